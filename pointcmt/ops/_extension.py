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

# what csrc has for the CPU; a library that lacks one of these was compiled from older sources
COMPILED_OPS = frozenset(
    {
        "ball_query",
        "emd",
        "furthest_point_sample",
        "gather_points",
        "gather_points_backward",
        "group_points",
        "group_points_backward",
        "group_relative",
        "group_relative_backward",
        "knn",
        "norm_act_max",
        "norm_act_max_backward",
        "three_interpolate",
        "three_interpolate_backward",
        "three_interpolate_weight_backward",
        "three_nn",
    }
)
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


def missing_ops() -> list[str]:
    """Operators of csrc that the loaded library lacks on the CPU, so that their slow twins serve: it is
    older than the sources. Empty where no library is loaded at all."""
    return sorted(COMPILED_OPS - _COMPILED["cpu"]) if has_cpu_kernels() else []


@functools.cache
def _warn_stale() -> None:
    warnings.warn(
        f"pointcmt's compiled kernels are older than its sources and lack {', '.join(missing_ops())}; the "
        f"slower pure-PyTorch twins of these serve instead. Build again: {BUILD_COMMAND}",
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
    if op in COMPILED_OPS and tensors[0].device.type == "cpu" and op not in ops:
        if not torch.compiler.is_compiling():
            _warn_stale()
        return False
    return bool(ops) if op is None else op in ops
