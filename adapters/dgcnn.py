"""WangYueFt/dgcnn and antao97/dgcnn.pytorch: DGCNN and the PointNet beside it, classification; and
antao97's DGCNN for parts and scenes.

The second is a fork of the first; the classes have the same parts (``DGCNN`` is ``DGCNN_cls`` there).
Clouds are [B, 3, N]; the feature is the 512-d input of ``dp1``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import (
    BATCH_NORM,
    DGCNN_HEAD,
    has,
    highest,
    lacks,
    layers,
    per_point,
    pooled,
    scores_last,
)
from pointcmt.adapters.registry import Adapter, register_adapter

NEGATIVE_SLOPE = 0.2  # of every leaky ReLU in these networks, the paper's and the code's


def _is_dgcnn(module: nn.Module) -> bool:
    # others (PCT, GDANet, …) took over the head; the edge convolutions tell
    return has(module, **DGCNN_HEAD) and all(
        layers(getattr(module, f"conv{i}"), (nn.Conv1d, nn.Conv2d), BATCH_NORM, nn.LeakyReLU)
        for i in (1, 2, 3, 4, 5)
    )


def _is_pointnet(module: nn.Module) -> bool:
    convolutions = {f"conv{i}": nn.Conv1d for i in range(1, 6)}
    return has(
        module, **convolutions, linear1=nn.Linear, bn6=BATCH_NORM, dp1=nn.Dropout, linear2=nn.Linear
    ) and lacks(module, "linear3")


@register_adapter(
    name="dgcnn",
    matches=_is_dgcnn,
    feature_module="dp1",
    feature_from="input",
    input_layout="B3N",
    local=per_point("conv5"),
    global_=pooled("linear1"),
)
def dgcnn(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.leaky_relu(module.bn7(module.linear2(module.dp1(feature))), negative_slope=NEGATIVE_SLOPE)
    return module.linear3(module.dp2(hidden))


@register_adapter(
    name="dgcnn-pointnet",
    matches=_is_pointnet,
    feature_module="dp1",
    feature_from="input",
    input_layout="B3N",
    local=per_point("bn5"),
    global_=pooled("linear1"),
)
def pointnet(module: nn.Module, feature: Tensor) -> Tensor:
    return module.linear2(module.dp1(feature))


def _is_segmentation(module: nn.Module) -> bool:
    edges = all(
        layers(getattr(module, f"conv{i}", None), nn.Conv2d, BATCH_NORM, nn.LeakyReLU) for i in range(1, 6)
    )
    return (
        edges
        and lacks(module, "linear1", "pool")
        and layers(getattr(module, "conv6", None), nn.Conv1d, BATCH_NORM, nn.LeakyReLU)
    )


register_adapter(
    Adapter(
        name="dgcnn-part",
        matches=lambda module: _is_segmentation(module) and has(module, conv11=nn.Conv1d),
        feature_module="conv6",
        feature_from="output",
        feature=highest,
        input_layout="B3N,onehot16",
        local=per_point("conv10"),
        per_point=scores_last,
    )
)
# the variant for ScanNet puts out a tuple of [B, N, K] and nothing
register_adapter(
    Adapter(
        name="dgcnn-scene",
        matches=lambda module: _is_segmentation(module) and has(module, conv9=nn.Conv1d),
        feature_module="conv6",
        feature_from="output",
        feature=highest,
        input_layout="B3N",
        local=per_point("conv8"),
        per_point=lambda output: output[0] if isinstance(output, tuple) else scores_last(output),
    )
)
