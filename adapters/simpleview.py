"""princeton-vl/SimpleView: its wrappers of PointNet, PointNet++, RS-CNN and DGCNN, and SimpleView itself.

A wrapper holds the codebase's own network as ``model``, takes clouds [B, N, 3] and returns ``{"logit": …}``;
the wrapped network's adapter does the work. SimpleView (``MVModel``) makes six depth images of the cloud; its
feature is what enters the last dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pointcmt.adapters._structure import has, run_from
from pointcmt.adapters.registry import Adapter, first_tensor, list_adapters, register_adapter


def _inner(module: nn.Module) -> Adapter:
    """The adapter of the network in a wrapper."""
    return next(adapter for adapter in list_adapters() if adapter.describes(module.model))


def _is_wrapper(module: nn.Module) -> bool:
    only_child = [name for name, _ in module.named_children()] == ["model"]
    return only_child and hasattr(module, "task") and any(a.describes(module.model) for a in list_adapters())


def _is_simpleview(module: nn.Module) -> bool:
    head = module.final_fc.model
    return (
        has(module, img_model=nn.Sequential, final_fc=nn.Module)
        and isinstance(head[-1], nn.Linear)
        and isinstance(head[-2], nn.Dropout)
    )


def _logits(output: Any) -> Tensor:
    return output["logit"] if isinstance(output, Mapping) and "logit" in output else first_tensor(output)


@register_adapter(
    name="simpleview-wrapper",
    matches=_is_wrapper,
    feature_module=lambda module: f"model.{_inner(module).feature_path(module.model)}",
    feature_from="input",  # as every adapter of the codebases that it wraps
    logits=_logits,
)
def wrapper(module: nn.Module, feature: Tensor) -> Tensor:
    return _inner(module).classify(module.model, feature)


@register_adapter(
    name="simpleview",
    matches=_is_simpleview,
    feature_module=lambda module: f"final_fc.model.{len(module.final_fc.model) - 2}",
    feature_from="input",
    logits=_logits,
)
def simpleview(module: nn.Module, feature: Tensor) -> Tensor:
    return run_from(module.final_fc.model, len(module.final_fc.model) - 2, feature)
