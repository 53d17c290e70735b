"""What adapters ask of a network's structure, so that a copy under another name is still recognised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pointcmt.adapters.registry import Tap, first_tensor

BATCH_NORM: type[nn.Module] = _BatchNorm  # also after nn.SyncBatchNorm.convert_sync_batchnorm

# heads that many codebases took over, from PointNet++ …
THREE_LAYERS = (nn.Linear, BATCH_NORM, nn.Module, nn.Dropout) * 2 + (nn.Linear,)
# … and from DGCNN; what is in front of them tells whose network it is
DGCNN_HEAD = {
    "linear1": nn.Linear,
    "bn6": BATCH_NORM,
    "dp1": nn.Dropout,
    "linear2": nn.Linear,
    "bn7": BATCH_NORM,
    "dp2": nn.Dropout,
    "linear3": nn.Linear,
}


def has(module: nn.Module, **kinds: type | tuple[type, ...]) -> bool:
    """Whether ``module`` has attributes of these names and kinds."""
    return all(isinstance(getattr(module, name, None), kind) for name, kind in kinds.items())


def lacks(module: nn.Module, *names: str) -> bool:
    """Whether ``module`` has none of these attributes."""
    return not any(hasattr(module, name) for name in names)


def layers(sequential: object, *kinds: type | tuple[type, ...]) -> bool:
    """Whether ``sequential`` is an ``nn.Sequential`` of exactly these layers, in this order."""
    return (
        isinstance(sequential, nn.Sequential)
        and len(sequential) == len(kinds)
        and all(isinstance(layer, kind) for layer, kind in zip(sequential, kinds, strict=True))
    )


def run_from(sequential: nn.Sequential, start: int, x: Tensor) -> Tensor:
    """Runs the layers from ``start`` on, one by one: a subclass of Sequential may not allow a slice."""
    for layer in list(sequential)[start:]:
        x = layer(x)
    return x


# Where codebases keep local features: each is ``select`` of a :class:`Tap`


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, M] or [B, C, M, 1] → [B, M, C]."""
    return (x.squeeze(3) if x.ndim == 4 else x).transpose(1, 2)


def stage(path: str | Callable[[nn.Module], str], channels_first_centers: bool = False) -> Tap:
    """A stage that puts out centres and their features [B, C, M] in a list or tuple."""

    def select(_module: nn.Module, tapped: Any, _inputs: tuple) -> tuple[Tensor, Tensor]:
        centers, features = tapped[:2]
        return _channels_last(features), centers.transpose(1, 2) if channels_first_centers else centers

    return Tap(path, "output", select)


def before_last_stage(path: str) -> Tap:
    """As :func:`stage`, of the last but one in a ``ModuleList``: the last one pools."""
    return stage(lambda module: f"{path}.{len(module.get_submodule(path)) - 2}")


def per_point(
    path: str | Callable[[nn.Module], str], feature_from: Literal["output", "input"] = "output"
) -> Tap:
    """A layer that puts out (or takes) a feature for each point [B, C, N] of clouds [B, 3 + C, N]."""

    def select(_module: nn.Module, tapped: Any, inputs: tuple) -> tuple[Tensor, Tensor]:
        features = tapped[0] if feature_from == "input" else tapped
        return _channels_last(features), inputs[0][:, :3].transpose(1, 2)

    return Tap(path, feature_from, select)


def scores_last(output: Any) -> Tensor:
    """Class scores of each point [B, N, K] of an output [B, K, N], or a tuple that begins with it."""
    return first_tensor(output).transpose(1, 2)


def highest(x: Tensor) -> Tensor:
    """The maximum over points or samples: [B, C, …] → [B, C]."""
    return x.flatten(2).amax(2)


def pooled(path: str | Callable[[nn.Module], str], last: bool = False) -> Tap:
    """What goes into the head: the first argument, or the last entry of a stage's output where ``last``."""
    if last:
        return Tap(path, "output", lambda _module, tapped, _inputs: tapped[1].flatten(1))
    return Tap(path, "input", lambda _module, tapped, _inputs: tapped[0])


def tokens(norm: str = "norm", groups: str = "group_divider") -> Tap:
    """A transformer's tokens after its last normalisation, without class token, and their groups' centres."""
    return Tap(
        norm,
        "output",
        lambda _module, tapped, _inputs: (tapped[0][:, -tapped[1][1].shape[1] :], tapped[1][1]),
        beside=(groups, "output"),
    )
