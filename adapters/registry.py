"""What an adapter is, where adapters are kept, and how one is proved.

An adapter says two things of a classifier that somebody else wrote: which tensor inside it is the shape
feature, and how that network turns a shape feature into class scores. The claim is checked, not trusted:
:func:`verify_adapter` runs the network on real points and compares ``classify(feature)`` with the output.

This module and every file beside it import nothing of pointcmt, and no third-party codebase.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

ENTRY_POINT_GROUP = "pointcmt.adapters"

_LOGIT_KEYS = ("logits", "logit", "pred", "preds", "prediction", "out", "output", "cls", "scores")


class AdapterError(RuntimeError):
    """An adapter does not describe the network it was used on, or no adapter can be found."""


def first_tensor(output: Any) -> Tensor:
    """The class scores in whatever a network returns: the default of :attr:`Adapter.logits`.

    Takes a tensor as it is; of a tuple or list the first tensor; of a mapping or an object with attributes
    the entry called ``logits`` (or ``pred``, ``out``, ...), else the only tensor there.

    Raises:
        AdapterError: nothing in ``output`` can be told to be the class scores.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in _LOGIT_KEYS:
            if isinstance(output.get(key), Tensor):
                return output[key]
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    elif isinstance(output, (tuple, list)):
        named = getattr(output, "logits", None)
        if isinstance(named, Tensor):
            return named
        for value in output:
            if isinstance(value, Tensor):
                return value
    elif is_dataclass(output) and not isinstance(output, type):
        return first_tensor({item.name: getattr(output, item.name) for item in fields(output)})
    elif isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    raise AdapterError(
        f"cannot tell which part of the student's output ({_describe(output)}) holds the class scores; "
        "give the adapter logits=<function from the output to the [B, K] tensor>"
    )


def identity(feature: Tensor) -> Tensor:
    return feature


Select = Callable[[nn.Module, Any, tuple], Any]


@dataclass(frozen=True)
class Tap:
    """Where a network keeps features of its encoder: local ones, or the pooled one.

    Attributes:
        module: path of a submodule, or ``module -> path``.
        where: whether they are in that submodule's ``"input"`` (the tuple of its positional arguments) or in
            its ``"output"``.
        select: ``(module, tapped, inputs) -> (local [B, M, C], centers [B, M, 3])``, or ``-> [B, D]`` for
            :attr:`Adapter.global_`: ``module`` the network,
            ``tapped`` what the submodule was given or gave, ``inputs`` the positional arguments of the
            network's own call, () where scripts never call it (``logits_module``).
    """

    module: str | Callable[[nn.Module], str]
    where: Literal["input", "output"]
    select: Select

    def __post_init__(self) -> None:
        if self.where not in ("input", "output"):
            raise ValueError(
                f"where is {self.where!r}; expected 'input' or 'output' (of the module at {self.module!r})"
            )

    def path(self, module: nn.Module) -> str:
        """Path of the submodule that is tapped, inside the unwrapped ``module``."""
        return self.module if isinstance(self.module, str) else self.module(module)


