"""Clouds that neighbour kernels find hard, fresh for every seed."""

from __future__ import annotations

from pathlib import Path

import h5py
import torch
from torch import Tensor


def hard_clouds(seed: int, batch: int, n: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Name → [batch, n, 3]: random, on a grid (ties everywhere), duplicated, collinear, equal, far away."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(batch, n, 3, generator=generator, dtype=dtype)
    pick = torch.randint(0, max(1, n // 3), (n,), generator=generator)
    line = torch.randint(-8, 9, (batch, n, 1), generator=generator).to(dtype)
    return {
        "random": plain,
        "grid": torch.randint(-2, 3, (batch, n, 3), generator=generator).to(dtype) / 2,
        "duplicates": plain[:, pick],
        "line": line * torch.tensor([1.0, 0.5, 0.0], dtype=dtype),
        "equal": plain[:, :1].expand(batch, n, 3).contiguous(),
        "far": plain * 1e-2 + 50,
        "tiny": plain * 1e-3,
    }


def large_clouds(seed: int, n: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As :func:`hard_clouds`, one of each, and what is hard for a tree: clusters, uneven density."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(1, n, 3, generator=generator, dtype=dtype)
    centre = torch.randn(1, 5, 3, generator=generator, dtype=dtype)
    own = torch.randint(0, 5, (n,), generator=generator)
    lone = plain.clone()
    lone[0, n // 2] = 1e7
    return {
        **hard_clouds(seed, 1, n, dtype),
        "plane": plain * torch.tensor([1.0, 1.0, 0.0], dtype=dtype) + 0.5,
        "clusters": centre[:, own] + 1e-4 * plain,
        "one far point": lone,
        "uneven": plain * torch.rand(1, n, 1, generator=generator, dtype=dtype) ** 8,
        "tiles": (plain * 4).round() / 4 + torch.where(plain[..., :1] > 1.5, 100.0, 0.0).to(dtype),
    }


def modelnet_clouds(root: Path, count: int, seed: int) -> Tensor:
    """``count`` real test clouds [count, N, 3], chosen by ``seed``."""
    files = [line.strip() for line in (root / "test_files.txt").read_text().splitlines() if line.strip()]
    with h5py.File(root / Path(files[0]).name) as file:
        data = torch.from_numpy(file["data"][:])
    pick = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return data[pick].float()
