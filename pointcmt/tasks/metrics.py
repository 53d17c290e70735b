"""Accuracies as the field reports them, in per cent."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import accuracy_score, recall_score


def overall_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """OA: part of the shapes [n] that are classified rightly, in %."""
    return 100.0 * float(accuracy_score(labels, predicted))


def class_accuracies(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Accuracy of each class [K] in %; NaN for a class without shapes."""
    recalls = recall_score(labels, predicted, labels=np.arange(num_classes), average=None, zero_division=0)
    return np.where(np.bincount(labels, minlength=num_classes) > 0, 100.0 * recalls, np.nan)


def scores(logits: np.ndarray, labels: np.ndarray, prefix: str) -> dict[str, float]:
    """OA and mAcc (mean over the classes that have shapes) of class scores [n, K], named ``prefix_oa``,
    ``prefix_macc``."""
    predicted = logits.argmax(1)
    return {
        f"{prefix}_oa": overall_accuracy(predicted, labels),
        f"{prefix}_macc": float(np.nanmean(class_accuracies(predicted, labels, logits.shape[1]))),
    }
