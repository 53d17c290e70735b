"""mutianxu/GDANet, classification.

Clouds are [B, 3, N]. The head is DGCNN's with ReLU; the feature is the 512-d input of ``dp1``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import DGCNN_HEAD, has
from pointcmt.adapters.registry import register_adapter


def _is_gdanet(module: nn.Module) -> bool:
    return has(module, SGCAM_1s=nn.Module, **DGCNN_HEAD)


@register_adapter(
    name="gdanet", matches=_is_gdanet, feature_module="dp1", feature_from="input", input_layout="B3N"
)
def gdanet(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.relu(module.bn7(module.linear2(module.dp1(feature))))
    return module.linear3(module.dp2(hidden))
