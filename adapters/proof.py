"""The proof that an adapter says the truth of a network.

:func:`verify_adapter` runs the network on real points and compares ``classify(feature)`` with its output
three times: as it is; with parameters and running statistics moved a little, because what is the identity at
the start (a bias of zero, a temperature of one, fresh batch normalisation) hides what an adapter leaves out;
and so in training mode, where dropout acts. The network's own tensors are never written to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pointcmt.adapters._untouched import (
    copied,
    gather_sharded,
    is_sharded,
    quiet_evaluation,
    untouched,
    why_not_exchangeable,
    with_tensors,
)
from pointcmt.adapters.generic import generic_adapter
from pointcmt.adapters.registry import (
    INPUT_LAYOUTS,
    Adapter,
    AdapterError,
    Tap,
    as_call,
    describe,
    find_adapter,
    first_tensor,
    in_precision_of,
    matching_adapter,
    module_tree,
    unwrap,
)

_SEED = 20221  # of the noise; any constant would do
_NOISE = 0.1  # of a parameter's own spread: enough to tell layers apart, too little to break the network
_WEAKER = (1.0, 0.1, 0.01)  # tried in turn where the scores overflow


class NoLayout(AdapterError):
    """A network runs on clouds in none of the layouts."""


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`verify_adapter` measured.

    Attributes:
        adapter: the adapter that was proved.
        feature_path: the tapped submodule.
        feature_shape: [B, D].
        logits_shape: [B, K]; None where the adapter has no classifier.
        max_difference: largest ``|classify(feature) - logits|`` of the network as it is.
        tolerance: the largest that passes.
        conclusive: false where the class scores do not depend on the feature at all, not even after the
            parameters were moved: then any feature would have passed.
        local_shape: [B, M, C] of the local features; None where the adapter has none.
        global_shape: [B, D'] of the encoder's pooled feature; None where the adapter does not say.
        unchecked: what could not be checked, each with the reason.
    """

    adapter: Adapter
    feature_path: str
    feature_shape: tuple[int, ...]
    logits_shape: tuple[int, ...] | None
    max_difference: float
    tolerance: float
    conclusive: bool = True
    local_shape: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    unchecked: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        text = (
            f"{self.adapter.name}: feature {list(self.feature_shape)} at the {self.adapter.feature_from} of "
            f"{self.feature_path!r}"
        )
        if self.logits_shape is None:
            text += ", no classifier, so that which tensor the feature is could not be checked"
        else:
            text += (
                f", logits {list(self.logits_shape)}, max |classify(feature) - logits| = "
                f"{self.max_difference:.3g} (tolerance {self.tolerance:.3g})"
            )
        if self.local_shape is not None:
            text += f"; local features {list(self.local_shape)}"
        if self.global_shape is not None:
            text += f"; pooled feature {list(self.global_shape)}"
        return text + "".join(f"; not checked: {reason}" for reason in self.unchecked)


def verify_adapter(
    student: nn.Module, points: Any, adapter: Adapter | str | None = None, **kwargs: Any
) -> AdapterReport:
    """Proves ``classify(feature) == logits`` on real points: see the module's docstring.

    Leaves the network as it was: modes of every submodule, parameters, buffers, attributes, gradients, hooks
    and the random generators of torch, NumPy and Python. The network is given copies of ``points``.

    Args:
        student: the network, bare or wrapped.
        points: what the network takes: a tensor, a tuple of its positional arguments, or any object.
        adapter: adapter or name; None finds one. Where a registered adapter matches and is wrong, the
            generic one takes its place if it can be proved, with a warning.
        kwargs: keyword arguments of the network.

    Returns:
        A report (always true). What could not be checked is in it, and is a warning.

    Raises:
        AdapterError: the tap is never reached, the feature is not [B, D], or classifying it does not give
            the network's output. The message has shapes, the difference, the module tree and what to do.
    """
    args = points if isinstance(points, tuple) else (points,)
    return verify_call(student, adapter, args, kwargs)


