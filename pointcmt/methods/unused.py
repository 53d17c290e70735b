"""Layers of a network that no feature depends on: its classifier, which pre-training does not reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pointcmt.adapters.proof import observe
from pointcmt.adapters.registry import Adapter, find_adapter, unwrap


def freeze_unused(
    network: nn.Module, points: Any, adapter: Adapter | str | None = None
) -> list[nn.Parameter]:
    """Takes the parameters that no tapped feature depends on out of training, and returns them.

    Call it before ``DistributedDataParallel`` wraps a network that is pre-trained: the wrapper would wait for
    gradients of the classifier that never come (``find_unused_parameters`` does not see it, because the
    network's output depends on them, and ``static_graph`` leaves gradients beside them without their mean).
    In one process it keeps an optimizer with weight decay from moving them. Afterwards::

        for parameter in unused:
            parameter.requires_grad_(True)

    Args:
        network: not yet wrapped; runs once, in eval mode.
        points: a few clouds as the network takes them: a tensor, or a tuple of positional arguments.
        adapter: where its features are: an ``Adapter``, the name of one, or None to find one.

    Raises:
        ValueError: the features depend on no parameter that is trained.
    """
    unused = unused_parameters(network, points, adapter)
    for parameter in unused:
        parameter.requires_grad_(False)
    return unused


def unused_parameters(
    network: nn.Module, points: Any, adapter: Adapter | str | None = None
) -> list[nn.Parameter]:
    """The parameters of a network's head: those that are trained and that no tapped feature depends on.

    Args, raises: as of :func:`freeze_unused`, and nothing is frozen.
    """
    args = points if isinstance(points, tuple) else (points,)
    chosen = find_adapter(network, adapter, points=(args, {}))
    modes = [(child, child.training) for child in network.modules()]
    network.eval()
    try:
        with torch.enable_grad():
            seen = observe(unwrap(network), chosen, lambda: network(*args))
            assert seen.feature is not None
            found = [seen.feature if seen.global_ is None else seen.global_]
            if seen.local is not None:
                found.append(seen.local[0])
            trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            if not trained or not any(tensor.requires_grad for tensor in found):
                raise ValueError(
                    f"the feature that adapter {chosen.name!r} taps in {type(network).__name__} depends on "
                    "none of its parameters that are trained: give another adapter"
                )
            gradients = torch.autograd.grad(
                [tensor.sum() for tensor in found if tensor.requires_grad], trained, allow_unused=True
            )
    finally:
        for child, mode in modes:
            child.training = mode
    return [parameter for parameter, got in zip(trained, gradients, strict=True) if got is None]
