"""Our networks for parts and scenes against the public classes, and the adapters of those: ``--repos DIR``.

OpenPoints' classes come from the installed package.
"""

from __future__ import annotations

import copy
import importlib.util
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks._public_students import _first_point, _imported, _TorchWithoutCuda
from pointcmt import ops, students
from pointcmt.adapters import find_adapter, verify_adapter
from pointcmt.adapters.proof import observe
from tests.third_party.catalogue import load
from tests.third_party.sandbox import checkout


@dataclass(frozen=True)
class Public:
    """A public class for parts or scenes.

    Attributes:
        name: of the test.
        marker: a file that tells a checkout of its repository; empty: the installed openpoints.
        build: checkout → the public network.
        ours: our network.
        channels: of its points.
        adapter: the adapter that must match.
    """

    name: str
    marker: str
    build: Callable[[Path], nn.Module]
    ours: Callable[[], nn.Module]
    channels: int
    adapter: str


def yanx27(file: str, *arguments: Any) -> Callable[[Path], nn.Module]:
    def build(root: Path) -> nn.Module:
        with _imported([root, root / "models"], {}) as importing:
            return importing(f"models.{file}").get_model(*arguments)

    return build


def antao97(name: str, k: int, *arguments: Any) -> Callable[[Path], nn.Module]:
    def build(root: Path) -> nn.Module:
        with _imported([root], {}) as importing:
            module = importing("model")
            module.torch = _TorchWithoutCuda()
            return getattr(module, name)(Namespace(k=k, emb_dims=1024, dropout=0.5), *arguments)

    return build


def openpoints(part: bool) -> Callable[[Path], nn.Module]:
    """As cfgs/shapenetpart/pointnext-s.yaml and cfgs/s3dis/pointnext-s.yaml of PointNeXt."""

    def build(_: Path) -> nn.Module:
        config = load("openpoints.utils:EasyConfig")()
        config.update(
            {
                "NAME": "BasePartSeg" if part else "BaseSeg",
                "encoder_args": {
                    "NAME": "PointNextEncoder",
                    "blocks": [1, 1, 1, 1, 1],
                    "strides": [1, 2, 2, 2, 2] if part else [1, 4, 4, 4, 4],
                    "width": 32,
                    "in_channels": 7 if part else 4,
                    "sa_layers": 3 if part else 2,
                    "sa_use_res": True,
                    "radius": 0.1,
                    "radius_scaling": 2.5 if part else 2,
                    "nsample": 32,
                    "expansion": 4,
                    "aggr_args": {"feature_type": "dp_fj", "reduction": "max"},
                    "group_args": {"NAME": "ballquery", "normalize_dp": True},
                    "conv_args": {"order": "conv-norm-act"},
                    "act_args": {"act": "relu"},
                    "norm_args": {"norm": "bn"},
                },
                "decoder_args": {"NAME": "PointNextPartDecoder", "cls_map": "curvenet"}
                if part
                else {"NAME": "PointNextDecoder"},
                "cls_args": {
                    "NAME": "SegHead",
                    "num_classes": 50 if part else 13,
                    "in_channels": None,
                    "norm_args": {"norm": "bn"},
                    **({"global_feat": "max,avg"} if part else {}),
                },
            }
        )
        return load("openpoints.models:build_model_from_cfg")(config)

    return build


YANX27, ANTAO97 = "models/pointnet2_sem_seg_msg.py", "main_semseg_s3dis.py"
PUBLIC = [
    *(
        Public(
            f"pointnet2-part-{variant}-{channels}",
            YANX27,
            yanx27(f"pointnet2_part_seg_{variant}", 50, channels == 6),
            lambda variant=variant, channels=channels: students.pointnet2_part(
                50, variant, in_channels=channels
            ),
            channels,
            "yanx27-pointnet2-part",
        )
        for variant, channels in (("ssg", 3), ("msg", 6))
    ),
    *(
        Public(
            f"pointnet2-scene-{variant}",
            YANX27,
            yanx27("pointnet2_sem_seg" + ("_msg" if variant == "msg" else ""), 13),
            lambda variant=variant: students.pointnet2_scene(13, variant),
            9,
            "yanx27-pointnet2-scene",
        )
        for variant in ("ssg", "msg")
    ),
    Public(
        "dgcnn-part",
        ANTAO97,
        antao97("DGCNN_partseg", 40, 50),
        lambda: students.dgcnn_part(50),
        3,
        "dgcnn-part",
    ),
    Public(
        "dgcnn-scene",
        ANTAO97,
        antao97("DGCNN_semseg_s3dis", 20),
        lambda: students.dgcnn_scene(13),
        9,
        "dgcnn-scene",
    ),
    Public(
        "pointnext-part",
        "",
        openpoints(True),
        lambda: students.pointnext_part(50, in_channels=7),
        7,
        "openpoints-part",
    ),
    Public(
        "pointnext-scene", "", openpoints(False), lambda: students.pointnext_scene(13), 7, "openpoints-scene"
    ),
]