@dataclass(frozen=True)
class Adapter:
    """Where one family of classifiers keeps its shape feature, and what its classifier is.

    Attributes:
        name: unique name, as ``pointcmt adapters`` lists it.
        matches: ``module -> bool``; true for the networks this adapter describes. Go by structure and class
            name, not by import, so that a renamed copy still matches.
        feature_module: path of a submodule (as in ``module.get_submodule``), or ``module -> path``.
        feature_from: whether the feature is that submodule's first ``"input"`` or its ``"output"``.
            The tensor is copied when it is seen, so a following in-place operation does no harm.
        classify: ``(module, feature [B, D]) -> logits [B, K]``: the network's own layers from the feature on,
            equal to the network's output (log-probabilities stay log-probabilities). None where there is no
            classifier, or none is needed: pre-training.
        logits: the network's output -> class scores [B, K].
        input_layout: what the network takes, for clouds [B, N, 3]: a key of :data:`INPUT_LAYOUTS`.
        feature: tapped tensor -> [B, D], where the network keeps it in another shape (``[B, D, 1]``).
        logits_module: path of the submodule that puts out the class scores. Empty: the network itself. Needed
            only where training scripts call some method of the network in place of ``network(points)``.
        local: where the network's local features and their centres are; None where it has none.
        global_: where the encoder's pooled feature [B, D'] is, before any layer of the head; None: the shape
            feature serves in its place.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    feature_module: str | Callable[[nn.Module], str]
    feature_from: Literal["input", "output"]
    classify: Callable[[nn.Module, Tensor], Tensor] | None = None
    logits: Callable[[Any], Tensor] = first_tensor
    input_layout: str = "BN3"
    feature: Callable[[Tensor], Tensor] = identity
    logits_module: str = ""
    local: Tap | None = None
    global_: Tap | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("an adapter needs a name")
        if self.feature_from not in ("input", "output"):
            raise ValueError(
                f"adapter {self.name!r}: feature_from is {self.feature_from!r}; expected 'input' or 'output' "
                "(of the module at feature_module)"
            )
        if self.input_layout not in INPUT_LAYOUTS:
            raise ValueError(
                f"adapter {self.name!r}: input_layout is {self.input_layout!r}; expected one of "
                f"{', '.join(INPUT_LAYOUTS)} (add another to pointcmt.adapters.INPUT_LAYOUTS)"
            )

    def describes(self, module: nn.Module) -> bool:
        """:attr:`matches`, false where it fails: a rule for one codebase looks for parts that others lack."""
        try:
            return bool(self.matches(module))
        except (AttributeError, IndexError, KeyError, TypeError):
            return False

    def feature_path(self, module: nn.Module) -> str:
        """Path of the submodule that is tapped, inside the unwrapped ``module``."""
        return self.feature_module if isinstance(self.feature_module, str) else self.feature_module(module)

    def submodule(self, module: nn.Module) -> nn.Module:
        """The submodule that is tapped.

        Raises:
            AdapterError: ``module`` has no submodule of that path.
        """
        path = self.feature_path(module)
        return _submodule(self, module, path, "feature_module")

    def tapped(self, tap: Tap, module: nn.Module) -> nn.Module:
        """The submodule of :attr:`local` or :attr:`global_`.

        Raises:
            AdapterError: ``module`` has no submodule of that path.
        """
        return _submodule(self, module, tap.path(module), "local" if tap is self.local else "global_")

    def output_module(self, module: nn.Module) -> nn.Module:
        """The submodule that puts out the class scores: ``module`` itself unless ``logits_module`` is set."""
        if not self.logits_module:
            return module
        return _submodule(self, module, self.logits_module, "logits_module")

    def arrange(self, points: Tensor) -> Any:
        """Clouds [B, N, 3] as the network takes them."""
        return INPUT_LAYOUTS[self.input_layout](points)


def _transposed(points: Tensor) -> Tensor:
    return points.transpose(1, 2).contiguous()


INPUT_LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "BN3": identity,
    "B3N": _transposed,
    "pos_x": lambda points: {"pos": points.contiguous(), "x": _transposed(points)},
}
"""How clouds [B, N, 3] are handed to a network: as they are, channels first, or OpenPoints' dictionary."""


# --------------------------------------------------------------------------------------------------------
# Seeing through wrappers


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``, Lightning Fabric.

    Wrappers may be nested. A module that merely has an attribute called ``module`` is not a wrapper.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        compiled = module.__dict__.get("_orig_mod") or module._modules.get("_orig_mod")
        fabric = module._modules.get("_original_module") if type(module).__name__ == "_FabricModule" else None
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and isinstance(compiled, nn.Module):
            module = compiled
        elif isinstance(fabric, nn.Module):
            module = fabric
        else:
            return module


def in_precision_of(module: nn.Module, feature: Tensor) -> Tensor:
    """The feature in the precision of the module that it goes into, unless autocast sees to that."""
    if torch.is_autocast_enabled(feature.device.type):
        return feature
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    return feature if parameter is None else feature.to(parameter.dtype)


