"""Sampling and neighbour search from 1,024 points to a million, on one thread, beside the libraries for it.

fpsample, SciPy's cKDTree and faiss are measured in the same run, in turns, with the making of their index;
one that is not installed is skipped by name. Run by :mod:`benchmarks.neighbors`.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._harness import RESULTS, ROOT, Timing, interleave, record, show
from pointcmt import ops

QUESTION = "How do sampling and neighbour search grow up to scenes of a million points, next to trees?"
RECORD = RESULTS / "neighbors-scenes-cpu.json"
PLOT = ROOT / "docs" / "images" / "neighbors.png"
SIZES = (1024, 10_000, 24_000, 100_000, 1_000_000)
NEIGHBOURS, HITS = 16, 32
GROWTH = (10_000, 30_000, 100_000, 300_000, 1_000_000)
GROWTH_TARGET = 1.15
TARGETS = {"furthest_point_sample": 3.0, "knn": 2.0, "ball_query": 2.0, "knn, D=64": 2.0, "knn, D=128": 2.0}


def room(data: Path, n: int) -> Tensor | None:
    """n points [1, n, 3] in metres, at random from the depth frames of a real kitchen in its world frame."""
    folder = data / "rgbd_7scenes_redkitchen"
    poses = sorted(folder.glob("*.pose.txt"))
    if not poses:
        return None
    from PIL import Image

    camera = np.loadtxt(folder / "camera-intrinsics.txt")
    random, each = np.random.default_rng(0), math.ceil(1.2 * max(SIZES) / len(poses))
    parts = []
    for pose in poses:
        depth = np.asarray(Image.open(str(pose).replace(".pose.txt", ".depth.png"))) / 1000.0
        row, column = np.nonzero((depth > 0.1) & (depth < 6))
        pick = random.permutation(len(row))[:each]
        row, column = row[pick], column[pick]
        z = depth[row, column]
        x = (column - camera[0, 2]) / camera[0, 0] * z
        y = (row - camera[1, 2]) / camera[1, 1] * z
        to_world = np.loadtxt(pose)
        parts.append(np.stack([x, y, z], 1) @ to_world[:3, :3].T + to_world[:3, 3])
    points = np.concatenate(parts)
    points = points[random.permutation(len(points))[:n]]
    return torch.from_numpy((points - points.min(0)).astype(np.float32))[None] if len(points) == n else None


def surfaces(data: Path, n: int) -> Tensor:
    """n points [1, n, 3]: a ModelNet40 test cloud where n is its size and it is there, else an ellipsoid."""
    files = sorted((data / "modelnet40_ply_hdf5_1024").glob("ply_data_test*.h5"))
    if files and n == 1024:
        import h5py

        with h5py.File(files[0]) as file:
            return torch.from_numpy(file["data"][:1]).float().contiguous()
    direction = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(direction, dim=-1) * torch.tensor([1.0, 0.8, 0.5])


def peers() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The libraries that are installed, and why the others are not measured."""
    there: dict[str, ModuleType] = {}
    skipped: dict[str, str] = {}
    for name in ("fpsample", "scipy.spatial", "faiss"):
        try:
            there[name.split(".")[0]] = importlib.import_module(name)
        except ImportError as error:
            skipped[name.split(".")[0]] = str(error)
    if "faiss" in there:
        there["faiss"].omp_set_num_threads(1)
    return there, skipped


def agreement(one: Tensor, two: np.ndarray) -> float:
    """Fraction of equal entries."""
    return float((one.numpy() == two).mean())


def compare(
    name: str,
    where: str,
    size: str,
    ours: Callable[[], Any],
    theirs: dict[str, Callable[[], Any]],
    agree: Any,
) -> dict[str, Any]:
    """One row: ours against the fastest of the peers given (variants of one library)."""
    best = next(iter(theirs), None)
    if len(theirs) > 1:
        tried = interleave(theirs, 2, warmup=0)
        best = min(tried, key=lambda variant: tried[variant].low)
    candidates = {"ours": ours, **({"theirs": theirs[best]} if best else {})}
    timings = interleave(candidates, 7, seconds=6)
    row: dict[str, Any] = {"op": name, "cloud": where, "size": size, "peer": best, "ours": timings["ours"]}
    if best:
        row["theirs"] = timings["theirs"]
        row["times faster"] = timings["theirs"].over(timings["ours"])
        row["agreement"] = agree(ours(), theirs[best]())
        target = TARGETS.get(name)
        if target is not None and not size.startswith("1024 "):
            row["target"] = f"at least {target:g}"
            row["met"] = row["times faster"] >= target
    return row


