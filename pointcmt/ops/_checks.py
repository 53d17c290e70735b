"""Checks and casts that the faces in :mod:`pointcmt.ops` share."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_DTYPES = (torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(op: str, **values: Tensor | None) -> None:
    """Every value is a tensor whose elements lie in memory, and no float of 8 bits; None is let through.

    Raises:
        TypeError: something else; the message says what and how to make a tensor of it.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op}: {name} is of type {type(value).__name__}; expected a torch.Tensor: torch.as_tensor "
                "makes one of lists and NumPy arrays"
            )
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} is sparse ({value.layout}); expected a dense tensor: to_dense()")
        if value.is_floating_point() and value.dtype not in _FLOATS:
            raise TypeError(
                f"{op}: {name} is of {value.dtype}; expected one of {', '.join(map(str, _FLOATS))}: convert "
                "it with .to"
            )


def check_required(op: str, **values: Tensor) -> None:
    """As :func:`check_tensors`, of arguments that must be given."""
    for name, value in values.items():
        if value is None:
            raise TypeError(f"{op}: {name} is None; expected a torch.Tensor")
    check_tensors(op, **values)


def check_count(op: str, name: str, value: int) -> None:
    """``value`` is a whole number, or TypeError."""
    if not isinstance(value, int) and not hasattr(value, "__index__"):  # as of NumPy and symbolic ones
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}; expected a whole number")


def check_number(op: str, name: str, value: float) -> None:
    """``value`` is a number, or TypeError."""
    # a tuple: the compiler of torch 2.6 does not know int | float
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}; expected a number")


def check_coordinates(op: str, **tensors: Tensor) -> None:
    """Every tensor is floating [B, ., D] and agrees with the first in B, D and device, or ValueError."""
    check_required(op, **tensors)
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or not tensor.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a floating-point tensor [B, N, D], "
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if tensor.shape[2] == 0:
            raise ValueError(f"{op}: {name} has points without coordinates: shape {list(tensor.shape)}")
        if tensor.shape[0] != first.shape[0] or tensor.shape[2] != first.shape[2]:
            raise ValueError(
                f"{op}: {first_name} and {name} must agree in batch size and in the last dimension, "
                f"got {list(first.shape)} and {list(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {first_name} is on {first.device} and {name} on {tensor.device}; move them together"
            )


def check_range(op: str, idx: Tensor, n: int) -> None:
    """IndexError where an index leaves [0, n): for the twins on a CPU, where looking costs no wait."""
    if idx.device.type != "cpu" or torch.compiler.is_compiling() or idx.numel() == 0:
        return
    low, high = (int(bound) for bound in idx.aminmax())
    if low < 0 or high >= n:
        raise IndexError(f"{op}: index {low if low < 0 else high} is out of range for {n} points")


def check_lengths(op: str, points: Tensor, lengths: Tensor | None) -> None:
    """lengths are None or int64 [B] on the points' device, each from 1 to N, or ValueError.

    On a CUDA device the values are looked at by the kernel, which stops with an assertion.
    """
    if lengths is None:
        return
    check_tensors(op, lengths=lengths)
    if lengths.dtype != torch.int64 or lengths.shape != points.shape[:1]:
        raise ValueError(
            f"{op}: lengths must be an int64 tensor [B] with one entry for each of {points.shape[0]} clouds, "
            f"got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if lengths.device != points.device:
        raise ValueError(
            f"{op}: lengths are on {lengths.device} and the points on {points.device}; move them together"
        )
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or lengths.numel() == 0:
        return
    low, high = (int(bound) for bound in lengths.aminmax())
    if low < 1 or high > points.shape[1]:
        raise ValueError(
            f"{op}: lengths must be from 1 to the number of points, {points.shape[1]}, "
            f"got {low if low < 1 else high}"
        )


def check_xyz(op: str, **tensors: Tensor) -> None:
    """As :func:`check_coordinates`, for points in space: the last dimension is 3."""
    check_coordinates(op, **tensors)
    name, tensor = next(iter(tensors.items()))
    if tensor.shape[2] != 3:
        raise ValueError(
            f"{op}: {name} must be [B, N, 3], got {list(tensor.shape)}; transpose [B, 3, N] first"
        )


def check_features(op: str, features: Tensor, idx: Tensor, idx_shape: str) -> None:
    """features are floating [B, C, N]; idx is int32 or int64, of idx_shape's rank, same B and device."""
    check_required(op, features=features, idx=idx)
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(
            f"{op}: features must be a floating-point tensor [B, C, N], "
            f"got {features.dtype} of shape {list(features.shape)}"
        )
    rank = idx_shape.count(",") + 1
    if idx.dim() != rank or idx.dtype not in _INDEX_DTYPES:
        raise ValueError(
            f"{op}: idx must be an int32 or int64 tensor {idx_shape}, "
            f"got {idx.dtype} of shape {list(idx.shape)}"
        )
    if idx.shape[0] != features.shape[0]:
        raise ValueError(
            f"{op}: features and idx must have the same batch size, "
            f"got {list(features.shape)} and {list(idx.shape)}"
        )
    if idx.device != features.device:
        raise ValueError(
            f"{op}: features are on {features.device} and idx on {idx.device}; move them together"
        )


def common_float(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float64 if one of them is, else in float32: coordinates are never compared in half."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)
