"""Calls of every compiled operator with random arguments, good and bad: `make sanitize` runs many of them.

Every call is drawn from its own number, so any of them can be run again alone (``--first N --calls 1``). A
good call must succeed; one with an index or a length out of range must be refused, forward and backward; one
with an argument that is broken in another way (a dimension cut or added, another dtype, a stride of 0, a huge
number) may succeed or be refused, by ValueError, IndexError, TypeError or RuntimeError. A sanitizer ends the
process where memory was touched that is not the call's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REFUSALS = (ValueError, IndexError, TypeError, RuntimeError)
FLOATS = (torch.float32, torch.float64)
HALVES = (*FLOATS, torch.float16, torch.bfloat16)


class Draw:
    """One call's random choices."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.torch = torch.Generator().manual_seed(number)

    def size(self, most: int = 40, least: int = 1) -> int:
        """Mostly small: what is special is near 0, 1 and the kernels' widths of vectors and tiles."""
        return max(least, min(most, self.random.choice([1, 1, 2, 3, 7, 8, 9, 16, 17, 24, 33, most])))

    def cloud(self, *shape: int, dtype: torch.dtype) -> Tensor:
        kind = self.random.random()
        x = torch.randn(*shape, generator=self.torch, dtype=torch.float64)
        if kind < 0.2:
            x = (2 * x).round() / 2  # ties
        elif kind < 0.3:
            x = x * 10.0 ** self.random.randint(-6, 6)
        elif kind < 0.35:
            x = x[..., :1, :].expand(shape)  # all points alike
        elif kind < 0.4 and x.numel():
            x.view(-1)[self.random.randrange(x.numel())] = self.random.choice([math.inf, -math.inf, 1e30])
        elif kind < 0.45 and x.numel():
            x.view(-1)[self.random.randrange(x.numel())] = math.nan
        return x.to(dtype)

    def index(self, *shape: int, n: int) -> Tensor:
        return torch.randint(
            0, n, shape, generator=self.torch, dtype=self.random.choice([torch.int32, torch.int64])
        )

    def lengths(self, batch: int, n: int) -> Tensor | None:
        return torch.randint(1, n + 1, (batch,), generator=self.torch) if self.random.random() < 0.4 else None

    def laid_out(self, x: Any) -> Any:
        """The same values, elsewhere in memory: transposed, with gaps, from an offset on."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        way = self.random.randrange(5)
        if way == 0:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if way == 1:
            wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
            wide[..., 1::2] = x
            return wide[..., 1::2]
        if way == 2:
            return x.new_zeros(x.numel() + 3)[3:].view(x.shape).copy_(x)
        return x


def _emd(d: Draw) -> tuple:
    n, dtype = d.size(90), d.random.choice(FLOATS)
    x, y = (torch.nan_to_num(d.cloud(d.size(3, 0), n, 3, dtype=dtype), 0, 1, -1) for _ in range(2))
    y = torch.randn(x.shape, generator=d.torch, dtype=dtype) if y.shape != x.shape else y
    return x, y, d.random.choice([1e-3, 0.01, 1.0]), d.random.choice([0, 1, 1000])


def _sample(d: Draw) -> tuple:
    batch, n = d.size(3, 0), d.size(d.random.choice([40, 3000]))
    return d.cloud(batch, n, 3, dtype=d.random.choice(FLOATS)), d.size(n), d.lengths(batch, n)


def _voxels(d: Draw) -> tuple:
    cloud = torch.nan_to_num(d.cloud(d.size(300, 0), 3, dtype=d.random.choice(FLOATS)), 0, 1, -1)
    return cloud, d.random.choice([0.1, 1.0, 100.0]) * max(
        1.0, float(cloud.abs().max()) if len(cloud) else 1
    ) / 50


def _pair(d: Draw, dims: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, n, m = d.size(3, 0), d.size(d.random.choice([40, 3000])), d.size(d.random.choice([40, 800]), 0)
    dtype = d.random.choice(FLOATS)
    points = d.cloud(batch, n, dims, dtype=dtype)
    queries = points if d.random.random() < 0.2 else d.cloud(batch, m, dims, dtype=dtype)
    return points, queries, d.lengths(batch, n)


def _ball(d: Draw) -> tuple:
    points, queries, lengths = _pair(d)
    return d.random.choice([1e-30, 0.1, 1.0, 1e30]), d.size(70), points, queries, lengths


def _knn(d: Draw) -> tuple:
    points, queries, lengths = _pair(d, d.random.choice([1, 2, 3, 3, 3, 4, 5, 8, 17]))
    return queries, points, d.size(min(points.shape[1], 150)), lengths


def _three_nn(d: Draw) -> tuple:
    points, queries, lengths = _pair(d)
    return queries, points, lengths


def _grouping(d: Draw, ranks: int) -> tuple[Tensor, Tensor, int]:
    batch, n, channels = d.size(3, 0), d.size(), d.size(20, 0)
    edges = [d.size(40, 0) for _ in range(ranks - 1)]
    x = torch.randn(batch, channels, n, generator=d.torch).to(d.random.choice(HALVES))
    return x, d.index(batch, *edges, n=n), n


def _gather(d: Draw, ranks: int) -> tuple:
    return _grouping(d, ranks)[:2]


def _gather_backward(d: Draw, ranks: int) -> tuple:
    x, idx, n = _grouping(d, ranks)
    grad = torch.randn(*x.shape[:2], *idx.shape[1:], generator=d.torch).to(x.dtype)
    return grad, idx, n


def _relative(d: Draw) -> tuple:
    features, idx, n = _grouping(d, 3)
    xyz = torch.randn(len(idx), n, 3, generator=d.torch).to(features.dtype)
    centres = torch.randn(len(idx), idx.shape[1], 3, generator=d.torch).to(features.dtype)
    return xyz, centres, idx, features if d.random.random() < 0.7 else None


def _relative_backward(d: Draw) -> tuple:
    features, idx, n = _grouping(d, 3)
    grad = torch.randn(len(idx), 3 + features.shape[1], *idx.shape[1:], generator=d.torch).to(features.dtype)
    return grad, idx, n, d.random.random() < 0.5


def _three(d: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, a gradient, indices, weights."""
    batch, m, n, channels = d.size(3, 0), d.size(), d.size(40, 0), d.size(20, 0)
    dtype = d.random.choice(HALVES)
    weight = torch.rand(batch, n, 3, generator=d.torch).to(
        torch.float64 if dtype is torch.float64 else torch.float32
    )
    features, grad = (torch.randn(batch, channels, size, generator=d.torch).to(dtype) for size in (m, n))
    return features, grad, d.index(batch, n, 3, n=m), weight


