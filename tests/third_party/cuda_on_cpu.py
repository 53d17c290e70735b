"""Lets code that hard-codes CUDA run on a CPU. For tests only; where there is a GPU nothing is patched.

Third-party networks ask for CUDA in a few ways: ``torch.device("cuda")`` or ``"cuda"`` given to a function
that makes a tensor, ``tensor.cuda()``, ``module.cuda()``, ``tensor.to("cuda")`` and the legacy constructors
``torch.cuda.FloatTensor(…)``. Inside :func:`cuda_on_cpu` each of these gives a CPU tensor instead:

* a ``TorchFunctionMode`` replaces a CUDA device among the arguments of any torch function, and makes
  ``.cuda()`` return the tensor itself;
* the mode is off while ``backward()`` runs, so the functions that make tensors are wrapped as well, for the
  backward passes of autograd Functions;
* the legacy constructors are replaced by functions that make CPU tensors of that type.

Nothing else is touched: no source is edited, no arithmetic changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = ("zeros", "ones", "empty", "full", "arange", "tensor")
LEGACY = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _Redirect(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, such as tensor.device
            return func(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        args = tuple(torch.device("cpu") if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _redirected(factory):
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return make


def _constructor(dtype: torch.dtype):
    def make(*args: Any, device: Any = None) -> torch.Tensor:
        if args and not all(isinstance(size, int) for size in args):
            return torch.tensor(args[0], dtype=dtype)
        return torch.empty(args, dtype=dtype)

    return make


@contextmanager
def cuda_on_cpu(active: bool | None = None) -> Iterator[None]:
    """Runs the block with CUDA redirected to the CPU; does nothing where there is a GPU.

    Args:
        active: force the choice; None redirects exactly where ``torch.cuda.is_available()`` is false.
    """
    if not (not torch.cuda.is_available() if active is None else active):
        yield
        return
    before = [(torch.cuda, name, getattr(torch.cuda, name)) for name in LEGACY]
    before += [(torch, name, getattr(torch, name)) for name in FACTORIES]
    for home, name, original in before:
        setattr(home, name, _constructor(LEGACY[name]) if home is torch.cuda else _redirected(original))
    try:
        with _Redirect():
            yield
    finally:
        for home, name, original in before:
            setattr(home, name, original)
