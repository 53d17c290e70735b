"""guochengqian/openpoints (PointNeXt): ``BaseCls`` with ``ClsHead`` on any encoder, and its PointMLP.

Its training script calls ``model.get_logits_loss(data, labels)``, which goes round ``model(data)``; the class
scores are therefore taken where the head puts them out. Clouds are a dictionary of ``pos`` [B, N, 3] and
``x`` [B, C, N].
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import has, run_from
from pointcmt.adapters.pointmlp import is_pointmlp
from pointcmt.adapters.registry import register_adapter


def _is_base_cls(module: nn.Module) -> bool:
    return has(module, encoder=nn.Module, prediction=nn.Module) and has(module.prediction, head=nn.Sequential)


def _first_after_feature(module: nn.Module) -> int:
    """Index of the layer that takes the feature: the one after the first block, if there is more than one."""
    return min(1, len(module.prediction.head) - 1)


@register_adapter(
    name="openpoints",
    matches=_is_base_cls,
    feature_module=lambda module: f"prediction.head.{_first_after_feature(module)}",
    feature_from="input",
    input_layout="pos_x",
    logits_module="prediction",
)
def base_cls(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.prediction.head, _first_after_feature(module), feature)


@register_adapter(
    name="openpoints-pointmlp",
    matches=lambda module: is_pointmlp(module) and hasattr(module, "forward_cls_feat"),
    feature_module="classifier.3",
    feature_from="input",
    input_layout="pos_x",
    logits_module="classifier",
)
def pointmlp(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.classifier, 3, feature)
