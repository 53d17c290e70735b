"""Public classifiers that pointcmt has no adapter of: they stand for the network that a user brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from tests.third_party.catalogue import Case, Config, _args
from tests.third_party.sandbox import load

_HIERARCHY = {
    "smooth": 0.3,
    "encoder_depths": [5, 5, 5],
    "encoder_dims": [96, 192, 384],
    "num_groups": [512, 256, 64],
    "drop_path_rate": 0.1,
    "num_heads": 6,
}
_TOKENS = {
    "depth": 12,
    "drop_path_rate": 0.1,
    "cls_dim": 40,
    "num_heads": 6,
    "group_size": 32,
    "num_group": 64,
    "encoder_dims": 384,
}


def _case(codebase: str, label: str, marker: str, build: Callable[[], nn.Module], **rest: Any) -> Case:
    common: Mapping[str, Any] = {"adapter": "", "layout": "", "unprepared": True}
    return Case(codebase=codebase, label=label, marker=marker, build=build, **{**common, **rest})


def _transformers() -> Iterator[Case]:
    for codebase, name, sizes, radii in (
        ("ZrrSkywalker/Point-M2AE", "Point_M2AE", [16, 8, 8], [0.32, 0.64, 1.28]),
        ("ZrrSkywalker/I2P-MAE", "I2P_MAE", [48, 24, 24], [0.24, 0.48, 0.96]),
    ):
        yield _case(
            codebase,
            f"{name}_ModelNet40",
            f"models/{name}_Finetune.py",
            lambda name=name, sizes=sizes, radii=radii: load(f"models.{name}_Finetune:{name}_ModelNet40")(
                Config(_HIERARCHY, group_sizes=sizes, local_radius=radii)
            ),
            adapter="point-mae-head",
            stubs={"clip_attn": {}} if name == "I2P_MAE" else {},
        )
    yield _case(
        "RunpeiDong/ACT",
        "PointTransformer (fine-tuning)",
        "models/act.py",
        lambda: load("models.act:PointTransformer")(
            Config(_TOKENS, embed_dim=384, transfer_type="full", type="full")
        ),
        stubs={"mmcv": {}, "mmcv.utils": {"collect_env": None, "get_git_hash": None}},
    )
    yield _case(
        "CGuangyan-BIT/PointGPT",
        "PointTransformer (fine-tuning)",
        "models/PointGPT.py",
        lambda: load("models.PointGPT:PointTransformer")(Config(_TOKENS, trans_dim=384, decoder_depth=4)),
    )
    yield _case(
        "qizekun/ReCon",
        "PointTransformer (fine-tuning)",
        "models/ReCon.py",
        lambda: load("models.transformer:PointTransformer")(
            Config(_TOKENS, trans_dim=384, embed_dim=384, type="full", transfer_type="full")
        ),
        stubs={"clip": {"clip": None}},
    )


def _convolutions() -> Iterator[Case]:
    yield _case(
        "Yochengliu/DensePoint",
        "DensePoint (L6, k24, g2)",
        "models/densepoint_cls_L6_k24_g2.py",
        lambda: load("models.densepoint_cls_L6_k24_g2:DensePoint")(num_classes=40),
        paths=(".", "utils"),
        hard_codes_cuda=True,
    )
    yield _case(
        "DylanWusee/pointconv_pytorch",
        "PointConvDensityClsSsg",
        "model/pointconv.py",
        lambda: load("model.pointconv:PointConvDensityClsSsg")(num_classes=40),
        stubs={"sklearn.neighbors.kde": {"KernelDensity": None}},
    )
    yield _case(
        "cszyzhang/riconv2",
        "RIConv++",
        "models/riconv2_cls.py",
        lambda: load("riconv2_cls:get_model")(40, 2, normal_channel=True),
        paths=(".", "models"),
        hard_codes_cuda=True,
        refused="This function was deprecated since version 1.9 and is now removed",
        note="does not run on current PyTorch: it calls `torch.symeig`",
    )
    yield _case(
        "yahuiliu99/PointConT",
        "PointConT_cls",
        "models/PointConT.py",
        lambda: load("models.PointConT:PointConT_cls")(
            Config(
                num_points=1024, num_classes=40, down_ratio=[2, 4, 8, 16, 32], patch_size=[16] * 5,
                local_size=[16] * 5, patch_dim=[3, 64, 128, 256, 512, 1024], num_heads=4, dropout=0.5,
            )
        ),
        hard_codes_cuda=True,
    )  # fmt: skip
    yield _case(
        "ZrrSkywalker/Point-NN",
        "Point_PN_mn40",
        "models/point_pn.py",
        lambda: load("models.point_pn:Point_PN_mn40")(),
        hard_codes_cuda=True,
    )
    for kind in ("cls_ssg", "cls_msg"):
        yield _case(
            "zhulf0804/Pointnet2.PyTorch",
            f"pointnet2_{kind}",
            "models/pointnet2_cls.py",
            lambda kind=kind: load(f"models.pointnet2_cls:pointnet2_{kind}")(6, 40),
        )
    for kind in ("Msg", "Ssg"):
        yield _case(
            "Jiang-Muyun/PointNet12",
            f"PointNet2Cls{kind}",
            "model/pointnet2.py",
            lambda kind=kind: load(f"model.pointnet2:PointNet2Cls{kind}")(),
        )
        yield _case(
            "halimacc/pointnet3",
            f"PointNet2Cls{kind}",
            "transform_nets.py",
            lambda kind=kind: load(f"pointnet2:PointNet2Cls{kind}")(),
        )


_EDGES = {"k": 20, "emb_dims": 1024, "dropout": 0.5, "num_points": 1024}


def _edge_convolutions() -> Iterator[Case]:
    for name in ("DGCNNCls_vanilla", "DGCNNCls_vanilla_2"):
        yield _case(
            "ToughStoneX/DGCNN",
            name,
            "Model/dynami_graph_cnn.py",
            lambda name=name: load(f"Model.dynami_graph_cnn:{name}")(40),
            stubs={"torchsummary": {"summary": None}},
        )
    yield _case(
        "ShiQiu0419/GBNet",
        "GBNet",
        "model.py",
        lambda: load("model:GBNet")(_args(**_EDGES)),
        hard_codes_cuda=True,
    )
    for file, name in (("ms_dgcnn", "MS_DGCNN"), ("ms_dgcnn2", "MS_DGCNN2")):
        yield _case(
            "said-ohamouddou/MS-DGCNN2",
            name,
            "ms_dgcnn2_model.py",
            lambda file=file, name=name: load(f"{file}_model:{name}")(_args(**_EDGES)),
            hard_codes_cuda=True,
        )
    yield _case(
        "packyan/DGCNN-Pytorch",
        "DGCNN",
        "models/DGCNN.py",
        lambda: load("models.DGCNN:DGCNN")(_args(**_EDGES)),
        hard_codes_cuda=True,
    )
    yield _case(
        "usherbob/dgcnn.pytorch",
        "DGCNN_cls",
        "model.py",
        lambda: load("model:DGCNN_cls")(_args(**_EDGES)),
        hard_codes_cuda=True,
    )
    yield _case(
        "hansen7/OcCo",
        "dgcnn_cls",
        "OcCo_Torch/models/dgcnn_cls.py",
        lambda: load("dgcnn_cls:get_model")(_args(**_EDGES)),
        paths=("OcCo_Torch/models", "OcCo_Torch/utils"),
        hard_codes_cuda=True,
    )
    yield _case(
        "AnTao97/UnsupervisedPointCloudReconstruction",
        "ClassificationNet",
        "model.py",
        lambda: load("model:ClassificationNet")(
            _args(
                k=20,
                feat_dims=512,
                dropout=0.5,
                encoder="dgcnn_cls",
                eval=False,
                task="classify",
                dataset="modelnet40",
            )
        ),
        hard_codes_cuda=True,
    )
    for kind in ("pointnet", "dgcnn"):
        yield _case(
            "FlyingGiraffe/vnn",
            f"vn_{kind}_cls",
            f"models/vn_{kind}_cls.py",
            lambda kind=kind: load(f"vn_{kind}_cls:get_model")(
                _args(n_knn=20, pooling="mean"), 40, normal_channel=False
            ),
            paths=(".", "models"),
            hard_codes_cuda=True,
        )


def _pointnets() -> Iterator[Case]:
    yield _case(
        "hansen7/OcCo",
        "pcn_cls",
        "OcCo_Torch/models/pcn_cls.py",
        lambda: load("pcn_cls:get_model")(),
        paths=("OcCo_Torch/models", "OcCo_Torch/utils"),
    )
    yield _case(
        "hansen7/OcCo",
        "pointnet_cls",
        "OcCo_Torch/models/pointnet_cls.py",
        lambda: load("pointnet_cls:get_model")(),
        paths=("OcCo_Torch/models", "OcCo_Torch/utils"),
        hard_codes_cuda=True,
    )
    yield _case(
        "ToughStoneX/DGCNN",
        "PointNet",
        "Model/pointnet.py",
        lambda: load("Model.pointnet:PointNet")(40),
        stubs={"torchsummary": {"summary": None}},
    )
    yield _case(
        "halimacc/pointnet3", "PointNetCls", "transform_nets.py", lambda: load("pointnet:PointNetCls")()
    )
    yield _case(
        "Jiang-Muyun/PointNet12",
        "PointNetCls",
        "model/pointnet2.py",
        lambda: load("model.pointnet:PointNetCls")(40),
    )
    yield _case(
        "meder411/PointNet-PyTorch",
        "PointNetClassifier",
        "models/pointnet_classifier.py",
        lambda: load("models.pointnet_classifier:PointNetClassifier")(1024, 3),
        hard_codes_cuda=True,
    )
    yield _case(
        "nikitakaraevv/pointnet",
        "PointNet",
        "source/model.py",
        lambda: load("source.model:PointNet")(),
    )
    for pool in ("mean", "max", "max1"):
        yield _case(
            "manzilzaheer/DeepSets",
            f"D ({pool})",
            "PointClouds/classifier.py",
            lambda pool=pool: load("classifier:D")(256, pool=pool),
            paths=("PointClouds",),
        )
    for name in ("DeepSet", "SetTransformer"):
        yield _case(
            "juho-lee/set_transformer",
            name,
            "main_pointcloud.py",
            lambda name=name: load(f"models:{name}")(3, 1, 40),
        )


UNPREPARED: tuple[Case, ...] = (
    *_transformers(),
    *_convolutions(),
    *_edge_convolutions(),
    *_pointnets(),
)


def geometric_cases() -> Iterator[Case]:
    """Networks of PyTorch Geometric's own parts: those that need none of its compiled companions."""
    yield _case("pyg-team/pytorch_geometric", "MLP, max pooling, MLP", "", geometric_pointnet)


def geometric_pointnet() -> nn.Module:
    """A PointNet of PyG's layers on its ``Data``, as its examples put them together."""
    MLP, pool = load("torch_geometric.nn:MLP"), load("torch_geometric.nn:global_max_pool")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.points = MLP([3, 64, 256])
            self.head = MLP([256, 128, 64, 40], dropout=0.5)

        def forward(self, data: Any) -> Any:
            return self.head(pool(self.points(data.pos), data.batch))

    return Net()
