"""``pointops2_cuda`` of Stratified Transformer: ``pointops_cuda`` of lists of points, and its attention.

Attention is over M pairs of a query and a key, in h heads: ``index0`` [M] says which query, ``index1`` [M]
which key; the functions of the second and third version take the queries' offsets [N + 1] in its place.
``table`` [L, h, d, 3] holds encodings of relative positions, one of L steps on each axis, and ``rel_idx``
[M, 3] says which steps apart a pair is. Results are written in place; gradients are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointcmt.compat.pointops_cuda import (
    add_gradients,
    aggregation_backward_cuda,
    aggregation_forward_cuda,
    furthestsampling_cuda,
    grouping_backward_cuda,
    grouping_forward_cuda,
    interpolation_backward_cuda,
    interpolation_forward_cuda,
    knnquery_cuda,
    subtraction_backward_cuda,
    subtraction_forward_cuda,
)

__all__ = [
    "aggregation_backward_cuda",
    "aggregation_forward_cuda",
    "furthestsampling_cuda",
    "grouping_backward_cuda",
    "grouping_forward_cuda",
    "interpolation_backward_cuda",
    "interpolation_forward_cuda",
    "knnquery_cuda",
    "subtraction_backward_cuda",
    "subtraction_forward_cuda",
]


def _of(offsets: Tensor) -> Tensor:
    """Offsets [N + 1] → which of N each of the M entries belongs to."""
    counts = offsets.long().diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), counts)


def _scores(q: Tensor, k: Tensor, index0: Tensor, index1: Tensor) -> Tensor:
    """[N, h, d], [N, h, d] → [M, h]: the inner product of each pair."""
    return (q[index0.long()] * k[index1.long()]).sum(-1)


def _values(attn: Tensor, v: Tensor, index0: Tensor, index1: Tensor, n: int) -> Tensor:
    """[M, h], [N, h, d] → [n, h, d]: each query's values, weighted."""
    return v.new_zeros(n, *v.shape[1:]).index_add(0, index0.long(), attn[..., None] * v[index1.long()])


def _encoding(table: Tensor, rel_idx: Tensor) -> Tensor:
    """[L, h, d, 3], [M, 3] → [M, h, d]: the sum over the axes."""
    steps = rel_idx.long().unbind(-1)
    return torch.stack([table[step, ..., axis] for axis, step in enumerate(steps)]).sum(0)


def _dots(q: Tensor, table: Tensor, index: Tensor, rel_idx: Tensor) -> Tensor:
    return (q[index.long()] * _encoding(table, rel_idx)).sum(-1)


def _both_dots(
    q: Tensor, k: Tensor, table_q: Tensor, table_k: Tensor, index_q: Tensor, index_k: Tensor, rel_idx: Tensor
) -> Tensor:
    return _dots(q, table_q, index_q, rel_idx) + _dots(k, table_k, index_k, rel_idx)


def _placed_values(
    attn: Tensor, v: Tensor, table: Tensor, index0: Tensor, index1: Tensor, rel_idx: Tensor, n: int
) -> Tensor:
    placed = v[index1.long()] + _encoding(table, rel_idx)
    return v.new_zeros(n, *v.shape[1:]).index_add(0, index0.long(), attn[..., None] * placed)


def attention_step1_forward_cuda(n, m, h, c, q, k, index0, index1, out):
    """q and k [N, h, d] → out [M, h]: the inner product of each pair."""
    out.copy_(_scores(q, k, index0, index1))


def attention_step1_backward_cuda(n, m, h, c, grad, index0, index1, q, k, grad_q, grad_k):
    """Adds the gradients of :func:`attention_step1_forward_cuda`, grad [M, h], to grad_q and grad_k."""
    add_gradients(_scores, (q, k), (index0, index1), grad, (grad_q, grad_k))


def attention_step1_forward_cuda_v2(n, m, h, c, n_max, q, k, offsets, index1, out):
    """As the first version, with the queries' offsets [N + 1]."""
    out.copy_(_scores(q, k, _of(offsets), index1))


def attention_step1_backward_cuda_v2(n, m, h, c, n_max, grad, offsets, index1, q, k, grad_q, grad_k):
    """As the first version, with the queries' offsets [N + 1]."""
    add_gradients(_scores, (q, k), (_of(offsets), index1), grad, (grad_q, grad_k))


def attention_step2_forward_cuda(n, m, h, c, attn, v, index0, index1, out):
    """attn [M, h], v [N, h, d] → out [N', h, d]: each query's values, weighted."""
    out.copy_(_values(attn, v, index0, index1, len(out)))


def attention_step2_backward_cuda(n, m, h, c, grad, index0, index1, attn, v, grad_attn, grad_v):
    """Adds the gradients of :func:`attention_step2_forward_cuda`, grad [N', h, d]."""
    add_gradients(_values, (attn, v), (index0, index1, len(grad)), grad, (grad_attn, grad_v))