def verify_call(
    student: nn.Module, adapter: Adapter | str | None, args: tuple, kwargs: Mapping[str, Any]
) -> AdapterReport:
    """As :func:`verify_adapter`, for a call with any arguments, also such as ``adapter`` or ``student``."""
    given = (args, dict(kwargs))
    try:
        return _verified(student, adapter, given)
    except AdapterError as error:
        _blame_input(given, error)
        raise


def _blame_input(given: Any, error: Exception) -> None:
    """Where the input itself is broken, that is the reason, and no adapter would be right.

    Raises:
        ValueError: a tensor of it has a value that is not finite; names its place.
    """
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    copied(given, keep)
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            place = (~tensor.isfinite()).nonzero()[0].tolist()
            value = tensor[tuple(place)].item()
            raise ValueError(
                f"the network's input {list(tensor.shape)} has {value} at {place} (shape {place[0]} of the "
                "batch); expected finite numbers. Mend that shape or leave it out (pointcmt check-data)"
            ) from error


def _verified(student: nn.Module, adapter: Adapter | str | None, given: tuple[tuple, dict]) -> AdapterReport:
    module = unwrap(student)
    _refuse_lazy(module)

    def run() -> Any:
        args, kwargs = copied(given)
        return module(*args, **kwargs)

    if adapter is not None:
        return _warned(module, _prove(module, find_adapter(module, adapter, points=given), run))
    named = matching_adapter(module)
    if named is None:
        return _warned(module, _prove(module, generic_adapter(module, given), run))
    try:
        report = _prove(module, named, run)
    except Exception as error:  # also of a tap or a classifier that looks for what this network lacks
        try:
            report = _prove(module, generic_adapter(module, given), run)
        except Exception:
            raise error from None
        what = "matches, but is wrong for" if named.describes(module) else "knows a part of"
        warnings.warn(
            f"the adapter {named.name!r} {what} this {type(module).__name__} "
            f"({str(error).splitlines()[0]}); the generic adapter is used in its place: {report}. Give "
            'adapter="generic" to choose it without this warning, or write one (docs/adapters.md)',
            RuntimeWarning,
            stacklevel=3,
        )
    return _warned(module, report)


def verify_tail(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], adapter: Adapter
) -> AdapterReport | None:
    """As :func:`verify_adapter`, on the inputs of ``adapter.logits_module`` in place of the network's.

    For scripts that never call the network itself. None where the feature is not inside that submodule.
    """
    last = adapter.output_module(module)
    tapped_module = adapter.submodule(module)
    if all(child is not tapped_module for child in last.modules()):
        return None

    def run() -> Any:
        copy_args, copy_kwargs = copied((args, dict(kwargs)))
        return last(*copy_args, **copy_kwargs)

    # what is tapped in front of the classifier never runs here
    return _warned(module, _prove(module, replace(adapter, local=None, global_=None), run, adapter))


def verify_again(
    module: nn.Module, adapter: Adapter, args: tuple, kwargs: Mapping[str, Any], *, tail: bool = False
) -> None:
    """One pass in eval mode in the middle of training: whatever was the identity at first is so no more.

    Args:
        module: the unwrapped network.
        args, kwargs: of the network.
        tail: they are of ``adapter.logits_module``, as in :func:`verify_tail`.

    Raises:
        AdapterError: the adapter is wrong.
    """
    if adapter.classify is None or any(is_sharded(parameter) for parameter in module.parameters()):
        return
    run = adapter.output_module(module) if tail else module

    def call() -> Any:
        copy_args, copy_kwargs = copied((args, dict(kwargs)))
        output = run(*copy_args, **copy_kwargs)
        if torch.isnan(adapter.logits(output)).any():  # the run diverged: no fault of the adapter
            raise FloatingPointError("the network's class scores are NaN")
        return output

    bare = replace(adapter, local=None, global_=None)
    with quiet_evaluation(module):
        _exchanged(
            module, _buffers_of(module), lambda: _compared(module, bare, call, "after some training, ")
        )


