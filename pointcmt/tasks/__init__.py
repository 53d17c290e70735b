"""What is trained for: the loss of a step, the metrics, and the figure that says which epoch was best.

A task is one file here. The training loop (``pointcmt.recipes.engine.fit``) knows a :class:`Task` and nothing
of accuracies: it minimises what ``step`` gives as ``loss``, logs what ``evaluate`` gives, and keeps the epoch
whose :class:`Figure` is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Labelled(Protocol):
    """A batch as the loop gives it: inputs, int64 labels [B] and their rows in the data set, int64 [B]."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Figure:
    """A metric that runs are chosen and compared by."""

    name: str
    """Its key in the metrics, such as ``heldout_oa``."""
    best: Literal["highest", "lowest"]
    """Which value is the best."""
    means: str
    """What choosing by it means, in words for results.json."""

    def improves(self, value: float, before: float) -> bool:
        """Whether ``value`` is better than ``before``."""
        return value > before if self.best == "highest" else value < before


@dataclass
class Task:
    """Loss, metrics and the figure to watch of one kind of training."""

    step: Callable[[nn.Module, Any, float], dict[str, Tensor]]
    """(model in training mode, batch, part of the run that is done in [0, 1)) → named scalars; ``loss`` is
    what is minimised."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Model in eval mode, without gradients → metrics, the same on every process."""
    watch: Figure
    """Says which epoch was best."""
    headline: tuple[str, ...] = ()
    """Metrics that the progress bar shows."""


def predict(forward: Callable[[Any], Tensor], batches: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """``forward`` over all batches, gathered over the processes in the data set's order.

    Args:
        forward: batch of B shapes → [B, …].
        batches: this process's part of them, each with ``labels`` [B] and ``index`` [B], the rows.

    Returns:
        outputs [n, …] float32 and labels [n] int64.
    """
    pieces = []
    with torch.no_grad():
        for batch in batches:
            if len(batch.labels):
                outputs = forward(batch).float().cpu().numpy()
                pieces.append((outputs, batch.labels.cpu().numpy(), batch.index.cpu().numpy()))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, pieces)
        pieces = [piece for one in everyone for piece in one]
    outputs, labels, index = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.argsort(index)
    return outputs[order], labels[order]
