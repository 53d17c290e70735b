"""guochengqian/openpoints (PointNeXt): ``BaseCls`` with ``ClsHead`` on any encoder, its PointMLP, and
PointNeXt for parts and scenes (``BasePartSeg``, ``BaseSeg``).

Its training script calls ``model.get_logits_loss(data, labels)``, which goes round ``model(data)``; the class
scores are therefore taken where the head puts them out. Clouds are a dictionary of ``pos`` [B, N, 3] and
``x`` [B, C, N].
"""

from __future__ import annotations

from torch import Tensor, nn

from pointcmt.adapters._structure import before_last_stage, has, highest, pooled, run_from, scores_last
from pointcmt.adapters.pointmlp import LOCAL, is_pointmlp
from pointcmt.adapters.registry import Adapter, Tap, register_adapter


def _is_base_cls(module: nn.Module) -> bool:
    return has(module, encoder=nn.Module, prediction=nn.Module) and has(module.prediction, head=nn.Sequential)


def _first_after_feature(module: nn.Module) -> int:
    """Index of the layer that takes the feature: the one after the first block, if there is more than one."""
    return min(1, len(module.prediction.head) - 1)


def _classify(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.prediction.head, _first_after_feature(module), feature)


# of each kind of encoder: what it has, and where its local features are; any encoder comes first, so that it
# is asked last
_ENCODERS = {
    "openpoints": (lambda encoder: True, None),
    "openpoints-pointnext": (
        lambda encoder: has(encoder, encoder=nn.Sequential) and hasattr(encoder, "strides"),
        before_last_stage("encoder.encoder"),
    ),
    "openpoints-pointnet2": (
        lambda encoder: has(encoder, SA_modules=nn.ModuleList),
        before_last_stage("encoder.SA_modules"),
    ),
    "openpoints-dgcnn": (
        lambda encoder: has(encoder, knn=nn.Module, fusion_block=nn.Module),
        Tap(
            "encoder.fusion_block",
            "output",
            lambda _module, tapped, _inputs: (tapped[0].transpose(1, 2), tapped[1][0]),
            beside=("encoder.knn", "input"),
        ),
    ),
}
for _name, (_has_parts, _local) in _ENCODERS.items():
    register_adapter(
        Adapter(
            name=_name,
            matches=lambda module, of=_has_parts: _is_base_cls(module) and of(module.encoder),
            feature_module=lambda module: f"prediction.head.{_first_after_feature(module)}",
            feature_from="input",
            classify=_classify,
            input_layout="pos_x",
            logits_module="prediction",
            local=_local,
            global_=pooled("prediction"),
        )
    )


@register_adapter(
    name="openpoints-pointmlp",
    matches=lambda module: is_pointmlp(module) and hasattr(module, "forward_cls_feat"),
    feature_module="classifier.3",
    feature_from="input",
    input_layout="pos_x",
    logits_module="classifier",
    local=LOCAL,
    global_=pooled("classifier.0"),
)
def pointmlp(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.classifier, 3, feature)


def _is_base_seg(module: nn.Module) -> bool:
    return has(module, encoder=nn.Module, decoder=nn.Module, head=nn.Module) and has(
        module.encoder, encoder=nn.Sequential
    )


def _last_activation(module: nn.Module) -> str:
    """The activation of the encoder's last block: the features of its coarsest centres."""
    stages = module.encoder.encoder
    return f"encoder.encoder.{len(stages) - 1}.{len(stages[-1]) - 1}.act"


def _decoded(_module: nn.Module, tapped: Tensor, inputs: tuple) -> tuple[Tensor, Tensor]:
    """[B, C, N] of the decoder, and the points of the dictionary that the network is called with."""
    given = inputs[0]
    return tapped.transpose(1, 2), given["pos"] if isinstance(given, dict) else given


# networks for parts take the category too, and their decoder knows it
for _part in (False, True):
    register_adapter(
        Adapter(
            name="openpoints-part" if _part else "openpoints-scene",
            matches=lambda module, part=_part: (
                _is_base_seg(module) and hasattr(module.decoder, "cls_map") == part
            ),
            feature_module=_last_activation,
            feature_from="output",
            feature=highest,
            input_layout="pos_x_cls" if _part else "pos_rest",
            local=Tap("decoder", "output", _decoded),
            per_point=scores_last,
        )
    )