def _interpolate(d: Draw) -> tuple:
    features, _, idx, weight = _three(d)
    return features, idx, weight


def _interpolate_backward(d: Draw) -> tuple:
    features, grad, idx, weight = _three(d)
    return grad, idx, weight, features.shape[2]


def _weight_backward(d: Draw) -> tuple:
    features, grad, idx, _ = _three(d)
    return grad, features, idx


def _edges(d: Draw) -> tuple[list, list, Tensor | None, int]:
    """x, centres, idx; weight, bias, mean, variance; idx; the number of rows in a group."""
    channels, dtype = 8 * d.size(5), d.random.choice(FLOATS)
    make = lambda *shape: torch.randn(*shape, generator=d.torch, dtype=dtype)  # noqa: E731
    if d.random.random() < 0.5:
        batch, n, m, samples = d.size(3), d.size(), d.size(), d.size(20)
        rows = [make(batch, n, channels), make(batch, m, channels), d.index(batch, m, samples, n=n)]
    else:
        rows = [
            make(*(d.size(9) for _ in range(d.random.randrange(3))), samples := d.size(20), channels),
            None,
            None,
        ]
    return rows, [make(channels), make(channels), make(channels), make(channels).abs()], rows[2], samples


def _norm_act_max(d: Draw) -> tuple:
    rows, (weight, bias, mean, var), _, _ = _edges(d)
    statistics = (mean, var) if d.random.random() < 0.4 else (None, None)
    return *rows, weight, bias, *statistics, 1e-5, 0.2


def _norm_act_max_backward(d: Draw) -> tuple:
    rows, (weight, bias, mean, var), idx, samples = _edges(d)
    shape = rows[1].shape if idx is not None else (*rows[0].shape[:-2], rows[0].shape[-1])
    grad, chosen, total = (torch.randn(shape, generator=d.torch, dtype=rows[0].dtype) for _ in range(3))
    which = torch.randint(0, samples, tuple(shape), generator=d.torch, dtype=torch.int32)
    training = d.random.random() < 0.7
    return grad, *rows, weight, bias, chosen, which, total, mean, var, 1e-5, 0.2, training


# operator → its random arguments, and the places of those that are indices or lengths
CALLS: dict[str, tuple[Callable[[Draw], tuple], tuple[int, ...]]] = {
    "emd": (_emd, ()),
    "furthest_point_sample": (_sample, (2,)),
    "voxel_subsample": (_voxels, ()),
    "ball_query": (_ball, (4,)),
    "knn": (_knn, (3,)),
    "three_nn": (_three_nn, (2,)),
    "gather_points": (lambda d: _gather(d, 2), (1,)),
    "gather_points_backward": (lambda d: _gather_backward(d, 2), (1,)),
    "group_points": (lambda d: _gather(d, 3), (1,)),
    "group_points_backward": (lambda d: _gather_backward(d, 3), (1,)),
    "group_relative": (_relative, (2,)),
    "group_relative_backward": (_relative_backward, (1,)),
    "three_interpolate": (_interpolate, (1,)),
    "three_interpolate_backward": (_interpolate_backward, (1,)),
    "three_interpolate_weight_backward": (_weight_backward, (2,)),
    "norm_act_max": (_norm_act_max, (2,)),
    "norm_act_max_backward": (_norm_act_max_backward, (3, 7)),
}


