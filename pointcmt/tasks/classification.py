"""Classification of shapes: cross-entropy, OA and mAcc."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.tasks import Figure, Task, predict
from pointcmt.tasks.metrics import scores

Forward = Callable[[nn.Module, Any], Tensor]


def classification(
    forward: Forward,
    parts: Mapping[str, Callable[[], Iterable[Any]]],
    watch: str,
    means: str,
    *,
    label_smoothing: float = 0.0,
    training: Forward | None = None,
) -> Task:
    """The task of classifying shapes.

    Args:
        forward: (model, batch) → class scores [B, K].
        parts: what is evaluated, such as ``heldout`` and ``test``: each gives its batches, in order. Their
            metrics are ``<part>_oa`` and ``<part>_macc``, in %.
        watch: the part whose OA says which epoch was best.
        means: what choosing by it means, in words.
        label_smoothing: of the cross-entropy.
        training: ``forward`` of a training step, where that differs (augmentation).
    """
    train_forward = training or forward

    def step(model: nn.Module, batch: Any, done: float) -> dict[str, Tensor]:
        logits = train_forward(model, batch).float()
        labelled = logits[: len(batch.labels)]  # clouds without labels may stand behind
        return {"loss": F.cross_entropy(labelled, batch.labels, label_smoothing=label_smoothing)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, batches in parts.items():
            metrics |= scores(*predict(lambda batch: forward(model, batch), batches()), name)
        return metrics

    return Task(
        step, evaluate, Figure(f"{watch}_oa", "highest", means), tuple(f"{name}_oa" for name in parts)
    )
