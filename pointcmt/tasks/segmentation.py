"""Segmentation: a class for each point, of parts of shapes or of scenes.

Figures are in per cent. With IoU of a class = |predicted ∩ true| / |predicted ∪ true| over points:

* Parts: the IoU of a shape is the mean over the parts of its category; a part that neither the shape has nor
  was predicted counts 1. *Instance mIoU* is the mean over shapes, *class mIoU* the mean over categories of
  the mean over their shapes.
* Scenes: IoU of each class over all points of all clouds together; *mIoU* and *mAcc* are means over the
  classes that some point has, or (IoU) that were predicted for one; *OA* is the part of the points that are
  right.

The predicted part is the highest score of the shape's own category (as in yanx27's PointNet++), or of all
parts (CrossPoint, antao97's DGCNN, OpenPoints): tables say which. Points with a negative label do not count
anywhere.

Source: Qi et al., PointNet (CVPR 2017), sections 5.2 and 5.3, and the public code of the named networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from pointcmt.tasks import Figure, Task

Argmax = Literal["category", "all"]
Forward = Callable[[nn.Module, Any], Tensor]


def parts_by_category(part_names: Sequence[str], class_names: Sequence[str]) -> list[list[int]]:
    """Which parts each category has, of names ``category/part``.

    Raises:
        ValueError: a part of no category, or a category without parts.
    """
    owners = [name.rpartition("/")[0] for name in part_names]
    found = [[n for n, owner in enumerate(owners) if owner == name] for name in class_names]
    if sum(map(len, found)) != len(part_names) or not all(found):
        raise ValueError(
            f"parts {', '.join(part_names[:4])} … of categories {', '.join(class_names[:4])} …; expected "
            "names category/part, at least one for each category"
        )
    return found


def restricted(scores: Tensor, category: Tensor, parts: Sequence[Sequence[int]]) -> Tensor:
    """Class scores [B, N, K] with −∞ at parts of other categories than each shape's, int64 [B]."""
    allowed = torch.zeros(len(parts), scores.shape[2], dtype=torch.bool, device=scores.device)
    for row, own in enumerate(parts):
        allowed[row, list(own)] = True
    return scores.masked_fill(~allowed[category][:, None], -torch.inf)


def shape_ious(
    predicted: np.ndarray, labels: np.ndarray, category: np.ndarray, parts: Sequence[Sequence[int]]
) -> np.ndarray:
    """IoU of each shape, float64 [n] in [0, 1]; see the module's docstring.

    Args:
        predicted, labels: int [n, N]; points with a negative label are left out.
        category: int [n].
        parts: of each category.

    Raises:
        ValueError: shapes that do not fit.
    """
    if predicted.shape != labels.shape or len(category) != len(labels):
        raise ValueError(
            f"predicted {list(predicted.shape)}, labels {list(labels.shape)} and category "
            f"{list(category.shape)}; expected [n, N], [n, N] and [n]"
        )
    known = labels >= 0
    result = np.empty(len(labels))
    for row, kind in enumerate(category):
        of_parts = []
        for part in parts[kind]:
            ours, theirs = (predicted[row] == part) & known[row], labels[row] == part
            union = int((ours | theirs).sum())
            of_parts.append(int((ours & theirs).sum()) / union if union else 1.0)
        result[row] = np.mean(of_parts)
    return result


