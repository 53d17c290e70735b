"""Pang-Yatian/Point-MAE, and the codebases that took over its fine-tuning head (ACT, ReCon, PointMamba, …).

Clouds are [B, N, 3]. The head is three linear layers with normalisation and dropout; the tap is before its
last two, at the 256-d input of the first dropout.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import THREE_LAYERS, layers, run_from
from pointcmt.adapters.registry import register_adapter


def _is_point_mae(module: nn.Module) -> bool:
    return layers(module.cls_head_finetune, *THREE_LAYERS)


@register_adapter(
    name="point-mae", matches=_is_point_mae, feature_module="cls_head_finetune.3", feature_from="input"
)
def point_mae(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.cls_head_finetune, 3, feature)