def radius_of(xyz: Tensor) -> float:
    """A radius whose balls hold about :data:`HITS` points: the median distance of that neighbour."""
    few = xyz[:, torch.randperm(xyz.shape[1], generator=torch.Generator().manual_seed(1))[:1000]]
    return float(ops.knn(few, xyz, HITS)[0][..., -1].median().sqrt())


def rows_of(where: str, xyz: Tensor, there: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """The three searches of one cloud."""
    n = xyz.shape[1]
    array = xyz[0].numpy()
    m, radius = n // 4, radius_of(xyz)
    fpsample, scipy = there.get("fpsample"), there.get("scipy")
    others: dict[str, Callable[[], Any]] = {}
    if fpsample is not None and n <= 100_000:
        for height in (3, 5, 7, 9):
            others[f"fpsample, kdline, height {height}"] = lambda h=height: (
                fpsample.bucket_fps_kdline_sampling(array, m, h, start_idx=0)
            )
        others["fpsample, kdtree"] = lambda: fpsample.bucket_fps_kdtree_sampling(array, m, start_idx=0)
    rows = [
        compare(
            "furthest_point_sample",
            where,
            f"{n} → {m}",
            lambda: ops.furthest_point_sample(xyz, m),
            others,
            # theirs fuses multiply-adds and leaves no point out: from the first near tie on, choices differ
            lambda one, two: len(np.intersect1d(one[0].numpy(), two)) / m,
        )
    ]
    others = {}
    if scipy is not None:
        others["scipy cKDTree"] = lambda: scipy.cKDTree(array).query(array, k=NEIGHBOURS)
    rows.append(
        compare(
            "knn",
            where,
            f"{n} in {n}, k={NEIGHBOURS}",
            lambda: ops.knn(xyz, xyz, NEIGHBOURS),
            others,
            lambda one, two: agreement(one[1][0], two[1]),
        )
    )
    if scipy is not None:
        others["scipy cKDTree"] = lambda: scipy.cKDTree(array).query_ball_point(array, radius)
    rows.append(
        compare(
            "ball_query",
            where,
            f"{n} in {n}, {HITS} hits",
            lambda: ops.ball_query(radius, HITS, xyz, xyz),
            others,
            lambda one, two: float(
                np.mean([set(row) <= set(all_) for row, all_ in zip(one[0].tolist(), two, strict=True)])
            ),
        )
    )
    return rows


def feature_rows(there: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """k-NN in feature space against faiss' exact search."""
    faiss = there.get("faiss")
    rows = []
    for dims in (64, 128):
        points = torch.randn(1, 1024, dims, generator=torch.Generator().manual_seed(dims))
        array = points[0].numpy()

        def search(array: np.ndarray = array, dims: int = dims) -> np.ndarray:
            index = faiss.IndexFlatL2(dims)  # type: ignore[union-attr]
            index.add(array)
            return index.search(array, 20)[1]

        row = compare(
            f"knn, D={dims}",
            "random",
            "1024 in 1024, k=20",
            lambda p=points: ops.knn(p, p, 20)[1],
            {"faiss, flat": search} if faiss is not None else {},
            lambda one, two: agreement(one[0], two),
        )
        if "times faster" in row:
            target = TARGETS[row["op"]]
            row |= {"target": f"at least {target:g}", "met": row["times faster"] >= target}
        rows.append(row)
    return rows


def growth(
    clouds: Callable[[int], Tensor], where: str
) -> tuple[list[dict[str, Any]], dict[str, dict[int, float]]]:
    """The exponent of n that each op's time follows from the first to the last size, by least squares."""
    times: dict[str, dict[int, Timing]] = {}
    for n in GROWTH:
        xyz = clouds(n)
        radius = radius_of(xyz)
        timings = interleave(
            {
                "furthest_point_sample": lambda x=xyz: ops.furthest_point_sample(x, x.shape[1] // 4),
                "knn": lambda x=xyz: ops.knn(x, x, NEIGHBOURS),
                "ball_query": lambda x=xyz, r=radius: ops.ball_query(r, HITS, x, x),
                "three_nn": lambda x=xyz: ops.three_nn(x, x[:, : x.shape[1] // 4].contiguous()),
                "voxel_subsample": lambda x=xyz: ops.voxel_subsample(x[0], 0.04),
            },
            9,
            seconds=8,
        )
        for name, timing in timings.items():
            times.setdefault(name, {})[n] = timing
    rows = []
    for name, by_size in times.items():
        exponent = float(np.polyfit(np.log(list(by_size)), np.log([t.low for t in by_size.values()]), 1)[0])
        rows.append(
            {
                "op": name,
                "cloud": where,
                "size": f"{GROWTH[0]} to {GROWTH[-1]}",
                "growth exponent": exponent,
                "target": f"at most {GROWTH_TARGET}",
                "met": exponent <= GROWTH_TARGET,
            }
        )
    return rows, {name: {n: t.median for n, t in by_size.items()} for name, by_size in times.items()}


MEMORY = """
import re, sys
from pathlib import Path
import torch
from benchmarks import _scenes
from pointcmt import ops

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
xyz = _scenes.surfaces(Path("."), int(sys.argv[2]))
radius = _scenes.radius_of(xyz)
call = {
    "furthest_point_sample": lambda x: ops.furthest_point_sample(x, x.shape[1] // 4),
    "knn": lambda x: ops.knn(x, x, _scenes.NEIGHBOURS),
    "ball_query": lambda x: ops.ball_query(radius, _scenes.HITS, x, x),
}[sys.argv[1]]
call(xyz[:, :3000].contiguous())
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
before = peak()
result = call(xyz)
result = result if isinstance(result, tuple) else (result,)
print(peak() - before, sum(t.nbytes for t in result) / 2**20)
"""


def memory_rows(n: int) -> list[dict[str, Any]]:
    """How much the process grows while a cloud of n points is searched, its result included (Linux only)."""
    rows: list[dict[str, Any]] = []
    if not Path("/proc/self/clear_refs").exists():
        return rows
    for name in ("furthest_point_sample", "knn", "ball_query"):
        command = [sys.executable, "-c", MEMORY, name, str(n)]
        # freed memory goes back at once, so that what is held before the call is held for a reason
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        peak, result = (float(value) for value in run.stdout.split())
        rows.append({"op": name, "cloud": "surface", "size": str(n), "peak MiB": peak, "result MiB": result})
    return rows


def plot(times: dict[str, dict[int, float]], where: str) -> None:
    """Time over the number of points, both logarithmic, with a line of slope 1 to compare."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, by_size in times.items():
        axes.loglog(list(by_size), [1e3 * t for t in by_size.values()], marker="o", label=name)
    first = min(min(by_size.values()) for by_size in times.values())
    axes.loglog(GROWTH, [1e3 * first * n / GROWTH[0] for n in GROWTH], "k:", label="slope 1")
    axes.set(xlabel="points", ylabel="milliseconds, one thread", title=f"Time over size: {where}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})
    plt.close(figure)


def measure(out: str | os.PathLike[str] = RECORD, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Measures, prints which targets are met, and writes the record and the plot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = Path(os.environ.get("POINTCMT_DATA", ROOT.parent / "shared" / "data"))
    there, skipped = peers()
    rows: list[dict[str, Any]] = []
    try:
        where = "room"
        clouds: dict[str, Callable[[int], Tensor]] = {"surface": lambda n: surfaces(data, n)}
        whole = room(data, max(sizes))
        if whole is None:
            skipped["room"] = "the depth frames of a room are not there (POINTCMT_DATA)"
            where = "surface"
        else:
            clouds["room"] = lambda n: whole[:, :n].contiguous()
        for n in sizes:
            for name, cloud in clouds.items():
                rows += rows_of(name, cloud(n), there)
        rows += feature_rows(there)
        grown, times = growth(clouds[where], where)
        rows += grown
        rows += memory_rows(max(sizes))
    finally:
        torch.set_num_threads(threads)
    show(rows)
    for row in rows:
        if "met" in row:
            value = row.get("times faster", row.get("growth exponent"))
            verdict = "met    " if row["met"] else "NOT MET"
            print(f"{verdict} {row['op']}, {row['cloud']}, {row['size']}: {value:.3g} ({row['target']})")
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")
    notes = {
        "threads": 1,
        "room": "7-Scenes redkitchen, 50 depth frames",
        "load": round(os.getloadavg()[0], 1),
        "times": "interleaved, medians; growth from the lower quartiles",
        "agreement": "of indices; of the sets of samples; of hits that are in SciPy's balls",
    }
    record(out, QUESTION, rows, skipped=skipped, notes=notes)
    plot(times, where)
    return rows
