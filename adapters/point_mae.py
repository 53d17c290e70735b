"""Pang-Yatian/Point-MAE, and the codebases that took over its fine-tuning head (ACT, ReCon, PointMamba, …).

Clouds are [B, N, 3]. The head is three linear layers with normalisation and dropout; the tap is before its
last two, at the 256-d input of the first dropout.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import THREE_LAYERS, has, layers, pooled, run_from, tokens
from pointcmt.adapters.registry import register_adapter


def _is_point_mae(module: nn.Module) -> bool:
    return layers(module.cls_head_finetune, *THREE_LAYERS)


def _has_tokens(module: nn.Module) -> bool:
    return has(module, group_divider=nn.Module, norm=nn.LayerNorm)


@register_adapter(
    name="point-mae-head",  # of a backbone of another kind
    matches=lambda module: _is_point_mae(module) and not _has_tokens(module),
    feature_module="cls_head_finetune.3",
    feature_from="input",
    global_=pooled("cls_head_finetune.0"),
)
def point_mae_head(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.cls_head_finetune, 3, feature)


@register_adapter(
    name="point-mae",
    matches=lambda module: _is_point_mae(module) and _has_tokens(module),
    feature_module="cls_head_finetune.3",
    feature_from="input",
    local=tokens(),
    global_=pooled("cls_head_finetune.0"),
)
def point_mae(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.cls_head_finetune, 3, feature)