def _spoil_index(d: Draw, args: list, places: tuple[int, ...]) -> int | None:
    """Puts one value out of range; its argument's place, or None where there is none to spoil."""
    there = [p for p in places if isinstance(args[p], Tensor) and args[p].numel()]
    if not there:
        return None
    place = d.random.choice(there)
    spoiled = args[place].clone()
    big = 2**31 - 1 if spoiled.dtype is torch.int32 else d.random.choice([2**31, 2**32, 2**32 + 1, 2**63 - 1])
    value = d.random.choice([-1, -(2**31), 10_000, big])
    spoiled.view(-1)[d.random.randrange(spoiled.numel())] = value
    args[place] = spoiled
    return place


def _break(d: Draw, args: list) -> None:
    """Changes one argument into something of another kind."""
    place = d.random.randrange(len(args))
    x = args[place]
    if isinstance(x, Tensor):
        shape = list(x.shape)
        ways: list[Callable[[], Tensor | None]] = [
            lambda: x.unsqueeze(0),
            lambda: x.to(d.random.choice([torch.int32, torch.int64, torch.bool, *HALVES, torch.complex64])),
            lambda: x.new_empty(0),
            lambda: None,
        ]
        if shape:
            axis = d.random.randrange(len(shape))
            ways += [
                lambda: x.narrow(axis, 0, shape[axis] // 2),
                lambda: torch.cat([x, x], axis),
                lambda: x.select(axis, 0) if shape[axis] else x,
                # a view without its memory, of which no copy fits: sizes whose products pass 2³¹ and 2⁶³
                lambda: (
                    x.new_zeros(()).expand([*shape[:axis], 2**40, *shape[axis + 1 :]]) if x.numel() else x
                ),
            ]
        args[place] = d.random.choice(ways)()
    elif isinstance(x, bool):
        args[place] = not x
    elif isinstance(x, int):
        args[place] = d.random.choice([-1, 0, 2**31, 2**40, 2**63 - 1, -(2**63)])
    elif isinstance(x, float):
        args[place] = d.random.choice([0.0, -1.0, math.nan, math.inf, 1e300, 1e-300])


def run(number: int, ops: Any) -> tuple[str, str, str | None]:
    """One call: operator, what was expected of it, and what was wrong with the outcome (None: nothing)."""
    d = Draw(number)
    name = d.random.choice(list(CALLS))
    make, places = CALLS[name]
    args, expected, spoiled = list(make(d)), "succeeds", None
    way = d.random.random()
    if way < 0.3:
        spoiled = _spoil_index(d, args, places)
        if spoiled is not None:
            expected = "refused"
    elif way < 0.6:
        _break(d, args)
        expected = "either"
    # views without memory stay as they are: their copies would not fit
    args = [d.laid_out(a) if isinstance(a, Tensor) and a.numel() < 2**20 else a for a in args]
    try:
        out = getattr(ops, name)(*args)
    except REFUSALS as error:
        if expected == "succeeds":
            return name, expected, f"{type(error).__name__}: {error}"
        if expected == "refused" and not isinstance(error, (IndexError, ValueError)):
            return name, expected, f"argument {spoiled} out of range gave {type(error).__name__}: {error}"
        return name, expected, None
    if expected == "refused":
        return name, expected, f"argument {spoiled} out of range was taken"
    for result in out if isinstance(out, tuple) else (out,):
        if result.is_floating_point():
            result.sum()  # read every number: one that was never written is a sanitizer's to find
    return name, expected, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for what was counted")
    options = parser.parse_args()
    from pointcmt.ops import _extension

    folder, threads = Path(_extension.__file__).parents[1], torch.get_num_threads()
    print(f"{_extension.cpu_capability()} from {folder}, {threads} threads", flush=True)
    counts: dict[str, Counter] = {name: Counter() for name in CALLS}
    start = time.monotonic()
    for number in range(options.first, options.first + options.calls):
        name, expected, wrong = run(number, torch.ops.pointcmt)
        counts[name][expected] += 1
        if wrong:
            counts[name]["wrong"] += 1
            print(f"call {number}, {name}: {wrong}", flush=True)
    wrong_calls = sum(count["wrong"] for count in counts.values())
    print(f"{options.calls} calls, {wrong_calls} wrong, {time.monotonic() - start:.0f} s")
    if options.out:
        options.out.write_text(json.dumps({name: dict(count) for name, count in counts.items()}))
    return 1 if wrong_calls else 0


if __name__ == "__main__":
    raise SystemExit(main())
