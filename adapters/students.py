"""pointcmt's own reference students: PointNet++, DGCNN, RS-CNN, PointMLP, PointNeXt (``pointcmt.students``),
and their networks for parts and scenes.

They have the parts of the public networks, so the public adapters' rules would match too; but clouds are
[B, N, 3] and logits come out, so they have adapters of their own, told by the class.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._structure import run_from
from pointcmt.adapters.registry import Adapter, Tap, first_tensor, register_adapter


def _is(name: str) -> Callable[[nn.Module], bool]:
    """Whether a module's class, or one it inherits from, is this package's student of that name."""
    return lambda module: any(
        cls.__name__ == name and cls.__module__.startswith("pointcmt.students.")
        for cls in type(module).__mro__
    )


def _stage(module: nn.Module, tapped: tuple[Tensor, Tensor], inputs: tuple) -> tuple[Tensor, Tensor]:
    """Features and centres of a stage, whose output is the centres and the features."""
    centers, local = tapped
    return local, centers


def _per_point(module: nn.Module, tapped: Tensor, inputs: tuple) -> tuple[Tensor, Tensor]:
    """[B, C, N] features of the points themselves."""
    return tapped.transpose(1, 2), inputs[0][..., :3]


@register_adapter(
    name="students-pointnet2",
    matches=_is("PointNet2"),
    feature_module="drop1",
    feature_from="input",
    local=Tap("sa2", "output", _stage),
)
def pointnet2(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.relu(module.bn2(module.fc2(module.drop1(feature))))
    return module.fc3(module.drop2(hidden))


@register_adapter(
    name="students-dgcnn",
    matches=_is("DGCNN"),
    feature_module="dp1",
    feature_from="input",
    local=Tap("conv5", "output", _per_point),
)
def dgcnn(module: nn.Module, feature: Tensor) -> Tensor:
    hidden = F.leaky_relu(module.bn7(module.linear2(module.dp1(feature))), negative_slope=0.2)
    return module.linear3(module.dp2(hidden))


@register_adapter(
    name="students-rscnn",
    matches=_is("RSCNN"),
    feature_module="FC_layer.1",
    feature_from="input",
    local=Tap("SA_modules.1", "output", _stage),
)
def rscnn(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.FC_layer, 1, feature)


@register_adapter(
    name="students-pointmlp",
    matches=_is("PointMLP"),
    feature_module="classifier.3",
    feature_from="input",
    local=Tap(lambda module: f"pos_blocks_list.{len(module.pos_blocks_list) - 1}", "output", _stage),
)
def pointmlp(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.classifier, 3, feature)


@register_adapter(
    name="students-pointnext",
    matches=_is("PointNeXt"),
    feature_module="prediction.head.1",
    feature_from="input",
    local=Tap("encoder.encoder.4.0", "output", _stage),
)
def pointnext(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.prediction.head, 1, feature)


def _before_head(module: nn.Module, tapped: tuple, inputs: tuple) -> tuple[Tensor, Tensor]:
    """[B, C, N] features that go into a layer, of the points themselves."""
    return _per_point(module, tapped[0], inputs)


def _as_rows(module: nn.Module, tapped: Tensor, inputs: tuple) -> tuple[Tensor, Tensor]:
    """[B, N, C] features of the points themselves."""
    return tapped, inputs[0][..., :3]


# of each network for parts or scenes: where its features of the points are
_SEGMENTERS = {
    "PointNet2Part": Tap("drop1", "input", _before_head),
    "PointNet2Scene": Tap("drop1", "input", _before_head),
    "DGCNNPart": Tap("conv11", "input", _before_head),
    "DGCNNScene": Tap("dp1", "input", _before_head),
    "PointNeXtSeg": Tap("decoder", "output", _as_rows),
}
for _name, _local in _SEGMENTERS.items():
    register_adapter(
        Adapter(
            name=f"students-{_name.lower()}",
            matches=_is(_name),
            feature_module="pool",
            feature_from="output",
            input_layout="BN3,category",
            local=_local,
            per_point=first_tensor,
        )
    )
