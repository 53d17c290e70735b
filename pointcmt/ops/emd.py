"""Earth mover's distance (EMD): the optimal one-to-one matching of two clouds, found by auction.

The auction algorithm is Bertsekas' (Annals of Operations Research 14, 1988). Every point of x that
holds no point of y *bids* for the one that is cheapest to it, where cheap is distance plus price;
it takes that point from whoever held it and raises its price until the second cheapest would be
as good, plus ``eps``. When every point holds one, the mean distance is within ``eps`` of the optimum.
*eps scaling* first runs coarse auctions whose prices then make the fine one short. A *sweep* looks for
the shortest paths from all points that wait to points that are free, and raises the prices as a long
war of bids would have done.

Prices also say how good a matching is. In any matching each point of x pays at least its cheapest
distance + price, and every price is paid once: that sum less the prices is a lower bound of the
optimum, whatever the prices are (linear programming duality). The auction goes on until the two meet.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pointcmt.ops._checks import check_count, check_number, check_required, check_xyz, common_float
from pointcmt.ops._deferred import can_watch, deferred
from pointcmt.ops._extension import compiled_ops, use_compiled

DEFAULT_TOLERANCE = 0.005
DEFAULT_MAX_ROUNDS = 1000
_MOST_POINTS = 2**24  # beyond it float32 does not tell indices apart, and 32 bits do not count N x 3 x 8
_NOT_FINITE = (
    "emd: an earlier call on the GPU was given NaN or infinite coordinates in {count} pairs, whose distance "
    "is therefore NaN; EMD needs finite points. (The host does not wait for the GPU, so it hears of this "
    "late.) In training, the student's features or the clouds made from them are not finite: look for NaN in "
    "the input, lower the learning rate or clip gradients; torch.autograd.set_detect_anomaly(True) finds the "
    "operation"
)

# as in csrc/emd_constants.h, where each is explained
_FIRST_EPS = 0.25
_EPS_FACTOR = 4.0
_LEAST_EPS = 1e-7
_UNMATCHED_FRACTION = 128
_TIGHTNESS = 3.0
_CAUTION = 0.7
_BIDS_FIRST, _BIDS_LATER = 4, 2
_FLOOR = 2.0**-50


@overload
def emd(
    x: Tensor,
    y: Tensor,
    tolerance: float = ...,
    max_rounds: int = ...,
    return_certificate: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def emd(
    x: Tensor, y: Tensor, tolerance: float = ..., max_rounds: int = ..., *, return_certificate: Literal[True]
) -> tuple[Tensor, Tensor, Tensor]: ...
def emd(
    x: Tensor,
    y: Tensor,
    tolerance: float = DEFAULT_TOLERANCE,
    max_rounds: int = DEFAULT_MAX_ROUNDS,
    return_certificate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Mean Euclidean distance between the points of x and y under a (near-)optimal one-to-one matching.

    The matching is found by auction with eps scaling, which goes on until its prices certify that the
    distance is within ``tolerance`` of the optimum: ``distance - bound <= tolerance * distance``, where
    ``bound`` is a lower bound of the distance of every matching. That holds for clouds of any shape and
    scale, far points and far clusters included. Mostly the distance is much nearer to the optimum than
    what is certified.

    Differentiable in x and y with the matching held fixed (the gradient of the optimum wherever it
    is unique); where two matched points coincide the sub-gradient 0 is taken.

    The work is bounded by ``max_rounds``, far above what any cloud was found to need. Where the bound is
    met, each point still unmatched takes the nearest point that is free, so that the assignment is a
    permutation all the same; on the CPU a ``RuntimeWarning`` says so, once per process.
    :func:`emd_statistics` counts such points anywhere. Memory is O(N) a pair.

    On CUDA all prices are float32, and the auction ends where they resolve no more: a tolerance of 0.005
    is certified where matched points are further apart than about 1e-5 of their clouds' size, and
    ``bound`` is right everywhere. On the CPU it goes on in float64.

    Args:
        x: [B, N, 3], any B ≥ 0 and 1 ≤ N ≤ 2²⁴; float16, bfloat16, float32 or float64, in any unit and scale.
        y: [B, N, 3] on the same device.
        tolerance: how far above the optimum the mean distance of a pair may be, as a part of that distance;
            in (0, 1].
        max_rounds: bound on the work per pair: N · max_rounds rows of N distances, of which a bid takes one.
        return_certificate: return ``bound`` as well.

    Returns:
        distance: [B], in the unit of x and y; float64 if an input is float64, else float32.
        assignment: int64 [B, N], a permutation of 0..N-1 in each row: x[b, i] is matched with
        y[b, assignment[b, i]]. Not differentiable.
        bound: only with ``return_certificate``: [B], a lower bound of the optimal mean distance, as
        certified by the prices; same unit and dtype as distance. Not differentiable.

    Raises:
        ValueError: wrong shapes, dtypes, tolerance or max_rounds; NaN or infinite coordinates.
            On CUDA the host does not wait for the values, which would stall the step: there a pair
            with NaN or infinite coordinates gets distance NaN and some permutation, and the
            ``ValueError`` comes from a later call, from :func:`pointcmt.ops.check_deferred` or on
            leaving ``PointCMT`` (not from inside a compiled or captured graph).

    Sources: "EMD" as PointCMT (Yan et al., NeurIPS 2022) and the point-cloud literature use it;
    auction: Bertsekas, Annals of Operations Research 14 (1988); sweeps: Goldberg & Kennedy, Mathematical
    Programming 71 (1995).
    """
    check_required("emd", x=x, y=y)
    if watched := can_watch(x):
        deferred.look()
    distance, bound, assignment, statistics = _emd(x, y, tolerance, max_rounds)
    if watched:
        deferred.watch(distance.detach().isnan().sum(), _NOT_FINITE)
    if not torch.compiler.is_compiling() and statistics.device.type == "cpu" and statistics[:, 3].any():
        _warn_bound_met(max_rounds)
    return (distance, assignment, bound) if return_certificate else (distance, assignment)


