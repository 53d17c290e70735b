"""Image labels: the student's classifier should know the classes of the teacher's features too."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, check_features, full_precision
from pointcmt.types import StudentState, TeacherOutput


class ImageLabels(Objective):
    """Cross-entropy of the labels and what the student's own classifier says of the image feature.

    Classifier enhancement asks the classifier to say the same of both features, whatever it is; this asks it
    to be right about the image's (mean over the batch). The gradient reaches the classifier alone, so that
    features of both kinds are drawn to the same side of its borders. Of labelled clouds only.

    Args:
        weight: 0.3.
        label_smoothing: of the cross-entropy; 0.2, as the student's own.

    Source: the supervised counterpart of the classifier enhancement of Yan et al., NeurIPS 2022, ours.
    """

    default_name = "image_labels"
    needs_classify = True
    needs_labels = True

    def __init__(self, weight: float = 0.3, label_smoothing: float = 0.2, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.label_smoothing = float(label_smoothing)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        check_features(self, student, teacher)
        assert student.classify is not None and student.labels is not None
        scores = full_precision(student.classify(teacher.feature))
        return F.cross_entropy(scores, student.labels, label_smoothing=self.label_smoothing)
