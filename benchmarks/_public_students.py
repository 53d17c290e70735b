"""The public repositories' own classes of our reference students, runnable on a CPU, for tests and timing.

Each is imported from a checkout and never copied. Where a class hard-codes CUDA or needs an extension that
cannot be built any more, only that is replaced, and the replacement is said beside it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pointcmt import ops, students


@dataclass(frozen=True)
class PublicStudent:
    """A public class beside our student of the same architecture.

    Attributes:
        name: for tables and test ids.
        repository: owner/name on GitHub.
        marker: a file that tells a checkout of it, relative to the checkout.
        build: checkout -> the public module with ``num_classes`` outputs.
        ours: num_classes -> our student.
        layout: "BN3" or "B3N", what the public class takes.
        replaced: what does not run as published on a CPU, and what stands in for it.
        search: their neighbour search by pointcmt's kernels, name -> function: see :meth:`share_search`.
    """

    name: str
    repository: str
    marker: str
    build: Callable[[Path, int], nn.Module]
    ours: Callable[[int], nn.Module]
    layout: str
    replaced: str
    search: Callable[[], dict[str, Callable[..., Tensor]]] = dict

    def find(self, root: Path) -> Path | None:
        """The checkout in ``root``: root itself, or a folder one or two levels below it."""
        for folder in (root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
            if (folder / self.marker).is_file():
                return folder
        return None

    @contextlib.contextmanager
    def sharing_search(self, module: nn.Module) -> Iterator[None]:
        """:meth:`share_search` inside, and the module's own search again after."""
        before = [
            (functions, name, functions[name])
            for part in module.modules()
            if (functions := getattr(type(part).forward, "__globals__", {}))
            for name in self.search()
            if name in functions
        ]
        self.share_search(module)
        try:
            yield
        finally:
            for functions, name, function in before:
                functions[name] = function

    def share_search(self, module: nn.Module) -> None:
        """Lets the public module find neighbours with pointcmt's kernels.

        Its own search rounds |x|^2 + |y|^2 - 2 x.y in float32, so that of two nearly equal neighbours now
        and then the other one is taken; with the same neighbours, the arithmetic behind can be compared.
        """
        for part in module.modules():
            functions = getattr(type(part).forward, "__globals__", {})
            for name, function in self.search().items():
                if name in functions and not str(functions["__name__"]).startswith("torch"):
                    functions[name] = function

    def run(self, module: nn.Module, points: Tensor) -> Tensor:
        """The public module's output on points [B, N, 3], from a fixed start of furthest point sampling."""
        given = points if self.layout == "BN3" else points.transpose(1, 2).contiguous()
        with mock.patch.object(torch, "randint", _first_point):
            output = module(given)
        return output[0] if isinstance(output, tuple) else output


def _first_point(low: int, high: int, size: tuple[int, ...], **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype", torch.long), device=options.get("device"))


@contextlib.contextmanager
def _imported(folders: list[Path], stubs: dict[str, types.ModuleType]) -> Iterator[Callable[[str], Any]]:
    """Imports from a checkout, leaving sys.path and sys.modules as they were."""
    before_path, before = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(folder) for folder in folders]
    replaced = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module
    finally:
        sys.path[:] = before_path
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or ""
            if name not in before and any(file.startswith(str(folder)) for folder in folders):
                del sys.modules[name]
        for name, old in replaced.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old