@dataclass(frozen=True)
class EmdStatistics:
    """What the matching of each pair took: int64 [B] tensors, and ``bound``."""

    rounds: Tensor
    """The work, in the unit of ``max_rounds``, rounded up. A sweep that has begun is finished, so it may pass
    ``max_rounds`` by three."""
    rows: Tensor
    """Rows of N distances that were looked through: one by each bid, others by sweeps and certificates."""
    completed: Tensor
    """Points that were unmatched when ``max_rounds`` was met, and were matched to what was free."""
    bound_met: Tensor
    """1 where ``max_rounds`` ended the auction before the certificate held."""
    sweeps: Tensor
    """Sweeps of shortest augmenting paths."""
    bound: Tensor
    """The lower bound of the optimal mean distance, as :func:`emd` returns it; floating."""


def emd_statistics(
    x: Tensor, y: Tensor, tolerance: float = DEFAULT_TOLERANCE, max_rounds: int = DEFAULT_MAX_ROUNDS
) -> tuple[Tensor, Tensor, EmdStatistics]:
    """As :func:`emd`, with the work that it took and the certificate, for analysis."""
    distance, bound, assignment, statistics = _emd(x, y, tolerance, max_rounds)
    rounds, rows, completed, bound_met, sweeps = statistics.unbind(1)
    return distance, assignment, EmdStatistics(rounds, rows, completed, bound_met, sweeps, bound)