@pytest.fixture(params=PUBLIC, ids=lambda public: public.name)
def pair(request, tmp_path) -> Iterator[tuple[Public, nn.Module, nn.Module]]:
    public = request.param
    root = request.config.getoption("--repos", default=None)
    place: Path | None = tmp_path
    with ExitStack() as stack:
        if public.marker:
            if not root:
                pytest.skip(
                    "needs checkouts of the public repositories: pytest tests/third_party --repos DIR"
                )
            place = next(
                (p.parents[public.marker.count("/")] for p in Path(root).glob(f"*/{public.marker}")), None
            )
            if place is None:
                pytest.skip(f"no checkout with {public.marker} in {root}")
        else:
            if importlib.util.find_spec("openpoints") is None:
                pytest.skip("openpoints is not installed: pip install openpoints (a development dependency)")
            stack.enter_context(checkout(tmp_path, cuda_on_cpu=True))
        assert place is not None
        torch.manual_seed(0)
        theirs, ours = public.build(place), public.ours()
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.1)
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        # their search rounds differently, so that of two nearly equal neighbours the other one may be taken
        for module in theirs.modules():
            names: dict[str, Any] = getattr(type(module).forward, "__globals__", {})
            if isinstance(names.get("farthest_point_sample"), types.FunctionType):
                names["farthest_point_sample"] = ops.furthest_point_sample
                names["query_ball_point"] = ops.ball_query
            if isinstance(names.get("knn"), types.FunctionType) and "get_graph_feature" in names:
                names["knn"] = lambda x, k: ops.knn(x.mT.contiguous(), x.mT.contiguous(), k)[1]
        if public.marker:  # in float64 no near tie decides; OpenPoints' kernels have float32 only
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
            theirs, ours = theirs.double(), ours.double()
        yield public, theirs, ours


def points_of(public: Public, dtype: torch.dtype | None = None) -> Tensor:
    count = 1040 if public.name.startswith("pointnet2-scene") else 520  # no fewer than the centres
    generator = torch.Generator().manual_seed(3)
    xyz = nn.functional.normalize(torch.randn(3, count, 3, generator=generator), dim=-1)
    if dtype is None:
        assert xyz.dtype == (torch.float64 if public.marker else torch.float32)
    xyz = xyz * (0.4 + 0.6 * torch.rand(3, count, 1, generator=generator))
    return torch.cat([xyz, torch.rand(3, count, public.channels - 3, generator=generator)], -1)


def call(public: Public, theirs: nn.Module, points: Tensor, category: Tensor | None) -> Tensor:
    """Class scores [B, N, K] of the public network, as its adapter calls it."""
    adapter = find_adapter(theirs)
    given = adapter.arrange(points, category)
    args = copy.deepcopy(given) if isinstance(given, tuple) else (copy.deepcopy(given),)
    with mock.patch.object(torch, "randint", _first_point):
        return adapter.per_point(theirs(*args))


@pytest.mark.slow
def test_names_outputs_gradients_and_adapter(pair):
    public, theirs, ours = pair
    parts = "part" in public.name
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    points = points_of(public)
    category = torch.tensor([0, 7, 15]) if parts else None
    adapter = find_adapter(theirs)
    assert adapter.name == public.adapter
    expected = call(public, theirs.train(), points, category)
    scores = ours.train()(points, category)
    got = scores.log_softmax(-1) if public.adapter.startswith("yanx27") else scores
    exact = 1e-7 if public.marker else 2e-3
    torch.testing.assert_close(got, expected, rtol=exact, atol=exact * expected.abs().max().item())
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * toward).sum().backward()
    (got * toward).sum().backward()
    largest = max(float(p.grad.norm()) for p in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        difference = (ours.get_parameter(name).grad - parameter.grad).norm()
        # in float32 of two nearly equal samples either may be the highest
        part = 1e-6 if public.marker else 0.1
        assert difference <= part * parameter.grad.norm() + 0.01 * part * largest, name
    with torch.no_grad():
        expected = call(public, theirs.eval(), points, category)
        ours.load_state_dict(theirs.state_dict())
        scores = ours.eval()(points, category)
        got = scores.log_softmax(-1) if public.adapter.startswith("yanx27") else scores
        torch.testing.assert_close(got, expected, rtol=exact, atol=exact)
        # the taps of the original say what ours says
        with mock.patch.object(torch, "randint", _first_point):
            report = verify_adapter(theirs, adapter.arrange(points, category))
            given = adapter.arrange(points, category)
            args = given if isinstance(given, tuple) else (given,)
            seen = observe(theirs, adapter, lambda: theirs(*args))
    assert report.local_shape[:2] == (3, points.shape[1])
    found = ours.encode(points, category)
    pooled = adapter.feature(seen.feature) if seen.global_ is None else seen.global_
    torch.testing.assert_close(pooled, found.global_, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen.local[0], found.local, rtol=1e-3, atol=1e-3)
    assert torch.equal(seen.local[1], points[..., :3])


@pytest.mark.slow
def test_images_teach_every_point_of_the_original(pair):
    """Dense distillation and Pic@Point on the public class itself, which is afterwards what it was."""
    from pointcmt import ImageTeacher
    from pointcmt.methods import DenseDistillation, PicAtPoint
    from pointcmt.views import ViewSpec

    public, theirs, _ = pair
    torch.set_default_dtype(torch.float32)
    theirs, points = theirs.float().train(), points_of(public, torch.float32)[:2]
    adapter, keys = find_adapter(theirs), list(theirs.state_dict())
    images = ImageTeacher(
        None, "simpleview_resnet", in_chans=1, feature_dim=16,
        backbone_options={"width": 0.125, "layers": (1, 1), "stem_stride": 2},
        view_spec=ViewSpec(rig="simpleview", size=32, splat=1.5),
    )  # fmt: skip
    for method in (DenseDistillation, PicAtPoint):
        options = {"hidden": 16, "local_points": 64}
        given = adapter.arrange(points)
        with (
            mock.patch.object(torch, "randint", _first_point),
            method(images, theirs, points=given, **options) as pre,
        ):
            assert pre.report.local_shape[:2] == (2, points.shape[1])
            adapter.call(theirs, points)
            loss = pre.loss(views=images.project(points[..., :3], cameras=True))
            theirs.zero_grad()
            loss.backward()
        taught = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in theirs.parameters()]
        # a fresh T-Net ends in zeros, which let no gradient through
        assert loss.isfinite() and sum(taught) > len(taught) / 2
    assert list(theirs.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in theirs.modules())
