"""Changes to clouds in training and voting: batched, on the clouds' own device.

Every transform takes points [B, N, 3] (or [B, N, 6] with normals) or a :class:`~pointcmt.types.Batch`, and
gives the same back. Of a batch everything that belongs to a point follows it: labels, colours and features
go where their point goes, normals turn and stretch with the surface, and what lies beyond
``lengths`` stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pointcmt.types import Batch

Clouds = TypeVar("Clouds", Tensor, Batch)


@dataclass(frozen=True)
class Augmentation:
    """Stage III's augmentation of PointCMT (as in its public code): scale, move and shuffle, cloud by cloud.

    Call it with points float [B, N, C], C of 3, or 6 with unit normals, which turn with the scale, or with a
    ``Batch``; it gives new clouds of that shape and dtype, on the same device.
    """

    scale: tuple[float, float] | None = (2 / 3, 3 / 2)
    """Range of the factors by which x, y and z are stretched, each on its own; None leaves them."""
    translation: float = 0.2
    """Each coordinate of the shift is uniform between minus this and this."""
    shuffle: bool = True
    """Put the points of each cloud in an order by chance."""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}; expected 0 < low <= high")
        if self.translation < 0:
            raise ValueError(f"translation is {self.translation}; expected 0 or more")

    @classmethod
    def of(cls, scale: float, shift: float, shuffle: bool = True) -> Augmentation:
        """With factors between 1/``scale`` and ``scale`` (1: none) and shifts of up to ``shift``: the options
        --augment-scale and --augment-shift.

        Raises:
            ValueError: a scale below 1, or a shift below 0.
        """
        if scale < 1:
            raise ValueError(f"--augment-scale is {scale}; expected 1 or more")
        if shift < 0:
            raise ValueError(f"--augment-shift is {shift}; expected 0 or more")
        return cls(None if scale == 1 else (1 / scale, scale), shift, shuffle)

    def __call__(self, clouds: Clouds, generator: torch.Generator | None = None) -> Clouds:
        changed = self.apply(clouds, *self.draw(clouds, generator))
        return shuffle(changed, generator) if self.shuffle else changed

    def draw(self, clouds: Tensor | Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Factors [B, 1, 3] and shifts [B, 1, 3] for clouds of B, on their device."""
        points, _ = coordinates(clouds)
        factors = torch.ones(len(points), 1, 3, dtype=points.dtype, device=points.device)
        shifts = torch.zeros_like(factors)
        if self.scale is not None:
            low, high = self.scale
            factors = low + (high - low) * uniform(points, 3, generator)
        if self.translation:
            shifts = self.translation * (2 * uniform(points, 3, generator) - 1)
        return factors, shifts

    def apply(self, clouds: Clouds, factors: Tensor, shifts: Tensor) -> Clouds:
        """New clouds in their order: stretched by factors and moved by shifts [B, 1, 3]."""
        if self.scale is not None:
            clouds = stretch(clouds, factors)
        points, normals = coordinates(clouds)
        return with_coordinates(clouds, points + shifts, normals)


def augment(clouds: Clouds, generator: torch.Generator | None = None) -> Clouds:
    """The paper's augmentation at its default setting; see :class:`Augmentation`.

    Args:
        clouds: points [B, N, C] or a batch, on any device.
        generator: draws the numbers; on any device (a CPU generator gives a GPU the same numbers as a CPU).
            None uses torch's own.
    """
    return Augmentation()(clouds, generator)


def vote_scale(
    clouds: Clouds, generator: torch.Generator | None = None, low: float = 0.85, high: float = 1.15
) -> Clouds:
    """Stretch clouds along x, y and z by factors of U[0.85, 1.15] for one vote of the voting test.

    The range is that of PointCMT's public code, after RS-CNN's voting test.
    """
    return stretch(clouds, low + (high - low) * uniform(coordinates(clouds)[0], 3, generator))


def shuffle(clouds: Clouds, generator: torch.Generator | None = None) -> Clouds:
    """The points of each cloud in an order by chance; padding stays behind them."""
    return take(clouds, _order(clouds, generator))


