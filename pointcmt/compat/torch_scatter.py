"""``torch_scatter`` (rusty1s/pytorch_scatter) over PyTorch's own scattering: what public networks call of it.

``index`` may have fewer dimensions than ``src``: it is expanded as there. Without ``out`` and ``dim_size``
the result is as long as the largest index says. The compiled package is faster on long inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "gather_csr",
    "scatter",
    "scatter_add",
    "scatter_log_softmax",
    "scatter_logsumexp",
    "scatter_max",
    "scatter_mean",
    "scatter_min",
    "scatter_mul",
    "scatter_softmax",
    "scatter_std",
    "scatter_sum",
    "segment_csr",
]
__version__ = "2.1.2"  # the release whose interface this is


def _expanded(index: Tensor, src: Tensor, dim: int) -> Tensor:
    """As broadcasting does, but from the left: index [N] or [B, N] beside src [B, N, C]."""
    dim = src.dim() + dim if dim < 0 else dim
    if index.dim() == 1:
        for _ in range(dim):
            index = index.unsqueeze(0)
    for _ in range(src.dim() - index.dim()):
        index = index.unsqueeze(-1)
    return index.expand(src.shape)


def _shape(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> list[int]:
    shape = list(src.shape)
    shape[dim] = dim_size if dim_size is not None else (int(index.max()) + 1 if index.numel() else 0)
    return shape


def scatter_sum(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Adds ``src`` up where ``index`` is the same along ``dim``; onto ``out`` where it is given."""
    index = _expanded(index, src, dim)
    if out is not None:
        return out.scatter_add_(dim, index, src)
    return src.new_zeros(_shape(src, index, dim, dim_size)).scatter_add_(dim, index, src)


scatter_add = scatter_sum


def scatter_mul(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """As :func:`scatter_sum`, with products; 1 where there is nothing."""
    index = _expanded(index, src, dim)
    start = src.new_ones(_shape(src, index, dim, dim_size)) if out is None else out
    return start.scatter_reduce(dim, index, src, "prod")


def scatter_mean(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """As :func:`scatter_sum`, divided by how many there are; 0 where there is nothing."""
    total = scatter_sum(src, index, dim, out, dim_size)
    expanded = _expanded(index, src, dim)
    count = scatter_sum(torch.ones_like(src), expanded, dim, None, total.shape[dim]).clamp(min=1)
    if total.is_floating_point():
        return total.div_(count) if out is not None else total / count
    return total.div_(count, rounding_mode="floor")


def _extreme(
    src: Tensor, index: Tensor, dim: int, out: Tensor | None, dim_size: int | None, reduce: str
) -> tuple[Tensor, Tensor]:
    index = _expanded(index, src, dim)
    shape = list(out.shape) if out is not None else _shape(src, index, dim, dim_size)
    start = src.detach().new_zeros(shape) if out is None else out.detach()
    best = start.scatter_reduce(dim, index, src.detach(), reduce, include_self=out is not None)
    size = src.shape[dim]
    place = torch.arange(size, device=src.device)
    place = place.view([-1 if axis == dim % src.dim() else 1 for axis in range(src.dim())]).expand(src.shape)
    # the first that reaches it: the gradient goes there only
    reaching = torch.where(src.detach() == best.gather(dim, index), place, size)
    first = torch.full(shape, size, device=src.device).scatter_reduce(dim, index, reaching, "amin")
    taken = src.gather(dim, first.clamp(max=max(size - 1, 0))) if size else best
    value = torch.where(first < size, taken, best)
    return (value if out is None else out.copy_(value)), first


def scatter_max(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Largest values and where along ``dim`` they are; 0 and ``src.size(dim)`` where there is nothing."""
    return _extreme(src, index, dim, out, dim_size, "amax")


def scatter_min(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest values and where along ``dim`` they are; 0 and ``src.size(dim)`` where there is nothing."""
    return _extreme(src, index, dim, out, dim_size, "amin")


def scatter(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:  # fmt: skip
    """``reduce``: sum, add, mul, mean, min or max.

    Raises:
        ValueError: another ``reduce``.
    """
    if reduce in ("sum", "add"):
        return scatter_sum(src, index, dim, out, dim_size)
    if reduce == "mul":
        return scatter_mul(src, index, dim, out, dim_size)
    if reduce == "mean":
        return scatter_mean(src, index, dim, out, dim_size)
    if reduce in ("min", "max"):
        return _extreme(src, index, dim, out, dim_size, f"a{reduce}")[0]
    raise ValueError(f"scatter: reduce is {reduce!r}; expected sum, add, mul, mean, min or max")


def scatter_logsumexp(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None,
    eps: float = 1e-12,
) -> Tensor:  # fmt: skip
    """log Σ exp of what has the same index."""
    index = _expanded(index, src, dim)
    size = out.shape[dim] if out is not None else dim_size
    largest = scatter_max(src.detach(), index, dim, None, size)[0]
    total = scatter_sum((src - largest.gather(dim, index)).exp(), index, dim, None, size)
    value = (total + eps).log() + largest
    return value if out is None else out.copy_(value)


def scatter_softmax(src: Tensor, index: Tensor, dim: int = -1, dim_size: int | None = None) -> Tensor:
    """Softmax over what has the same index; of ``src``'s shape."""
    index = _expanded(index, src, dim)
    largest = scatter_max(src.detach(), index, dim, None, dim_size)[0]
    shifted = (src - largest.gather(dim, index)).exp()
    return shifted / scatter_sum(shifted, index, dim, None, dim_size).gather(dim, index)


def scatter_log_softmax(
    src: Tensor, index: Tensor, dim: int = -1, eps: float = 1e-12, dim_size: int | None = None
) -> Tensor:
    """Logarithm of :func:`scatter_softmax`."""
    index = _expanded(index, src, dim)
    largest = scatter_max(src.detach(), index, dim, None, dim_size)[0]
    shifted = src - largest.gather(dim, index)
    return shifted - (scatter_sum(shifted.exp(), index, dim, None, dim_size) + eps).log().gather(dim, index)


def scatter_std(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None,
    unbiased: bool = True,
) -> Tensor:  # fmt: skip
    """Standard deviation of what has the same index."""
    index = _expanded(index, src, dim)
    size = out.shape[dim] if out is not None else dim_size
    count = scatter_sum(torch.ones_like(src), index, dim, None, size)
    mean = scatter_sum(src, index, dim, None, size) / count.clamp(min=1)
    square = scatter_sum((src - mean.gather(dim, index)).square(), index, dim, None, size)
    value = (square / ((count - 1).clamp(min=1) if unbiased else count.clamp(min=1))).sqrt()
    return value if out is None else out.copy_(value)


def segment_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """Reduces the segments [indptr[i], indptr[i + 1]) of the last dimension that ``indptr`` has."""
    dim = indptr.dim() - 1
    flat = indptr.reshape(-1, indptr.shape[-1])
    if bool((flat != flat[0]).any()):
        raise ValueError("segment_csr: this stand-in takes the same segments in every row of indptr")
    counts = flat[0].diff()
    index = torch.repeat_interleave(torch.arange(len(counts), device=src.device), counts)
    value = scatter(src.narrow(dim, 0, len(index)), index, dim, None, len(counts), reduce)
    return value if out is None else out.copy_(value)


def gather_csr(src: Tensor, indptr: Tensor) -> Tensor:
    """Repeats entry i of ``src`` [K, …] ``indptr[i + 1] − indptr[i]`` times."""
    if indptr.dim() != 1:
        raise ValueError("gather_csr: this stand-in takes indptr of one dimension")
    return torch.repeat_interleave(src, indptr.diff(), dim=0)
