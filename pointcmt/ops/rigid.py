"""Rigid motions: the rotation and translation that bring weighted corresponding points together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pointcmt.ops._checks import check_required, check_tensors

# Extents and gaps below these parts of the clouds' own size are rounding: coordinates come in float32 (2⁻²⁴),
# and products of two of them are what is compared.
_NO_EXTENT = 1e-13
_NO_GAP = 1e-12


class Rigid(NamedTuple):
    """B rigid motions, ``moved = points @ rotation.mT + translation[:, None]``.

    Attributes:
        rotation: [B, 3, 3], determinant +1.
        translation: [B, 3].
    """

    rotation: Tensor
    translation: Tensor

    def move(self, points: Tensor) -> Tensor:
        """The points [B, N, 3] moved: [B, N, 3]."""
        return points @ self.rotation.mT + self.translation[:, None]


def weighted_procrustes(source: Tensor, target: Tensor, weights: Tensor | None = None) -> Rigid:
    """The rigid motion that minimises ``Σ w_i ‖R s_i + t − t_i‖²``, computed in float64.

    The rotation is the unit quaternion that is the leading eigenvector of Horn's symmetric 4×4 matrix, so it
    is a proper rotation whatever the points are, and needs no correction of a determinant.

    Where the points leave a rotation undetermined (they lie on a line, in one place, there is one point only,
    or reflected points fit equally well about several axes), the optimal rotation of least angle is
    returned; where several have that angle (half a turn), one fixed choice. Weights that are all zero give
    the identity and no translation.

    Differentiable once in source, target and weights. The gradient is finite also where singular values of
    the covariance are equal, where the backward pass of an SVD is not: only the gap between the largest
    eigenvalue and the others enters. Where the rotation is undetermined, no gradient flows along the
    directions that are not determined.

    Args:
        source: [B, N, 3] points, N ≥ 1.
        target: [B, N, 3] the point that corresponds to each.
        weights: [B, N], not negative; None weighs all alike. Only their ratios matter.

    Returns:
        rotation [B, 3, 3] and translation [B, 3], in the dtype of the points (float32 where they differ and
        neither is float64).

    Raises:
        ValueError: shapes or dtypes other than these, N = 0, a negative weight, or a NaN or infinity.

    Source: Horn, Closed-form solution of absolute orientation using unit quaternions (JOSA A 1987); the same
    problem as Kabsch (1976) and Umeyama (1991) solve by an SVD.
    """
    source, target, weights = _check(source, target, weights)
    dtype = torch.promote_types(source.dtype, target.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    with torch.autocast(source.device.type, enabled=False):
        source, target, weights = source.double(), target.double(), weights.double()
        total = weights.sum(1, keepdim=True)
        nothing = total <= 0
        share = weights / torch.where(nothing, 1.0, total)
        source_centre = (share[..., None] * source).sum(1)
        target_centre = (share[..., None] * target).sum(1)
        covariance = (share[..., None] * (source - source_centre[:, None])).mT @ (
            target - target_centre[:, None]
        )
        with torch.no_grad():
            size = _extent(source, source_centre, share) * _extent(target, target_centre, share)
        quaternion = _LeadingEigenvector.apply(_horn(covariance), size)
        rotation = rotation_from_quaternion(quaternion)
        translation = target_centre - (rotation @ source_centre[..., None]).squeeze(-1)
    return Rigid(rotation.to(dtype), translation.to(dtype))


def rotation_from_quaternion(quaternion: Tensor) -> Tensor:
    """Unit quaternions [..., 4], the scalar part first → rotation matrices [..., 3, 3]."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _check(source: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    op = "weighted_procrustes"
    check_required(op, source=source, target=target)
    check_tensors(op, weights=weights)
    for name, tensor in (("source", source), ("target", target)):
        if tensor.dim() != 3 or tensor.shape[-1] != 3 or not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a floating-point tensor [B, N, 3], "
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )
    if source.shape != target.shape:
        raise ValueError(
            f"{op}: source and target must correspond point by point, "
            f"got {list(source.shape)} and {list(target.shape)}"
        )
    if source.shape[1] == 0:
        raise ValueError(f"{op}: expected at least one pair of points, got shape {list(source.shape)}")
    if weights is None:
        weights = torch.ones_like(source[..., 0])
    if weights.shape != source.shape[:2] or not weights.is_floating_point():
        raise ValueError(
            f"{op}: weights must be a floating-point tensor {list(source.shape[:2])}, one per pair of "
            f"points, got {weights.dtype} of shape {list(weights.shape)}"
        )
    for name, tensor in (("source", source), ("target", target), ("weights", weights)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{op}: {name} holds a NaN or an infinity; remove such points first")
    if (weights < 0).any():
        raise ValueError(f"{op}: weights must not be negative, got {float(weights.detach().min()):.4g}")
    return source, target, weights


def _extent(points: Tensor, centre: Tensor, share: Tensor) -> Tensor:
    """Weighted root mean square distance [B] from the centre; 0 where it is rounding of the coordinates."""
    extent = (share * (points - centre[:, None]).square().sum(-1)).sum(1).sqrt()
    magnitude = (share * points.square().sum(-1)).sum(1).sqrt()
    return torch.where(extent > _NO_EXTENT * magnitude, extent, 0.0)


def _horn(covariance: Tensor) -> Tensor:
    """Covariances ``Σ w s tᵀ`` [B, 3, 3] → Horn's matrices [B, 4, 4], whose leading eigenvector is sought."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in covariance.unbind(-2))
    rows = (
        (xx + yy + zz, yz - zy, zx - xz, xy - yx),
        (yz - zy, xx - yy - zz, xy + yx, zx + xz),
        (zx - xz, xy + yx, yy - xx - zz, yz + zy),
        (xy - yx, zx + xz, yz + zy, zz - xx - yy),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


class _LeadingEigenvector(torch.autograd.Function):
    """Unit vector [B, 4] in the leading eigenspace of symmetric [B, 4, 4], nearest to (1, 0, 0, 0).

    Where the leading eigenvalue is simple that is its eigenvector; else the quaternion of least angle.
    ``size`` [B] is what an eigenvalue gap is compared to.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, size: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(torch.where(size[:, None, None] > 0, matrix, 0.0))
        gap = values[:, -1:] - values  # [B, 4], ascending eigenvalues: the last gap is 0
        leading = gap <= _NO_GAP * size[:, None]
        # projections of the four axes on the leading eigenspace: column a is that of axis a
        projector = (vectors * leading[:, None, :].to(vectors)) @ vectors.mT
        length = projector.diagonal(dim1=-2, dim2=-1)  # squared lengths of the columns
        # (1, 0, 0, 0) has the least angle; where it is across the space, another axis fixes the choice. With
        # one leading eigenvector all columns are multiples of it, and the longest is the best conditioned.
        single = leading.sum(1) == 1
        best = torch.where((length[:, 0] > 1e-12) & ~single, 0, length.argmax(1))
        vector = projector.gather(2, best[:, None, None].expand(-1, 4, 1)).squeeze(2)
        vector = vector / vector.norm(dim=1, keepdim=True)
        vector = torch.where(vector[:, :1] < 0, -vector, vector)
        ctx.save_for_backward(vectors, gap, leading, vector)
        return vector

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, gap, leading, vector = ctx.saved_tensors
        # dq = Σ u (uᵀ dK q) / (λ − λ_u) over the eigenvectors u outside of the leading eigenspace
        along = (vectors.mT @ grad[..., None]).squeeze(-1) * torch.where(leading, 0.0, 1 / gap)
        outer = (vectors @ along[..., None]) * vector[:, None, :]
        return (outer + outer.mT) / 2, None
