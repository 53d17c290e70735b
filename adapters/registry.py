"""What an adapter is, where adapters are kept, and how the one for a network is found.

An adapter says two things of a classifier that somebody else wrote: which tensor inside it is the shape
feature, and how that network turns a shape feature into class scores. The claim is checked, not trusted:
proof.py runs the network on real points and compares ``classify(feature)`` with the output.

This module and every file beside it import nothing of pointcmt, and no third-party codebase.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

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
        f"cannot tell which part of the student's output ({describe(output)}) holds the class scores; "
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
            ``tapped`` what the submodule was given (a tuple) or gave, ``inputs`` what the network was called
            with (positional arguments, then keyword arguments in the order given), () where scripts never
            call it (``logits_module``).
        beside: (path, ``"input"`` or ``"output"``) of another submodule, which runs earlier in the pass: then
            ``tapped`` is a pair, and its second is what went into that one or came out of it. For networks
            that keep centres and features in different places. Of :attr:`Adapter.local` only.
    """

    module: str | Callable[[nn.Module], str]
    where: Literal["input", "output"]
    select: Select
    beside: tuple[str | Callable[[nn.Module], str], Literal["input", "output"]] | None = None

    def __post_init__(self) -> None:
        for where, module in (
            (self.where, self.module),
            *([] if self.beside is None else [self.beside[::-1]]),
        ):
            if where not in ("input", "output"):
                raise ValueError(
                    f"where is {where!r}; expected 'input' or 'output' (of the module at {module!r})"
                )

    def path(self, module: nn.Module) -> str:
        """Path of the submodule that is tapped, inside the unwrapped ``module``."""
        return self.module if isinstance(self.module, str) else self.module(module)

    def beside_path(self, module: nn.Module) -> str:
        """Path of the submodule of :attr:`beside`; there must be one."""
        assert self.beside is not None
        path = self.beside[0]
        return path if isinstance(path, str) else path(module)


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
            equal to the network's class scores (log-probabilities stay log-probabilities). None where there
            is no classifier, or none is needed: pre-training.
        logits: the network's output -> class scores [B, K]. Of the output only: what ``classify`` returns is
            class scores already.
        input_layout: what the network takes, for clouds [B, N, 3]: a key of :data:`INPUT_LAYOUTS`.
        feature: tapped tensor -> [B, D], where the network keeps it in another shape (``[B, D, 1]``).
        logits_module: path of the submodule that puts out the class scores. Empty: the network itself. Needed
            only where training scripts call some method of the network in place of ``network(points)``.
        local: where the network's local features and their centres are; None where it has none.
        global_: where the encoder's pooled feature [B, D'] is, before any layer of the head; None: the shape
            feature serves in its place.
        per_point: of a segmentation network, its output -> class scores of each point [B, N, K]; None: it
            classifies clouds. Its ``feature`` is that of the whole cloud, ``local`` has one for each point.
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
    per_point: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("an adapter needs a name")
        if self.feature_from not in ("input", "output"):
            raise ValueError(
                f"adapter {self.name!r}: feature_from is {self.feature_from!r}; expected 'input' or 'output' "
                "(of the module at feature_module)"
            )
        if self.global_ is not None and self.global_.beside is not None:
            raise ValueError(f"adapter {self.name!r}: beside is for local features; global_ has one")
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

    def beside(self, tap: Tap, module: nn.Module) -> nn.Module:
        """The submodule of ``tap.beside``.

        Raises:
            AdapterError: ``module`` has no submodule of that path.
        """
        return _submodule(self, module, tap.beside_path(module), "beside")

    def output_module(self, module: nn.Module) -> nn.Module:
        """The submodule that puts out the class scores: ``module`` itself unless ``logits_module`` is set."""
        if not self.logits_module:
            return module
        return _submodule(self, module, self.logits_module, "logits_module")

    def arrange(self, points: Tensor, category: Tensor | None = None) -> Any:
        """Clouds [B, N, 3 + C] as the network takes them; a tuple is several arguments.

        ``category`` int64 [B], of each shape, is handed to networks that take it (:data:`CATEGORY_LAYOUTS`);
        others are not given it.
        """
        if self.input_layout in CATEGORY_LAYOUTS:
            return CATEGORY_LAYOUTS[self.input_layout](points, category)
        return INPUT_LAYOUTS[self.input_layout](points)

    def call(self, student: Callable[..., Any], points: Tensor, category: Tensor | None = None) -> Any:
        """What ``student``, the network or a wrapper of it, returns for clouds [B, N, 3 + C]."""
        args, kwargs = as_call(self.arrange(points, category))
        return student(*args, **kwargs)


