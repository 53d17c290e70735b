"""yanx27/Pointnet_Pointnet2_pytorch: PointNet++ (SSG and MSG) and PointNet, classification.

Both take clouds channels first, with normals if they were built so, and return log-probabilities first.
The PointNet here descends from fxia22/pointnet.pytorch, whose ``PointNetCls`` has the same parts; the
feature is the same in all of them: 512-d, after ``relu(bn1(fc1))``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import BATCH_NORM, has, lacks, pooled, stage
from pointcmt.adapters.registry import register_adapter


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
