"""Lets code that asks for CUDA by name run where there is no GPU: it gets CPU tensors in its place.

Public networks ask for CUDA in a few ways: ``"cuda"`` or ``torch.device("cuda")`` given to a function that
makes a tensor, ``tensor.cuda()``, ``module.cuda()``, ``.to("cuda")``, ``.type(torch.cuda.FloatTensor)`` and
the old constructors ``torch.cuda.FloatTensor(…)``. While the redirect is on, these functions of torch are
replaced by ones that take such a device for the CPU; they are looked up by name at every call, also in the
backward passes of autograd functions. ``torch.cuda.is_available()`` stays false, and no arithmetic changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = [
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
]
_METHODS = ["to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"]
_CONSTRUCTORS = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "CharTensor": torch.int8,
    "ShortTensor": torch.int16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "BoolTensor": torch.bool,
}

_before: list[tuple[Any, str, Any]] = []  # what was replaced: where, its name, the original


def turn_on() -> None:
    """Redirects, where there is no GPU; turning on twice is turning on once."""
    if _before or torch.cuda.is_available():
        return
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        _replace(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "type", _typed(torch.Tensor.type))
    for name, dtype in _CONSTRUCTORS.items():
        _replace(torch.cuda, name, _constructor(dtype))


def turn_off() -> None:
    """Puts the originals back."""
    while _before:
        home, name, original = _before.pop()
        setattr(home, name, original)


def _replace(home: Any, name: str, function: Callable[..., Any]) -> None:
    _before.append((home, name, getattr(home, name)))
    setattr(home, name, function)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return function(*[torch.device("cpu") if _is_cuda(value) else value for value in args], **kwargs)

    return redirected


def _constructor(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def make(*args: Any, device: Any = None) -> torch.Tensor:
        if args and not all(isinstance(size, int) for size in args):
            return torch.tensor(args[0], dtype=dtype)
        return torch.empty(args, dtype=dtype)

    make.dtype = dtype  # type: ignore[attr-defined]
    return make


def _typed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def typed(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dtype, str) and dtype.startswith("torch.cuda."):
            dtype = _CONSTRUCTORS[dtype.rpartition(".")[2]]
        return original(self, getattr(dtype, "dtype", dtype), *args, **kwargs)

    return typed
