"""How fast are sampling, neighbour search and grouping, next to what a user could run instead?

    python -m benchmarks.neighbors --yanx27 DIR --antao97 DIR

Peers are measured in the same run, in turns, on the same real or random clouds: the PyTorch code of
yanx27/Pointnet_Pointnet2_pytorch and of antao97/dgcnn.pytorch (imported from checkouts that are
passed in), our own PyTorch twins, and torch-cluster and pointnet2_ops where they are installed. A
peer that is not there is skipped by name. Beside each ratio stands how much of the output agrees:
yanx27 and antao97 take distances from |q|² + |p|² − 2 q·p, whose rounding swaps near neighbours.

On a CPU, :mod:`benchmarks._scenes` follows: from 1,024 points to a million, beside fpsample, SciPy and
faiss, with the targets and whether they are met.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import _scenes
from benchmarks._harness import RESULTS, ROOT, interleave, record, show
from pointcmt import ops
from pointcmt.ops.grouping import reference_group_points
from pointcmt.ops.neighbors import reference_ball_query, reference_knn
from pointcmt.ops.sampling import reference_furthest_point_sample

QUESTION = "How fast are sampling, neighbour search and grouping, next to what a user could run instead?"


def load_module(path: Path, name: str) -> ModuleType:
    """One file of a checkout, as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is not a Python file; pass the root of a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Peers:
    """The peers that are there, and why the others are not."""

    def __init__(self, yanx27: str | None, antao97: str | None, device: torch.device) -> None:
        self.skipped: dict[str, str] = {}
        self.yanx27 = self._checkout("yanx27", yanx27, "models/pointnet2_utils.py")
        self.antao97 = self._checkout("antao97", antao97, "model.py")
        self.torch_cluster = self._package("torch_cluster")
        self.pointnet2 = self._package("pointnet2_ops.pointnet2_utils") if device.type == "cuda" else None
        if device.type != "cuda":
            self.skipped["pointnet2_ops"] = "runs on CUDA only"

    def _checkout(self, name: str, folder: str | None, file: str) -> ModuleType | None:
        if folder is None:
            self.skipped[name] = f"no checkout was passed (--{name} DIR)"
            return None
        return load_module(Path(folder) / file, f"_peer_{name}")

    def _package(self, name: str) -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            self.skipped[name.split(".")[0]] = str(error)
            return None


def clouds(batch: int, n: int, device: torch.device) -> tuple[Tensor, str]:
    """Test clouds of ModelNet40 where it is on the machine, else points on random ellipsoids."""
    default = ROOT.parent / "shared" / "data" / "modelnet40_ply_hdf5_1024"
    folder = Path(os.environ.get("POINTCMT_MODELNET40", default))
    files = sorted(folder.glob("ply_data_test*.h5"))
    if files:
        import h5py

        with h5py.File(files[0]) as file:
            points = torch.from_numpy(file["data"][:batch]).float()
        if points.shape[1] >= n and len(points) == batch:
            return points[:, :n].contiguous().to(device), "ModelNet40"
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(batch, n, 3, generator=generator), dim=-1)
    return (direction * (0.3 + 0.7 * torch.rand(batch, 1, 3, generator=generator))).to(device), "ellipsoids"


def same_rows(one: Tensor, two: Tensor) -> float:
    """Fraction of the indices in each last-dimension row of ``one`` that ``two``'s row holds too."""
    return (one[..., :, None] == two[..., None, :]).any(-1).float().mean().item()


