"""The adapter for networks that nobody wrote one for: the feature is what goes into the last linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters.registry import (
    Adapter,
    AdapterError,
    first_tensor,
    module_tree,
    quiet_evaluation,
    unwrap,
)

NAME = "generic"


def generic_adapter(student: nn.Module, points: Any = None) -> Adapter:
    """Feature: input of the last ``nn.Linear``; classifier: that layer (and a log-softmax, if one follows).

    Args:
        student: the network, bare or wrapped.
        points: what the network takes: a tensor, a tuple of positional arguments, or ``(args, kwargs)``.
            With it the network is run once, in eval mode, to see which linear layer is last in execution and
            that its output is the class scores. Without it the layer defined last is taken on trust.

    Raises:
        AdapterError: there is no linear layer, or the output is not that of the one that runs last.
    """
    module = unwrap(student)
    linears = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear)}
    if not linears:
        raise AdapterError(_no_linear_end(module, "it has no nn.Linear at all"))
    if points is None:
        return _adapter_at(list(linears)[-1], log_softmax=False)
    args, kwargs = _call(points)
    ran: list[tuple[str, Tensor]] = []
    handles = []

    def record(path: str) -> Callable:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            ran.append((path, output.clone()))

        return hook

    with quiet_evaluation(module):
        try:
            for path, child in linears.items():
                handles.append(child.register_forward_hook(record(path)))
            logits = first_tensor(module(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
    if not ran:
        raise AdapterError(_no_linear_end(module, "its forward pass runs none of its nn.Linear layers"))
    path, output = ran[-1]
    for log_softmax in (False, True):
        scores = F.log_softmax(output, -1) if log_softmax else output
        if scores.shape == logits.shape and torch.allclose(
            scores, logits.to(scores.dtype), rtol=1e-3, atol=1e-4
        ):
            return _adapter_at(path, log_softmax)
    raise AdapterError(
        _no_linear_end(
            module,
            f"its output {list(logits.shape)} is not that of the nn.Linear that runs last, {path!r} "
            f"{list(output.shape)}",
        )
    )


def _adapter_at(path: str, log_softmax: bool) -> Adapter:
    def classify(module: nn.Module, feature: Tensor) -> Tensor:
        scores = module.get_submodule(path)(feature)
        return F.log_softmax(scores, -1) if log_softmax else scores

    return Adapter(
        name=NAME,
        matches=lambda module: any(isinstance(child, nn.Linear) for child in module.modules()),
        feature_module=path,
        feature_from="input",
        classify=classify,
    )


def _call(points: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(points, tuple):
        if len(points) == 2 and isinstance(points[0], tuple) and isinstance(points[1], dict):
            return points
        return points, {}
    return (points,), {}


def _no_linear_end(module: nn.Module, reason: str) -> str:
    name = type(module).__name__
    return (
        f"no adapter is registered for {name}, and the generic one (the input of the last nn.Linear) does "
        f"not fit: {reason}. Write one, it takes a few lines:\n\n"
        "    from pointcmt.adapters import Adapter, verify_adapter\n"
        "    adapter = Adapter(\n"
        f'        name="{name.lower()}",\n'
        f'        matches=lambda module: type(module).__name__ == "{name}",\n'
        '        feature_module="<path of a submodule>",       # where the [B, D] shape feature is ...\n'
        '        feature_from="output",                         # ... its output, or its input\n'
        "        classify=lambda module, feature: module.<the layers after it>(feature),\n"
        "    )\n"
        "    verify_adapter(student, points, adapter)           # proves it\n\n"
        f"then PointCMT(teacher, student, adapter=adapter) (see docs/adapters.md). The modules of {name}:\n"
        f"{module_tree(module)}"
    )
