"""hancyran/RepSurf: PointNet++ on umbrella RepSurf, classification, both widths.

Clouds are [B, 3, N]; the network returns log-probabilities; the feature is the 512-d input of
``classfier[3]`` (their spelling), which follows an in-place activation and is not changed after it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import THREE_LAYERS, has, layers, run_from
from pointcmt.adapters.registry import register_adapter


def _is_repsurf(module: nn.Module) -> bool:
    return has(module, surface_constructor=nn.Module, sa1=nn.Module) and layers(
        module.classfier, *THREE_LAYERS
    )


@register_adapter(
    name="repsurf",
    matches=_is_repsurf,
    feature_module="classfier.3",
    feature_from="input",
    input_layout="B3N",
)
def repsurf(module: nn.Module, feature: Tensor) -> Tensor:
    return F.log_softmax(run_from(module.classfier, 3, feature), dim=-1)
