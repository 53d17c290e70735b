"""How fast is the EMD, and how near to the optimum, beside what a user could pick instead?

CPU, one thread: SciPy's ``linear_sum_assignment`` and POT's ``ot.emd`` (both exact, on a cost matrix
that they are given), geomloss' Sinkhorn at the coarsest blur whose gap is as small as ours, and the
torch twin. CUDA, B = 32: geomloss, and where their folders are given the MSN kernel that PointCMT's
authors use (eps 0.05, 3000 iterations) and PyTorchEMD. All are interleaved in one run; the gap to the
exact optimum stands beside every speed, and the gap that the prices certify without knowing it.

On the CPU also: every kind of hard clouds of :mod:`benchmarks.exhaust` beside SciPy, with the time as a
multiple of the median over the kinds; and what a pair takes in memory.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks._harness import RESULTS, ROOT, Timing, interleave, process_memory, record, show
from benchmarks.exhaust import KINDS
from pointcmt.ops import emd, emd_statistics, unit_cube
from pointcmt.ops.emd import DEFAULT_TOLERANCE, reference_emd

QUESTION = (
    "How fast is the EMD, and how near to the optimum, beside SciPy, POT, geomloss and the authors' kernel?"
)
TIGHT = 0.001
DEFAULT = f"pointcmt, tolerance {DEFAULT_TOLERANCE}"
BLURS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
TARGETS = {DEFAULT: (40, 0.002), f"pointcmt, tolerance {TIGHT}": (15, 0.0002)}


def modelnet40(count: int, n: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """``count`` pairs of test shapes with n points in the unit cube; None where the data is not there.

    Beyond the 1024 points of a stored shape, points are added between a point and its nearest one.
    """
    default = ROOT.parent / "shared" / "data" / "modelnet40_ply_hdf5_1024"
    root = Path(os.environ.get("POINTCMT_MODELNET40", default))
    if not (root / "test_files.txt").exists():
        return None
    import h5py

    name = (root / "test_files.txt").read_text().split()[0].rsplit("/", 1)[-1]
    random = np.random.default_rng(seed)
    with h5py.File(root / name) as file:
        chosen = random.choice(len(file["data"]), 2 * count, replace=False)
        shapes = torch.from_numpy(np.stack([file["data"][i] for i in chosen])).float()
    generator = torch.Generator().manual_seed(seed)
    while shapes.shape[1] < n:
        apart = torch.cdist(shapes, shapes) + 9 * torch.eye(shapes.shape[1])
        nearest = shapes.gather(1, apart.argmin(2, keepdim=True).expand(-1, -1, 3))
        t = torch.rand(*shapes.shape[:2], 1, generator=generator)
        shapes = torch.cat([shapes, shapes + t * (nearest - shapes)], 1)
    keep = torch.randperm(shapes.shape[1], generator=generator)[:n]
    x, y = unit_cube(shapes[:, keep]).chunk(2)
    return x.contiguous(), y.contiguous()


def random_surfaces(count: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ellipsoids' surfaces, where ModelNet40 is not at hand."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * count, n, 3, generator=generator), dim=-1)
    axes = 0.2 + torch.rand(2 * count, 1, 3, generator=generator)
    x, y = unit_cube(directions * axes).chunk(2)
    return x.contiguous(), y.contiguous()


def perturbed(x: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs as FE sees them: point k of one cloud lies near point k of the other."""
    return x, x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def costs(x: Tensor, y: Tensor) -> list[np.ndarray]:
    return list(
        torch.cdist(x.double().cpu(), y.double().cpu(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    )


def sinkhorn(
    x: Tensor, y: Tensor, optimum: float, gap: float
) -> tuple[Callable[[Tensor, Tensor], Tensor], float, float] | None:
    """geomloss at the coarsest blur whose mean distance is within ``gap``: (it, blur, its gap)."""
    try:
        from geomloss import SamplesLoss
    except ImportError:
        return None
    for blur in BLURS:
        loss = SamplesLoss("sinkhorn", p=1, blur=blur, scaling=0.7, debias=False, backend="tensorized")
        found = loss(x, y).double().mean().item() / optimum - 1
        if abs(found) <= gap or blur == BLURS[-1]:
            return loss, blur, found
    return None


def imported(folder: str | None, module: str) -> Any:
    if folder is None:
        return None
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever building or loading a foreign extension may raise
        print(f"{module} from {folder}: {error}")
        return None
    finally:
        sys.path.remove(folder)


def matched(x: Tensor, y: Tensor, assignment: Tensor) -> float:
    index = assignment.long().unsqueeze(-1).expand(-1, -1, 3)
    return (x - y.gather(1, index)).double().norm(dim=-1).mean().item()


def measure(
    case: str, x: Tensor, y: Tensor, args: argparse.Namespace, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Times every candidate on one set of pairs; one row per candidate."""
    pairs, n, _ = x.shape
    device = x.device
    # the optimum takes SciPy seconds a pair where N is large: there, a part of a batch is judged by it
    judged = pairs if device.type == "cpu" else min(pairs, round(args.pairs * min(1.0, (1024 / n) ** 2)))
    if n > args.exact_points:
        judged = 0
    some, others = x[:judged], y[:judged]
    matrices = costs(some, others)
    optimum = float(np.mean([c[linear_sum_assignment(c)].mean() for c in matrices])) if judged else math.nan
    calls: dict[str, Callable[[], Any]] = {}
    gaps: dict[str, float] = {}
    extra: dict[str, dict[str, Any]] = {}

    for tolerance in (DEFAULT_TOLERANCE, TIGHT):
        name = f"pointcmt, tolerance {tolerance}"
        calls[name] = functools.partial(emd, x, y, tolerance=tolerance)
        distance, _, statistics = emd_statistics(x, y, tolerance=tolerance)
        gaps[name] = distance[:judged].double().mean().item() / optimum - 1 if judged else math.nan
        extra[name] = {
            "certified": 1 - statistics.bound.double().mean().item() / distance.double().mean().item(),
            "rounds": statistics.rounds.double().mean().item(),
            "sweeps": statistics.sweeps.double().mean().item(),
        }
        if device.type == "cpu":
            extra[name]["memory MiB"] = memory(functools.partial(emd, tolerance=tolerance), x[:1], y[:1])
    if n <= args.twin_points:
        calls["torch twin"] = lambda: reference_emd(x, y)
        gaps["torch twin"] = reference_emd(some, others)[0].double().mean().item() / optimum - 1
    if device.type == "cpu" and judged:
        calls["scipy linear_sum_assignment"] = lambda: [linear_sum_assignment(c) for c in matrices]
        gaps["scipy linear_sum_assignment"] = 0.0
        extra["scipy linear_sum_assignment"] = {
            "memory MiB": memory(lambda a, b: linear_sum_assignment(costs(a, b)[0]), x[:1], y[:1])
        }
        try:
            import ot

            weights = np.full(n, 1 / n)
            solve = functools.partial(ot.emd, weights, weights, numItermax=10_000_000)
            calls["POT ot.emd"] = lambda: [solve(M=c) for c in matrices]
            plans = [solve(M=c) for c in matrices]
            gaps["POT ot.emd"] = (
                float(np.mean([np.vdot(p, c) for p, c in zip(plans, matrices, strict=True)])) / optimum - 1
            )
        except ImportError:
            skipped["POT ot.emd"] = "pip install pot"
    if judged and n <= args.sinkhorn_points:
        found = sinkhorn(some, others, optimum, max(gaps[DEFAULT], 1e-4))
        if found is None:
            skipped["geomloss Sinkhorn"] = "pip install geomloss"
        else:
            name = f"geomloss Sinkhorn blur {found[1]}"
            calls[name], gaps[name] = functools.partial(found[0], x, y), found[2]
            if device.type == "cpu":
                extra[name] = {"memory MiB": memory(found[0], x[:1], y[:1])}
    if device.type == "cuda":
        msn, pytorch_emd = imported(args.msn_emd, "emd_module"), imported(args.pytorch_emd, "emd")
        if msn is None or n % 1024:
            skipped["MSN auction"] = (
                "give --msn-emd a built folder with emd_module; its N is a multiple of 1024"
            )
        else:
            module = msn.emdModule()
            calls["MSN auction, eps 0.05, 3000 iterations"] = lambda: module(x, y, 0.05, 3000)
            gaps["MSN auction, eps 0.05, 3000 iterations"] = (
                matched(some, others, module(some, others, 0.05, 3000)[1]) / optimum - 1
                if judged
                else math.nan
            )
        if pytorch_emd is None:
            skipped["PyTorchEMD approximate match"] = "give --pytorch-emd a built folder with the module emd"
        else:
            calls["PyTorchEMD approximate match"] = lambda: pytorch_emd.earth_mover_distance(
                x, y, transpose=False
            )
            gaps["PyTorchEMD approximate match"] = float("nan")  # a soft match of squared distances

    times = interleave(calls, args.repeats, device=device, seconds=args.seconds)
    rows = []
    for name, timing in times.items():
        per_pair = Timing(*(t / pairs for t in (timing.median, timing.low, timing.high)), timing.repeats)
        row: dict[str, Any] = {
            "case": case,
            "points": n,
            "pairs": pairs,
            "candidate": name,
            "per pair": per_pair,
            "gap": None if math.isnan(gaps[name]) else gaps[name],
            "ours is faster by": timing.over(times[DEFAULT]),
        }
        if name in TARGETS and device.type == "cpu" and judged:
            ratio, gap = TARGETS[name]
            row["times SciPy"] = times["scipy linear_sum_assignment"].over(timing)
            row["target"] = f"{ratio}x at {gap:.2%}"
        rows.append(row | extra.get(name, {}))
    show(rows)
    print()
    return rows


def memory(call: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor) -> float:
    """MiB that a call takes beyond what one on a few points leaves behind, measured in a fork."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        call(x[:, :8], y[:, :8])  # code that is loaded at first use
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # freed memory that is used again would not be seen
        before = process_memory("VmRSS")
        call(x, y)
        os.write(write, str(process_memory("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        taken = int(answer.read())
    os.waitpid(child, 0)
    return taken / 2**20


def hard(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kind of hard clouds, beside SciPy and beside the median over the kinds."""
    rows: list[dict[str, Any]] = []
    for kind, draw in KINDS.items():
        x, y = (torch.from_numpy(c)[None].float() for c in draw(np.random.default_rng(0), args.hard_points))
        (matrix,) = costs(x, y)
        distance, _, statistics = emd_statistics(x, y)
        ours = functools.partial(emd, x, y)
        scipy = functools.partial(linear_sum_assignment, matrix)
        times = interleave({"ours": ours, "scipy": scipy}, args.repeats, seconds=args.seconds / 5)
        best, found = matrix[scipy()].mean(), distance.item()
        rows.append(
            {
                "case": f"hard: {kind}",
                "points": args.hard_points,
                "pairs": 1,
                "candidate": DEFAULT,
                "per pair": times["ours"],
                "gap": found / best - 1 if best else found,
                "certified": 1 - statistics.bound.item() / found if found else 0.0,
                "times SciPy": times["scipy"].over(times["ours"]),
                "rounds": statistics.rounds.item(),
                "sweeps": statistics.sweeps.item(),
            }
        )
    middle = float(np.median([row["per pair"].median for row in rows]))
    for row in rows:
        row["of the median"] = row["per pair"].median / middle
    show(rows)
    print()
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="pairs at once on CUDA")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of 1024 points on the CPU")
    parser.add_argument("--points", type=int, nargs="+", default=[256, 1024, 2048, 4096, 16384])
    parser.add_argument("--exact-points", type=int, default=4096, help="largest N that SciPy is run at")
    parser.add_argument("--hard-points", type=int, default=1024, help="N of the hard clouds")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=30, help="per case, after at least three repeats")
    parser.add_argument("--twin-points", type=int, default=256, help="largest N that the twin is timed at")
    parser.add_argument(
        "--sinkhorn-points", type=int, default=1024, help="largest N that geomloss is timed at"
    )
    parser.add_argument("--msn-emd", metavar="DIR", help="a built folder of the MSN EMD (module emd_module)")
    parser.add_argument("--pytorch-emd", metavar="DIR", help="a built folder of PyTorchEMD (module emd)")
    parser.add_argument("--out", help="the JSON file; benchmarks/results/emd-<device>.json by default")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread, as SciPy has
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    try:
        for n in args.points:
            count = (
                args.batch if device.type == "cuda" else max(1, round(args.pairs * min(1.0, (1024 / n) ** 2)))
            )
            pair, source = modelnet40(count, n, seed=n), "ModelNet40"
            if pair is None:
                skipped["ModelNet40"] = "set POINTCMT_MODELNET40; ellipsoids serve instead"
                pair, source = random_surfaces(count, n, seed=n), "ellipsoids"
            x, y = (cloud.to(device) for cloud in pair)
            rows += measure(source, x, y, args, skipped)
            if n == 1024:
                for noise in (0.003, 0.01, 0.03):
                    x, y = (cloud.to(device) for cloud in perturbed(pair[0], noise, seed=n))
                    rows += measure(f"shared generator, noise {noise}", x, y, args, skipped)
        if device.type == "cpu":
            rows += hard(args)
        if device.type == "cpu" and threads > 1:
            x, y = random_surfaces(8 * threads, 1024, seed=0)

            def on(count: int) -> None:
                torch.set_num_threads(count)
                emd(x, y)

            times = interleave({"1": lambda: on(1), str(threads): lambda: on(threads)}, args.repeats)
            rows.append(
                {
                    "case": f"{len(x)} pairs on {threads} threads",
                    "points": 1024,
                    "pairs": len(x),
                    "candidate": DEFAULT,
                    "speed-up over one thread": times["1"].over(times[str(threads)]),
                }
            )
            show(rows[-1:])
    finally:
        torch.set_num_threads(threads)
    if any(n > args.exact_points for n in args.points):
        skipped[f"SciPy beyond {args.exact_points} points"] = "minutes a pair; --exact-points"
    for peer, why in skipped.items():
        print(f"not measured: {peer}: {why}")
    out = args.out or RESULTS / f"emd-{device.type}.json"
    record(
        out, QUESTION, rows, skipped=skipped, notes={"threads": 1, "tolerance": [DEFAULT_TOLERANCE, TIGHT]}
    )
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
