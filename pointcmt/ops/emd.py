"""Earth mover's distance (EMD): the optimal one-to-one matching of two clouds, found by auction.

The auction algorithm is Bertsekas' (Annals of Operations Research 14, 1988). Every point of x that
holds no point of y *bids* for the one that is cheapest to it, where cheap is distance plus price;
it takes that point from whoever held it and raises its price until the second cheapest would be
as good, plus ``eps``. When every point holds one, the mean distance is within ``eps`` of the optimum.
*eps scaling* first runs coarse auctions whose prices then make the fine one short.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pointcmt.ops._checks import check_xyz, common_float
from pointcmt.ops._deferred import can_watch, deferred
from pointcmt.ops._extension import compiled_ops, use_compiled

DEFAULT_EPS = 0.0015
DEFAULT_MAX_ROUNDS = 10_000
_NOT_FINITE = (
    "emd: an earlier call on the GPU was given NaN or infinite coordinates in {count} pairs, whose distance "
    "is therefore NaN; EMD needs finite points. (The host does not wait for the GPU, so it hears of this "
    "late.) In training, the student's features or the clouds made from them are not finite: look for NaN in "
    "the input, lower the learning rate or clip gradients; torch.autograd.set_detect_anomaly(True) finds the "
    "operation"
)

# eps scaling, as in csrc/emd_constants.h: the first increment, in the clouds' scale; the factor per phase
_FIRST_EPS = 0.1
_EPS_FACTOR = 4.0
_WARM_FRACTION = 16  # a warm start begins where at most N / 16 of its points are ill matched
_UNMATCHED_FRACTION = 128  # a phase before the last ends when at most N / 128 points are unmatched


def emd(
    x: Tensor,
    y: Tensor,
    eps: float = DEFAULT_EPS,
    max_rounds: int = DEFAULT_MAX_ROUNDS,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean Euclidean distance between the points of x and y under a (near-)optimal one-to-one matching.

    The matching is found by auction with eps scaling. ``eps`` is relative to the scale of a pair,
    which is the longest side of the larger one of its two bounding boxes; the mean distance exceeds
    the optimum by at most ``eps`` times that scale, and in practice by a small fraction of it.

    Differentiable in x and y with the matching held fixed (the gradient of the optimum wherever it
    is unique); where two matched points coincide the sub-gradient 0 is taken.

    The work is bounded: at most ``max_rounds`` rounds, a round being one bid of each unmatched point
    on CUDA and N single bids on the CPU. Where the bound is met, each point still unmatched takes the
    nearest point that is free, so that the assignment is a permutation all the same; on the CPU a
    ``RuntimeWarning`` says so, once per process. :func:`emd_statistics` counts such points anywhere.

    Args:
        x: [B, N, 3], any B ≥ 0 and N ≥ 1; float16, bfloat16, float32 or float64, in any unit and scale.
        y: [B, N, 3] on the same device.
        eps: final bid increment, relative to the scale of each pair; positive.
        max_rounds: bound on the rounds of bidding per pair, over all phases.
        initial: int64 [B, N] assignment to start from, -1 where nothing is known. A good one saves
            most of the work; none makes the result worse than that assignment itself.

    Returns:
        distance: [B], in the unit of x and y; float64 if an input is float64, else float32.
        assignment: int64 [B, N], a permutation of 0..N-1 in each row: x[b, i] is matched with
        y[b, assignment[b, i]]. Not differentiable.

    Raises:
        ValueError: wrong shapes, dtypes, eps, max_rounds or initial; NaN or infinite coordinates.
            On CUDA the host does not wait for the values, which would stall the step: there a pair
            with NaN or infinite coordinates gets distance NaN and some permutation, and the
            ``ValueError`` comes from a later call, from :func:`pointcmt.ops.check_deferred` or on
            leaving ``PointCMT`` (not from inside a compiled or captured graph); entries of
            ``initial`` that are out of range or repeated count as -1.

    Sources: "EMD" as PointCMT (Yan et al., NeurIPS 2022) and the point-cloud literature use it;
    auction: Bertsekas, Annals of Operations Research 14 (1988).
    """
    if watched := can_watch(x):
        deferred.look()
    distance, assignment, statistics = _emd(x, y, eps, max_rounds, initial)
    if watched:
        deferred.watch(distance.detach().isnan().sum(), _NOT_FINITE)
    if not torch.compiler.is_compiling() and statistics.device.type == "cpu" and statistics[:, 3].any():
        _warn_bound_met(max_rounds)
    return distance, assignment


