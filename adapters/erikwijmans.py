"""erikwijmans/Pointnet2_PyTorch: PointNet++ classification, SSG and MSG, of both of its generations.

The current one is a LightningModule with ``fc_layer``; the first one (``Pointnet2SSG``, ``Pointnet2MSG``,
still vendored by many repositories) has ``FC_layer``, built of blocks. Clouds are [B, N, 3 + C].
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import BATCH_NORM, before_last_stage, has, layers, pooled, run_from
from pointcmt.adapters.registry import register_adapter


def _is_current(module: nn.Module) -> bool:
    return has(module, SA_modules=nn.ModuleList) and layers(
        module.fc_layer,
        nn.Linear,
        BATCH_NORM,
        nn.ReLU,
        nn.Linear,
        BATCH_NORM,
        nn.ReLU,
        nn.Dropout,
        nn.Linear,
    )


def _is_first_generation(module: nn.Module) -> bool:
    # Relation-Shape CNN has the same head on other set abstraction layers: those reduce with a convolution
    return (
        has(module, SA_modules=nn.ModuleList)
        and layers(module.FC_layer, nn.Sequential, nn.Dropout, nn.Sequential, nn.Dropout, nn.Sequential)
        and not any(hasattr(part, "cr_mapping") for part in module.SA_modules.modules())
    )


@register_adapter(
    name="erikwijmans-pointnet2",
    matches=_is_current,
    feature_module="fc_layer.3",
    feature_from="input",
    local=before_last_stage("SA_modules"),
    global_=pooled("fc_layer.0"),
)
def pointnet2(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.fc_layer, 3, feature)


@register_adapter(
    name="erikwijmans-pointnet2-v2",
    matches=_is_first_generation,
    feature_module="FC_layer.1",
    feature_from="input",
    local=before_last_stage("SA_modules"),
    global_=pooled("FC_layer.0"),
)
def pointnet2_first_generation(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.FC_layer, 1, feature)