def _transposed(points: Tensor) -> Tensor:
    return points.transpose(1, 2).contiguous()


def _rest(points: Tensor) -> Tensor:
    """What comes beside the coordinates: normals or colours; the coordinates again where there is nothing."""
    return points[..., 3:] if points.shape[-1] > 3 else points


def _joined(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B * N, 3], [B * N, C] and the number of each point's cloud [B * N]."""
    clouds = torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])
    return points[..., :3].flatten(0, 1), _rest(points).flatten(0, 1), clouds


def _graph(points: Tensor, x: bool) -> Any:
    pos, rest, batch = _joined(points)
    sizes = torch.arange(len(points) + 1, device=points.device) * points.shape[1]
    entries = {"pos": pos, "x": rest if x else None, "batch": batch, "ptr": sizes}
    try:
        Batch = importlib.import_module("torch_geometric.data").Batch
    except ImportError:
        return SimpleNamespace(**entries, num_graphs=len(points), num_nodes=len(pos))
    return Batch(
        _num_graphs=len(points), **{name: value for name, value in entries.items() if value is not None}
    )


def _offsets(points: Tensor) -> list[Tensor]:
    pos, rest, _ = _joined(points)
    ends = (torch.arange(len(points), device=points.device, dtype=torch.int32) + 1) * points.shape[1]
    return [pos, rest, ends]


INPUT_LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "BN3": identity,
    "B3N": _transposed,
    "pos_x": lambda points: {"pos": points.contiguous(), "x": _transposed(points)},
    "pos_rest": lambda points: {"pos": points[..., :3].contiguous(), "x": _transposed(_rest(points))},
    "xyz,f:BN3": lambda points: (points[..., :3].contiguous(), _rest(points).contiguous()),
    "xyz,f:B3N": lambda points: (_transposed(points[..., :3]), _transposed(_rest(points))),
    "xyz:BN3,f:B3N": lambda points: (points[..., :3].contiguous(), _transposed(_rest(points))),
    "(xyz,f):BN3": lambda points: ((points[..., :3].contiguous(), _rest(points).contiguous()),),
    "(xyz,f):B3N": lambda points: ((_transposed(points[..., :3]), _transposed(_rest(points))),),
    "B3N1": lambda points: _transposed(points).unsqueeze(-1),
    "data": lambda points: _graph(points, x=points.shape[-1] > 3),
    "data+x": lambda points: _graph(points, x=True),
    "pos,batch": lambda points: (_joined(points)[0], _joined(points)[2]),
    "x,pos,batch": lambda points: (_joined(points)[1], _joined(points)[0], _joined(points)[2]),
    "none,pos,batch": lambda points: (None, _joined(points)[0], _joined(points)[2]),
    "pos,x,batch": lambda points: _joined(points),
    "pxo": _offsets,
}
"""How clouds [B, N, 3 + C] are handed to a network; a tuple is several positional arguments.

``BN3`` as they are; ``B3N`` channels first; ``pos_x`` OpenPoints' dictionary, ``pos_rest`` with what follows
the coordinates as ``x``; ``xyz,f:…`` coordinates and
features apart, ``(xyz,f):…`` both in one tuple; ``B3N1`` as an image of width one; ``data`` a batch of
PyTorch Geometric (``data+x`` with features, which are the coordinates again where there are no others);
``…,batch`` its tensors as arguments; ``pxo`` points, features and the ends of the clouds in a list. Add
another by its name.
"""


SHAPENET_CATEGORIES = 16


def _one_hot(points: Tensor, category: Tensor | None) -> Tensor:
    """Categories of ShapeNetPart [B, 16]; zeros where they are not known, as in pre-training."""
    if category is None:
        return points.new_zeros(len(points), SHAPENET_CATEGORIES)
    return nn.functional.one_hot(category, SHAPENET_CATEGORIES).to(points.dtype)