def sample(clouds: Clouds, count: int, generator: torch.Generator | None = None) -> Clouds:
    """``count`` points of each cloud by chance: none twice where it has enough, else every one, then again.

    Raises:
        ValueError: ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1 point")
    order, number = _order(clouds, generator), own_points(clouds)
    column = torch.arange(count, device=order.device).expand(len(order), count)
    taken = take(clouds, order.gather(1, column % number.to(order.device).unsqueeze(1)))
    if isinstance(taken, Batch) and taken.lengths is not None:
        taken = taken.replace(lengths=taken.lengths.clamp(max=count))
    return taken


def stretch(clouds: Clouds, factors: Tensor) -> Clouds:
    """Multiply coordinates by factors [B, 1, 3]; normals by the inverse, then to unit length."""
    points, normals = coordinates(clouds)
    if normals is not None:
        normals = torch.nn.functional.normalize(normals / factors, dim=-1)
    return with_coordinates(clouds, points * factors, normals)


def take(clouds: Clouds, order: Tensor) -> Clouds:
    """Clouds made of the points that ``order`` int64 [B, M] names, with all that belongs to them."""
    if isinstance(clouds, Batch):
        return clouds.take(order)
    return clouds.gather(1, order.unsqueeze(-1).expand(-1, -1, clouds.shape[2]))


def check_points(points: Tensor) -> None:
    """Raise ``ValueError`` unless ``points`` is a floating [B, N, 3] or [B, N, 6]."""
    if points.ndim != 3 or points.shape[-1] not in (3, 6) or not points.is_floating_point():
        raise ValueError(
            f"points are {points.dtype} {list(points.shape)}; expected floating [B, N, 3], "
            "or [B, N, 6] with normals"
        )


def coordinates(clouds: Tensor | Batch) -> tuple[Tensor, Tensor | None]:
    """Coordinates [B, N, 3], and normals [B, N, 3] where there are any."""
    if isinstance(clouds, Tensor):
        check_points(clouds)
        return clouds[..., :3], clouds[..., 3:] if clouds.shape[2] == 6 else None
    if clouds.points is None:
        raise ValueError("the batch has no points to change; expected Batch(points=[B, N, 3], …)")
    check_points(clouds.points)
    if clouds.points.shape[2] == 6:
        raise ValueError("the batch has points of 6 columns; expected [B, N, 3], and normals= beside them")
    return clouds.points, clouds.normals


def with_coordinates(clouds: Clouds, points: Tensor, normals: Tensor | None) -> Clouds:
    """The clouds with other coordinates and normals."""
    if isinstance(clouds, Batch):
        return clouds.replace(points=points, normals=normals)
    return points if normals is None else torch.cat([points, normals], dim=-1)


def own_points(clouds: Tensor | Batch) -> Tensor:
    """How many points of each cloud are its own, the rest being padding: int64 [B]."""
    points, _ = coordinates(clouds)
    if isinstance(clouds, Batch) and clouds.lengths is not None:
        return clouds.lengths
    return torch.full((len(points),), points.shape[1], device=points.device)


def _order(clouds: Tensor | Batch, generator: torch.Generator | None) -> Tensor:
    """A permutation of each cloud's points, padding last: int64 [B, N]."""
    points, _ = coordinates(clouds)
    # sorting uniform numbers draws a permutation for every cloud at once
    keys = uniform(points, points.shape[1], generator).squeeze(1)
    if isinstance(clouds, Batch) and clouds.lengths is not None:
        place = torch.arange(points.shape[1], device=points.device)
        keys = keys.masked_fill(place >= clouds.lengths.unsqueeze(1), 2.0)
    return keys.argsort(dim=1, stable=True)


def uniform(points: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """U[0, 1) numbers [B, 1, width] for points: drawn on the generator's device, moved to the points'."""
    device = points.device if generator is None else generator.device
    drawn = torch.rand(len(points), 1, width, generator=generator, device=device)
    return drawn.to(points.device, points.dtype)