def _emd(x: Tensor, y: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = _checked(x, y, tolerance, max_rounds)
    if use_compiled(x, op="emd"):
        return torch.ops.pointcmt.emd(x, y, tolerance, max_rounds)
    return _reference(x, y, tolerance, max_rounds)


def _checked(x: Tensor, y: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor]:
    """Both clouds in one dtype, float32 or float64; ValueError where an argument is wrong."""
    check_xyz("emd", x=x, y=y)
    if x.shape != y.shape:
        raise ValueError(
            f"emd: x and y must hold equally many points, got {list(x.shape)} and {list(y.shape)}; "
            "sample the larger cloud down first (pointcmt.ops.furthest_point_sample)"
        )
    if not 1 <= x.shape[1] <= _MOST_POINTS:
        raise ValueError(
            f"emd: clouds need at least one point and at most 2**24 = {_MOST_POINTS}, got {list(x.shape)}"
        )
    check_number("emd", "tolerance", tolerance)
    check_count("emd", "max_rounds", max_rounds)
    if not 0 < tolerance <= 1:
        raise ValueError(
            f"emd: tolerance must be in (0, 1] (a part of the optimal distance, such as "
            f"{DEFAULT_TOLERANCE}), got {tolerance}"
        )
    if max_rounds < 0:
        raise ValueError(f"emd: max_rounds must not be negative, got {max_rounds}")
    x, y = common_float(x, y)
    return x, y


@functools.cache
def _warn_bound_met(max_rounds: int) -> None:
    warnings.warn(
        f"emd: the auction met its bound of max_rounds={max_rounds} before its prices certified the "
        "tolerance; points left were matched to the nearest free point, so the distance may be well above "
        "the optimum (return_certificate=True says how far at most). Raise max_rounds, or tolerance.",
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
    tolerance: float = DEFAULT_TOLERANCE,
    max_rounds: int = DEFAULT_MAX_ROUNDS,
    return_certificate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The readable twin of :func:`emd`, in PyTorch and float64, with a matrix of N x N distances a pair."""
    x, y = _checked(x, y, tolerance, max_rounds)
    distance, bound, assignment, _ = _reference(x, y, tolerance, max_rounds)
    return (distance, assignment, bound) if return_certificate else (distance, assignment)


def _reference(
    x: Tensor, y: Tensor, tolerance: float, max_rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # to torch.compile the twin is one operator: its loops depend on values, and are no part of any graph
    run = _opaque_auction if torch.compiler.is_compiling() else _auction
    bound, assignment, statistics = run(x.detach(), y.detach(), tolerance, max_rounds)
    distance = _matched_distance(x, y, assignment)
    return distance, bound.minimum(distance.detach()), assignment, statistics


def _auction(x: Tensor, y: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bound [B], assignment int64 [B, N] and statistics int64 [B, 5], as csrc/emd.h has them."""
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("emd: x or y holds NaN or infinite coordinates; EMD needs finite points")
    batch, n, _ = x.shape
    bound = x.new_zeros(batch)
    assignment = torch.zeros((batch, n), dtype=torch.int64, device=x.device)
    statistics = torch.zeros((batch, 5), dtype=torch.int64, device=x.device)
    for b in range(batch):
        pair = _Pair(x[b].double(), y[b].double(), max_rounds * n)
        done = pair.solve(tolerance)
        completed = pair.complete()
        assignment[b] = pair.holds
        below = torch.tensor(pair.bound * pair.scale / n, dtype=x.dtype, device=x.device)
        bound[b] = below.nextafter(torch.zeros_like(below))  # still a lower bound after rounding
        over = not done and pair.rows >= pair.most
        statistics[b] = torch.tensor([-(-pair.rows // n), pair.rows, completed, over, pair.sweeps])
    return bound, assignment, statistics


class _Pair:
    """The auction of one pair: all points of x that hold nothing bid at once (Jacobi)."""

    def __init__(self, x: Tensor, y: Tensor, most: int) -> None:
        both = torch.stack([x, y])
        low, high = both.amin((0, 1)) / 2, both.amax((0, 1)) / 2  # halves: high - low may overflow
        self.scale = min(max(2 * (high - low).amax().item(), sys.float_info.min), sys.float_info.max)
        both = (both / 2 - (low + high) / 2) / (self.scale / 2)
        self.spread = (both - both.mean(1, keepdim=True)).norm(dim=-1).mean(1).amax().item()
        self.cost = torch.cdist(both[0], both[1], compute_mode="donot_use_mm_for_euclid_dist")
        self.n = n = len(x)
        self.price = self.cost.new_zeros(n)
        self.holds = torch.full((n,), -1, device=x.device)  # by point of x: what it holds
        self.owner = self.holds.clone()  # by point of y: who holds it
        self.most, self.rows, self.sweeps, self.bound = most, 0, 0, 0.0

    def solve(self, tolerance: float) -> bool:
        """Tightens eps until the certificate holds: True; False where the work or float64 ends first."""
        eps, aim, certified, least = max(_FIRST_EPS * self.spread, _LEAST_EPS), 0.0, False, False
        while not least:
            floor = _FLOOR * self.price.mean().item()
            if least := eps < floor:
                eps = aim = floor
            self.begin_phase(eps, certified)
            last = eps <= aim
            # a coarse phase only sets prices: its last few bidders, who take most of its rounds, can wait,
            # unless there is a war of bids, which finer increments only make longer
            self.bid(eps, 0 if last or self.sweeps else self.n // _UNMATCHED_FRACTION)
            if self.rows >= self.most:
                return False
            held = self.holds >= 0
            total = self.cost[held, self.holds[held]].sum().item()
            if total == 0 and held.all():
                return True
            certified = last
            if last:
                self.bound = max(self.bound, self.certify())
                if total - self.bound <= tolerance * total:
                    return True
                enough = _CAUTION * tolerance * total / (total - self.bound)
                eps = aim = eps * min(max(enough, 0.5 / _EPS_FACTOR), 0.5)
            else:
                # where the certificate is expected to hold
                aim = _TIGHTNESS * tolerance * total / max(int(held.sum()), 1)
                eps = max(eps / _EPS_FACTOR, min(aim, eps / 1.5))
        return False

    def begin_phase(self, eps: float, certified: bool) -> None:
        """Nobody holds anything but those whose object is known to be within eps of their cheapest."""
        self.price -= self.price.min()
        if certified:
            value = self.cost + self.price
            keep = value.gather(1, self.holds[:, None])[:, 0] <= value.amin(1) + eps
            self.owner[self.holds[~keep]] = -1
            self.holds[~keep] = -1
        else:
            self.holds.fill_(-1)
            self.owner.fill_(-1)

    def certify(self) -> float:
        """What every matching costs at least, by the prices."""
        self.rows += self.n
        return ((self.cost + self.price).amin(1).sum() - self.price.sum()).item()

    def bid(self, eps: float, enough: int) -> None:
        """Rounds of bidding until at most ``enough`` points wait."""
        since = 0
        while len(bidders := (self.holds < 0).nonzero()[:, 0]) > enough and self.rows < self.most:
            if since >= (_BIDS_LATER if self.sweeps else _BIDS_FIRST) * self.n:
                self.sweep(eps)
                since = 0
                continue
            two, ranked = (self.cost[bidders] + self.price).topk(min(2, self.n), dim=1, largest=False)
            objects = ranked[:, 0]
            current = self.price[objects]
            offer = current + (two[:, -1] - two[:, 0] + eps)
            # rounding must not stop a price from rising, or two bidders could alternate for ever
            offer = offer.maximum(current.nextafter(current.new_tensor(math.inf)))

            # the highest bid takes the point, the first bidder among equals
            highest = torch.full_like(self.price, -math.inf).scatter_reduce(0, objects, offer, "amax")
            leading = offer == highest[objects]
            winner = torch.full_like(self.owner, self.n)
            winner.scatter_reduce_(0, objects[leading], bidders[leading], "amin")
            won = leading & (winner[objects] == bidders)
            previous = self.owner[objects[won]]
            self.holds[previous[previous >= 0]] = -1
            self.match(bidders[won], objects[won])
            self.price[objects[won]] = offer[won]
            since += len(bidders)
            self.rows += len(bidders)

    def sweep(self, eps: float) -> None:
        """Raises prices by the lengths of the shortest paths from free points of y back to all that wait.

        A step's length is how far it is from being a bid. Afterwards the steps of these paths are bids, and
        those paths that do not meet are matched along.
        """
        self.sweeps += 1
        waiting, free = self.holds < 0, self.owner < 0
        value = self.cost + self.price
        need = value.gather(1, self.holds.clamp_min(0)[:, None])[:, 0] - eps
        need = torch.where(waiting, value.amin(1), need)
        length, hop = torch.where(free, value - need[:, None], math.inf).min(1)
        rise = torch.where(free, 0.0, math.inf).to(self.price)
        settled = torch.zeros_like(waiting)
        order: list[int] = []  # those that wait, the nearest to a free point first
        left, reached = int(waiting.sum()), 0.0
        self.rows += 2 * left
        while left:  # Dijkstra
            i = int(length.masked_fill(settled, math.inf).argmin())
            reached = max(reached, length[i].item())
            settled[i] = True
            if waiting[i]:
                order.append(i)
                left -= 1
                continue
            j = self.holds[i]
            rise[j] = reached
            found = value[:, j] + reached - need
            closer = ~settled & (found < length)
            length = torch.where(closer, found, length)
            hop = torch.where(closer, j, hop)
            self.rows += 1
        self.price += rise.clamp_max(reached)
        taken: set[int] = set()
        for first in order:
            path, i = [], first
            while i >= 0 and int(hop[i]) not in taken:
                path.append(i)
                i = int(self.owner[hop[i]])
            if i < 0:  # it ends at a free point, and has met no other
                bidders = torch.tensor(path, device=hop.device)
                self.match(bidders, hop[bidders])
                taken.update(hop[bidders].tolist())

    def match(self, bidders: Tensor, objects: Tensor) -> None:
        self.holds[bidders] = objects
        self.owner[objects] = bidders

    def complete(self) -> int:
        """The bound on work was met: each point left takes the nearest one that is free."""
        left = (self.holds < 0).nonzero()[:, 0]
        for i in left:
            j = torch.where(self.owner < 0, self.cost[i], math.inf).argmin()
            self.match(i, j)
        return len(left)


# not torch.compiler.disable, which imports the compiler: seconds of every import of this package
_opaque_auction = torch.library.custom_op(
    "pointcmt::reference_auction",
    _auction,
    mutates_args=(),
    schema="(Tensor x, Tensor y, float tolerance, int max_rounds) -> (Tensor, Tensor, Tensor)",
)


@_opaque_auction.register_fake
def _(x: Tensor, y: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = x.shape[0], x.shape[1]
    return (
        x.new_empty((batch,)),
        x.new_empty((batch, n), dtype=torch.int64),
        x.new_empty((batch, 5), dtype=torch.int64),
    )


if "emd" in compiled_ops("cpu"):

    @torch.library.register_fake("pointcmt::emd")
    def _(x: Tensor, y: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, n = x.shape[0], x.shape[1]
        return (
            x.new_empty((batch,)),
            x.new_empty((batch,)),
            x.new_empty((batch, n), dtype=torch.int64),
            x.new_empty((batch, 5), dtype=torch.int64),
        )

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, y, *_ = inputs
        _, bound, assignment, statistics = output
        ctx.mark_non_differentiable(bound, assignment, statistics)
        ctx.save_for_backward(x, y, assignment)

    def _backward(
        ctx: Any,
        grad_distance: Tensor,
        _bound: Tensor | None,
        _assignment: Tensor | None,
        _statistics: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, assignment = ctx.saved_tensors
        index = assignment.unsqueeze(-1).expand_as(y)
        _, direction = _unit_vectors(x - y.gather(1, index))
        grad = direction * (grad_distance / x.shape[1])[:, None, None]
        # a permutation sends each row to its own place: no two writes meet, so the order is no matter
        grad_y = torch.zeros_like(y).scatter(1, index, -grad) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, grad_y, None, None

    torch.library.register_autograd("pointcmt::emd", _backward, setup_context=_setup_context)
