"""What adapters ask of a network's structure, so that a copy under another name is still recognised."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