@dataclass(frozen=True)
class EmdStatistics:
    """What the auction of each pair took: int64 [B] tensors."""

    rounds: Tensor
    """Rounds of bidding; on the CPU, bids / N rounded up."""
    bids: Tensor
    """Single bids."""
    completed: Tensor
    """Points that were unmatched when ``max_rounds`` was met, and were matched to what was free."""
    bound_met: Tensor
    """1 where ``max_rounds`` ended the auction before it was through."""


def emd_statistics(
    x: Tensor,
    y: Tensor,
    eps: float = DEFAULT_EPS,
    max_rounds: int = DEFAULT_MAX_ROUNDS,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor, EmdStatistics]:
    """As :func:`emd`, with the number of rounds and bids that it took, for analysis."""
    distance, assignment, statistics = _emd(x, y, eps, max_rounds, initial)
    return distance, assignment, EmdStatistics(*statistics.unbind(1))


def _emd(
    x: Tensor, y: Tensor, eps: float, max_rounds: int, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    check_xyz("emd", x=x, y=y)
    if x.shape != y.shape:
        raise ValueError(
            f"emd: x and y must hold equally many points, got {list(x.shape)} and {list(y.shape)}; "
            "sample the larger cloud down first (pointcmt.ops.furthest_point_sample)"
        )
    if x.shape[1] == 0:
        raise ValueError(f"emd: clouds need at least one point, got {list(x.shape)}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"emd: eps must be positive and finite (a fraction of the clouds' scale), got {eps}")
    if max_rounds < 0:
        raise ValueError(f"emd: max_rounds must not be negative, got {max_rounds}")
    if initial is not None:
        if initial.shape != x.shape[:2] or initial.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"emd: initial must be an int64 assignment [B, N] = {list(x.shape[:2])}, "
                f"got {initial.dtype} of shape {list(initial.shape)}"
            )
        if initial.device != x.device:
            raise ValueError(f"emd: x is on {x.device} and initial on {initial.device}; move them together")
        initial = initial.to(torch.int64)
    x, y = common_float(x, y)
    if use_compiled(x, op="emd"):
        return torch.ops.pointcmt.emd(x, y, eps, max_rounds, initial)
    assignment, statistics = _reference_auction(x.detach(), y.detach(), eps, max_rounds, initial)
    return _matched_distance(x, y, assignment), assignment, statistics


@functools.cache
def _warn_bound_met(max_rounds: int) -> None:
    warnings.warn(
        f"emd: the auction met its bound of max_rounds={max_rounds} before every point was matched; the "
        "points left were matched to the nearest free point, so the distance may be well above the optimum. "
        "Raise max_rounds, or eps.",
        RuntimeWarning,
        stacklevel=3,
    )


def _unit_vectors(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Length [..., 1] and direction [..., 3] of vectors of any scale; the direction of 0 is 0."""
    largest = difference.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))  # squares must not under- or overflow
    scaled = difference / scale
    square = (scaled * scaled).sum(-1, keepdim=True)
    length = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
    return torch.where(square > 0, length, torch.zeros_like(length)) * scale, scaled / length


def _matched_distance(x: Tensor, y: Tensor, assignment: Tensor) -> Tensor:
    """Mean distance [B] of matched points; differentiable, with sub-gradient 0 where they coincide."""
    matched = y.gather(1, assignment.unsqueeze(-1).expand_as(y))
    length, _ = _unit_vectors(x - matched)
    return length.squeeze(-1).mean(1)


def reference_emd(
    x: Tensor,
    y: Tensor,
    eps: float = DEFAULT_EPS,
    max_rounds: int = DEFAULT_MAX_ROUNDS,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The readable twin of :func:`emd`, in PyTorch: all unmatched points of the batch bid at once."""
    check_xyz("emd", x=x, y=y)
    x, y = common_float(x, y)
    assignment, _ = _reference_auction(x.detach(), y.detach(), eps, max_rounds, initial)
    return _matched_distance(x, y, assignment), assignment


def _check_values(x: Tensor, y: Tensor, initial: Tensor | None) -> None:
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("emd: x or y holds NaN or infinite coordinates; EMD needs finite points")
    if initial is not None:
        n = initial.shape[1]
        known = initial >= 0
        ordered = torch.where(known, initial, -torch.arange(1, n + 1, device=initial.device)).sort(1).values
        if (initial < -1).any() or (initial >= n).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(
                "emd: each row of initial must be a permutation of 0..N-1, with -1 where nothing is known"
            )


def _reference_auction(
    x: Tensor, y: Tensor, eps: float, max_rounds: int, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Assignment int64 [B, N] and statistics int64 [B, 4]: the fields of EmdStatistics."""
    # to torch.compile the twin is one operator: its loops depend on values, and are no part of any graph
    run = _opaque_auction if torch.compiler.is_compiling() else _auction
    return run(x, y, eps, max_rounds, initial)


@torch.no_grad()
def _auction(
    x: Tensor, y: Tensor, eps: float, max_rounds: int, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_values(x, y, initial)
    batch, n, _ = x.shape
    device = x.device
    statistics = torch.zeros(batch, 4, dtype=torch.int64, device=device)
    if batch == 0:
        return torch.empty(0, n, dtype=torch.int64, device=device), statistics

    # Any scale is brought to 1 in float64, halves first: a difference of two huge numbers may overflow.
    both = torch.cat([x, y], 1).double() / 2
    centre = (both.amin(1, keepdim=True) + both.amax(1, keepdim=True)) / 2
    sides = torch.stack([part.amax(1) - part.amin(1) for part in (x.double() / 2, y.double() / 2)])
    scale = sides.amax((0, 2)).clamp_min(1e-4 * (both.amax(1) - both.amin(1)).amax(1))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, None]
    dtype = x.dtype
    bidders, objects = ((both - centre) / scale).to(dtype).split(n, 1)
    cost = torch.cdist(bidders, objects, compute_mode="donot_use_mm_for_euclid_dist")

    price = cost.new_zeros(batch, n)
    holds = torch.full((batch, n), -1, dtype=torch.int64, device=device)  # by point of x: what it holds
    owner = holds.clone()  # by point of y: who holds it
    last = max(eps, 1e-7)
    increment = max(last, _FIRST_EPS)
    if initial is not None:
        # the finest phase at which all but a few initial pairs satisfy eps complementary slackness
        given = cost.gather(2, initial.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        slack = torch.where(initial >= 0, given - cost.amin(2), math.inf)
        increment = last
        while increment < _FIRST_EPS and ((slack > increment).sum(1) * _WARM_FRACTION > n).any():
            increment *= _EPS_FACTOR
        increment = increment if increment < _FIRST_EPS else max(last, _FIRST_EPS)
        kept = slack <= increment
        holds = torch.where(kept, initial, holds)
        b, i = kept.nonzero(as_tuple=True)
        owner[b, initial[b, i]] = i

    bound_met = torch.zeros(batch, dtype=torch.bool, device=device)
    while True:
        # a coarse phase only sets prices: its last few bidders, who take most of its rounds, can wait
        enough = n // _UNMATCHED_FRACTION if increment > last else 0
        while True:
            waiting = holds < 0
            active = (waiting.sum(1) > enough) & (statistics[:, 0] < max_rounds)
            b, i = (waiting & active[:, None]).nonzero(as_tuple=True)  # the bidders, of all pairs at once
            if b.numel() == 0:
                break
            two, ranked = (cost[b, i] + price[b]).topk(min(2, n), dim=1, largest=False)
            object_ = ranked[:, 0]
            current = price[b, object_]
            raised = current + (two[:, -1] - two[:, 0] + increment)
            # rounding must not stop a price from rising, or two bidders could alternate for ever
            raised = raised.maximum(current.nextafter(current.new_tensor(math.inf)))

            # the highest bid takes the point, the first bidder among equals
            key = b * n + object_
            highest = torch.full((batch * n,), -math.inf, dtype=dtype, device=device)
            highest.scatter_reduce_(0, key, raised, "amax")
            leading = raised == highest[key]
            winner = torch.full((batch * n,), n, dtype=torch.int64, device=device)
            winner.scatter_reduce_(0, key[leading], i[leading], "amin")
            won = leading & (winner[key] == i)
            b_won, i_won, j_won = b[won], i[won], object_[won]
            previous = owner[b_won, j_won]
            evicted = previous >= 0
            holds[b_won[evicted], previous[evicted]] = -1
            holds[b_won, i_won] = j_won
            owner[b_won, j_won] = i_won
            price[b_won, j_won] = raised[won]
            statistics[:, 1] += torch.bincount(b, minlength=batch)
            statistics[:, 0] += active
        if increment <= last:
            break
        bound_met = statistics[:, 0] >= max_rounds
        increment = max(last, increment / _EPS_FACTOR)
        holds[~bound_met] = -1  # where the bound is met, they keep what they hold
        owner[~bound_met] = -1

    # the bound was met: each point left takes the nearest one that is free
    left = holds < 0
    statistics[:, 2] = left.sum(1)
    statistics[:, 3] = bound_met | left.any(1)
    for b_left, i_left in left.nonzero().tolist():
        free = torch.where(owner[b_left] < 0, cost[b_left, i_left], math.inf)
        j = int(free.argmin())
        holds[b_left, i_left], owner[b_left, j] = j, i_left

    if initial is not None:  # a warm start never makes the result worse
        complete = (initial >= 0).all(1)
        better = complete & (_mean_cost(cost, initial.clamp_min(0)) < _mean_cost(cost, holds))
        holds = torch.where(better[:, None], initial, holds)
    return holds, statistics


# not torch.compiler.disable, which imports the compiler: seconds of every import of this package
_opaque_auction = torch.library.custom_op(
    "pointcmt::reference_auction",
    _auction,
    mutates_args=(),
    schema="(Tensor x, Tensor y, float eps, int max_rounds, Tensor? initial) -> (Tensor, Tensor)",
)


@_opaque_auction.register_fake
def _(x: Tensor, y: Tensor, eps: float, max_rounds: int, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty((x.shape[0], 4), dtype=torch.int64)


def _mean_cost(cost: Tensor, assignment: Tensor) -> Tensor:
    return cost.gather(2, assignment.unsqueeze(-1)).squeeze(-1).double().mean(1)


if "emd" in compiled_ops("cpu"):

    @torch.library.register_fake("pointcmt::emd")
    def _(
        x: Tensor, y: Tensor, eps: float, max_rounds: int, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, n = x.shape[0], x.shape[1]
        return (
            x.new_empty((batch,)),
            x.new_empty((batch, n), dtype=torch.int64),
            x.new_empty((batch, 4), dtype=torch.int64),
        )

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, y, *_ = inputs
        _, assignment, statistics = output
        ctx.mark_non_differentiable(assignment, statistics)
        ctx.save_for_backward(x, y, assignment)

    def _backward(
        ctx: Any, grad_distance: Tensor, _assignment: Tensor | None, _statistics: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y, assignment = ctx.saved_tensors
        index = assignment.unsqueeze(-1).expand_as(y)
        _, direction = _unit_vectors(x - y.gather(1, index))
        grad = direction * (grad_distance / x.shape[1])[:, None, None]
        # a permutation sends each row to its own place: no two writes meet, so the order is no matter
        grad_y = torch.zeros_like(y).scatter(1, index, -grad) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, grad_y, None, None, None

    torch.library.register_autograd("pointcmt::emd", _backward, setup_context=_setup_context)
