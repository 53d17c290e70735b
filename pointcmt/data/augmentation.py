"""Changes to clouds in training and voting: batched, on the clouds' own device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Stage III's augmentation of PointCMT (as in its public code): scale, move and shuffle, cloud by cloud.

    Call it with points float [B, N, C], C of 3, or 6 with unit normals, which turn with the scale; it gives
    new points of that shape and dtype, on the same device.
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
        """With factors between 1/``scale`` and ``scale`` (1: none) and shifts of up to ``shift``."""
        return cls(None if scale == 1 else (1 / scale, scale), shift, shuffle)

    def __call__(self, points: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_points(points)
        points = self.apply(points, *self.draw(points, generator))
        if self.shuffle:
            # sorting uniform numbers draws a permutation for every cloud at once
            order = _uniform(points, points.shape[1], generator).squeeze(1).argsort(1)
            points = points.gather(1, order.unsqueeze(-1).expand_as(points))
        return points

    def draw(self, points: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Factors [B, 1, 3] and shifts [B, 1, 3] for clouds [B, N, C], on their device."""
        factors = torch.ones(len(points), 1, 3, dtype=points.dtype, device=points.device)
        shifts = torch.zeros_like(factors)
        if self.scale is not None:
            low, high = self.scale
            factors = low + (high - low) * _uniform(points, 3, generator)
        if self.translation:
            shifts = self.translation * (2 * _uniform(points, 3, generator) - 1)
        return factors, shifts

    def apply(self, points: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
        """New clouds [B, N, C] in their order: stretched by factors and moved by shifts [B, 1, 3]."""
        points = points.clone()
        if self.scale is not None:
            points = _stretch(points, factors)
        points[..., :3] += shifts
        return points


def augment(points: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The paper's augmentation of points [B, N, C] at its default setting; see :class:`Augmentation`.

    Args:
        points: clouds on any device.
        generator: draws the numbers; on any device (a CPU generator gives a GPU the same numbers as a CPU).
            None uses torch's own.
    """
    return Augmentation()(points, generator)


def vote_scale(
    points: Tensor, generator: torch.Generator | None = None, low: float = 0.85, high: float = 1.15
) -> Tensor:
    """Stretch clouds [B, N, C] along x, y and z by factors of U[0.85, 1.15] for one vote of the voting test.

    The range is that of PointCMT's public code, after RS-CNN's voting test.
    """
    check_points(points)
    return _stretch(points.clone(), low + (high - low) * _uniform(points, 3, generator))


def check_points(points: Tensor) -> None:
    """Raise ``ValueError`` unless ``points`` is a floating [B, N, 3] or [B, N, 6]."""
    if points.ndim != 3 or points.shape[-1] not in (3, 6) or not points.is_floating_point():
        raise ValueError(
            f"points are {points.dtype} {list(points.shape)}; expected floating [B, N, 3], "
            "or [B, N, 6] with normals"
        )


def _stretch(points: Tensor, factors: Tensor) -> Tensor:
    """Multiply coordinates [B, N, 3] by [B, 1, 3] in place; normals by the inverse, then to unit length."""
    points[..., :3] *= factors
    if points.shape[-1] == 6:
        points[..., 3:] = torch.nn.functional.normalize(points[..., 3:] / factors, dim=-1)
    return points


def _uniform(points: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """U[0, 1) numbers [B, 1, width] for points: drawn on the generator's device, moved to the points'."""
    device = points.device if generator is None else generator.device
    drawn = torch.rand(len(points), 1, width, generator=generator, device=device)
    return drawn.to(points.device, points.dtype)
