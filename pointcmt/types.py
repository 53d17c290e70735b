"""The two records every objective sees: what the student did, what the teacher said."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class TeacherOutput(NamedTuple):
    """What the image teacher says of B shapes; carries no gradient into the teacher.

    Attributes:
        feature: [B, D] shape feature after pooling over views.
        logits: [B, K] class scores of the teacher's own classifier.
    """

    feature: Tensor
    logits: Tensor


class StudentState(NamedTuple):
    """What one forward pass of the student left for the objectives.

    Attributes:
        feature: [B, D] the student's shape feature, attached to its graph.
        logits: [B, K] the student's output, attached to its graph.
        classify: ``feature [B, D] -> logits [B, K]`` through the student's *own* classifier,
            in the student's current mode, leaving its BatchNorm running statistics untouched.
    """

    feature: Tensor
    logits: Tensor
    classify: Callable[[Tensor], Tensor]
