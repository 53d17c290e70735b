"""``knn_cuda`` (unlimblue/KNN_CUDA) over :func:`pointcmt.ops.knn`; no gradients, as there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointcmt import ops

__all__ = ["KNN", "knn"]


class KNN(nn.Module):
    """The k nearest reference points of every query.

    Args:
        k: how many.
        transpose_mode: True for clouds [B, N, D] and results [B, M, k]; False (the original's default)
            for clouds [B, D, N] and results [B, k, M].
    """

    def __init__(self, k: int, transpose_mode: bool = False) -> None:
        super().__init__()
        self.k = k
        self.transpose_mode = transpose_mode

    @torch.no_grad()
    def forward(self, ref: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """→ Euclidean distances, ascending, and int64 indices into ref."""
        if not self.transpose_mode:
            ref, query = ref.transpose(1, 2).contiguous(), query.transpose(1, 2).contiguous()
        squared, idx = ops.knn(query, ref, self.k)
        if not self.transpose_mode:
            squared, idx = squared.transpose(1, 2).contiguous(), idx.transpose(1, 2).contiguous()
        return squared.sqrt(), idx


def knn(ref: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One cloud: ref [D, N], query [D, M] → distances and int64 indices, both [k, M]."""
    distance, idx = KNN(k)(ref[None], query[None])
    return distance[0], idx[0]
