"""qq456cvb/Point-Transformers: three point transformers, classification (``PointTransformerCls`` in each).

Named there after their authors: Hengshuang (Zhao et al., Point Transformer), Menghao (Guo et al., PCT) and
Nico (Engel et al., Point Transformer). Clouds are [B, N, C]; the tap is before the last two layers of each
head.
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import has, layers, run_from
from pointcmt.adapters.pct import has_pct_parts
from pointcmt.adapters.registry import register_adapter


def _is_hengshuang(module: nn.Module) -> bool:
    return has(module, backbone=nn.Module) and layers(
        module.fc2, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear
    )


def _is_nico(module: nn.Module) -> bool:
    return has(module, lfg=nn.Module, gfg=nn.Module, lg_att=nn.Module) and layers(
        module.fc_cls, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear
    )


@register_adapter(
    name="point-transformers-hengshuang", matches=_is_hengshuang, feature_module="fc2.2", feature_from="input"
)
def hengshuang(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.fc2, 2, feature)


@register_adapter(
    name="point-transformers-menghao",
    matches=lambda module: has_pct_parts(module) and has(module, relu=nn.ReLU),
    feature_module="dp1",
    feature_from="input",
)
def menghao(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = module.relu(module.bn7(module.linear2(module.dp1(feature))))
    return module.linear3(module.dp2(hidden))


@register_adapter(
    name="point-transformers-nico", matches=_is_nico, feature_module="fc_cls.4", feature_from="input"
)
def nico(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.fc_cls, 4, feature)
