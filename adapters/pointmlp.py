"""ma-xu/pointMLP-pytorch: PointMLP and PointMLP-Elite, both classification folders.

Clouds are [B, 3, N]. The feature is tapped as the input of ``classifier[3]``, not as the output of
``classifier[2]``: one activation object serves the whole network, so a hook on it would see every layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import THREE_LAYERS, has, lacks, layers, pooled, run_from
from pointcmt.adapters.registry import Tap, register_adapter


def is_pointmlp(module: nn.Module) -> bool:
    return has(
        module,
        embedding=nn.Module,
        local_grouper_list=nn.ModuleList,
        pre_blocks_list=nn.ModuleList,
        pos_blocks_list=nn.ModuleList,
    ) and layers(module.classifier, *THREE_LAYERS)


# the last stage's features, and its centres from where the groups are made
LOCAL = Tap(
    lambda module: f"pos_blocks_list.{len(module.pos_blocks_list) - 1}",
    "output",
    lambda _module, tapped, _inputs: (tapped[0].transpose(1, 2), tapped[1][0]),
    beside=(lambda module: f"local_grouper_list.{len(module.local_grouper_list) - 1}", "output"),
)


@register_adapter(
    name="pointmlp",
    matches=lambda module: (
        is_pointmlp(module) and lacks(module, "forward_cls_feat")
    ),  # OpenPoints has its own
    feature_module="classifier.3",
    feature_from="input",
    input_layout="B3N",
    local=LOCAL,
    global_=pooled("classifier.0"),
)
def pointmlp(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.classifier, 3, feature)
