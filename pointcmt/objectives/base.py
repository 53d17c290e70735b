"""What every objective is: one scalar from what the student did and what the teacher said."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor, nn

from pointcmt.types import StudentState, TeacherOutput

if TYPE_CHECKING:
    from collections.abc import Callable


class Sizes(NamedTuple):
    """Sizes of features, which an objective's heads are built by; None where it is not known on entering.

    Attributes:
        feature: D of the student's shape feature.
        global_: D' of the student's encoder's pooled feature.
        local: C of the student's local features.
        image: D of the teacher's shape feature, and of its features per view.
        maps: channels of the teacher's feature maps.
    """

    feature: int | None = None
    global_: int | None = None
    local: int | None = None
    image: int | None = None
    maps: int | None = None


class Objective(nn.Module, ABC):
    """One loss between student and teacher; a new method is a subclass in a file of its own.

    Subclasses implement ``forward(student, teacher) -> scalar``, not yet multiplied by :attr:`weight`, and
    set ``default_name``. They compute in float32 or wider (see :func:`full_precision`): training may run in
    half precision. Parameters that an objective trains (a connector, say) belong into the user's optimizer;
    ``CrossModalTraining.parameters()`` has them.

    Attributes:
        weight: factor of this loss in the sum; may be changed between steps.
        name: key in ``CrossModalTraining.losses``.
        needs_generator: whether :meth:`bind` must be given a point generator.
        needs_logits, needs_per_view, needs_maps: what the teacher must give beside its shape feature.
        needs_cameras: whether the views must come with their cameras.
        needs_classify: whether the student must have a classifier.
        needs_local: whether the student's local features are needed.
        needs_global: whether the student's pooled feature is needed, before its head.
        needs_labels: whether the shapes' classes are needed; such an objective is of labelled shapes alone.
        image_side: names of the submodules that project images; they may have a learning rate of their own.
        sees_copies: whether, of k augmented copies of each shape, the objective is given the k·B student
            features beside the teacher's B (``student.copies`` says k); otherwise the teacher's are repeated.
    """

    default_name: ClassVar[str]
    needs_generator: bool = False
    needs_logits: bool = False
    needs_per_view: bool = False
    needs_maps: bool = False
    needs_cameras: bool = False
    needs_classify: bool = False
    needs_local: bool = False
    needs_global: bool = False
    needs_labels: bool = False
    sees_copies: bool = False
    image_side: tuple[str, ...] = ()

    def __init__(self, weight: float, name: str | None = None) -> None:
        super().__init__()
        self.weight = float(weight)
        self.name = name or self.default_name

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        """Called on entering a training context, before the first step: build heads here.

        Args:
            generator: the point generator given to the context, if any.
            classify: the teacher's own classifier, feature [B, D] -> logits [B, K], frozen.
            sizes: of the features, as far as they are known.

        Raises:
            ValueError: something is missing; the message says what to give.
        """

    @abstractmethod
    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        """The unweighted loss, a scalar.

        Raises:
            ValueError: sizes that do not fit; the message says what to change.
        """

    def extra_repr(self) -> str:
        return f"name={self.name!r}, weight={self.weight:g}"


def full_precision(tensor: Tensor) -> Tensor:
    """float32, or float64 where the tensor is: losses are not computed in half precision."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def check_features(objective: Objective, student: StudentState, teacher: TeacherOutput) -> None:
    """Both features are [B, D] with one D.

    Raises:
        ValueError: they are not.
    """
    ours, theirs = student.feature.shape, teacher.feature.shape
    if ours[1] != theirs[1]:
        raise ValueError(
            f"{objective.name}: the student's feature has size {ours[1]}, the teacher's {theirs[1]}; they "
            "must be equal. Train a teacher for this student (pointcmt train-teacher --feature-dim "
            f"{ours[1]}, and a generator with it), give the student a feature of size {theirs[1]}, or tap it "
            "elsewhere by an adapter"
        )


def check_logits(
    objective: Objective, student: StudentState, teacher: TeacherOutput
) -> tuple[Tensor, Tensor]:
    """Both score the same K classes; returns their scores in float32 or wider.

    Raises:
        ValueError: they do not.
    """
    if student.logits is None or teacher.logits is None:
        who = "the teacher" if teacher.logits is None else "the student"
        raise ValueError(
            f"{objective.name} compares class scores, and {who} has no classifier: use objectives on "
            "features, or one that was trained to classify"
        )
    ours, theirs = student.logits.shape, teacher.logits.shape
    if ours != theirs:
        raise ValueError(
            f"{objective.name}: the student's logits are {list(ours)}, the teacher's {list(theirs)}; both "
            "must score the same classes: train the teacher on the student's classes"
        )
    return full_precision(student.logits), full_precision(teacher.logits)
