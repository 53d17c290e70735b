"""Strawberry-Eat-Mango/PCT_Pytorch: the Point Cloud Transformer in PyTorch, classification.

Clouds are [B, 3, N]. The head is DGCNN's; the tap is before its last two layers: the 512-d input of ``dp1``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import DGCNN_HEAD, has, lacks
from pointcmt.adapters.registry import register_adapter


def has_pct_parts(module: nn.Module) -> bool:
    return has(module, gather_local_0=nn.Module, pt_last=nn.Module, conv_fuse=nn.Sequential, **DGCNN_HEAD)


@register_adapter(
    name="pct",
    matches=lambda module: has_pct_parts(module) and lacks(module, "relu"),  # with it: point_transformers.py
    feature_module="dp1",
    feature_from="input",
    input_layout="B3N",
)
def pct(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.leaky_relu(module.bn7(module.linear2(module.dp1(feature))), negative_slope=0.2)  # theirs
    return module.linear3(module.dp2(hidden))
