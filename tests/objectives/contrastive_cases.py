"""Losses on the outputs of one small network, for the same batch in one process and in two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointcmt.objectives import info_nce, local_info_nce, nt_xent


def projector() -> nn.Module:
    torch.manual_seed(40)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """8 shapes: two inputs [8, 4, 6] each, and cells [8, 4] on maps of 2×2 of which some are none."""
    generator = torch.Generator().manual_seed(41)
    first, second = torch.randn(2, 8, 4, 6, generator=generator).unbind()
    cell = torch.randint(0, 4, (8, 4), generator=generator)
    cell[1, 2:] = -1
    cell[6] = -1
    return first, second, cell


def _global(network: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    both = network(torch.cat([first.mean(1), second.mean(1)]))
    return both.chunk(2)


def _pairs(network: nn.Module, first: Tensor, second: Tensor, cell: Tensor) -> Tensor:
    return info_nce(*_global(network, first, second), temperature=0.2)


def _symmetric(network: nn.Module, first: Tensor, second: Tensor, cell: Tensor) -> Tensor:
    return info_nce(*_global(network, first, second), temperature=0.2, symmetric=True, max_logits=9)


def _several(network: nn.Module, first: Tensor, second: Tensor, cell: Tensor) -> Tensor:
    anchors, candidates = _global(network, first, second)
    candidates = torch.cat([candidates, 0.5 * candidates + anchors])
    positives = torch.eye(len(anchors), dtype=torch.bool).repeat(1, 2)
    return info_nce(anchors, candidates, positives, temperature=0.2)


def _nt_xent(network: nn.Module, first: Tensor, second: Tensor, cell: Tensor) -> Tensor:
    return nt_xent(*_global(network, first, second), temperature=0.2)


def _local(network: nn.Module, first: Tensor, second: Tensor, cell: Tensor) -> Tensor:
    both = network(torch.cat([first, second]))
    local, maps = both.chunk(2)
    return local_info_nce(
        local, maps.transpose(1, 2).unflatten(2, (2, 2)), cell, temperature=0.2, max_logits=50
    )


CASES = {
    "pairs": _pairs,
    "symmetric": _symmetric,
    "several": _several,
    "nt_xent": _nt_xent,
    "local": _local,
}
