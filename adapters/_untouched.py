"""Running somebody's network without leaving anything in it, nor in what it was given."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# what torch itself keeps on a module and a forward pass has no business with
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_CONTAINERS = (dict, OrderedDict, list, set, deque)
_DEEPEST = 8  # an input nested deeper than this is no cloud


@contextmanager
def quiet_evaluation(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or autocast; nothing of the network or of the random generators changes.

    Put back are the modes of all submodules, buffers (also those that were replaced or resized), attributes
    of every other kind, and the random generators of torch, NumPy and Python. Modes are set flag by flag, not
    by ``module.eval()``: some networks do work in ``train()``, and a frozen part must come back frozen.
    """
    with untouched(module):
        for child in module.modules():
            child.training = False
        yield


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """As :func:`quiet_evaluation`, in whatever mode the network is."""
    before = [(child, _Attributes(child)) for child in module.modules()]
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.is_cuda})
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    try:
        kinds = {tensor.device.type for tensor in module.parameters()} | {"cpu"}
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _no_autocast(kinds):
            yield
    finally:
        with torch.no_grad():
            for child, attributes in before:
                attributes.put_back(child)
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


class _Attributes:
    """What a module holds: its attributes, what is in their containers, and the values of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.held = {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}
        self.held["training"] = module.training
        self.inside = {
            name: copy.copy(value) for name, value in self.held.items() if type(value) in _CONTAINERS
        }
        tensors = [value for value in self.held.values() if isinstance(value, Tensor)]
        tensors += [value for value in module._buffers.values() if value is not None]
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors if not _is_lazy(tensor)]

    def put_back(self, module: nn.Module) -> None:
        now = vars(module)
        for name in [name for name in now if name not in self.held and name not in _TORCHS_OWN]:
            del now[name]
        for name, value in self.held.items():
            if name == "training":
                module.training = value
            elif name not in now or now[name] is not value:
                now[name] = value
        for name, content in self.inside.items():
            _refill(self.held[name], content)
        for tensor, values in self.values:
            if tensor.shape != values.shape:
                tensor.resize_(values.shape)
            if not _same(tensor, values):
                tensor.copy_(values)


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_meta or nn.parameter.is_lazy(tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and bool(((a == b) | a.isnan()).all())


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        same = list(container) == list(content) and all(container[key] is content[key] for key in content)
    elif isinstance(container, set):
        same = container == content
    else:
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)


@contextmanager
def _no_autocast(kinds: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in sorted(kinds):
            if torch.amp.autocast_mode.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# --------------------------------------------------------------------------------------------------------
# Other parameters and buffers for the time of one call


class _Running(nn.Module):
    def __init__(self, module: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.run = run

    def forward(self) -> Any:
        return self.run()


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], run: Callable[[], Any]) -> Any:
    """``run()`` while ``module`` has these parameters and buffers; its own are never written to."""
    running = _Running(module, run)
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return torch.func.functional_call(running, named, (), strict=False)


def why_not_exchangeable(module: nn.Module) -> str | None:
    """Why a network's tensors cannot be exchanged for the time of a call; None where they can."""
    for child in module.modules():
        if isinstance(child, torch.jit.ScriptModule):
            return "it is compiled by TorchScript"
        if type(child).__name__ == "FullyShardedDataParallel" or _is_fully_sharded(child):
            return "its parameters are sharded (FSDP)"
    if any(is_sharded(parameter) for parameter in module.parameters()):
        return "its parameters are sharded (DTensor)"
    return None


def _is_fully_sharded(module: nn.Module) -> bool:
    """By its class: after a pass its parameters may be whole for a while."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_sharded(tensor: Tensor) -> bool:
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def gather_sharded(module: nn.Module) -> None:
    """Gathers the parameters that FSDP2 sharded for the whole network: its layers are run outside of a pass.

    FSDP2 gives them back by itself when the next pass or its backward pass ends. Parts that are sharded by
    themselves gather their own when they are called.
    """
    if hasattr(module, "unshard") and any(is_sharded(parameter) for parameter in module.parameters()):
        module.unshard()


# --------------------------------------------------------------------------------------------------------
# What the network is given


def detached_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def copied(value: Any, tensor: Callable[[Tensor], Tensor] = detached_copy) -> Any:
    """A copy of a network's input, whatever it is: its tensors by ``tensor``, the rest by ``deepcopy``.

    Tensors are found in containers and in attributes (a ``Data`` of PyTorch Geometric, one's own class). An
    object that cannot be copied is handed on as it is.
    """
    memo: dict[int, Any] = {}
    if not _copy_tensors(value, tensor, memo, set(), 0):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        # a handle to something outside of Python: then the network gets the object itself, as it does anyway
        return value


def _copy_tensors(
    value: Any, tensor: Callable[[Tensor], Tensor], memo: dict[int, Any], seen: set[int], depth: int
) -> bool:
    """Puts the copy of each tensor in ``value`` into ``memo``; whether there is anything to copy."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = tensor(value)
        return True
    if value is None or isinstance(value, (str, bytes, int, float, bool, complex, type, nn.Module)):
        if isinstance(value, nn.Module):
            memo[id(value)] = value
        return False
    if id(value) in seen or depth > _DEEPEST:
        return False
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts += value
    parts += getattr(value, "__dict__", {}).values()
    found = [_copy_tensors(part, tensor, memo, seen, depth + 1) for part in parts]
    return any(found) or isinstance(value, (list, dict, set, deque)) or hasattr(value, "__array__")
