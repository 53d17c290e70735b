"""Checks and casts that the faces in :mod:`pointcmt.ops` share."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_coordinates(op: str, **tensors: Tensor) -> None:
    """Every tensor is floating [B, ., D] and agrees with the first in B, D and device, or ValueError."""
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