def fit_adapter(
    student: nn.Module, clouds: Tensor, adapter: Adapter | str | None = None, layout: str | None = None
) -> AdapterReport:
    """Finds how a network takes its clouds and which adapter is true of it: the one way for all commands.

    Args:
        student: the network, bare or wrapped.
        clouds: [B, N, 3 + C], B at least 2, on the network's device.
        adapter: adapter or name; None finds one.
        layout: a key of ``INPUT_LAYOUTS``; None tries the adapter's own, then all others in turn.

    Returns:
        The proof; ``report.adapter.input_layout`` is the layout that runs, so that
        ``report.adapter.call(student, clouds)`` calls the network.

    Raises:
        ValueError: no such layout.
        NoLayout: the network runs in none of the layouts (the message says what each gave).
        AdapterError: no adapter is true of it.
    """
    module = unwrap(student)
    _refuse_lazy(module)
    if layout is not None and layout not in INPUT_LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(INPUT_LAYOUTS)}")
    known = adapter if isinstance(adapter, Adapter) else matching_adapter(module)
    first = layout or ("BN3" if known is None else known.input_layout)
    wrong: AdapterError | None = None
    failures = {}
    for name in [first] if layout else dict.fromkeys([first, *INPUT_LAYOUTS]):
        try:
            args, kwargs = as_call(INPUT_LAYOUTS[name](clouds))

            def run(args: tuple = args, kwargs: dict[str, Any] = kwargs) -> Any:
                copy_args, copy_kwargs = copied((args, kwargs))
                return module(*copy_args, **copy_kwargs)

            with quiet_evaluation(module):
                output = _exchanged(module, _buffers_of(module), run)
            _require_batch(adapter, output, len(clouds))
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        try:
            report = verify_call(module, adapter, args, kwargs)
        except AdapterError as error:
            wrong = wrong or error
            continue
        return replace(report, adapter=replace(report.adapter, input_layout=name))
    if wrong is not None:
        raise wrong
    tried = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
    raise NoLayout(
        f"{type(module).__name__} runs on clouds {list(clouds.shape)} in none of the layouts that were "
        f"tried:\n{tried}\nIf it takes normals too, give clouds with 6 channels (--channels 6). Else add its "
        "own layout: pointcmt.adapters.INPUT_LAYOUTS['mine'] = lambda points: <a tensor, or a tuple of "
        "arguments>, then layout='mine'."
    )


def _require_batch(adapter: Adapter | str | None, output: Any, clouds: int) -> None:
    """A layout that a network takes for another may run, with the clouds joined to one."""
    find = adapter.logits if isinstance(adapter, Adapter) else first_tensor
    try:
        scores = find(output)
    except AdapterError:  # which part of the output they are is not known yet
        return
    if scores.ndim < 2 or len(scores) != clouds:
        raise ValueError(f"it gives {list(scores.shape)} for {clouds} clouds")


# --------------------------------------------------------------------------------------------------------
# One proof


def _prove(
    module: nn.Module, adapter: Adapter, run: Callable[[], Any], named: Adapter | None = None
) -> AdapterReport:
    unchecked: list[str] = []
    hindered = why_not_exchangeable(module)
    training = any(child.training for child in module.modules())
    with untouched(module):
        modes = [(child, child.training or not training) for child in module.modules()]
        _set_modes(module, False)
        buffers = {} if hindered else _buffers_of(module)
        seen = _exchanged(module, buffers, lambda: _compared(module, adapter, run, ""))
        conclusive = seen.conclusive
        if hindered is None and adapter.classify is not None:
            conclusive |= _prove_moved(module, adapter, run, unchecked)
            for child, mode in modes:
                child.training = mode
            _prove_training(module, adapter, run, unchecked)
        elif hindered is not None:
            unchecked.append(f"its parameters moved, and training mode: {hindered}")
    if adapter.classify is not None and not conclusive:
        unchecked.append("which tensor the feature is: the class scores do not depend on it")
    return AdapterReport(
        named or adapter,
        adapter.feature_path(module),
        tuple(seen.feature.shape),
        None if seen.logits is None else tuple(seen.logits.shape),
        seen.difference,
        seen.tolerance,
        conclusive,
        seen.local_shape,
        seen.global_shape,
        tuple(unchecked),
    )


class _Compared(NamedTuple):
    feature: Tensor
    logits: Tensor | None
    difference: float
    tolerance: float
    conclusive: bool
    local_shape: tuple[int, ...] | None
    global_shape: tuple[int, ...] | None