def attention_step2_forward_cuda_v2(n, m, h, c, n_max, attn, v, offsets, index1, out):
    """As the first version, with the queries' offsets [N + 1]."""
    out.copy_(_values(attn, v, _of(offsets), index1, len(out)))


def attention_step2_backward_cuda_v2(n, m, h, c, n_max, grad, offsets, index1, attn, v, grad_attn, grad_v):
    """As the first version, with the queries' offsets [N + 1]."""
    add_gradients(_values, (attn, v), (_of(offsets), index1, len(grad)), grad, (grad_attn, grad_v))


def dot_prod_with_idx_forward_cuda(n, m, h, hdim, q, index, table, rel_idx, out):
    """q [N, h, d] → out [M, h]: inner products with the encoding of each pair's relative position."""
    out.copy_(_dots(q, table, index, rel_idx))


def dot_prod_with_idx_backward_cuda(n, m, h, hdim, grad, q, index, table, rel_idx, grad_q, grad_table):
    """Adds the gradients of :func:`dot_prod_with_idx_forward_cuda`, grad [M, h]."""
    add_gradients(_dots, (q, table), (index, rel_idx), grad, (grad_q, grad_table))


def dot_prod_with_idx_forward_cuda_v2(
    n, m, h, hdim, n_max, t, q, index_q, k, index_k, table_q, table_k, rel_idx, rel_idx_offsets, order, out
):
    """The sum of the first version for queries and for keys; offsets and order only speed it up there."""
    out.copy_(_both_dots(q, k, table_q, table_k, index_q, index_k, rel_idx))


def dot_prod_with_idx_backward_cuda_v2(
    n, m, h, hdim, n_max, t, grad, q, index_q, k, index_k, table_q, table_k, rel_idx, rel_idx_offsets, order,
    grad_q, grad_k, grad_table_q, grad_table_k,
):  # fmt: skip
    """Adds the gradients of :func:`dot_prod_with_idx_forward_cuda_v2`."""
    add_gradients(
        _both_dots, (q, k, table_q, table_k), (index_q, index_k, rel_idx), grad,
        (grad_q, grad_k, grad_table_q, grad_table_k),
    )  # fmt: skip


def dot_prod_with_idx_forward_cuda_v3(
    n, m, h, hdim, n_max, q, offsets_q, k, index_k, table_q, table_k, rel_idx, out
):
    """As the second version, with the queries' offsets [N + 1]."""
    out.copy_(_both_dots(q, k, table_q, table_k, _of(offsets_q), index_k, rel_idx))


def dot_prod_with_idx_backward_cuda_v3(
    n, m, h, hdim, n_max, grad, q, offsets_q, k, index_k, table_q, table_k, rel_idx, grad_q, grad_k,
    grad_table_q, grad_table_k,
):  # fmt: skip
    """As the second version, with the queries' offsets [N + 1]."""
    add_gradients(
        _both_dots, (q, k, table_q, table_k), (_of(offsets_q), index_k, rel_idx), grad,
        (grad_q, grad_k, grad_table_q, grad_table_k),
    )  # fmt: skip


def attention_step2_with_rel_pos_value_forward_cuda(
    n, m, h, hdim, attn, v, index0, index1, table, rel_idx, out
):
    """As :func:`attention_step2_forward_cuda`, the encoding of the relative position added to each value."""
    out.copy_(_placed_values(attn, v, table, index0, index1, rel_idx, len(out)))


def attention_step2_with_rel_pos_value_backward_cuda(
    n, m, h, hdim, grad, index0, index1, attn, v, table, rel_idx, grad_attn, grad_v, grad_table
):
    """Adds the gradients of :func:`attention_step2_with_rel_pos_value_forward_cuda`."""
    add_gradients(
        _placed_values, (attn, v, table), (index0, index1, rel_idx, len(grad)), grad,
        (grad_attn, grad_v, grad_table),
    )  # fmt: skip


def attention_step2_with_rel_pos_value_forward_cuda_v2(
    n, m, h, hdim, n_max, attn, v, offsets, index1, table, rel_idx, out
):
    """As the first version, with the queries' offsets [N + 1]."""
    out.copy_(_placed_values(attn, v, table, _of(offsets), index1, rel_idx, len(out)))


def attention_step2_with_rel_pos_value_backward_cuda_v2(
    n, m, h, hdim, n_max, grad, offsets, index1, attn, v, table, rel_idx, grad_attn, grad_v, grad_table
):
    """As the first version, with the queries' offsets [N + 1]."""
    add_gradients(
        _placed_values, (attn, v, table), (_of(offsets), index1, rel_idx, len(grad)), grad,
        (grad_attn, grad_v, grad_table),
    )  # fmt: skip
