"""lulutang0608/Point-BERT, fine-tuning: ``PointTransformer``, also as OpenPoints vendors it.

Clouds are [B, N, 3]. The head is two linear layers; the tap is before both: the class token beside the
maximum over the other tokens, 768-d at the published width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import has, layers, run_from, tokens
from pointcmt.adapters.registry import register_adapter


def _is_point_bert(module: nn.Module) -> bool:
    return has(module, group_divider=nn.Module, norm=nn.LayerNorm) and layers(
        module.cls_head_finetune, nn.Linear, nn.Module, nn.Dropout, nn.Linear
    )


@register_adapter(
    name="point-bert",
    matches=_is_point_bert,
    feature_module="cls_head_finetune.0",
    feature_from="input",
    local=tokens(),
)
def point_bert(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.cls_head_finetune, 0, feature)
