"""Finds the compiled kernels, once, and says what is there.

``pointcmt._C`` declares the operators of ``csrc/`` when it is imported, and runs on every CPU. The CPU
kernels are in libraries beside it, each compiled for CPUs of one capability, of which the best that this CPU
can run is loaded: ``avx2`` or ``default``; a build with POINTCMT_ARCH has one, ``native``. They give the same
neighbours, samples and groups, bit by bit. Where nothing could be built or loaded, every op in
:mod:`pointcmt.ops` runs its pure-PyTorch twin instead, and the first use warns once with the command that
builds it. A library of another version, whose operators take other arguments, is an error.

Environment:
    POINTCMT_CPU_CAPABILITY: ``default`` or ``avx2``: take this library and no other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence

import torch

from pointcmt.ops._capabilities import CAPABILITIES

# What csrc/schemas.h declares: name → arguments and results. A library without one of these, or with others
# of its name, was compiled from other sources.
SCHEMAS: dict[str, str] = {
    "ball_query": "(float radius, SymInt nsample, Tensor xyz, Tensor new_xyz, Tensor? lengths=None) -> "
    "Tensor",
    "emd": "(Tensor x, Tensor y, float tolerance, int max_rounds) -> "
    "(Tensor distance, Tensor bound, Tensor assignment, Tensor statistics)",
    "furthest_point_sample": "(Tensor xyz, SymInt npoint, Tensor? lengths=None) -> Tensor",
    "gather_points": "(Tensor features, Tensor idx) -> Tensor",
    "gather_points_backward": "(Tensor grad, Tensor idx, SymInt n) -> Tensor",
    "group_points": "(Tensor features, Tensor idx) -> Tensor",
    "group_points_backward": "(Tensor grad, Tensor idx, SymInt n) -> Tensor",
    "group_relative": "(Tensor xyz, Tensor new_xyz, Tensor idx, Tensor? features) -> Tensor",
    "group_relative_backward": "(Tensor grad, Tensor idx, SymInt n, bool coordinates) -> "
    "(Tensor, Tensor, Tensor)",
    "knn": "(Tensor queries, Tensor points, SymInt k, Tensor? lengths=None) -> (Tensor, Tensor)",
    "norm_act_max": "(Tensor x, Tensor? centres, Tensor? idx, Tensor weight, Tensor bias, "
    "Tensor? running_mean, Tensor? running_var, float eps, float slope) -> "
    "(Tensor out, Tensor chosen, Tensor which, Tensor total, Tensor mean, Tensor var)",
    "norm_act_max_backward": "(Tensor grad, Tensor x, Tensor? centres, Tensor? idx, Tensor weight, "
    "Tensor bias, Tensor chosen, Tensor which, Tensor total, Tensor mean, Tensor var, float eps, "
    "float slope, bool training) -> (Tensor, Tensor, Tensor, Tensor)",
    "three_interpolate": "(Tensor features, Tensor idx, Tensor weight) -> Tensor",
    "three_interpolate_backward": "(Tensor grad, Tensor idx, Tensor weight, SymInt m) -> Tensor",
    "three_interpolate_weight_backward": "(Tensor grad, Tensor features, Tensor idx) -> Tensor",
    "three_nn": "(Tensor unknown, Tensor known, Tensor? lengths=None) -> (Tensor, Tensor)",
    "voxel_subsample": "(Tensor points, float size) -> (Tensor kept, Tensor inverse)",
}
COMPILED_OPS = frozenset(SCHEMAS)
BUILD_COMMAND = "pip install --no-build-isolation -e .   # in a checkout of pointcmt, with a C++20 compiler"


class UnsuitableCpuError(ImportError):
    """The CPU kernels were compiled for another CPU than this one; loading them would end the process."""


class StaleKernelsError(ImportError):
    """The compiled operators take or give other things than these sources: they are of another version."""


def check_schemas(schemas: Mapping[str, str], library: str) -> None:
    """Refuse a library whose operators have other arguments or results than :data:`SCHEMAS`.

    Its operators cannot be undefined again in this process, nor called as this version calls them, so there
    is no going on with it. Operators that it lacks altogether are left to :func:`missing_ops`: twins serve.

    Args:
        schemas: what the library declares, as SCHEMAS.
        library: its file, for the message.

    Raises:
        StaleKernelsError: names the operators, both forms of the first, and the command that builds anew.
    """
    changed = sorted(name for name in schemas.keys() & SCHEMAS.keys() if schemas[name] != SCHEMAS[name])
    if changed:
        name = changed[0]
        raise StaleKernelsError(
            f"pointcmt's compiled kernels ({library}) are of another version than its sources: "
            f"{', '.join(changed)} changed; {name} there is {schemas[name]}, expected {SCHEMAS[name]}. "
            f"Build again: {BUILD_COMMAND}"
        )


def choose_capability(
    features: Sequence[str], built: Sequence[str], native: str | None = None, forced: str | None = None
) -> str:
    """Which library of CPU kernels to load.

    Args:
        features: what the CPU can do, by the names in :data:`CAPABILITIES`.
        built: the libraries that there are.
        native: for a build with POINTCMT_ARCH the features that it needs, between spaces; else None.
        forced: POINTCMT_CPU_CAPABILITY, if it is set.

    Raises:
        ValueError: ``forced`` is not the name of a capability.
        UnsuitableCpuError: the CPU lacks what the library needs.
        ModuleNotFoundError: there is no library to choose.
    """
    if forced and forced not in CAPABILITIES:
        raise ValueError(
            f"POINTCMT_CPU_CAPABILITY is {forced!r}; it must be one of {', '.join(CAPABILITIES)}"
        )
    wanted = {name: set(needed) for name, needed in CAPABILITIES.items() if name in built}
    if native is not None and not forced:
        wanted = {"native": set(native.split())}
    elif forced:
        wanted = {name: needed for name, needed in wanted.items() if name == forced}
    if not wanted:
        raise ModuleNotFoundError(
            f"no library of CPU kernels {f'for {forced} ' if forced else ''}was built "
            f"(there: {', '.join(built) or 'none'})"
        )
    fitting = [name for name, needed in wanted.items() if needed <= set(features)]
    if not fitting:
        name, needed = next(iter(wanted.items()))
        lacking = sorted(needed - set(features))
        raise UnsuitableCpuError(
            f"the CPU kernels here were compiled for {name}, and this CPU lacks {', '.join(lacking)}; "
            + ("build again without POINTCMT_ARCH" if name == "native" else "unset POINTCMT_CPU_CAPABILITY")
        )
    return fitting[-1]


_CAPABILITY: str | None = None


def _load() -> Exception | None:
    global _CAPABILITY
    forced = os.environ.get("POINTCMT_CPU_CAPABILITY")
    try:
        library = importlib.import_module("pointcmt._C")
        check_schemas(_declared(), str(getattr(library, "__file__", "pointcmt._C")))
        names = ("native", *CAPABILITIES)
        built = [name for name in names if importlib.util.find_spec(f"pointcmt._cpu_{name}") is not None]
        chosen = choose_capability(library.cpu_features(), built, getattr(library, "native", None), forced)
        importlib.import_module(f"pointcmt._cpu_{chosen}")
    except (ValueError, StaleKernelsError):
        raise
    except Exception as error:  # ImportError, or an OSError from a library of another torch version
        return error
    _CAPABILITY = chosen
    return None


def _declared() -> dict[str, str]:
    """The operators of the loaded library, as SCHEMAS has them."""
    there = set(torch._C._dispatch_get_all_op_names())
    own = [name for name in SCHEMAS if f"pointcmt::{name}" in there]
    return {name: str(torch._C._get_schema(f"pointcmt::{name}", "")).partition(name)[2] for name in own}


def _registered(key: str) -> frozenset[str]:
    """The names of pointcmt's operators that have a kernel for this dispatch key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("pointcmt::") for name in names if name.startswith("pointcmt::"))


# Loaded on import and kept as plain constants, so that torch.compile can trace through the question.
_LOAD_ERROR = _load()
_COMPILED: dict[str, frozenset[str]] = {"cpu": _registered("CPU"), "cuda": _registered("CUDA")}


def load_error() -> Exception | None:
    """The error that importing the kernels gave, or None where they are there."""
    return _LOAD_ERROR


def cpu_capability() -> str | None:
    """What the loaded CPU kernels were compiled for: a key of CAPABILITIES, ``"native"``, or None."""
    return _CAPABILITY


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