def cases(peers: Peers, xyz: Tensor) -> list[dict[str, Any]]:
    """What is measured: name, sizes, ours, and the peers, each a callable that returns the output."""
    batch, n, _ = xyz.shape
    device = xyz.device
    generator = torch.Generator().manual_seed(1)
    found: list[dict[str, Any]] = []

    def add(
        name: str, size: str, ours: Callable[[], Any], others: dict[str, Callable[[], Any]], agree: Any
    ) -> None:
        found.append({"name": name, "size": size, "ours": ours, "others": others, "agree": agree})

    # furthest point sampling
    m, radius, samples = n // 2, 0.2, 32
    others: dict[str, Callable[[], Any]] = {"twin": lambda: reference_furthest_point_sample(xyz, m)}
    if (yanx27 := peers.yanx27) is not None:
        others["yanx27"] = lambda: yanx27.farthest_point_sample(xyz, m)  # starts at a random point
    if (cluster := peers.torch_cluster) is not None:
        flat, owner = xyz.flatten(0, 1), torch.arange(batch, device=device).repeat_interleave(n)
        others["torch_cluster"] = lambda: cluster.fps(flat, owner, ratio=m / n, random_start=False)
    if (pointnet2 := peers.pointnet2) is not None:
        others["pointnet2_ops"] = lambda: pointnet2.furthest_point_sample(xyz, m)
    exact = lambda one, two: (one.long() == two.long()).float().mean().item()  # noqa: E731
    add(
        "furthest_point_sample",
        f"{batch}x{n}->{m}",
        lambda: ops.furthest_point_sample(xyz, m),
        others,
        {"twin": exact, "pointnet2_ops": exact},
    )

    # ball query around those points
    centres = ops.gather_points(xyz.transpose(1, 2).contiguous(), ops.furthest_point_sample(xyz, m))
    centres = centres.transpose(1, 2).contiguous()
    others = {"twin": lambda: reference_ball_query(radius, samples, xyz, centres)}
    if yanx27 is not None:
        others["yanx27"] = lambda: yanx27.query_ball_point(radius, samples, xyz, centres)
    if pointnet2 is not None:
        others["pointnet2_ops"] = lambda: pointnet2.ball_query(radius, samples, xyz, centres)
    add(
        "ball_query",
        f"{batch}x{m} in {n}, r={radius}, S={samples}",
        lambda: ops.ball_query(radius, samples, xyz, centres),
        others,
        dict.fromkeys(("twin", "yanx27", "pointnet2_ops"), exact),
    )

    # grouping, forward alone and with its gradient
    idx = ops.ball_query(radius, samples, xyz, centres)
    features = torch.randn(batch, 64, n, generator=generator).to(device)
    rows = features.transpose(1, 2).contiguous()
    others = {"twin": lambda: reference_group_points(features, idx)}
    if yanx27 is not None:
        others["yanx27"] = lambda: yanx27.index_points(rows, idx)
    short = idx.int()
    if pointnet2 is not None:
        others["pointnet2_ops"] = lambda: pointnet2.grouping_operation(features, short)
    close = lambda one, two: float(torch.equal(one, two))  # noqa: E731
    moved = lambda one, two: float(torch.equal(one, two.permute(0, 3, 1, 2)))  # noqa: E731
    add(
        "group_points",
        f"{batch}x64x{n}->{m}x{samples}",
        lambda: ops.group_points(features, idx),
        others,
        {"twin": close, "pointnet2_ops": close, "yanx27": moved},
    )

    slope = torch.randn(batch, 64, m, samples, generator=generator).to(device)
    slope_rows = slope.permute(0, 2, 3, 1).contiguous()

    def both(op: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> Callable[[], Tensor]:
        leaf = leaf.clone().requires_grad_()
        return lambda: torch.autograd.grad(op(leaf), leaf, grad)[0]

    others = {"twin": both(lambda f: reference_group_points(f, idx), features, slope)}
    if yanx27 is not None:
        others["yanx27"] = both(lambda f: yanx27.index_points(f, idx), rows, slope_rows)
    if pointnet2 is not None:
        others["pointnet2_ops"] = both(lambda f: pointnet2.grouping_operation(f, short), features, slope)
    near = lambda one, two: float(torch.allclose(one, two, rtol=1e-3, atol=1e-3))  # noqa: E731
    turned = lambda one, two: near(one, two.transpose(1, 2))  # noqa: E731
    add(
        "group_points with gradient",
        f"{batch}x64x{n}->{m}x{samples}",
        both(lambda f: ops.group_points(f, idx), features, slope),
        others,
        {"twin": near, "pointnet2_ops": near, "yanx27": turned},
    )

    # a ball query with grouping: coordinates relative to their centre, then the features
    others = {}
    joined = torch.cat([slope[:, :3], slope], 1)
    if yanx27 is not None:
        joined_rows = joined.permute(0, 2, 3, 1).contiguous()

        def group_yanx27(f: Tensor) -> Tensor:  # the lines of its sample_and_group behind the sampling
            at = yanx27.query_ball_point(radius, samples, xyz, centres)
            relative = yanx27.index_points(xyz, at) - centres[:, :, None]
            return torch.cat([relative, yanx27.index_points(f, at)], -1)

        others["yanx27"] = both(group_yanx27, rows, joined_rows)
    if pointnet2 is not None:
        theirs = pointnet2.QueryAndGroup(radius, samples)
        others["pointnet2_ops"] = both(lambda f: theirs(xyz, centres, f), features, joined)

    def in_passes(f: Tensor) -> Tensor:
        at = ops.ball_query(radius, samples, xyz, centres)
        planes = xyz.transpose(1, 2).contiguous()
        relative = ops.group_points(planes, at) - centres.transpose(1, 2)[..., None]
        return torch.cat([relative, ops.group_points(f, at)], 1)

    others["ours in passes"] = both(in_passes, features, joined)
    # its distances round otherwise, so that a point on the edge of a ball is now and then on its other side
    alike = lambda one, two: torch.isclose(one, two.mT, rtol=1e-3, atol=1e-3).float().mean().item()  # noqa: E731
    add(
        "query_and_group with gradient",
        f"{batch}x64x{n}->{m}x{samples}, r={radius}",
        both(lambda f: ops.query_and_group(radius, samples, xyz, centres, f), features, joined),
        others,
        {"ours in passes": near, "pointnet2_ops": near, "yanx27": alike},
    )

    # the whole of a set abstraction's front: sample, query, group
    if yanx27 is not None:
        add(
            "sample and group",
            f"{batch}x{n}->{m}x{samples}, 64 channels",
            lambda: sample_and_group(m, radius, samples, xyz, features),
            {"yanx27": lambda: yanx27.sample_and_group(m, radius, samples, xyz, rows)},
            {},
        )

    # k nearest neighbours in space and in feature space
    for dims, k in ((3, 20), (64, 20), (128, 20)):
        points = xyz if dims == 3 else torch.randn(batch, n, dims, generator=generator).to(device)
        planes = points.transpose(1, 2).contiguous()
        others = {}
        if dims == 3:
            others["twin"] = lambda p=points, k=k: reference_knn(p, p, k)[1]
        if (antao97 := peers.antao97) is not None:
            others["antao97"] = lambda p=planes, k=k: antao97.knn(p, k)
        if cluster is not None:
            others["torch_cluster"] = lambda p=points, k=k: cluster.knn(
                p.flatten(0, 1),
                p.flatten(0, 1),
                k,
                torch.arange(batch, device=device).repeat_interleave(n),
                torch.arange(batch, device=device).repeat_interleave(n),
            )
        add(
            f"knn, D={dims}",
            f"{batch}x{n}, k={k}",
            lambda p=points, k=k: ops.knn(p, p, k)[1],
            others,
            {"twin": exact, "antao97": same_rows},
        )
    return found


def sample_and_group(npoint: int, radius: float, nsample: int, xyz: Tensor, features: Tensor) -> Tensor:
    """Ours for yanx27's ``sample_and_group``: relative coordinates and features, [B, 3 + C, M, S]."""
    planes = xyz.transpose(1, 2).contiguous()
    centres = ops.gather_points(planes, ops.furthest_point_sample(xyz, npoint)).transpose(1, 2)
    return ops.query_and_group(radius, nsample, xyz, centres, features)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--yanx27", metavar="DIR", help="a checkout of yanx27/Pointnet_Pointnet2_pytorch")
    parser.add_argument("--antao97", metavar="DIR", help="a checkout of antao97/dgcnn.pytorch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="of 1024 points; fewer of larger clouds")
    parser.add_argument("--points", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8, help="per case, after at least three repeats")
    parser.add_argument("--part", choices=("clouds", "scenes", "both"), default="both")
    parser.add_argument("--out", help="the JSON file; benchmarks/results/neighbors-<device>.json by default")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.part == "scenes":
        _scenes.measure()
        return 0
    peers = Peers(options.yanx27, options.antao97, device)
    rows: list[dict[str, Any]] = []
    sources = set()
    for n in options.points:
        batch = max(1, min(options.batch, round(options.batch * (1024 / n) ** 2)))
        xyz, source = clouds(batch, n, device)
        sources.add(f"{source} of {n} points")
        rows += compare(cases(peers, xyz), options.repeats, options.seconds, device)
    show(rows)
    for name, why in peers.skipped.items():
        print(f"skipped {name}: {why}")
    out = options.out or RESULTS / f"neighbors-{device.type}.json"
    notes = {"clouds": ", ".join(sorted(sources)), "device": str(device)}
    record(out, QUESTION, rows, skipped=peers.skipped, notes=notes)
    if device.type == "cpu" and options.part == "both":
        _scenes.measure()
    return 0


def compare(
    measured: list[dict[str, Any]], repeats: int, seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each case and peer."""
    rows: list[dict[str, Any]] = []
    for case in measured:
        ours = case["ours"]
        result = ours()
        agreement = {
            name: check(result, case["others"][name]())
            for name, check in case["agree"].items()
            if name in case["others"]
        }
        timings = interleave({"ours": ours, **case["others"]}, repeats, device=device, seconds=seconds)
        for name in case["others"]:
            rows.append(
                {
                    "op": case["name"],
                    "size": case["size"],
                    "peer": name,
                    "ours": timings["ours"],
                    "theirs": timings[name],
                    "times faster": timings[name].over(timings["ours"]),
                    "agreement": agreement.get(name),
                }
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