def part_figures(ious: np.ndarray, category: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """``instance_miou`` and ``class_miou`` in % of the shapes' IoUs, and ``iou/<category>`` of each category
    that has shapes."""
    each = {
        name: 100 * float(ious[category == number].mean())
        for number, name in enumerate(class_names)
        if (category == number).any()
    }
    return {
        "instance_miou": 100 * float(ious.mean()),
        "class_miou": float(np.mean(list(each.values()))),
        **{f"iou/{name}": value for name, value in each.items()},
    }


def scene_figures(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """``miou``, ``macc`` and ``oa`` in % of a confusion matrix [K, K] (true, predicted), and ``iou/<class>``
    of each class that was there or predicted.

    A class that no point has and none was predicted to have does not count; one that is predicted and never
    there has IoU 0, and no accuracy.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    true, predicted, right = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    union = true + predicted - right
    if not confusion.sum():
        raise ValueError("no point has a label, so that nothing can be measured")
    ious = {name: 100 * float(right[k] / union[k]) for k, name in enumerate(class_names) if union[k]}
    return {
        "miou": float(np.mean(list(ious.values()))),
        "macc": 100 * float(np.mean(right[true > 0] / true[true > 0])),
        "oa": 100 * float(right.sum() / confusion.sum()),
        **{f"iou/{name}": value for name, value in ious.items()},
    }


def segmentation_loss(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of class scores [B, N, K], mean over the points whose label [B, N] is not negative; 0
    where none is."""
    known = labels >= 0
    target = torch.where(known, labels, -100)
    total = F.cross_entropy(
        scores.float().flatten(0, 1), target.flatten(), label_smoothing=label_smoothing, reduction="sum"
    )
    return total / known.sum().clamp(min=1)


def counted(labels: Tensor, lengths: Tensor | None) -> Tensor:
    """Labels [B, N] with −1 where a point has none, or is beyond its cloud's ``lengths`` [B]."""
    labels = torch.where(labels >= 0, labels, -1)
    if lengths is None:
        return labels
    return labels.masked_fill(torch.arange(labels.shape[1], device=labels.device) >= lengths[:, None], -1)


class Measure:
    """Figures of clouds that come batch by batch, the same on every process.

    Args:
        part_names: names of the labels.
        class_names: of the categories; None: scenes.
        argmax: of parts, which scores compete.
    """

    def __init__(
        self, part_names: Sequence[str], class_names: Sequence[str] | None, argmax: Argmax = "category"
    ) -> None:
        self.part_names, self.class_names, self.argmax = list(part_names), class_names, argmax
        self.parts = None if class_names is None else parts_by_category(part_names, class_names)
        self.shapes: list[tuple[np.ndarray, ...]] = []
        # of two classes at least, which torchmetrics asks for
        self.confusion = MulticlassConfusionMatrix(max(2, len(part_names)), ignore_index=-1)

    def add(
        self,
        scores: Tensor,
        labels: Tensor,
        category: Tensor | None = None,
        index: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """Class scores [B, N, K] of points with labels [B, N]; ``index`` int64 [B] are rows of the set, by
        which a shape counts once, and of each cloud its first ``lengths`` [B] points count."""
        labels = counted(labels, lengths)
        if self.parts is None:
            predicted = scores.argmax(-1)
            self.confusion.to(scores.device).update(predicted.flatten(), labels.flatten())
            return
        assert category is not None, "parts have a category"
        if self.argmax == "category":
            scores = restricted(scores, category, self.parts)
        kind = category.cpu().numpy()
        ious = shape_ious(scores.argmax(-1).cpu().numpy(), labels.cpu().numpy(), kind, self.parts)
        rows = np.arange(len(ious)) if index is None else index.cpu().numpy()
        self.shapes.append((rows, ious, kind))

    def figures(self) -> dict[str, float]:
        """See :func:`part_figures` and :func:`scene_figures`."""
        if self.parts is None:
            size = len(self.part_names)
            return scene_figures(self.confusion.compute().cpu().numpy()[:size, :size], self.part_names)
        pieces = self.shapes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, pieces)
            pieces = [piece for one in everyone for piece in one]
        rows, ious, kind = (np.concatenate(column) for column in zip(*pieces, strict=True))
        _, first = np.unique(rows, return_index=True)
        assert self.class_names is not None
        return part_figures(ious[first], kind[first], self.class_names)


def headline(parts: bool) -> str:
    """The figure that runs are compared by."""
    return "instance_miou" if parts else "miou"


def segmentation(
    forward: Forward,
    evaluated: Mapping[str, Callable[[], Iterable[Any]]],
    watch: str,
    means: str,
    *,
    part_names: Sequence[str],
    class_names: Sequence[str] | None = None,
    argmax: Argmax = "category",
    label_smoothing: float = 0.0,
    prepare: Callable[[Any], Any] | None = None,
) -> Task:
    """The task of giving each point its class.

    Args:
        forward: (model, ``pointcmt.types.Batch``) → class scores [B, N, K].
        evaluated: what is evaluated, such as ``heldout`` and ``test``: each gives its batches. Metrics are
            ``<part>_instance_miou`` and ``<part>_class_miou`` of parts, ``<part>_miou``, ``<part>_macc`` and
            ``<part>_oa`` of scenes, in %.
        watch: the part whose first figure says which epoch was best.
        means: what choosing by it means, in words.
        part_names: names of the labels.
        class_names: of the shapes' categories, for parts; None: scenes.
        argmax: of parts, whether those of the shape's category compete, or all.
        label_smoothing: of the cross-entropy.
        prepare: what a training step does to its batch first (augmentation).
    """
    first = headline(class_names is not None)

    def step(model: nn.Module, batch: Any, done: float) -> dict[str, Tensor]:
        if prepare is not None:
            batch = prepare(batch)
        labels = counted(batch.point_labels, batch.lengths)
        return {"loss": segmentation_loss(forward(model, batch), labels, label_smoothing)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, batches in evaluated.items():
            measure = Measure(part_names, class_names, argmax)
            for batch in batches():
                if len(batch):
                    scores = forward(model, batch).float()
                    measure.add(scores, batch.point_labels, batch.category, batch.index, batch.lengths)
            figures = measure.figures()
            metrics |= {f"{name}_{key}": value for key, value in figures.items() if "/" not in key}
        return metrics

    return Task(
        step, evaluate, Figure(f"{watch}_{first}", "highest", means), tuple(f"{n}_{first}" for n in evaluated)
    )
