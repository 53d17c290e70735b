"""The third-party networks that the conformance suite knows: where each is, how it is built, what it needs.

A codebase is found by a file that few others have; a folder of its name comes first.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from pointcmt.adapters import Adapter
from tests.third_party.sandbox import load


@dataclass(frozen=True)
class Case:
    """One class of one codebase.

    Attributes:
        codebase: owner/name of the public repository.
        label: the class, as the table shows it.
        marker: a file of the checkout that tells the codebase; ``find`` looks for it.
        adapter: name of the adapter that must be found; of those that are not ``unprepared``.
        build: makes the network, inside :func:`tests.third_party.sandbox.checkout`.
        paths: folders to put on ``sys.path``.
        stubs: packages imported there but not needed here.
        layout: how its input is arranged (a key of ``pointcmt.adapters.INPUT_LAYOUTS``); the check finds it
            out. Empty where that does not matter.
        points: points per cloud.
        channels: 3, or 6 with normals.
        hard_codes_cuda: its forward pass asks for CUDA by name.
        own: the adapter that has to be written for it.
        refused: part of the error where there is none.
        note: of either, what the table says.
        unprepared: pointcmt has no adapter for its codebase.
        needs: packages without which it cannot be imported.
    """

    codebase: str
    label: str
    marker: str
    adapter: str
    build: Callable[[], nn.Module]
    paths: tuple[str, ...] = (".",)
    stubs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layout: str = "BN3"
    points: int = 1024
    channels: int = 3
    hard_codes_cuda: bool = False
    own: Adapter | None = None
    refused: str = ""
    note: str = ""
    unprepared: bool = False
    needs: tuple[str, ...] = ()

    def find(self, repos: Path) -> Path | None:
        """The checkout in ``repos`` that holds the marker, one of that name first; or ``repos`` itself."""
        name = self.codebase.rpartition("/")[2]
        folders = sorted(path for path in repos.iterdir() if path.is_dir())
        folders.sort(key=lambda folder: folder.name not in (name, self.codebase.replace("/", "+")))
        return next((folder for folder in [*folders, repos] if (folder / self.marker).exists()), None)


def commit_of(folder: Path) -> str:
    """The commit of a checkout: from git, or from a file ``.commit`` beside exported sources."""
    if (folder / ".commit").exists():
        return (folder / ".commit").read_text().strip()
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


class Config(dict):
    """A configuration that is read as attributes, as EasyDict and OmegaConf are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _args(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


class _Blocks(nn.Sequential):
    """``etw_pytorch_utils.Seq``, no longer published: a Sequential that grows by ``.fc`` and ``.dropout``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def fc(self, width: int, bn: bool = False, activation: Any = nn.ReLU(inplace=True)) -> _Blocks:  # noqa: B008
        block = nn.Sequential(nn.Linear(self.width, width, bias=not bn))
        if bn:
            block.append(nn.BatchNorm1d(width))
        if activation is not None:
            block.append(activation)
        self.append(block)
        self.width = width
        return self

    def dropout(self, p: float) -> _Blocks:
        self.append(nn.Dropout(p))
        return self


def _shared_mlp(widths: list[int], bn: bool = True) -> nn.Sequential:
    from pointcmt.compat.pointnet2_ops.pointnet2_modules import build_shared_mlp

    return build_shared_mlp(widths, bn=bn)


_ETW = {"etw_pytorch_utils": {"Seq": _Blocks, "SharedMLP": _shared_mlp}}
_LIGHTNING = {  # its networks were written for a Lightning that let hparams be assigned
    "pytorch_lightning": {"LightningModule": nn.Module},
    "pointnet2.data": {"Indoor3DSemSeg": None, "ModelNet40Cls": None},
    "pointnet2.data.data_utils": {},
    "pointnet2.data.Indoor3DSemSegLoader": {"Indoor3DSemSeg": None},
    "pointnet2.data.ModelNet40Loader": {"ModelNet40Cls": None},
}
_SIMPLEVIEW = {  # all_utils imports names that Python dropped in 3.10, and progress bars
    **_ETW,
    "all_utils": {"DATASET_NUM_CLASS": {"modelnet40": 40}},
    "torchvision.models.utils": {"load_state_dict_from_url": None},
}

_DGCNN_ARGS = {"k": 20, "emb_dims": 1024, "dropout": 0.5}
_REPSURF_ARGS = {
    "num_class": 15,
    "num_point": 1024,
    "return_dist": True,
    "return_center": True,
    "return_polar": True,
    "group_size": 8,
    "umb_pool": "sum",
    "cuda_ops": False,
}
_TRANSFORMER = {
    "trans_dim": 384,
    "depth": 12,
    "drop_path_rate": 0.1,
    "cls_dim": 40,
    "num_heads": 6,
    "group_size": 32,
    "num_group": 64,
}


def _erikwijmans(kind: str) -> nn.Module:
    network = load(f"pointnet2.models.pointnet2_{kind.lower()}_cls:PointNet2Classification{kind}")
    return network({"model.use_xyz": True})


def _point_transformer(author: str, **model: Any) -> nn.Module:
    network = load(f"models.{author}.model:PointTransformerCls")
    return network(Config(num_point=1024, num_class=40, input_dim=6, model=Config(model)))


def _simpleview(name: str, **options: Any) -> nn.Module:
    return load(f"models.{name}")(dataset="modelnet40", **options)


YANX27 = "yanx27/Pointnet_Pointnet2_pytorch"
ERIKWIJMANS = "erikwijmans/Pointnet2_PyTorch"
MAXU = "ma-xu/pointMLP-pytorch"
SIMPLEVIEW = "princeton-vl/SimpleView"
TRANSFORMERS = "qq456cvb/Point-Transformers"
POINTNEXT = "guochengqian/openpoints"


def _yanx27() -> Iterator[Case]:
    common = {
        "codebase": YANX27,
        "marker": "models/pointnet_sem_seg.py",
        "paths": (".", "models"),
        "layout": "B3N",
    }
    for kind in ("ssg", "msg"):
        for channels in (3, 6):
            yield Case(
                label=f"pointnet2_cls_{kind}" + (" with normals" if channels == 6 else ""),
                adapter="yanx27-pointnet2",
                build=lambda kind=kind, channels=channels: load(f"pointnet2_cls_{kind}:get_model")(
                    40, normal_channel=channels == 6
                ),
                channels=channels,
                **common,
            )
    yield Case(
        label="pointnet_cls",
        adapter="yanx27-pointnet",
        build=lambda: load("pointnet_cls:get_model")(40, normal_channel=False),
        **common,
    )


def _pointmlp() -> Iterator[Case]:
    for folder in ("classification_ModelNet40", "classification_ScanObjectNN"):
        for name in ("pointMLP", "pointMLPElite"):
            yield Case(
                codebase=MAXU,
                label=f"{name} ({folder.removeprefix('classification_')})",
                marker="classification_ModelNet40/models/pointmlp.py",
                adapter="pointmlp",
                build=lambda name=name: load(f"models.pointmlp:{name}")(num_classes=40),
                paths=(folder,),
                layout="B3N",
            )


def _simpleviews() -> Iterator[Case]:
    common = {
        "codebase": SIMPLEVIEW,
        "marker": "models/mv_utils.py",
        "paths": (".", "pointnet2_pyt", "rs_cnn/utils"),
        "stubs": _SIMPLEVIEW,
    }
    wrappers = {
        "PointNet": ("models.pointnet:PointNet", {"task": "cls_trans"}, False),
        "PointNet2": ("models.pointnet2:PointNet2", {"task": "cls", "version_cls": 1.0}, False),
        "RSCNN": ("models.rscnn:RSCNN", {"task": "cls", "ssn_or_msn": True}, False),
        "DGCNN": ("models.dgcnn:DGCNN", {"task": "cls"}, True),
    }
    for label, (name, options, cuda) in wrappers.items():
        yield Case(
            label=label,
            adapter="simpleview-wrapper",
            build=lambda name=name, options=options: load(name)(dataset="modelnet40", **options),
            hard_codes_cuda=cuda,
            **common,
        )
    yield Case(
        label="MVModel (SimpleView)",
        adapter="simpleview",
        build=lambda: load("models.mv:MVModel")(
            task="cls", dataset="modelnet40", backbone="resnet18", feat_size=16
        ),
        hard_codes_cuda=True,
        **common,
    )


def _point_transformers() -> Iterator[Case]:
    common = {"codebase": TRANSFORMERS, "marker": "models/Hengshuang/model.py", "channels": 6}
    yield Case(
        label="Hengshuang",
        adapter="point-transformers-hengshuang",
        build=lambda: _point_transformer("Hengshuang", nneighbor=16, nblocks=4, transformer_dim=512),
        **common,
    )
    yield Case(
        label="Menghao",
        adapter="point-transformers-menghao",
        build=lambda: _point_transformer("Menghao"),
        **common,
    )
    yield Case(
        label="Nico",
        adapter="point-transformers-nico",
        build=lambda: _point_transformer(
            "Nico", n_head=8, m=4, k=64, global_k=128, global_dim=512, local_dim=256, reduce_dim=64
        ),
        **common,
    )


def openpoints_model(name: str, **encoder: Any) -> nn.Module:
    """``BaseCls`` with ``ClsHead`` on the encoder of that name, from the installed ``openpoints``."""
    config = load("openpoints.utils:EasyConfig")()
    head = {"NAME": "ClsHead", "num_classes": 40, "mlps": [512, 256], "norm_args": {"norm": "bn1d"}}
    config.update({"NAME": "BaseCls", "encoder_args": {"NAME": name, **encoder}, "cls_args": head})
    config.criterion_args = {"NAME": "CrossEntropy"}
    return load("openpoints.models:build_model_from_cfg")(config)


_BALL = {"conv_args": {"order": "conv-norm-act"}, "act_args": {"act": "relu"}, "norm_args": {"norm": "bn"}}


def openpoints_pointmlp() -> nn.Module:
    config = load("openpoints.utils:EasyConfig")()
    config.update({"NAME": "PointMLP", "num_classes": 40, "points": 1024})
    return load("openpoints.models:build_model_from_cfg")(config)


def openpoints_pointnet2() -> nn.Module:
    return openpoints_model(
        "PointNet2Encoder",
        in_channels=3,
        width=None,
        layers=3,
        use_res=False,
        strides=[2, 4, 1],
        mlps=[[[64, 64, 128]], [[128, 128, 256]], [[256, 512, 1024]]],
        radius=[0.2, 0.4, None],
        num_samples=[32, 64, None],
        sampler="fps",
        aggr_args={"NAME": "convpool", "feature_type": "dp_fj", "anisotropic": False, "reduction": "max"},
        group_args={"NAME": "ballquery", "use_xyz": True, "normalize_dp": False},
        **_BALL,
    )


def openpoints_pointnext() -> nn.Module:
    return openpoints_model(
        "PointNextEncoder",
        blocks=[1, 1, 1, 1, 1, 1],
        strides=[1, 2, 2, 2, 2, 1],
        width=32,
        in_channels=3,
        radius=0.15,
        radius_scaling=1.5,
        sa_layers=2,
        sa_use_res=True,
        nsample=32,
        expansion=4,
        aggr_args={"feature_type": "dp_fj", "reduction": "max"},
        group_args={"NAME": "ballquery", "normalize_dp": True},
        **_BALL,
    )


def openpoints_dgcnn() -> nn.Module:
    return openpoints_model(
        "DGCNN",
        in_channels=3,
        channels=64,
        n_classes=40,
        emb_dims=1024,
        n_blocks=5,
        conv="edge",
        k=20,
        dropout=0.5,
        norm_args={"norm": "bn"},
        act_args={"act": "leakyrelu", "negative_slope": 0.2},
    )


def openpoints_pointnet() -> nn.Module:
    return openpoints_model("PointNetEncoder", in_channels=3, is_seg=False, input_transform=False)


def openpoints_cases() -> Iterator[Case]:
    """From the installed package; its pure-PyTorch classes run anywhere, the others over our stand-in."""
    builders = {
        "PointNet": (openpoints_pointnet, "openpoints", False),
        "PointNet++": (openpoints_pointnet2, "openpoints-pointnet2", True),
        "PointNeXt-S": (openpoints_pointnext, "openpoints-pointnext", True),
        "DGCNN": (openpoints_dgcnn, "openpoints-dgcnn", True),
        "PointMLP": (openpoints_pointmlp, "openpoints-pointmlp", True),
    }
    for label, (build, adapter, cuda) in builders.items():
        yield Case(
            codebase=POINTNEXT,
            label=label,
            marker="",
            adapter=adapter,
            build=build,
            layout="pos_x",
            points=512,
            hard_codes_cuda=cuda,
        )


def _others() -> Iterator[Case]:
    for kind in ("SSG", "MSG"):
        yield Case(
            codebase=ERIKWIJMANS,
            label=f"PointNet2Classification{kind}",
            marker="pointnet2/models/pointnet2_ssg_cls.py",
            adapter="erikwijmans-pointnet2",
            build=lambda kind=kind: _erikwijmans(kind),
            stubs=_LIGHTNING,
            channels=6,
        )
    for codebase, marker, folder, name in (
        ("WangYueFt/dgcnn", "pytorch/model.py", "pytorch", "DGCNN"),
        ("antao97/dgcnn.pytorch", "main_semseg_s3dis.py", ".", "DGCNN_cls"),
    ):
        common = {"codebase": codebase, "marker": marker, "paths": (folder,), "layout": "B3N"}
        yield Case(
            label=name,
            adapter="dgcnn",
            build=lambda name=name: load(f"model:{name}")(_args(**_DGCNN_ARGS)),
            hard_codes_cuda=True,
            **common,
        )
        yield Case(
            label="PointNet",
            adapter="dgcnn-pointnet",
            build=lambda: load("model:PointNet")(_args(**_DGCNN_ARGS)),
            **common,
        )
    yield Case(
        codebase="Yochengliu/Relation-Shape-CNN",
        label="RSCNN_SSN",
        marker="models/rscnn_ssn_cls.py",
        adapter="rscnn",
        build=lambda: load("models.rscnn_ssn_cls:RSCNN_SSN")(num_classes=40),
        paths=(".", "utils"),
        hard_codes_cuda=True,
    )
    yield Case(
        codebase="tiangexiang/CurveNet",
        label="CurveNet",
        marker="core/models/curvenet_cls.py",
        adapter="curvenet",
        build=lambda: load("models.curvenet_cls:CurveNet")(num_classes=40),
        paths=("core",),
        layout="B3N",
    )
    yield Case(
        codebase="Strawberry-Eat-Mango/PCT_Pytorch",
        label="Pct",
        marker="model_new.py",
        adapter="pct",
        build=lambda: load("model:Pct")(_args(dropout=0.5)),
        layout="B3N",
    )
    for label, name in (("RepSurf-U", "repsurf_ssg_umb"), ("RepSurf-U 2x", "repsurf_ssg_umb_2x")):
        yield Case(
            codebase="hancyran/RepSurf",
            label=label,
            marker="classification/modules/repsurface_utils.py",
            adapter="repsurf",
            build=lambda name=name: load(f"models.repsurf.{name}:Model")(_args(**_REPSURF_ARGS)),
            paths=("classification",),
            layout="B3N",
        )
    yield Case(
        codebase="Pang-Yatian/Point-MAE",
        label="PointTransformer (fine-tuning)",
        marker="models/Point_MAE.py",
        adapter="point-mae",
        build=lambda: load("models.Point_MAE:PointTransformer")(Config(_TRANSFORMER, encoder_dims=384)),
    )
    yield Case(
        codebase="lulutang0608/Point-BERT",
        label="PointTransformer (fine-tuning)",
        marker="models/Point_BERT.py",
        adapter="point-bert",
        build=lambda: load("models.Point_BERT:PointTransformer")(Config(_TRANSFORMER, encoder_dims=256)),
    )
    yield Case(
        codebase="mutianxu/GDANet",
        label="GDANET",
        marker="model/GDANet_cls.py",
        adapter="gdanet",
        build=lambda: load("model.GDANet_cls:GDANET")(),
        layout="B3N",
        hard_codes_cuda=True,
    )
    yield Case(
        codebase="ZhanHeshen/PointCMT",
        label="PointNet2 (the paper's own code)",
        marker="train_pointcmt.py",
        adapter="pointcmt-original",
        build=lambda: load("models.pointnet2:PointNet2")(num_class=40),
        paths=(".", "pointnet2"),
        stubs=_ETW,
    )
    yield Case(
        codebase="fxia22/pointnet.pytorch",
        label="PointNetCls",
        marker="pointnet/model.py",
        adapter="yanx27-pointnet",
        build=lambda: load("pointnet.model:PointNetCls")(k=40, feature_transform=True),
        layout="B3N",
    )


CASES: tuple[Case, ...] = (
    *_yanx27(),
    *_others(),
    *_pointmlp(),
    *_simpleviews(),
    *_point_transformers(),
)
