"""Yochengliu/Relation-Shape-CNN: RS-CNN, single-scale, classification.

Clouds are [B, N, 3 + C]; the feature is the 512-d output of the first block of ``FC_layer``.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import before_last_stage, has, layers, pooled, run_from
from pointcmt.adapters.registry import register_adapter


def _is_rscnn(module: nn.Module) -> bool:
    return (
        has(module, SA_modules=nn.ModuleList)
        and layers(module.FC_layer, nn.Sequential, nn.Dropout, nn.Sequential, nn.Dropout, nn.Sequential)
        and any(hasattr(part, "cr_mapping") for part in module.SA_modules.modules())
    )


@register_adapter(
    name="rscnn",
    matches=_is_rscnn,
    feature_module="FC_layer.1",
    feature_from="input",
    local=before_last_stage("SA_modules"),
    global_=pooled("FC_layer.0"),
)
def rscnn(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.FC_layer, 1, feature)
