"""The EMD against the exact optimum on a million random and adversarial pairs: none wrong, none over bound.

Every case is drawn from its own number, so any of them can be run again (``--case``). A case is wrong where
the assignment is no permutation; where the distance is not that of the assignment, is below the optimum, or
is further above it than the tolerance; where the bound is above the optimum; where distance and bound are
further apart than the tolerance; and where the bound on the work was met. The optimum is SciPy's, in float64.

Runs on all cores, block by block; the state file says which blocks are done, so a run that was killed goes
on. At the end the worst of every kind of clouds is a record, from which docs/performance.md has its table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks._harness import RESULTS, ROOT, record
from pointcmt.ops import emd_statistics
from pointcmt.ops.emd import DEFAULT_TOLERANCE
from pointcmt.recipes.config import write_json

QUESTION = "How often is the EMD wrong, and what is the worst of random and adversarial pairs?"
BLOCK = 500
STATE = ROOT / "build" / "exhaust-emd.json"
MOST_ROUNDS = 250  # a quarter of the default bound: more than twice what any case was found to need

Clouds = tuple[np.ndarray, ...]  # x and y, float64 [N, 3]


def _uniform(random: Generator, n: int) -> Clouds:
    return random.random((n, 3)), random.random((n, 3))


def _surface(random: Generator, n: int) -> Clouds:
    x, y = random.standard_normal((2, n, 3))
    axes = 0.2 + random.random((2, 3))
    return tuple(c / np.linalg.norm(c, axis=1, keepdims=True) * a for c, a in zip((x, y), axes, strict=True))


def _common_outlier(random: Generator, n: int) -> Clouds:
    x, y = _uniform(random, n)
    sides = 10.0 ** random.uniform(1, 3)
    x[0], y[-1] = (sides, 0, 0), (sides, random.random(), 0)
    return x, y


def _outlier(random: Generator, n: int) -> Clouds:
    x, y = _uniform(random, n)
    x[random.integers(n)] *= 10.0 ** random.uniform(1, 3)
    return x, y


def _far_clusters(random: Generator, n: int) -> Clouds:
    clusters = int(random.integers(2, 6))
    centres = random.random((clusters, 3)) * 10.0 ** random.uniform(0.5, 3)
    shares = random.dirichlet(np.ones(clusters), 2)
    return tuple(random.random((n, 3)) + centres[random.choice(clusters, n, p=share)] for share in shares)


def _equal_clusters(random: Generator, n: int) -> Clouds:
    away = np.where(np.arange(n)[:, None] < n // 2, 10.0 ** random.uniform(1, 3), 0)
    return tuple(cloud + away for cloud in _uniform(random, n))


def _tight_clusters(random: Generator, n: int) -> Clouds:
    return tuple(
        random.integers(0, 4, (n, 1)) * 3.0 + 1e-4 * random.standard_normal((n, 3)) for _ in range(2)
    )


def _one_against_spread(random: Generator, n: int) -> Clouds:
    x, y = _uniform(random, n)
    return x, 0.5 + y * 10.0 ** random.uniform(-6, -1)


def _duplicates(random: Generator, n: int) -> Clouds:
    return tuple(cloud[random.integers(0, 1 + n // 7, n)] for cloud in _uniform(random, n))


def _line(random: Generator, n: int) -> Clouds:
    direction = random.standard_normal(3)
    return tuple(random.random((n, 1)) * direction for _ in range(2))


def _plane(random: Generator, n: int) -> Clouds:
    return tuple(cloud * (1, 1, 0) for cloud in _uniform(random, n))


def _lattice(random: Generator, n: int) -> Clouds:
    side = int(random.integers(1, 6))
    return tuple(random.integers(0, side + 1, (n, 3)) / 8 for _ in range(2))


def _all_equal(random: Generator, n: int) -> Clouds:
    x, y = _uniform(random, n)
    x[:] = x[0]
    if random.random() < 0.3:
        y[:] = y[0]
    return x, y


def _shuffled(random: Generator, n: int) -> Clouds:
    x, _ = _uniform(random, n)
    return x, random.permutation(x)


def _noisy(random: Generator, n: int) -> Clouds:
    x, _ = _uniform(random, n)
    return x, x + 10.0 ** random.uniform(-5, -1) * random.standard_normal((n, 3))


def _apart(random: Generator, n: int) -> Clouds:
    x, y = _uniform(random, n)
    return x, y + random.standard_normal(3) * 10.0 ** random.uniform(0, 3)


def _all_scales(random: Generator, n: int) -> Clouds:
    return tuple(random.standard_normal((n, 3)) * 10.0 ** random.uniform(-3, 1, (n, 1)) for _ in range(2))


KINDS: dict[str, Callable[[Generator, int], Clouds]] = {
    "uniform": _uniform,
    "surfaces": _surface,
    "common outlier": _common_outlier,
    "one-sided outlier": _outlier,
    "far clusters, unequal": _far_clusters,
    "far clusters, equal": _equal_clusters,
    "tight clusters": _tight_clusters,
    "one cluster against spread": _one_against_spread,
    "duplicates": _duplicates,
    "collinear": _line,
    "planar": _plane,
    "lattice": _lattice,
    "all equal": _all_equal,
    "same cloud, shuffled": _shuffled,
    "same cloud, noisy": _noisy,
    "clouds apart": _apart,
    "all scales": _all_scales,
}


@dataclass(frozen=True)
class Case:
    """One pair of clouds, drawn from its number."""

    number: int
    kind: str
    x: np.ndarray  # float64 [N, 3], before the unit
    y: np.ndarray
    unit: float
    double: bool
    tolerance: float


def case(number: int, largest: int = 200) -> Case:
    """The case of this number, of any kind, with up to ``largest`` points, mostly fewer, in any unit."""
    random = np.random.default_rng(number)
    kind = list(KINDS)[number % len(KINDS)]
    n = int(np.exp(random.uniform(0, np.log(largest + 1))))
    unit = 10.0 ** random.choice([-20, -6, 0, 0, 0, 4, 15])
    double = random.random() < 0.2
    tolerance = float(random.choice([DEFAULT_TOLERANCE, DEFAULT_TOLERANCE, 0.001, 0.05]))
    x, y = KINDS[kind](random, n)
    return Case(number, kind, x, y, unit, double, tolerance)


class Verdict(NamedTuple):
    """What the EMD of a case came to."""

    wrong: list[str]  # each in a word or two; empty where all holds
    rounds: int  # the work, in units of N rows of N distances
    excess: float  # how far the distance is above the optimum, as a part of what the tolerance allows


def judge(one: Case, match: Callable[..., Any] = emd_statistics) -> Verdict:
    """Compares the EMD of a case with the optimum, its certificate with both, and the work with its bound."""
    dtype = torch.float64 if one.double else torch.float32
    x, y = (torch.from_numpy(c * one.unit).to(dtype)[None] for c in (one.x, one.y))
    distance, assignment, statistics = match(x, y, tolerance=one.tolerance, max_rounds=MOST_ROUNDS)
    found, bound, index = distance.item(), statistics.bound.item(), assignment[0].numpy()
    rounds = int(statistics.rounds)
    costs = cdist(x[0].double().numpy(), y[0].double().numpy())
    best = costs[linear_sum_assignment(costs)].mean()
    rounding = 1e-12 if one.double else 1e-6
    wrong = []
    if sorted(index) != list(range(len(costs))):
        return Verdict(["no permutation"], rounds, 0.0)
    if abs(costs[np.arange(len(index)), index].mean() - found) > rounding * found:
        wrong.append("not the assignment's distance")
    if found < best * (1 - rounding):
        wrong.append("below the optimum")
    if found > best * (1 + rounding) / (1 - one.tolerance):
        wrong.append("above the tolerance")
    if bound > best * (1 + 1e-12):
        wrong.append("bound above the optimum")
    if found - bound > found * (one.tolerance + rounding):
        wrong.append("not certified")
    if statistics.bound_met.item():
        wrong.append("over its bound")
    excess = (found - best) / (found * one.tolerance) if found > best else 0.0
    return Verdict(wrong, rounds, float(excess))


class Worst(NamedTuple):
    """The worst of the cases of one kind, with the numbers of the cases that were it."""

    cases: int = 0
    wrong: int = 0
    rounds: int = 0
    longest: int = -1
    excess: float = 0.0
    farthest: int = -1

    def of(self, other: Worst) -> Worst:
        """The worst of both."""
        rounds, longest = max((self.rounds, -self.longest), (other.rounds, -other.longest))
        excess, farthest = max((self.excess, -self.farthest), (other.excess, -other.farthest))
        cases, wrong = self.cases + other.cases, self.wrong + other.wrong
        return Worst(cases, wrong, rounds, -longest, excess, -farthest)


@dataclass(frozen=True)
class Block:
    """What a block of cases came to."""

    number: int
    wrong: dict[str, list[str]]  # case number → what is wrong
    worst: dict[str, Worst]  # by kind


def run_block(number: int, most: int) -> Block:
    """Cases ``number * BLOCK`` and on, below ``most``."""
    torch.set_num_threads(1)
    wrong: dict[str, list[str]] = {}
    worst: dict[str, Worst] = {}
    for k in range(number * BLOCK, min((number + 1) * BLOCK, most)):
        one = case(k)
        found = judge(one)
        if found.wrong:
            wrong[str(k)] = found.wrong
        worst[one.kind] = worst.get(one.kind, Worst()).of(
            Worst(1, bool(found.wrong), found.rounds, k, found.excess, k)
        )
    return Block(number, wrong, worst)


def _in_parallel(blocks: Iterable[int], cases: int, workers: int) -> Iterator[Block]:
    todo = list(blocks)
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(run_block, todo, [cases] * len(todo))


def _row(kind: str, worst: Worst) -> dict[str, Any]:
    return {
        "clouds": kind,
        "pairs": worst.cases,
        "wrong": worst.wrong,
        "most rounds": worst.rounds,
        "in case": worst.longest,
        "farthest above the optimum, of the tolerance": f"{worst.excess:.1%}",
        "at case": worst.farthest if worst.excess else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exhaust", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--state", type=Path, default=STATE, help="what is done already; removed to begin anew"
    )
    parser.add_argument("--out", type=Path, help="the record; beside the others where all cases were run")
    parser.add_argument("--case", type=int, help="run this one, and print what comes of it")
    args = parser.parse_args(argv)
    if args.cases < 1 or args.workers < 1:
        parser.error(f"--cases and --workers must be at least 1, got {args.cases} and {args.workers}")
    if args.case is not None:
        one = case(args.case)
        wrong, rounds, excess = judge(one)
        bits = 64 if one.double else 32
        print(f"case {one.number}: {one.kind}, {len(one.x)} points, unit {one.unit:g}, float{bits}, ", end="")
        print(f"tolerance {one.tolerance:g}, of which {excess:.1%} taken: {rounds} rounds; ", end="")
        print(", ".join(wrong) or "right")
        return 1 if wrong else 0

    state: dict[str, Any] = {"cases": args.cases, "done": [], "wrong": {}, "worst": {}}
    if args.state.exists():
        kept = json.loads(args.state.read_text())
        if kept.keys() == state.keys() and kept["cases"] == args.cases:
            state = kept
            print(f"{args.state}: {len(state['done'])} blocks of {BLOCK} cases are done already")
    done = set(state["done"])
    blocks = [k for k in range(-(-args.cases // BLOCK)) if k not in done]
    shown = TextColumn("{task.completed:,.0f} of {task.total:,.0f} cases, {task.fields[wrong]} wrong")
    with Progress(shown, BarColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=args.cases, completed=len(done) * BLOCK, wrong=len(state["wrong"]))
        for block in _in_parallel(blocks, args.cases, args.workers):
            state["done"].append(block.number)
            state["wrong"] |= block.wrong
            for kind, worst in block.worst.items():
                state["worst"][kind] = worst.of(Worst(*state["worst"].get(kind, Worst())))
            write_json(args.state, state)
            progress.update(task, advance=BLOCK, wrong=len(state["wrong"]))
    counts = Counter(what for found in state["wrong"].values() for what in found)
    print(f"{args.cases} cases: {len(state['wrong'])} wrong {dict(counts) if counts else ''}")
    worst = {kind: Worst(*state["worst"][kind]) for kind in KINDS if kind in state["worst"]}
    hardest = max(worst.values(), key=lambda one: one.rounds)
    print(f"most work: {hardest.rounds} rounds of {MOST_ROUNDS}, case {hardest.longest}")
    out = args.out or (RESULTS / "emd-exhaust.json" if args.cases >= 1_000_000 else None)
    if out is not None:
        notes = {"cases": args.cases, "wrong": len(state["wrong"]), "bound": MOST_ROUNDS}
        record(out, QUESTION, [_row(kind, one) for kind, one in worst.items()], notes=notes)
    for number, found in list(state["wrong"].items())[:20]:
        print(f"  --case {number}: {', '.join(found)}")
    return 1 if state["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