def module_tree(module: nn.Module, limit: int = 60) -> str:
    """``path: Class(sizes)`` per submodule in the order of definition, as error messages show it."""
    lines = [f"{type(module).__name__}:"]
    named = [(path, child) for path, child in module.named_modules() if path]
    depth = 1 + max((path.count(".") for path, _ in named), default=0)
    while depth > 1 and sum(path.count(".") < depth for path, _ in named) > limit:
        depth -= 1
    shown = [(path, child) for path, child in named if path.count(".") < depth]
    # the classifier is at the end, so that is the part to keep when even the top level is too long
    for path, child in shown[-limit:]:
        extra = child.extra_repr() if not isinstance(child, nn.Sequential) else ""
        lines.append(f"  {path}: {type(child).__name__}({extra})")
    if len(shown) > limit:
        lines.insert(1, f"  ... {len(shown) - limit} more")
    return "\n".join(lines)


def _submodule(adapter: Adapter, module: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise AdapterError(
            f"adapter {adapter.name!r}: {what} is {path!r}, but {type(module).__name__} has no such "
            f"submodule. Choose one of its paths:\n{module_tree(module)}"
        ) from None


# --------------------------------------------------------------------------------------------------------
# The registry

_builtin: dict[str, Adapter] = {}
_installed: dict[str, Adapter] = {}
_registered: dict[str, Adapter] = {}
_loading: dict[str, Adapter] | None = None
_loaded = False
_problems: dict[str, str] = {}

_Classify = Callable[[nn.Module, Tensor], Tensor]
_F = TypeVar("_F", bound=_Classify)


@overload
def register_adapter(adapter: Adapter, *, replace: bool = False) -> Adapter: ...
@overload
def register_adapter(*, replace: bool = False, **description: Any) -> Callable[[_Classify], Adapter]: ...
def register_adapter(
    adapter: Adapter | None = None, *, replace: bool = False, **description: Any
) -> Adapter | Callable[[_Classify], Adapter]:
    """Adds an adapter to the registry, by call or as a decorator of its classifier.

    By call: ``register_adapter(Adapter(...))``. As a decorator::

        @register_adapter(name="mynet", matches=..., feature_module="head.2", feature_from="output")
        def mynet(module, feature):
            return module.head[3:](feature)

    after which ``mynet`` is the :class:`Adapter`.

    Args:
        adapter: the adapter (call form).
        replace: take the place of a registered adapter of the same name.
        description: the fields of :class:`Adapter` other than ``classify`` (decorator form).

    Raises:
        ValueError: another adapter has that name and ``replace`` is false.
    """
    if adapter is None:
        if not description:
            raise ValueError(
                "register_adapter needs an Adapter, or the fields of one when it decorates a classifier"
            )
        return lambda classify: register_adapter(Adapter(classify=classify, **description), replace=replace)
    if not isinstance(adapter, Adapter):
        raise ValueError(
            f"register_adapter takes an Adapter, not {_describe(adapter)}; as a decorator it is called with "
            "the fields: @register_adapter(name=..., matches=..., feature_module=..., feature_from=...)"
        )
    if description:
        raise ValueError(f"register_adapter(adapter) takes no further fields, got {', '.join(description)}")
    shelf = _registered if _loading is None else _loading
    if adapter.name in shelf and not replace and shelf[adapter.name] != adapter:
        raise ValueError(
            f"an adapter named {adapter.name!r} is registered already; choose another name or pass "
            "replace=True"
        )
    shelf.pop(adapter.name, None)  # the latest comes last, so that it is found first
    shelf[adapter.name] = adapter
    return adapter


def unregister_adapter(name: str) -> None:
    """Takes out an adapter that :func:`register_adapter` added; those that come with a package stay."""
    if name not in _registered:
        raise ValueError(
            f"no adapter named {name!r} was registered by call; registered so: "
            f"{', '.join(_registered) or 'none'}"
        )
    del _registered[name]


@contextmanager
def _onto(shelf: dict[str, Adapter]) -> Iterator[None]:
    global _loading
    before, _loading = _loading, shelf
    try:
        yield
    finally:
        _loading = before


def _load() -> None:
    """Imports the adapter files beside this one and the entry points of other packages, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    package = __name__.rpartition(".")[0]
    with _onto(_builtin):
        for info in pkgutil.iter_modules(sys.modules[package].__path__):
            if info.name not in ("registry", "generic") and not info.name.startswith("_"):
                importlib.import_module(f"{package}.{info.name}")
    with _onto(_installed):
        for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            # somebody else's broken package must not take this one down
            try:
                loaded = entry.load()
                if isinstance(loaded, Adapter):
                    register_adapter(loaded)
            except Exception as error:
                _problems[entry.name] = f"{entry.value}: {type(error).__name__}: {error}"
                warnings.warn(
                    f"the adapter entry point {entry.name!r} ({entry.value}) could not be loaded: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )


def adapter_problems() -> dict[str, str]:
    """Entry points that could not be loaded: name -> reason."""
    _load()
    return dict(_problems)


def list_adapters() -> list[Adapter]:
    """Every registered adapter in the order in which :func:`find_adapter` asks them.

    First those registered by call, then those of other packages (entry points), then those that come with
    pointcmt; the latest first in each. A name hides the same name further back.
    """
    _load()
    found: dict[str, Adapter] = {}
    for shelf in (_registered, _installed, _builtin):
        for name in reversed(shelf):
            found.setdefault(name, shelf[name])
    return list(found.values())


def get_adapter(name: str) -> Adapter:
    """The registered adapter of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    for adapter in list_adapters():
        if adapter.name == name:
            return adapter
    raise ValueError(
        f"no adapter named {name!r}; registered: "
        f"{', '.join(sorted(a.name for a in list_adapters())) or 'none'}"
    )


def find_adapter(student: nn.Module, adapter: Adapter | str | None = None, *, points: Any = None) -> Adapter:
    """The adapter for ``student``: the explicit one, else a registered match, else the generic one.

    Args:
        student: the network, bare or inside the wrappers that :func:`unwrap` knows.
        adapter: an :class:`Adapter` or the name of a registered one; taken as it is.
        points: what the network takes. With it, the generic adapter is the linear layer that really runs
            last and puts out the class scores; without it, the one defined last.

    Raises:
        AdapterError: no registered adapter matches and the network does not end in a linear layer.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, str):
        return get_adapter(adapter)
    if adapter is not None:
        raise ValueError(
            f"adapter is {_describe(adapter)}; expected an Adapter or the name of a registered one"
        )
    module = unwrap(student)
    for candidate in list_adapters():
        if candidate.describes(module):
            return candidate
    from pointcmt.adapters.generic import generic_adapter

    return generic_adapter(module, points)


# --------------------------------------------------------------------------------------------------------
# The proof


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`verify_adapter` measured.

    Attributes:
        adapter: the adapter that was proved.
        feature_path: the tapped submodule.
        feature_shape: [B, D].
        logits_shape: [B, K].
        max_difference: largest ``|classify(feature) - logits|``.
        tolerance: the largest that passes.
        conclusive: false where the class scores do not depend on the feature at all (a classifier whose
            weights are zero at the start): then any feature would have passed.
        local_shape: [B, M, C] of the local features; None where the adapter has none.
        global_shape: [B, D'] of the encoder's pooled feature; None where the adapter does not say.
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
            if not self.conclusive:
                text += "; the scores do not depend on the feature yet, so this proves little"
        if self.local_shape is not None:
            text += f"; local features {list(self.local_shape)}"
        if self.global_shape is not None:
            text += f"; pooled feature {list(self.global_shape)}"
        return text


def verify_adapter(
    student: nn.Module, points: Any, adapter: Adapter | str | None = None, **kwargs: Any
) -> AdapterReport:
    """Proves ``classify(feature) == logits`` in eval mode on real points.

    Leaves the network as it was: modes of every submodule, buffers, gradients, hooks and the random
    generators of torch, NumPy and Python.

    Args:
        student: the network, bare or wrapped.
        points: what the network takes: a tensor, or a tuple of its positional arguments.
        adapter: adapter or name; None finds one.
        kwargs: keyword arguments of the network.

    Returns:
        A report (always true).

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
    module = unwrap(student)
    adapter = find_adapter(module, adapter, points=(args, dict(kwargs)))
    return _prove(module, adapter, lambda: module(*args, **kwargs))


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
    return _prove(module, adapter, lambda: last(*args, **kwargs))


def _prove(module: nn.Module, adapter: Adapter, run: Callable[[], Any]) -> AdapterReport:
    with quiet_evaluation(module):
        seen = observe(module, adapter, run)
        path = adapter.feature_path(module)
        where = f"the {adapter.feature_from} of {path!r}"
        help_ = (
            "\nWrite an adapter whose feature_module is the submodule where the [B, D] shape feature is, "
            "and whose classify runs the layers after it (docs/adapters.md). The modules of "
            f"{type(module).__name__}:\n{module_tree(module)}"
        )
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
        local_shape, global_shape = _prove_taps(module, adapter, seen, len(feature), help_)
        difference, tolerance, conclusive = 0.0, 0.0, False
        if logits is not None:
            difference, tolerance, conclusive = _prove_classifier(
                module, adapter, feature, logits, where, help_
            )
    return AdapterReport(
        adapter,
        path,
        tuple(feature.shape),
        None if logits is None else tuple(logits.shape),
        difference,
        tolerance,
        conclusive,
        local_shape,
        global_shape,
    )


def _prove_classifier(
    module: nn.Module, adapter: Adapter, feature: Tensor, logits: Tensor, where: str, help_: str
) -> tuple[float, float, bool]:
    """``classify(feature) == logits``: largest difference, tolerance, and whether the feature matters."""
    assert adapter.classify is not None
    try:
        again = adapter.classify(module, in_precision_of(module, feature))
    except Exception as error:
        raise AdapterError(
            f"adapter {adapter.name!r}: classify failed on the feature {list(feature.shape)} at {where}: "
            f"{type(error).__name__}: {error}" + help_
        ) from error
    if not isinstance(again, Tensor) or again.shape != logits.shape:
        raise AdapterError(
            f"adapter {adapter.name!r}: classify(feature {list(feature.shape)} at {where}) gives "
            f"{_describe(again)}; the network's class scores are {list(logits.shape)}." + help_
        )
    difference, tolerance = _difference(again, logits), _tolerance(feature, logits)
    # `not <=` so that NaN fails too
    if not difference <= tolerance:
        raise AdapterError(
            f"adapter {adapter.name!r} is wrong for {type(module).__name__}: classify(feature) differs "
            f"from the network's output by up to {difference:.3g} (tolerance {tolerance:.3g}); feature "
            f"{list(feature.shape)} at {where}, logits {list(logits.shape)}." + help_
        )
    moved = adapter.classify(module, in_precision_of(module, feature + feature.abs().mean() + 1))
    return difference, tolerance, _difference(moved, logits) > tolerance


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
        local_shape = tuple(local.shape)
    if seen.global_ is not None:
        if seen.global_.ndim != 2 or seen.global_.shape[0] != batch:
            raise AdapterError(
                f"adapter {adapter.name!r}: global_ gives {list(seen.global_.shape)}; expected [B, D] with "
                f"B = {batch}." + help_
            )
        global_shape = tuple(seen.global_.shape)
    return local_shape, global_shape


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


def observe(module: nn.Module, adapter: Adapter, run: Callable[[], Any]) -> Observed:
    """Calls ``run``, watching what the adapter taps of ``module``."""
    found: dict[str, Any] = {}
    inputs: list[tuple] = []

    def keep(name: str, tap: Tap) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            found[name] = tree_map(_copied, tap.select(module, value, inputs[0] if inputs else ()))

        return see

    with ExitStack() as stack:
        handle = module.register_forward_pre_hook(lambda _m, args: inputs.append(args))
        stack.callback(handle.remove)
        submodule = adapter.submodule(module)
        stack.enter_context(
            tapped(
                submodule,
                adapter.feature_from,
                lambda value: found.update(feature=_copied(first_tensor(value))),
            )
        )
        for name, tap in (("local", adapter.local), ("global_", adapter.global_)):
            if tap is not None:
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


@contextmanager
def quiet_evaluation(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or autocast; modes, buffers and random generators are put back.

    Modes are set flag by flag, not by ``module.eval()``: some networks do work in ``train()``, and a frozen
    part of a network must come back frozen.
    """
    modes = [(child, child.training) for child in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.is_cuda})
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    try:
        for child, _ in modes:
            child.training = False
        kinds = {tensor.device.type for tensor in module.parameters()} | {"cpu"}
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _no_autocast(kinds):
            yield
    finally:
        for child, mode in modes:
            child.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@contextmanager
def _no_autocast(kinds: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in sorted(kinds):
            if torch.amp.autocast_mode.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(_describe(item) for item in value) or 'nothing'}"
    return f"a {type(value).__name__}"
