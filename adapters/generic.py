"""The adapter for networks that nobody wrote one for: the feature is what goes into the last linear layer."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters._untouched import (
    copied,
    quiet_evaluation,
    why_not_exchangeable,
    with_tensors,
)
from pointcmt.adapters.registry import (
    Adapter,
    AdapterError,
    Tap,
    as_call,
    describe,
    first_tensor,
    module_tree,
    unwrap,
)

NAME = "generic"


def generic_adapter(student: nn.Module, points: Any = None) -> Adapter:
    """Feature: input of the last linear layer; classifier: that layer (and a log-softmax, if one follows).

    A layer is linear by what it does, whatever its class: ``nn.Linear``, a 1 × 1 convolution on one position,
    PyTorch Geometric's ``Linear``, one with LoRA. The network's output may be [B, K], [B, K, 1] or [B, 1, K].
    Where the network computes features per point on the way, they are :attr:`Adapter.local`.

    Args:
        student: the network, bare or wrapped.
        points: what the network takes: a tensor, a tuple of positional arguments, ``(args, kwargs)``, or any
            object. With it the network is run once, in eval mode, and the layer is the one whose result is
            the class scores. Without it the layer defined last is taken on trust.

    Raises:
        AdapterError: there is no linear layer, or none has the class scores as its result.
    """
    module = unwrap(student)
    candidates = [path for path, child in module.named_modules() if _may_be_linear(child)]
    if points is None:
        if not candidates:
            raise AdapterError(_no_linear_end(module, "it has no linear layer at all"))
        return _adapter_at(candidates[-1], _Shape(), log_softmax=False)
    call = as_call(points)
    passes, logits = _recorded(module, *call)
    if logits.ndim < 2 or not _is_scores(logits):
        raise AdapterError(
            _no_linear_end(module, f"its output has shape {list(logits.shape)}, expected class scores [B, K]")
        )
    flat = logits.flatten(1)
    for log_softmax in (False, True):
        ends = [
            seen for seen in passes if _gives(seen.output, flat, log_softmax) and _has_matrix(module, seen)
        ]
        # the innermost of them: a Sequential around the layer gives the same
        ends = [seen for seen in ends if not any(other.path.startswith(f"{seen.path}.") for other in ends)]
        for seen in reversed(ends):
            layer = _outermost(module, passes, seen)
            shape = _Shape.of(layer.input)
            # the tap sees the last call of a layer
            last = next(other for other in reversed(passes) if other.path == layer.path)
            if shape is None or last.output is not layer.output or not _is_linear(module, layer):
                continue
            adapter = _adapter_at(layer.path, shape, log_softmax)
            if logits.ndim > 2:
                adapter = replace(adapter, logits=_flat_scores)
            return replace(adapter, local=_per_point(module, *call))
    if not any(_may_be_linear(module.get_submodule(seen.path)) for seen in passes):
        raise AdapterError(_no_linear_end(module, "its forward pass runs no linear layer"))
    last = next(
        (seen for seen in reversed(passes) if _may_be_linear(module.get_submodule(seen.path))), passes[-1]
    )
    raise AdapterError(
        _no_linear_end(
            module,
            f"none of its linear layers has the class scores {list(logits.shape)} as its result; the one "
            f"that runs last, {last.path!r}, gives {describe(last.output)}",
        )
    )


class _Pass(NamedTuple):
    path: str
    input: Tensor
    output: Tensor


class _Shape(NamedTuple):
    """How a layer takes features [B, D]: with further axes of length one, the features on axis ``axis``."""

    ndim: int = 2
    axis: int = 1

    @staticmethod
    def of(given: Tensor) -> _Shape | None:
        """None where the tensor holds more than one vector for each cloud."""
        long = [axis for axis in range(1, given.ndim) if given.shape[axis] > 1]
        if given.ndim < 2 or len(long) > 1:
            return None
        return _Shape(given.ndim, long[0] if long else 1)

    def restored(self, feature: Tensor) -> Tensor:
        if self.ndim == 2:
            return feature
        sizes = [len(feature), *[1] * (self.ndim - 1)]
        sizes[self.axis] = -1
        return feature.reshape(sizes)


def _recorded(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[list[_Pass], Tensor]:
    """Each submodule's calls in the order in which they ended, and the class scores, of one pass."""
    passes: list[_Pass] = []
    handles = []

    def record(path: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            small = isinstance(output, Tensor) and output.numel() < _LARGE
            if small and given is not None and output.ndim >= 2:
                passes.append(_Pass(path, before.pop(path, given), output.clone()))

        return hook

    before: dict[str, Tensor] = {}

    def remember(path: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            # what a following layer may work on in place; large tensors are no features of a whole shape
            if given is not None and given.numel() < _LARGE:
                before[path] = given.clone()

        return hook

    def run() -> Any:
        copy_args, copy_kwargs = copied((args, kwargs))
        return module(*copy_args, **copy_kwargs)

    with quiet_evaluation(module):
        try:
            for path, child in module.named_modules():
                if path:
                    handles.append(child.register_forward_pre_hook(remember(path), with_kwargs=True))
                    handles.append(child.register_forward_hook(record(path), with_kwargs=True))
            buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
            logits = first_tensor(
                run() if why_not_exchangeable(module) is not None else with_tensors(module, buffers, run)
            )
        finally:
            for handle in handles:
                handle.remove()
    return passes, logits


_LARGE = 1 << 20  # elements: more than this are neither class scores nor features of whole shapes


def _is_scores(logits: Tensor) -> bool:
    return sum(size > 1 for size in logits.shape[1:]) <= 1


def _flat_scores(output: Any) -> Tensor:
    return first_tensor(output).flatten(1)


def _gives(output: Tensor, flat: Tensor, log_softmax: bool) -> bool:
    """Whether a layer's output is the class scores, but for axes of length one."""
    if output.shape[0] != flat.shape[0] or output.numel() != flat.numel() or not output.is_floating_point():
        return False
    scores = output.flatten(1)
    scores = F.log_softmax(scores, -1) if log_softmax else scores
    return torch.allclose(scores, flat.to(scores.dtype), rtol=1e-3, atol=1e-4)


def _outermost(module: nn.Module, passes: list[_Pass], seen: _Pass) -> _Pass:
    """The module around a linear layer that is part of the same layer: LoRA's, with its own parameters."""
    path = seen.path
    while "." in path:
        path = path.rpartition(".")[0]
        around = next((other for other in passes if other.path == path), None)
        if around is None:
            # LoRA keeps its layers in dictionaries, which are never called
            if isinstance(module.get_submodule(path), (nn.ModuleDict, nn.ModuleList)):
                continue
            break
        same = (
            around.input.shape == seen.input.shape
            and torch.equal(around.input, seen.input)
            and around.output.shape == seen.output.shape
        )
        own = {id(p) for p in module.get_submodule(path).parameters()}
        inner = {id(p) for p in module.get_submodule(seen.path).parameters()}
        if not same or own == inner:
            break
        seen = around
    return seen


def _may_be_linear(child: nn.Module) -> bool:
    """By its parameters: a matrix, also as the kernel of a 1 × 1 convolution."""
    weight = child._parameters.get("weight")
    if isinstance(child, (nn.Linear, nn.LazyLinear)):
        return True
    if isinstance(child, nn.modules.conv._ConvNd):
        return not isinstance(child, nn.modules.conv._ConvTransposeNd) and set(child.kernel_size) == {1}
    return weight is not None and weight.ndim == 2 and not isinstance(child, (nn.Embedding, nn.EmbeddingBag))


def _has_matrix(module: nn.Module, seen: _Pass) -> bool:
    return any(parameter.ndim > 1 for parameter in module.get_submodule(seen.path).parameters())


def _is_linear(module: nn.Module, seen: _Pass) -> bool:
    """Whether the layer maps the mean of two features to the mean of what it maps them to."""
    layer = module.get_submodule(seen.path)
    if isinstance(layer, nn.Linear):
        return True
    if len(seen.input) < 2:
        return _may_be_linear(layer)

    def run() -> Tensor:
        a = seen.input.detach().clone()
        b = a.flip(0) * 1.5 + 0.5
        return (layer(a.clone()) + layer(b.clone())) / 2 - layer((a + b) / 2)

    with quiet_evaluation(module):
        try:
            curved = run()
        except Exception:  # it needs more than the feature, so it is no linear layer of it
            return False
    scale = float(seen.output.abs().max()) + 1e-6
    return float(curved.abs().max()) < 1e-3 * scale


def _adapter_at(path: str, shape: _Shape, log_softmax: bool) -> Adapter:
    def classify(module: nn.Module, feature: Tensor) -> Tensor:
        scores = module.get_submodule(path)(shape.restored(feature)).flatten(1)
        return F.log_softmax(scores, -1) if log_softmax else scores

    return Adapter(
        name=NAME,
        matches=lambda module: any(_may_be_linear(child) for child in module.modules()),
        feature_module=path,
        feature_from="input",
        classify=classify,
        feature=(lambda tapped: tapped) if shape.ndim == 2 else (lambda tapped: tapped.flatten(1)),
    )


# --------------------------------------------------------------------------------------------------------
# Features per point


def _per_point(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tap | None:
    """The last features that the network has for each of its points, if any.

    Checked by permuting the points and changing the other clouds of the batch.

    A submodule's output [B, C, N], [B, N, C] or [B, C, N, 1], N the number of points.
    """
    inputs = (*args, *kwargs.values())
    cloud = _cloud(inputs)
    if cloud is None or kwargs:
        return None
    points = cloud.shape[1]
    order = torch.randperm(points, generator=torch.Generator().manual_seed(0)).to(cloud.device)
    found: dict[str, list[tuple[int, ...]]] = {}
    with quiet_evaluation(module):
        _watched(
            module,
            [path for path, _ in module.named_modules() if path],
            lambda path, output: found.setdefault(path, []).append(tuple(output.shape)),
            copied(args),
        )
        fitting = [path for path, shapes in found.items() if len(shapes) == 1 and _axis(shapes[0], points)]
        if not fitting:
            return None
        path = fitting[-1]
        axis = _axis(found[path][0], points)
        assert axis is not None
        seen: list[Tensor] = []
        for permuted in (False, True):
            change = functools.partial(_permuted, cloud=cloud, order=order) if permuted else torch.clone
            given = copied(args, change)
            _watched(module, [path], lambda _p, output: seen.append(_points_first(output, axis)), given)
    straight, other = seen
    scale = float(straight.abs().max()) + 1e-6
    if float((straight[0, order] - other[0]).abs().max()) > 1e-3 * scale:
        return None

    def select(_module: nn.Module, tapped: Tensor, inputs: tuple) -> tuple[Tensor, Tensor]:
        centers = _cloud(inputs)
        if centers is None:
            raise AdapterError(
                "the generic adapter finds local features only where a network is called with one tensor "
                "of clouds"
            )
        return _points_first(tapped, axis), centers

    return Tap(path, "output", select)


def _watched(module: nn.Module, paths: list[str], see: Callable[[str, Tensor], Any], args: tuple) -> None:
    def watch(path: str) -> Callable:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                see(path, output)

        return hook

    handles = [module.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    try:
        if why_not_exchangeable(module) is None:
            with_tensors(module, buffers, lambda: module(*args))
        else:
            module(*args)
    finally:
        for handle in handles:
            handle.remove()


def _cloud(inputs: tuple) -> Tensor | None:
    """[B, N, 3] coordinates in what a network was called with: one tensor [B, N, 3 + C] or [B, 3 + C, N]."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if len(inputs) != 1 or len(tensors) != 1 or tensors[0].ndim != 3:
        return None
    given = tensors[0]
    if 3 <= given.shape[2] < given.shape[1] and given.shape[2] <= _CHANNELS:
        return given[..., :3]
    if 3 <= given.shape[1] < given.shape[2] and given.shape[1] <= _CHANNELS:
        return given[:, :3].transpose(1, 2)
    return None


_CHANNELS = 9  # coordinates, normals, colours


def _permuted(tensor: Tensor, cloud: Tensor, order: Tensor) -> Tensor:
    """With the points in this order, and all clouds but the first smaller."""
    axis = 1 if tensor.shape[1] == cloud.shape[1] else 2
    permuted = tensor.detach().index_select(axis, order)
    permuted[1:] *= 0.7
    return permuted


def _axis(shape: tuple[int, ...], points: int) -> int | None:
    """Where the points are in a tensor that has one feature for each of them."""
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or shape[1:].count(points) != 1:
        return None
    axis = 1 + shape[1:].index(points)
    return axis if shape[3 - axis] > 3 else None


def _points_first(output: Tensor, axis: int) -> Tensor:
    output = output.squeeze(3) if output.ndim == 4 else output
    return output if axis == 1 else output.transpose(1, 2)


def template(name: str) -> str:
    """An adapter to be filled in for a class of that name, as errors and docs/adapters.md show it."""
    return f"""\
from pointcmt.adapters import Adapter, verify_adapter
adapter = Adapter(
    name="{name.lower()}",
    matches=lambda module: type(module).__name__ == "{name}",
    feature_module="<path of a submodule>",  # where the [B, D] shape feature is ...
    feature_from="output",  # ... its output, or its "input"
    # feature=lambda tapped: <[B, D]>,  # where the tapped tensor has another shape
    classify=lambda module, feature: module.<the layers after it>(feature),
    # logits=lambda output: <[B, K]>,  # where the class scores are not all that the network returns
)
verify_adapter(student, points, adapter)  # proves it"""


def _no_linear_end(module: nn.Module, reason: str) -> str:
    name = type(module).__name__
    return (
        f"no adapter is registered for {name}, and the generic one (the input of the linear layer whose "
        f"result is the class scores) does not fit: {reason}. Write one, it takes a few lines:\n\n"
        f"{textwrap.indent(template(name), '    ')}\n\n"
        f"then PointCMT(teacher, student, adapter=adapter) (see docs/adapters.md). The modules of {name}:\n"
        f"{module_tree(module)}"
    )
