"""Changes to clouds in contrastive pre-training, with the motion that each cloud went through."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from pointcmt.types import Batch

_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class CloudAugmentation:
    """Scale, rotation about one axis, translation, jitter and dropout of points, in that order, each cloud by
    itself.

    Call it with points float [B, N, C], C of 3, or 6 with unit normals, which turn with the cloud; it gives
    new points of that shape.
    """

    normalize: bool = False
    """Centre each cloud and scale it to the unit sphere first."""
    scale: tuple[float, float] | None = None
    """Range of one factor for all three axes; None: 1."""
    rotate: Literal["x", "y", "z"] | None = None
    """Axis of a rotation by any angle: the one that points up. None: no rotation."""
    translate: float = 0.0
    """Each coordinate of the shift is uniform within ± this part of the cloud's extent along it."""
    jitter: float = 0.0
    """Standard deviation of Gaussian noise on the coordinates."""
    clip: float = 0.05
    """Largest noise."""
    dropout: float = 0.0
    """Each cloud has a part of its points, uniform between 0 and this, replaced by copies of its first."""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}; expected 0 < low <= high")
        if self.rotate is not None and self.rotate not in _AXES:
            raise ValueError(f"rotate is {self.rotate!r}; expected 'x', 'y', 'z' or None")
        if min(self.translate, self.jitter, self.clip) < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"translate={self.translate}, jitter={self.jitter}, clip={self.clip}, "
                f"dropout={self.dropout}; expected numbers of 0 or more, and a dropout below 1"
            )

    @classmethod
    def crosspoint(cls, up: Literal["x", "y", "z"]) -> Self:
        """CrossPoint's, for data whose ``up`` axis points up (Afham et al. 2022, public code: y there)."""
        return cls(True, (0.5, 2.0), up, translate=0.5, jitter=0.01, clip=0.05, dropout=0.875)

    @classmethod
    def pic_at_point(cls, up: Literal["x", "y", "z"]) -> Self:
        """Pic@Point's: "random rotation" (Herzog and Suwelack 2024, section 4.1), about the up axis, which
        the paper does not say."""
        return cls(rotate=up)

    def __call__(self, points: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.with_motion(points, generator)[0]

    def on(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The batch with new points (and normals); a point that is dropped becomes the first one, label and
        all."""
        if batch.points is None:
            raise ValueError("the batch has no points to change")
        whole = batch.points if batch.normals is None else torch.cat([batch.points, batch.normals], -1)
        changed, _ = self._moved(whole, generator)
        batch = replace(
            batch, points=changed[..., :3], normals=None if batch.normals is None else changed[..., 3:]
        )
        dropped = self._dropped(whole, generator)
        if dropped is None:
            return batch
        place = torch.arange(whole.shape[1], device=whole.device)
        return batch.take(torch.where(dropped, 0, place))

    def with_motion(self, points: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """New points [B, N, C], and what moved each cloud: [B, 4, 4], p' = motion @ (p, 1), jitter and
        dropout aside. For the cameras of images that show the clouds as they were
        (``pointcmt.views.cells.moved``).

        Raises:
            ValueError: points that are not a floating [B, N, 3] or [B, N, 6].
        """
        if points.ndim != 3 or points.shape[2] not in (3, 6) or not points.is_floating_point():
            raise ValueError(
                f"points are {points.dtype} {list(points.shape)}; expected floating [B, N, 3], or [B, N, 6] "
                "with normals"
            )
        changed, motion = self._moved(points, generator)
        dropped = self._dropped(points, generator)
        if dropped is not None:
            changed = torch.where(dropped[..., None], changed[:, :1], changed)
        return changed, motion

    def _dropped(self, points: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Which points are replaced by the first: bool [B, N]; None where none can be."""
        if not self.dropout:
            return None
        part = self.dropout * _uniform(points, (len(points), 1, 1), generator)
        return (_uniform(points, (*points.shape[:2], 1), generator) <= part).squeeze(-1)

    def _moved(self, points: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As :meth:`with_motion`, all points kept."""
        xyz = points[..., :3]
        count, device = len(points), points.device
        rotation = torch.eye(3, device=device, dtype=points.dtype).repeat(count, 1, 1)
        factor = torch.ones(count, 1, 1, device=device, dtype=points.dtype)
        shift = torch.zeros(count, 1, 3, device=device, dtype=points.dtype)
        if self.normalize:
            center = xyz.mean(1, keepdim=True)
            radius = (xyz - center).norm(dim=-1).amax(1)[:, None, None]
            factor = 1 / torch.where(radius > 0, radius, 1.0)
            shift = -center * factor
        if self.scale is not None:
            low, high = self.scale
            drawn = low + (high - low) * _uniform(points, (count, 1, 1), generator)
            factor, shift = factor * drawn, shift * drawn
        if self.rotate is not None:
            rotation = _about(self.rotate, 2 * math.pi * _uniform(points, (count,), generator))
            shift = (shift * rotation).sum(-1)[:, None]
        # one product, written out: it may not run in half precision or TF32
        changed = (xyz[:, :, None, :] * rotation[:, None] * factor[..., None]).sum(-1) + shift
        if self.translate:
            extent = changed.amax(1, keepdim=True) - changed.amin(1, keepdim=True)
            move = self.translate * extent * (2 * _uniform(points, (count, 1, 3), generator) - 1)
            changed, shift = changed + move, shift + move
        motion = points.new_zeros(count, 4, 4)
        motion[:, :3, :3], motion[:, :3, 3], motion[:, 3, 3] = rotation * factor, shift[:, 0], 1
        if self.jitter:
            noise = self.jitter * _normal(points, changed.shape, generator)
            changed = changed + noise.clamp(-self.clip, self.clip)
        if points.shape[2] == 6:
            normals = (points[:, :, None, 3:] * rotation[:, None]).sum(-1)
            changed = torch.cat([changed, F.normalize(normals, dim=-1)], -1)
        return changed, motion


def _about(axis: str, angle: Tensor) -> Tensor:
    """Rotations [B, 3, 3] about an axis by angles [B] in radians."""
    cosine, sine, k = angle.cos(), angle.sin(), _AXES.index(axis)
    i, j = (k + 1) % 3, (k + 2) % 3
    result = angle.new_zeros(len(angle), 3, 3)
    result[:, k, k] = 1
    result[:, i, i], result[:, i, j], result[:, j, i], result[:, j, j] = cosine, -sine, sine, cosine
    return result


def _uniform(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device).to(like.device, like.dtype)


def _normal(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device).to(like.device, like.dtype)