class _TorchWithoutCuda:
    """``torch``, except that ``torch.device(anything)`` is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: torch.device("cpu")) if name == "device" else getattr(torch, name)


def _yanx27(variant: str) -> Callable[[Path, int], nn.Module]:
    def build(checkout: Path, num_classes: int) -> nn.Module:
        with _imported([checkout / "models"], {}) as load:
            return load(f"pointnet2_cls_{variant}").get_model(num_classes, normal_channel=False)

    return build


def _dgcnn(folder: str, cls: str) -> Callable[[Path, int], nn.Module]:
    def build(checkout: Path, num_classes: int) -> nn.Module:
        with _imported([checkout / folder], {}) as load:
            module = load("model")
            module.torch = _TorchWithoutCuda()
            options = Namespace(k=20, emb_dims=1024, dropout=0.5)
            return getattr(module, cls)(options, output_channels=num_classes)

    return build


def _pointmlp(factory: str) -> Callable[[Path, int], nn.Module]:
    def build(checkout: Path, num_classes: int) -> nn.Module:
        package, utils = (types.ModuleType(n) for n in ("pointnet2_ops", "pointnet2_ops.pointnet2_utils"))
        package.pointnet2_utils = utils  # type: ignore[attr-defined]
        utils.furthest_point_sample = lambda xyz, n: ops.furthest_point_sample(xyz, n).int()  # type: ignore[attr-defined]
        stubs = {"pointnet2_ops": package, "pointnet2_ops.pointnet2_utils": utils}
        with _imported([checkout / "classification_ModelNet40" / "models"], stubs) as load:
            return getattr(load("pointmlp"), factory)(num_classes)

    return build


def _rscnn(checkout: Path, num_classes: int) -> nn.Module:
    extension = types.ModuleType("_ext")
    extension.pointnet2 = types.SimpleNamespace()  # type: ignore[attr-defined]
    folders = [checkout / "models", checkout / "utils" / "pytorch_utils", checkout / "utils"]
    with _imported(folders, {"_ext": extension}) as load:
        utils = load("pointnet2_utils")
        utils.furthest_point_sample = ops.furthest_point_sample
        utils.gather_operation = _gather
        utils.grouping_operation = _gather
        utils.ball_query = _centred_ball_query
        return load("rscnn_ssn_cls").RSCNN_SSN(num_classes)


def _gather(features: Tensor, idx: Tensor) -> Tensor:
    """[B, C, N], [B, ...] -> [B, C, ...]."""
    flat = idx.long().flatten(1)[:, None].expand(-1, features.shape[1], -1)
    return features.gather(2, flat).view(*features.shape[:2], *idx.shape[1:])


def _centred_ball_query(radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor, fps_idx: Tensor) -> Tensor:
    """The CUDA kernel's rule in torch: hits by index with 0 < d² < r², rows filled with the centre, which
    is also put before them."""
    n = xyz.shape[1]
    squared = (new_xyz[:, :, None] - xyz[:, None]).square().sum(-1)
    hit = (squared < radius * radius) & (squared > 0)
    idx = torch.where(hit, torch.arange(n, device=xyz.device), n).sort(-1).values[..., :nsample]
    own = fps_idx.long()[..., None]
    return torch.cat([own, torch.where(idx < n, idx, own)], -1)


def _yanx27_search() -> dict[str, Callable[..., Tensor]]:
    return {"farthest_point_sample": ops.furthest_point_sample, "query_ball_point": ops.ball_query}


def _dgcnn_search() -> dict[str, Callable[..., Tensor]]:
    return {"knn": lambda x, k: ops.knn(x.transpose(1, 2), x.transpose(1, 2), k)[1]}


def _pointmlp_search() -> dict[str, Callable[..., Tensor]]:
    return {"knn_point": lambda k, xyz, new_xyz: ops.knn(new_xyz, xyz, k)[1]}


_CUDA_DEVICE = "torch.device('cuda') in get_graph_feature, by the CPU device"
_FPS = "pointnet2_ops.furthest_point_sample (CUDA only), by pointcmt's"
PUBLIC_STUDENTS = [
    PublicStudent(
        "pointnet2-ssg",
        "yanx27/Pointnet_Pointnet2_pytorch",
        "models/pointnet2_sem_seg_msg.py",
        _yanx27("ssg"),
        lambda k: students.pointnet2(k, "ssg"),
        "B3N",
        "nothing",
        _yanx27_search,
    ),
    PublicStudent(
        "pointnet2-msg",
        "yanx27/Pointnet_Pointnet2_pytorch",
        "models/pointnet2_sem_seg_msg.py",
        _yanx27("msg"),
        lambda k: students.pointnet2(k, "msg"),
        "B3N",
        "nothing",
        _yanx27_search,
    ),
    PublicStudent(
        "dgcnn",
        "antao97/dgcnn.pytorch",
        "main_semseg_s3dis.py",
        _dgcnn(".", "DGCNN_cls"),
        students.dgcnn,
        "B3N",
        _CUDA_DEVICE,
        _dgcnn_search,
    ),
    PublicStudent(
        "dgcnn-authors",
        "WangYueFt/dgcnn",
        "pytorch/model.py",
        _dgcnn("pytorch", "DGCNN"),
        students.dgcnn,
        "B3N",
        _CUDA_DEVICE,
        _dgcnn_search,
    ),
    PublicStudent(
        "rscnn",
        "Yochengliu/Relation-Shape-CNN",
        "models/rscnn_ssn_cls.py",
        _rscnn,
        students.rscnn,
        "BN3",
        "the CUDA extension: furthest_point_sample by pointcmt's, grouping and ball query by torch",
    ),
    PublicStudent(
        "pointmlp",
        "ma-xu/pointMLP-pytorch",
        "classification_ModelNet40/models/pointmlp.py",
        _pointmlp("pointMLP"),
        lambda k: students.pointmlp(k, "full"),
        "B3N",
        _FPS,
        _pointmlp_search,
    ),
    PublicStudent(
        "pointmlp-elite",
        "ma-xu/pointMLP-pytorch",
        "classification_ModelNet40/models/pointmlp.py",
        _pointmlp("pointMLPElite"),
        lambda k: students.pointmlp(k, "elite"),
        "B3N",
        _FPS,
        _pointmlp_search,
    ),
]