def _dictionary(points: Tensor, category: Tensor | None) -> dict[str, Tensor]:
    number = category if category is not None else torch.zeros_like(points[:, 0, 0], dtype=torch.int64)
    return {"pos": points[..., :3].contiguous(), "x": _transposed(points), "cls": number[:, None]}


CATEGORY_LAYOUTS: dict[str, Callable[[Tensor, Tensor | None], Any]] = {
    "BN3,category": lambda points, category: points if category is None else (points, category),
    "B3N,onehot16": lambda points, category: (_transposed(points), _one_hot(points, category)),
    "pos_x_cls": _dictionary,
}
"""How clouds and their shapes' categories are handed to networks for parts: ``BN3,category`` as they are,
int64 [B]; ``B3N,onehot16`` channels first, one-hot [B, 16]; ``pos_x_cls`` OpenPoints' dictionary. Each is in
:data:`INPUT_LAYOUTS` too, without a category. Where it is not known, zeros stand in for the one-hot code, and
category 0 in the dictionary."""
INPUT_LAYOUTS |= {
    name: lambda points, arrange=arrange: arrange(points, None)  # type: ignore[misc]
    for name, arrange in CATEGORY_LAYOUTS.items()
}


def as_call(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """A network's arguments: a tuple is the positional ones, ``(args, kwargs)`` both, else the only one."""
    if isinstance(inputs, tuple):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return inputs
        return inputs, {}
    return (inputs,), {}


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
            f"register_adapter takes an Adapter, not {describe(adapter)}; as a decorator it is called with "
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
            if info.name not in ("registry", "generic", "proof") and not info.name.startswith("_"):
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
        adapter: an :class:`Adapter`, the name of a registered one, or ``"generic"``; taken as it is.
        points: what the network takes. With it, the generic adapter is the linear layer whose result is the
            network's output; without it, the one defined last.

    Raises:
        AdapterError: no registered adapter matches and the network does not end in a linear layer.
    """
    from pointcmt.adapters.generic import NAME, generic_adapter

    if isinstance(adapter, Adapter):
        return adapter
    module = unwrap(student)
    if adapter == NAME:
        return generic_adapter(module, points)
    if isinstance(adapter, str):
        return get_adapter(adapter)
    if adapter is not None:
        raise ValueError(
            f"adapter is {describe(adapter)}; expected an Adapter or the name of a registered one"
        )
    return matching_adapter(module) or generic_adapter(module, points)


def matching_adapter(module: nn.Module) -> Adapter | None:
    """The registered adapter that matches the network, else that of a known network inside it, else None."""
    for candidate in list_adapters():
        if candidate.describes(module):
            return candidate
    for path, child in _outermost_first(module):
        for candidate in list_adapters():
            if candidate.describes(child):
                return _inside(candidate, path)
    return None


def _outermost_first(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = [(path, child) for path, child in module.named_modules() if path]
    # a head or a layer is no network: what can be one has parts of its own
    whole = [(path, child) for path, child in named if len(list(child.children())) > 1]
    return iter(sorted(whole, key=lambda item: item[0].count(".")))


def _inside(inner: Adapter, path: str) -> Adapter:
    """An adapter for a network that holds, at ``path``, one that ``inner`` knows."""

    def classify(module: nn.Module, feature: Tensor) -> Tensor:
        assert inner.classify is not None
        return inner.classify(module.get_submodule(path), feature)

    def moved(tap: Tap | None) -> Tap | None:
        if tap is None:
            return None
        return Tap(
            lambda module: f"{path}.{tap.path(module.get_submodule(path))}",
            tap.where,
            lambda module, tapped, inputs: tap.select(module.get_submodule(path), tapped, inputs),
            None
            if tap.beside is None
            else (lambda module: f"{path}.{tap.beside_path(module.get_submodule(path))}", tap.beside[1]),
        )

    return replace(
        inner,
        name=f"{inner.name} (in {path})",
        matches=lambda module: False,  # found by the part, not by the whole
        feature_module=lambda module: f"{path}.{inner.feature_path(module.get_submodule(path))}",
        classify=None if inner.classify is None else classify,
        logits_module=f"{path}.{inner.logits_module}" if inner.logits_module else "",
        local=moved(inner.local),
        global_=moved(inner.global_),
    )


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(describe(item) for item in value) or 'nothing'}"
    return f"a {type(value).__name__}"
