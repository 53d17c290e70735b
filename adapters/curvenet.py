"""tiangexiang/CurveNet, classification.

Clouds are [B, 3, N]; the feature is the 512-d input of ``dp1``.
Its ``conv1`` and ``conv2`` are linear layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import BATCH_NORM, has, pooled, stage
from pointcmt.adapters.registry import register_adapter


def _is_curvenet(module: nn.Module) -> bool:
    return has(
        module,
        lpfa=nn.Module,
        cic11=nn.Module,
        conv1=nn.Linear,
        bn1=BATCH_NORM,
        dp1=nn.Dropout,
        conv2=nn.Linear,
    )


@register_adapter(
    name="curvenet",
    matches=_is_curvenet,
    feature_module="dp1",
    feature_from="input",
    input_layout="B3N",
    local=stage("cic42", channels_first_centers=True),
    global_=pooled("conv1"),
)
def curvenet(module: nn.Module, feature: Tensor) -> Tensor:
    return module.conv2(module.dp1(feature))
