"""Corruptions of clouds at test time, for robustness curves."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pointcmt.data.augmentation import check_points

Corruption = Literal["dropout", "jitter", "rotation_up", "rotation", "scale"]

# severities of a curve, from none on; in the units that `corrupt` documents
SEVERITIES: dict[str, tuple[float, ...]] = {
    "dropout": (0.0, 0.25, 0.5, 0.75, 0.875, 0.9375),
    "jitter": (0.0, 0.01, 0.02, 0.03, 0.04, 0.05),
    "rotation_up": (0.0, 15.0, 30.0, 60.0, 90.0, 180.0),
    "rotation": (0.0, 15.0, 30.0, 60.0, 90.0, 180.0),
    "scale": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
}


def corrupt(
    points: Tensor,
    kind: Corruption,
    severity: float,
    generator: torch.Generator | None = None,
    *,
    keep_count: bool = True,
    up: Literal["x", "y", "z"] = "z",
) -> Tensor:
    """Clouds [B, N, C] after one corruption, drawn for each cloud by itself, on their device.

    =========== =========================================================================== ============
    kind        what happens                                                                severity
    =========== =========================================================================== ============
    dropout     points are lost, spread evenly; survivors are repeated to keep N            part, 0 … 1
    jitter      Gaussian noise on every coordinate                                          its standard
                                                                                            deviation
    rotation_up a turn about the axis that points up, by U[-severity, severity]             degrees
    rotation    a turn about an axis by chance (of SO(3)), by U[-severity, severity]        degrees
    scale       x, y and z stretched, each by a factor exp U[-log severity, log severity]   factor ≥ 1
    =========== =========================================================================== ============

    The kinds are those of ModelNet-C (Ren et al., ICML 2022), in natural units instead of five levels;
    ``SEVERITIES`` gives a range of each. Normals, where there are any, turn with the cloud.

    Args:
        points: clouds in the unit sphere.
        kind: which corruption.
        severity: see the table; at 0 (scale: 1) the clouds come back as they were.
        generator: draws the numbers, on any device; None uses torch's own.
        keep_count: False lets ``dropout`` return fewer points, [B, N', C] with N' ≥ 1.
        up: the axis of ``rotation_up``.

    Raises:
        ValueError: another kind, a severity out of range, or points of another shape.
    """
    check_points(points)
    if kind not in get_args(Corruption):
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(get_args(Corruption))}")
    low, high = (1.0, float("inf")) if kind == "scale" else (0.0, 1.0 if kind == "dropout" else float("inf"))
    if not low <= severity <= high or severity == float("inf") or (kind == "dropout" and severity == 1):
        raise ValueError(f"severity of {kind} is {severity}; expected at least {low:g} and below {high:g}")
    if severity == low:
        return points.clone()
    device = points.device if generator is None else generator.device
    batch, count, _ = points.shape

    def uniform(*shape: int) -> Tensor:
        drawn = torch.rand(batch, *shape, generator=generator, device=device, dtype=torch.float64)
        return drawn.to(points.device)

    if kind == "dropout":
        left = max(1, round(count * (1 - severity)))
        rows = uniform(count).argsort(1)[:, :left]
        if keep_count:
            rows = rows[:, torch.arange(count, device=rows.device) % left]
        return points.gather(1, rows.unsqueeze(-1).expand(-1, -1, points.shape[2]))
    if kind == "jitter":
        noise = torch.randn(batch, count, 3, generator=generator, device=device).to(points)
        return torch.cat([points[..., :3] + severity * noise, points[..., 3:]], dim=-1)
    if kind in ("rotation", "rotation_up"):
        axis = torch.randn(batch, 3, generator=generator, device=device, dtype=torch.float64).to(
            points.device
        )
        if kind == "rotation_up":
            axis = torch.eye(3, dtype=axis.dtype, device=axis.device)["xyz".index(up)].expand(batch, 3)
        angle = torch.deg2rad(severity * (2 * uniform(1) - 1))
        matrix = _rotation(torch.nn.functional.normalize(axis, dim=-1), angle).to(points.dtype)
        turned = points.reshape(batch, count, -1, 3) @ matrix.transpose(1, 2).unsqueeze(1)
        return turned.reshape(points.shape)
    factor = torch.exp((2 * uniform(1, 3) - 1) * torch.tensor(severity).log()).to(points.dtype)
    normals = points[..., 3:]
    if points.shape[2] == 6:
        normals = torch.nn.functional.normalize(normals / factor, dim=-1)
    return torch.cat([points[..., :3] * factor, normals], dim=-1)


def _rotation(axis: Tensor, angle: Tensor) -> Tensor:
    """Rodrigues' formula: unit axes [B, 3] and angles [B, 1] in radians → matrices [B, 3, 3]."""
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=axis.dtype, device=axis.device)
    sin, cos = angle.sin().unsqueeze(-1), angle.cos().unsqueeze(-1)
    return eye + sin * cross + (1 - cos) * (cross @ cross)
