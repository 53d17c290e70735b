"""ZhanHeshen/PointCMT: the PointNet++ (MSG) of the paper's own code, bare or in its wrapper.

The authors cut the head in two, ``fc_layer1`` and ``fc_layer2``; the feature between them is the 512-d one.
The bare network returns (logits, feature), the wrapper ({"logit": …}, feature). Clouds are [B, N, 3].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pointcmt.adapters._structure import has
from pointcmt.adapters.registry import first_tensor, register_adapter


def _network(module: nn.Module) -> nn.Module:
    return module if hasattr(module, "SA_modules") else module.model


def _is_original(module: nn.Module) -> bool:
    network = _network(module)
    return has(network, SA_modules=nn.ModuleList, fc_layer1=nn.Module, fc_layer2=nn.Module)


def _logits(output: Any) -> Tensor:
    return first_tensor(output[0] if isinstance(output, tuple) else output)


@register_adapter(
    name="pointcmt-original",
    matches=_is_original,
    feature_module=lambda module: "fc_layer2" if hasattr(module, "SA_modules") else "model.fc_layer2",
    feature_from="input",
    logits=_logits,
)
def pointnet2(module: nn.Module, feature: Tensor) -> Tensor:
    return _network(module).fc_layer2(feature)
