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


@functools.cache
def load_error() -> Exception | None:
    """The error that importing ``pointcmt._C`` gave, or None where the kernels are there."""
    try:
        importlib.import_module("pointcmt._C")
    except Exception as error:  # ImportError, or an OSError from a library of another torch version
        return error
    return None


def has_cpu_kernels() -> bool:
    """True where the C++ kernels were compiled and could be loaded."""
    return load_error() is None


@functools.cache
def has_cuda_kernels() -> bool:
    """True where the CUDA kernels were compiled too (a GPU need not be visible)."""
    return has_cpu_kernels() and torch._C._dispatch_has_kernel_for_dispatch_key("pointcmt::emd", "CUDA")


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"pointcmt's compiled kernels are not available ({load_error()}); the slower pure-PyTorch twins "
        f"serve instead. To build them: {BUILD_COMMAND}",
        RuntimeWarning,
        stacklevel=4,
    )


def use_compiled(*tensors: torch.Tensor) -> bool:
    """Whether a compiled kernel serves these tensors' device; warns once where none was built."""
    kind = tensors[0].device.type
    if not has_cpu_kernels():
        if not torch.compiler.is_compiling():
            _warn_once()
        return False
    return kind == "cpu" or (kind == "cuda" and has_cuda_kernels())
