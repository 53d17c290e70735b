"""Feature enhancement (FE): the student's feature should generate the same cloud as the image feature."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pointcmt.objectives.base import Objective, Sizes, check_features, full_precision
from pointcmt.objectives.cloud_distances import DISTANCES
from pointcmt.ops import emd, unit_cube
from pointcmt.ops._deferred import deferred
from pointcmt.types import StudentState, TeacherOutput

CloudDistance = Callable[[Tensor, Tensor], Tensor]


class FeatureEnhancement(Objective):
    """Distance between the clouds that one frozen generator makes of the student's and of the image feature.

    Both clouds are scaled to a unit cube, each by its own bounding box, and compared point to point. The
    gradient reaches the student's feature only: the generator is a frozen copy in eval mode, the image
    feature carries none.

    Args:
        weight: the paper's 30.
        generator: ``[B, D] -> [B, N, 3]``, e.g. ``PointGenerator``. None: the one given to ``PointCMT``.
        distance: ``"emd"`` (the paper's), ``"chamfer"``, ``"sinkhorn"``, ``"sliced_wasserstein"``, or a
            callable ``(x [B, N, 3], y [B, N, 3]) -> [B]``, in unit-cube lengths.

    Raises:
        ValueError: unknown distance, or feature sizes that do not fit the generator.

    Source: Yan et al., "Let Images Give You More: Point Cloud Cross-Modal Training for Shape Analysis",
    NeurIPS 2022, section 3.3; weight, unit cube and reduction (mean over points and batch) as in the authors'
    public code.
    """

    default_name = "feature_enhancement"
    needs_generator = True

    def __init__(
        self,
        weight: float = 30.0,
        generator: nn.Module | None = None,
        distance: str | CloudDistance = "emd",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if isinstance(distance, str) and distance != "emd" and distance not in DISTANCES:
            raise ValueError(
                f"{self.name}: distance is {distance!r}; expected one of emd, {', '.join(DISTANCES)}, or a "
                "callable (x [B, N, 3], y [B, N, 3]) -> [B]"
            )
        self.distance = distance
        self.generator: nn.Module | None = None
        self._bound_here = False
        if generator is not None:
            self._freeze(generator)

    def _freeze(self, generator: nn.Module) -> None:
        # a copy: the caller's generator keeps its mode, its device and its gradients
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)

    def bind(
        self,
        *,
        generator: nn.Module | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        if generator is not None and (self.generator is None or self._bound_here):
            self._freeze(generator)
            self._bound_here = True
        if self.generator is None:
            raise ValueError(
                f"{self.name} needs a point generator: PointCMT(teacher, student, generator=<path or "
                "PointGenerator>). `pointcmt train-generator` trains one for your teacher"
            )

    def train(self, mode: bool = True) -> FeatureEnhancement:
        super().train(mode)
        if self.generator is not None:
            self.generator.eval()
        return self

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        if self.generator is None:
            raise RuntimeError(
                f"{self.name} has no generator: give it one (generator=...), or use it in PointCMT"
            )
        check_features(self, student, teacher)
        size = getattr(self.generator, "feature_dim", student.feature.shape[1])
        if size != student.feature.shape[1]:
            raise ValueError(
                f"{self.name}: the generator takes features of size {size}, the student's and the teacher's "
                f"have size {student.feature.shape[1]}; train the generator with this teacher (pointcmt "
                "train-generator)"
            )
        # a forward pass in float16 that overflowed is for the GradScaler to skip, and no error
        logits = student.feature if student.logits is None else student.logits
        overflow = torch.float16 in (student.feature.dtype, logits.dtype)
        # half precision would cost the matching more accuracy than it saves time
        with torch.autocast(student.feature.device.type, enabled=False), deferred.tolerated(overflow):
            dtype = next((p.dtype for p in self.generator.parameters()), torch.float32)
            ours = unit_cube(full_precision(self.generator(student.feature.to(dtype))))
            with torch.no_grad():
                theirs = unit_cube(full_precision(self.generator(teacher.feature.to(dtype))))
            return self._distance(ours, theirs).mean()

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        if callable(self.distance):
            return self.distance(x, y)
        if self.distance != "emd":
            return DISTANCES[self.distance](x, y)
        return emd(x, y)[0]

    def extra_repr(self) -> str:
        distance = getattr(self.distance, "__name__", self.distance)
        return f"{super().extra_repr()}, distance={distance}"
