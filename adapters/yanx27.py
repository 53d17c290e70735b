"""yanx27/Pointnet_Pointnet2_pytorch: PointNet++ (SSG and MSG) and PointNet, classification; PointNet++ for
parts and scenes.

Both take clouds channels first, with normals if they were built so, and return log-probabilities first.
The PointNet here descends from fxia22/pointnet.pytorch, whose ``PointNetCls`` has the same parts; the
feature is the same in all of them: 512-d, after ``relu(bn1(fc1))``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import (
    BATCH_NORM,
    has,
    highest,
    lacks,
    per_point,
    pooled,
    stage,
)
from pointcmt.adapters.registry import Adapter, Tap, first_tensor, register_adapter


def _is_pointnet2(module: nn.Module) -> bool:
    # pointcmt's own student has the same parts, but takes [B, N, 3] and has no such switch
    return hasattr(module, "normal_channel") and has(
        module,
        sa1=nn.Module,
        sa2=nn.Module,
        sa3=nn.Module,
        fc1=nn.Linear,
        bn1=BATCH_NORM,
        drop1=nn.Dropout,
        fc2=nn.Linear,
        bn2=BATCH_NORM,
        drop2=nn.Dropout,
        fc3=nn.Linear,
    )


def _is_pointnet(module: nn.Module) -> bool:
    return has(
        module,
        feat=nn.Module,
        fc1=nn.Linear,
        bn1=BATCH_NORM,
        fc2=nn.Linear,
        dropout=nn.Dropout,
        bn2=BATCH_NORM,
        fc3=nn.Linear,
    ) and lacks(module, "drop1")


@register_adapter(
    name="yanx27-pointnet2",
    matches=_is_pointnet2,
    feature_module="drop1",
    feature_from="input",
    input_layout="B3N",
    local=stage("sa2", channels_first_centers=True),
    global_=pooled("fc1"),
)
def pointnet2(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = module.drop2(F.relu(module.bn2(module.fc2(module.drop1(feature)))))
    return F.log_softmax(module.fc3(hidden), dim=-1)


@register_adapter(
    name="yanx27-pointnet",
    matches=_is_pointnet,
    feature_module="fc2",
    feature_from="input",
    input_layout="B3N",
    global_=pooled("fc1"),
)
def pointnet(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.relu(
        module.bn2(module.dropout(module.fc2(feature)))
    )  # dropout before the normalisation: theirs
    return F.log_softmax(module.fc3(hidden), dim=-1)


def _is_segmentation(module: nn.Module) -> bool:
    return lacks(module, "fc1", "pool") and has(
        module,
        sa1=nn.Module,
        sa3=nn.Module,
        fp1=nn.Module,
        conv1=nn.Conv1d,
        bn1=BATCH_NORM,
        drop1=nn.Dropout,
        conv2=nn.Conv1d,
    )


def _last_norm(module: nn.Module) -> str:
    """The last normalisation of the last level: after it come ReLU and the maximum."""
    level = "sa4" if hasattr(module, "sa4") else "sa3"
    found = module.get_submodule(level)
    if has(found, mlp_bns=nn.ModuleList):
        return f"{level}.mlp_bns.{len(found.mlp_bns) - 1}"
    return f"{level}.bn_blocks.{len(found.bn_blocks) - 1}.{len(found.bn_blocks[-1]) - 1}"


def _whole(x: Tensor) -> Tensor:
    return highest(F.relu(x))


def _coarsest(path: str) -> Tap:
    """The features that the first propagation starts from, over all of their centres."""
    return Tap(path, "input", lambda _module, tapped, _inputs: highest(tapped[3]))


for _name, _scene in (("yanx27-pointnet2-part", False), ("yanx27-pointnet2-scene", True)):
    register_adapter(
        Adapter(
            name=_name,
            matches=lambda module, scene=_scene: _is_segmentation(module) and hasattr(module, "sa4") == scene,
            feature_module=_last_norm,
            feature_from="output",
            feature=_whole,
            input_layout="B3N" if _scene else "B3N,onehot16",
            local=per_point("drop1", "input"),
            global_=_coarsest("fp4" if _scene else "fp3"),
            per_point=first_tensor,
        )
    )
