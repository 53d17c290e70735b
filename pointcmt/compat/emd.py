"""The earth mover's distance of MSN, on which PointCMT's authors trained, over :func:`pointcmt.ops.emd`.

Stands for two modules of Colin97/MSN-Point-Cloud-Completion (folder ``emd``; ``emdloss`` in PointCMT): the
compiled ``emd`` (:func:`forward`, :func:`backward`) and the Python ``emd_module`` over it
(:class:`emdModule`).

As there: ``dist`` is the *squared* distance of each point to its match, not a distance and not a mean, so
that MSN takes ``torch.sqrt(dist).mean(1)``; only the first cloud gets a gradient; indices are int32.
Otherwise than there: the assignment is always a permutation, any number of points and clouds will do,
nothing needs a GPU, and clouds need not lie in the unit cube.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointcmt import ops
from pointcmt.compat._scatter import ZeroGradient

__all__ = ["backward", "emdFunction", "emdModule", "forward"]


def _match(x: Tensor, y: Tensor, eps: float, iters: int) -> Tensor:
    """int64 [B, N]: x[b, i] goes to y[b, match[b, i]].

    ``eps`` and ``iters`` are not used. MSN's auction ends after ``iters`` rounds and hands out what is left
    over without regard to the distance, and its ``eps`` is in the clouds' unit; ours ends when it has
    certified that the distance is near the optimum, for clouds of any unit, with bounded work.
    """
    _check(x, y)
    if not eps > 0:
        raise ValueError(f"emd: eps must be positive, got {eps}")
    if iters < 1:
        raise ValueError(f"emd: iters must be at least 1, got {iters}")
    with torch.no_grad():
        return ops.emd(x.float(), y.float())[1]


def _check(x: Tensor, y: Tensor) -> None:
    if x.dim() != 3 or x.shape[-1] != 3 or x.shape != y.shape:
        raise ValueError(
            "emd: both clouds must be [B, N, 3] with the same B and N, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )


def _matched(y: Tensor, match: Tensor) -> Tensor:
    return y.gather(1, match.long()[..., None].expand(-1, -1, 3))


def _emd(x: Tensor, y: Tensor, eps: float, iters: int) -> tuple[Tensor, Tensor]:
    match = _match(x, y, eps, iters)
    goal = ZeroGradient.apply(y) if y.requires_grad else y
    dist = (x.float() - _matched(goal.float(), match)).square().sum(-1)
    return dist, match.int()


class emdFunction:
    """``emdFunction.apply(xyz1, xyz2, eps, iters)``; see :class:`emdModule`."""

    apply = staticmethod(_emd)


class emdModule(nn.Module):
    """``emdModule()(xyz1, xyz2, eps, iters) -> (dist, assignment)``."""

    def forward(self, input1: Tensor, input2: Tensor, eps: float, iters: int) -> tuple[Tensor, Tensor]:
        """Matches the points of two clouds one to one, with the least sum of distances up to half a percent.

        Args:
            input1: [B, N, 3] predicted cloud; gets the gradient.
            input2: [B, N, 3] true cloud.
            eps, iters: accepted for compatibility; the matching is near the optimum, and the work bounded,
                without them.

        Returns:
            dist: float32 [B, N], squared distance of ``input1[b, i]`` to its match.
            assignment: int32 [B, N], index of the match in ``input2``; a permutation.

        Raises:
            ValueError: shapes that differ or are not [B, N, 3]; eps or iters out of range.
        """
        return _emd(input1, input2, eps, iters)


def forward(
    xyz1: Tensor,
    xyz2: Tensor,
    dist: Tensor,
    assignment: Tensor,
    price: Tensor,
    assignment_inv: Tensor,
    bid: Tensor,
    bid_increments: Tensor,
    max_increments: Tensor,
    unass_idx: Tensor,
    unass_cnt: Tensor,
    unass_cnt_sum: Tensor,
    cnt_tmp: Tensor,
    max_idx: Tensor,
    eps: float,
    iters: int,
) -> int:
    """The compiled ``emd.forward``: fills dist, assignment and assignment_inv; the rest is its scratch
    space.
    """
    match = _match(xyz1, xyz2, eps, iters)
    assignment.copy_(match)
    assignment_inv.copy_(match.argsort(dim=1))
    dist.copy_((xyz1 - _matched(xyz2, match)).square().sum(-1))
    return 1


def backward(xyz1: Tensor, xyz2: Tensor, gradxyz: Tensor, graddist: Tensor, idx: Tensor) -> int:
    """The compiled ``emd.backward``: adds the gradient of dist to gradxyz [B, N, 3]."""
    gradxyz.add_(2 * graddist[..., None] * (xyz1 - _matched(xyz2, idx)))
    return 1