def _compared(module: nn.Module, adapter: Adapter, run: Callable[[], Any], when: str) -> _Compared:
    """Runs the network as it stands, and compares.

    Raises:
        AdapterError: a shape or a value is not what the adapter says; ``when`` is put before the difference.
    """
    seen = observe(module, adapter, run)
    help_ = _help(module)
    feature, logits, where = _shaped(module, adapter, seen, help_)
    local_shape, global_shape = _prove_taps(module, adapter, seen, len(feature), help_)
    if logits is None:
        return _Compared(feature, None, 0.0, 0.0, False, local_shape, global_shape)
    gather_sharded(module)
    again = _classified(module, adapter, feature, logits, where, help_)
    difference, tolerance = _difference(again, logits), _tolerance(feature, logits)
    # `not <=` so that NaN fails too
    if not difference <= tolerance:
        raise AdapterError(
            f"adapter {adapter.name!r} is wrong for {type(module).__name__}: {when}classify(feature) differs "
            f"from the network's output by up to {difference:.3g} (tolerance {tolerance:.3g}); feature "
            f"{list(feature.shape)} at {where}, logits {list(logits.shape)}." + help_
        )
    assert adapter.classify is not None
    moved = adapter.classify(module, in_precision_of(module, feature + feature.abs().mean() + 1))
    conclusive = _difference(moved, logits) > tolerance
    return _Compared(feature, logits, difference, tolerance, conclusive, local_shape, global_shape)


def _help(module: nn.Module) -> str:
    return (
        "\nWrite an adapter whose feature_module is the submodule where the [B, D] shape feature is, "
        "and whose classify runs the layers after it (docs/adapters.md). The modules of "
        f"{type(module).__name__}:\n{module_tree(module)}"
    )


def _shaped(
    module: nn.Module, adapter: Adapter, seen: Observed, help_: str
) -> tuple[Tensor, Tensor | None, str]:
    """The feature [B, D], the class scores [B, K] and where the feature is."""
    where = f"the {adapter.feature_from} of {adapter.feature_path(module)!r}"
    if seen.feature is None:
        raise AdapterError(
            f"adapter {adapter.name!r} taps {where}, which {type(module).__name__}'s forward pass never "
            "runs." + help_
        )
    feature = adapter.feature(seen.feature)
    logits = None if adapter.classify is None else adapter.logits(seen.output)
    if logits is not None and logits.ndim != 2:
        raise AdapterError(
            f"adapter {adapter.name!r}: the class scores have shape {list(logits.shape)}; expected "
            "[B, K]. Give the adapter logits=<function from the network's output to [B, K]>." + help_
        )
    if feature.ndim != 2 or (logits is not None and feature.shape[0] != logits.shape[0]):
        batch = "" if logits is None else f" with B = {logits.shape[0]}"
        raise AdapterError(
            f"adapter {adapter.name!r}: the feature at {where} has shape {list(feature.shape)}; expected "
            f"[B, D]{batch}. Tap another submodule, or give the adapter "
            "feature=<function from that tensor to [B, D]>." + help_
        )
    return feature, logits, where


def _classified(
    module: nn.Module, adapter: Adapter, feature: Tensor, logits: Tensor, where: str, help_: str
) -> Tensor:
    assert adapter.classify is not None
    try:
        again = adapter.classify(module, in_precision_of(module, feature))
    except Exception as error:
        sharded = (
            " The network's parameters are sharded, and classify runs outside of its forward pass: shard "
            "with fully_shard(network, reshard_after_forward=False), or give the classifier a fully_shard "
            "of its own."
            if any(is_sharded(parameter) for parameter in module.parameters())
            else ""
        )
        raise AdapterError(
            f"adapter {adapter.name!r}: classify failed on the feature {list(feature.shape)} at {where}: "
            f"{type(error).__name__}: {error}.{sharded}" + help_
        ) from error
    if not isinstance(again, Tensor) or again.shape != logits.shape:
        raise AdapterError(
            f"adapter {adapter.name!r}: classify(feature {list(feature.shape)} at {where}) gives "
            f"{describe(again)}; the network's class scores are {list(logits.shape)}. classify returns class "
            "scores [B, K]: logits= is for the network's output only." + help_
        )
    return again


