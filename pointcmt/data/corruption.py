"""Corruptions of clouds at test time, for robustness curves."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pointcmt.data.augmentation import (
    Clouds,
    coordinates,
    own_points,
    stretch,
    take,
    with_coordinates,
)
from pointcmt.types import Batch

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
    clouds: Clouds,
    kind: Corruption,
    severity: float,
    generator: torch.Generator | None = None,
    *,
    keep_count: bool = True,
    up: Literal["x", "y", "z"] = "z",
) -> Clouds:
    """Clouds after one corruption, drawn for each cloud by itself, on their device.

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
        clouds: points [B, N, C] or a ``Batch``, in the unit sphere.
        kind: which corruption.
        severity: see the table; at 0 (scale: 1) the clouds come back as they were.
        generator: draws the numbers, on any device; None uses torch's own.
        keep_count: False lets ``dropout`` return fewer points, [B, N', C] with N' ≥ 1.
        up: the axis of ``rotation_up``: ``dataset.up``.

    Raises:
        ValueError: another kind, a severity out of range, or points of another shape.
    """
    points, normals = coordinates(clouds)
    if kind not in get_args(Corruption):
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(get_args(Corruption))}")
    if up not in ("x", "y", "z"):
        raise ValueError(f"up is {up!r}; expected x, y or z: the axis of the clouds that points up")
    low, high = (1.0, float("inf")) if kind == "scale" else (0.0, 1.0 if kind == "dropout" else float("inf"))
    if not low <= severity <= high or severity == float("inf") or (kind == "dropout" and severity == 1):
        raise ValueError(f"severity of {kind} is {severity}; expected at least {low:g} and below {high:g}")
    if severity == low:
        return with_coordinates(clouds, points.clone(), normals)
    device = points.device if generator is None else generator.device
    batch, count, _ = points.shape

    def uniform(*shape: int) -> Tensor:
        drawn = torch.rand(batch, *shape, generator=generator, device=device, dtype=torch.float64)
        return drawn.to(points.device)

    if kind == "dropout":
        own = own_points(clouds).to(points.device)
        place = torch.arange(count, device=points.device)
        order = uniform(count).masked_fill(place >= own.unsqueeze(1), 2.0).argsort(1)
        left = (own.double() * (1 - severity)).round().long().clamp(min=1)
        width = count if keep_count else int(left.max())
        taken = take(clouds, order.gather(1, place[:width] % left.unsqueeze(1)))
        if isinstance(taken, Batch) and taken.lengths is not None:
            taken = taken.replace(lengths=left.to(taken.lengths))
        return taken
    if kind == "jitter":
        noise = torch.randn(batch, count, 3, generator=generator, device=device).to(points)
        return with_coordinates(clouds, points + severity * noise, normals)
    if kind in ("rotation", "rotation_up"):
        axis = torch.randn(batch, 3, generator=generator, device=device, dtype=torch.float64).to(
            points.device
        )
        if kind == "rotation_up":
            axis = torch.eye(3, dtype=axis.dtype, device=axis.device)["xyz".index(up)].expand(batch, 3)
        angle = torch.deg2rad(severity * (2 * uniform(1) - 1))
        matrix = _rotation(torch.nn.functional.normalize(axis, dim=-1), angle).to(points.dtype)
        turn = matrix.transpose(1, 2)
        return with_coordinates(clouds, points @ turn, None if normals is None else normals @ turn)
    factor = torch.exp((2 * uniform(1, 3) - 1) * torch.tensor(severity).log()).to(points.dtype)
    return stretch(clouds, factor)


def _rotation(axis: Tensor, angle: Tensor) -> Tensor:
    """Rodrigues' formula: unit axes [B, 3] and angles [B, 1] in radians → matrices [B, 3, 3]."""
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=axis.dtype, device=axis.device)
    sin, cos = angle.sin().unsqueeze(-1), angle.cos().unsqueeze(-1)
    return eye + sin * cross + (1 - cos) * (cross @ cross)
