"""Finds the compiled kernels, once, and says what is there.

``pointcmt._C`` registers the operators of ``csrc/`` with PyTorch when it is imported. Where it
could not be built, every op in :mod:`pointcmt.ops` runs its pure-PyTorch twin instead, and the
first use warns once with the command that builds it.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

BUILD_COMMAND = "pip install --no-build-isolation -e .   # in a checkout of pointcmt, with a C++20 compiler"


def _load() -> Exception | None:
    try:
        importlib.import_module("pointcmt._C")
    except Exception as error:  # ImportError, or an OSError from a library of another torch version
        return error
    return None


def _registered(key: str) -> frozenset[str]:
    """The names of pointcmt's operators that have a kernel for this dispatch key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("pointcmt::") for name in names if name.startswith("pointcmt::"))


# Loaded on import and kept as plain constants, so that torch.compile can trace through the question.
_LOAD_ERROR = _load()
_COMPILED: dict[str, frozenset[str]] = {"cpu": _registered("CPU"), "cuda": _registered("CUDA")}


def load_error() -> Exception | None:
    """The error that importing ``pointcmt._C`` gave, or None where the kernels are there."""
    return _LOAD_ERROR


def has_cpu_kernels() -> bool:
    """True where the C++ kernels were compiled and could be loaded."""
    return _LOAD_ERROR is None


def has_cuda_kernels() -> bool:
    """True where the CUDA kernels were compiled too (a GPU need not be visible)."""
    return bool(_COMPILED["cuda"])


def compiled_ops(device: str) -> frozenset[str]:
    """The names of the operators that have a compiled kernel for ``"cpu"`` or ``"cuda"``."""
    return _COMPILED.get(device, frozenset())


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"pointcmt's compiled kernels are not available ({load_error()}); the slower pure-PyTorch twins "
        f"serve instead. To build them: {BUILD_COMMAND}",
        RuntimeWarning,
        stacklevel=4,
    )


def use_compiled(*tensors: torch.Tensor, op: str | None = None) -> bool:
    """Whether compiled kernels serve these tensors' device; warns once where none was built.

    Args:
        tensors: the op's inputs; the first one's device counts.
        op: the operator's name without its namespace. With it the answer is about that operator,
            without it about the library as a whole.
    """
    if not has_cpu_kernels():
        if not torch.compiler.is_compiling():
            _warn_once()
        return False
    ops = _COMPILED.get(tensors[0].device.type, frozenset())
    return bool(ops) if op is None else op in ops