def _prove_taps(
    module: nn.Module, adapter: Adapter, seen: Observed, batch: int, help_: str
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Local features come one per centre and cloud, the pooled feature one per cloud: their shapes."""
    local_shape = global_shape = None
    for name, tap, found in (
        ("local", adapter.local, seen.local),
        ("global_", adapter.global_, seen.global_),
    ):
        if tap is not None and found is None:
            raise AdapterError(
                f"adapter {adapter.name!r}: {name} taps the {tap.where} of {tap.path(module)!r}, which "
                f"{type(module).__name__}'s forward pass never runs." + help_
            )
    if seen.local is not None:
        local, centers = seen.local
        if (
            local.ndim != 3
            or centers.ndim != 3
            or local.shape[0] != batch
            or centers.shape != (*local.shape[:2], 3)
        ):
            raise AdapterError(
                f"adapter {adapter.name!r}: local gives features {list(local.shape)} and centres "
                f"{list(centers.shape)}; expected [B, M, C] and [B, M, 3] with B = {batch}: one feature for "
                "each centre." + help_
            )
        if centers.shape[1] > 1 and bool((centers == centers[:, :1]).all()):
            raise AdapterError(
                f"adapter {adapter.name!r}: all {centers.shape[1]} centres that local gives are one and the "
                "same point of each cloud; expected where each local feature is." + help_
            )
        local_shape = tuple(local.shape)
    if seen.global_ is not None:
        if seen.global_.ndim != 2 or seen.global_.shape[0] != batch:
            raise AdapterError(
                f"adapter {adapter.name!r}: global_ gives {list(seen.global_.shape)}; expected [B, D] with "
                f"B = {batch}." + help_
            )
        global_shape = tuple(seen.global_.shape)
    return local_shape, global_shape


def _refuse_lazy(module: nn.Module) -> None:
    lazy = [name for name, tensor in module.named_parameters() if nn.parameter.is_lazy(tensor)]
    lazy += [name for name, tensor in module.named_buffers() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise AdapterError(
            f"{type(module).__name__} has lazy layers that have no size yet ({', '.join(lazy[:3])}): run it "
            "once on a batch first"
        )


def _warned(module: nn.Module, report: AdapterReport) -> AdapterReport:
    for reason in report.unchecked:
        warnings.warn(
            f"of the adapter {report.adapter.name!r} on {type(module).__name__} this could not be checked: "
            f"{reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return report


# --------------------------------------------------------------------------------------------------------
# Moved parameters, and training mode


def _exchanged(module: nn.Module, tensors: Mapping[str, Tensor], run: Callable[[], Any]) -> Any:
    if not tensors or why_not_exchangeable(module) is not None:
        return run()
    return with_tensors(module, tensors, run)


def _set_modes(module: nn.Module, training: bool) -> None:
    for child in module.modules():
        child.training = training


def _buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def _moved(module: nn.Module, strength: float) -> dict[str, Tensor]:
    """Every floating parameter with noise of a tenth of its spread, and other running statistics."""
    random = torch.Generator().manual_seed(_SEED)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random).to(like.device, like.dtype)

    tensors = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        if value.is_floating_point() and value.numel():
            spread = float(value.float().std()) if value.numel() > 1 else 0.0
            drawn = noise(value)
            # of a constant: never next to nothing, which a single temperature could get by chance
            step = drawn * spread if spread > 0 else drawn + drawn.sign()
            value = value + _NOISE * strength * step
        tensors[name] = value
    for name, buffer in module.named_buffers():
        value = buffer.detach().clone()
        if value.is_floating_point() and name.endswith("running_mean"):
            value += _NOISE * strength * noise(value)
        elif value.is_floating_point() and name.endswith("running_var"):
            value *= torch.exp(3 * _NOISE * strength * noise(value))
        tensors[name] = value
    return tensors


def _attempts(module: nn.Module, run: Callable[[], _Compared], what: str, unchecked: list[str]) -> bool:
    """Runs with moved parameters, weaker where the scores are not finite; whether the feature mattered."""
    failure = "its class scores are not finite then"
    for strength in _WEAKER:
        try:
            seen: _Compared | None = _exchanged(module, _moved(module, strength), run)
        except AdapterError:
            raise
        except _NotFinite:
            continue
        except Exception as error:
            failure = f"the network fails then ({type(error).__name__}: {str(error)[:200]})"
            break
        return seen is not None and seen.conclusive
    unchecked.append(f"{what}: {failure}")
    return False


class _NotFinite(Exception):
    pass


def _prove_moved(module: nn.Module, adapter: Adapter, run: Callable[[], Any], unchecked: list[str]) -> bool:
    bare = replace(adapter, local=None, global_=None, logits=_finite(adapter.logits))
    when = "with parameters and running statistics moved a little, as training moves them, "
    return _attempts(
        module, lambda: _compared(module, bare, run, when), "with its parameters moved", unchecked
    )


def _finite(logits: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def checked(output: Any) -> Tensor:
        scores = logits(output)
        if not bool(torch.isfinite(scores).all()):
            raise _NotFinite
        return scores

    return checked


def _prove_training(
    module: nn.Module, adapter: Adapter, run: Callable[[], Any], unchecked: list[str]
) -> None:
    bare = replace(adapter, local=None, global_=None, logits=_finite(adapter.logits))
    _attempts(module, lambda: _trained(module, bare, run, unchecked), "in training mode", unchecked)


def _trained(
    module: nn.Module, adapter: Adapter, run: Callable[[], Any], unchecked: list[str]
) -> _Compared | None:
    """In training mode: the classifier, from the random numbers that were next at the tap, as the network.

    Layers with dropout may stand in another order, or beside others that draw too; then every dropout is
    given the mask that belongs to its probability and shape.
    """
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.is_cuda})
    help_ = _help(module)
    difference = tolerance = 0.0
    for masks in (None, _SameMasks(module)):
        with ExitStack() as stack:
            if masks is not None:
                stack.enter_context(masks)
            at_tap: list[list[Tensor]] = []

            def tap(masks: _SameMasks | None = masks, at_tap: list = at_tap) -> None:
                at_tap[:] = [_random_states(devices)]
                if masks is not None:
                    masks.calls.clear()

            seen = observe(module, adapter, run, tap)
            try:
                feature, logits, where = _shaped(module, adapter, seen, help_)
            except AdapterError as error:
                raise AdapterError(f"in training mode, {error}") from None
            assert logits is not None
            drew = not all(torch.equal(a, b) for a, b in zip(at_tap[0], _random_states(devices), strict=True))
            inside = [] if masks is None else list(masks.calls)
            if masks is not None:
                masks.calls.clear()
            _set_random_states(devices, at_tap[0])
            again = _classified(module, adapter, feature, logits, where, help_)
            difference, tolerance = _difference(again, logits), _tolerance(feature, logits)
            if difference <= tolerance:
                return None
    if drew:
        unchecked.append(
            "in training mode: the network draws random numbers after the feature in its own way, so that "
            "its output and the classifier's cannot be compared"
        )
        return None
    assert masks is not None
    theirs, ours = ", ".join(inside) or "none", ", ".join(masks.calls) or "none"
    raise AdapterError(
        f"adapter {adapter.name!r} is wrong for {type(module).__name__}: in training mode classify(feature) "
        f"differs from the network's output by up to {difference:.3g} (tolerance {tolerance:.3g}) for the "
        f"same dropout masks. Dropout after the feature, in the network: {theirs}; in classify: {ours}. Let "
        "classify run the network's own layers in the order of its forward pass, each where it is there."
        + help_
    )


class _SameMasks(TorchFunctionMode):
    """Gives each dropout the mask that its probability and shape call for, and keeps a list of them."""

    _KINDS = (
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    )

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._module = module
        self._current = ""
        self._handles: list[Any] = []

    def __enter__(self) -> _SameMasks:
        for path, child in self._module.named_modules():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                self._handles.append(child.register_forward_pre_hook(self._naming(path)))
                self._handles.append(child.register_forward_hook(self._naming("")))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def _naming(self, path: str) -> Callable[..., None]:
        def name(*_: Any) -> None:
            self._current = path

        return name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in self._KINDS:
            return func(*args, **kwargs)
        defaults = {"p": 0.5, "training": func not in (F.alpha_dropout, F.feature_alpha_dropout)}
        names = ("input", "p", "training", "inplace")
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        x, p = given["input"], float(given["p"])
        if not given["training"] or p == 0:
            return x
        shape = x.shape if func in (F.dropout, F.alpha_dropout) else (*x.shape[:2], *[1] * (x.ndim - 2))
        random = torch.Generator().manual_seed(_SEED + round(1e6 * p))
        mask = torch.rand(shape, generator=random).ge(p).to(x.device, x.dtype) / max(1 - p, 1e-6)
        self.calls.append(f"{self._current or func.__name__} (p={p:g}, {list(x.shape)})")
        return x.mul_(mask) if given.get("inplace") else x * mask


def _random_states(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _set_random_states(devices: list[int], states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


# --------------------------------------------------------------------------------------------------------
# Watching one pass


class Observed(NamedTuple):
    """What one forward pass showed; None for what never ran or was not asked for.

    Attributes:
        feature: a copy of the tapped tensor, as it is.
        output: of ``logits_module``.
        local: [B, M, C] and [B, M, 3].
        global_: [B, D'].
    """

    feature: Tensor | None
    output: Any
    local: tuple[Tensor, Tensor] | None = None
    global_: Tensor | None = None


def observe(
    module: nn.Module, adapter: Adapter, run: Callable[[], Any], on_tap: Callable[[], None] | None = None
) -> Observed:
    """Calls ``run``, watching what the adapter taps of ``module``; ``on_tap`` is called at each feature."""
    found: dict[str, Any] = {}
    inputs: list[tuple] = []

    def keep(name: str, tap: Tap) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            value = (value, found.get("beside")) if tap.beside is not None else value
            found[name] = tree_map(_copied, tap.select(module, value, inputs[0] if inputs else ()))

        return see

    def see_feature(value: Any) -> None:
        found.update(feature=_copied(first_tensor(value)))
        if on_tap is not None:
            on_tap()

    with ExitStack() as stack:
        handle = module.register_forward_pre_hook(
            lambda _m, args, kwargs: inputs.append((*args, *kwargs.values())), with_kwargs=True
        )
        stack.callback(handle.remove)
        stack.enter_context(tapped(adapter.submodule(module), adapter.feature_from, see_feature))
        for name, tap in (("local", adapter.local), ("global_", adapter.global_)):
            if tap is not None:
                if tap.beside is not None:
                    see_beside = tapped(
                        adapter.beside(tap, module), tap.beside[1], lambda value: found.update(beside=value)
                    )
                    stack.enter_context(see_beside)
                stack.enter_context(tapped(adapter.tapped(tap, module), tap.where, keep(name, tap)))
        handle = adapter.output_module(module).register_forward_hook(
            lambda _m, _a, output: found.update(output=output)
        )
        stack.callback(handle.remove)
        run()
    return Observed(found.get("feature"), found.get("output"), found.get("local"), found.get("global_"))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def tapped(
    submodule: nn.Module, where: Literal["input", "output"], see: Callable[[Any], None]
) -> Iterator[None]:
    """Calls ``see`` with what goes into ``submodule`` (a tuple), or with what comes out of it."""
    if where == "input":
        handle = submodule.register_forward_pre_hook(
            lambda _m, args, kwargs: see((*args, *kwargs.values())), with_kwargs=True
        )
    else:
        handle = submodule.register_forward_hook(lambda _m, _a, output: see(output))
    try:
        yield
    finally:
        handle.remove()


def _difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    difference = (a.double() - b.double()).abs()
    # equal infinities (a log-probability of 0) subtract to NaN
    return float(torch.where(a == b, torch.zeros_like(difference), difference).max())


def _tolerance(feature: Tensor, logits: Tensor) -> float:
    """Rounding of the coarsest type on the way, relative to the largest score."""
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (feature, logits))
    relative = max(1e-4, 8 * coarsest)
    if logits.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        relative = max(relative, 2e-3)
    finite = logits[torch.isfinite(logits)]
    return relative * max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-3)
