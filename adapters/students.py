"""pointcmt's own reference students: PointNet++, DGCNN, RS-CNN, PointMLP (``pointcmt.students``).

They have the parts of the public networks, so the public adapters' rules would match too; but clouds are
[B, N, 3] and logits come out, so they have adapters of their own, told by the class.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import run_from
from pointcmt.adapters.registry import register_adapter


def _is(name: str) -> Callable[[nn.Module], bool]:
    """Whether a module's class, or one it inherits from, is this package's student of that name."""
    return lambda module: any(
        cls.__name__ == name and cls.__module__.startswith("pointcmt.students.")
        for cls in type(module).__mro__
    )


@register_adapter(
    name="students-pointnet2", matches=_is("PointNet2"), feature_module="drop1", feature_from="input"
)
def pointnet2(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.relu(module.bn2(module.fc2(module.drop1(feature))))
    return module.fc3(module.drop2(hidden))


@register_adapter(name="students-dgcnn", matches=_is("DGCNN"), feature_module="dp1", feature_from="input")
def dgcnn(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.leaky_relu(module.bn7(module.linear2(module.dp1(feature))), negative_slope=0.2)
    return module.linear3(module.dp2(hidden))


@register_adapter(
    name="students-rscnn", matches=_is("RSCNN"), feature_module="FC_layer.1", feature_from="input"
)
def rscnn(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.FC_layer, 1, feature)


@register_adapter(
    name="students-pointmlp", matches=_is("PointMLP"), feature_module="classifier.3", feature_from="input"
)
def pointmlp(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.classifier, 3, feature)
