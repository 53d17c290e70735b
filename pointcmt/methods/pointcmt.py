"""PointCMT: supervised training under an image teacher."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from pointcmt.adapters.registry import Adapter
from pointcmt.generator import PointGenerator
from pointcmt.objectives import ClassifierEnhancement, FeatureEnhancement, Objective
from pointcmt.schedules import Guard
from pointcmt.training import CrossModalTraining


class PointCMT(CrossModalTraining):
    """PointCMT's stage III: feature enhancement and classifier enhancement under an image teacher.

    ::

        teacher = ImageTeacher.load("runs/mn40/teacher.safetensors")
        with PointCMT(teacher, student, generator="runs/mn40/generator.safetensors") as cmt:
            for points, labels, views in loader:
                loss = criterion(student(points), labels) + cmt.loss(views=views)

    See :class:`CrossModalTraining` for what entering, training and leaving do.

    Args:
        teacher: image teacher.
        student: the network to be trained.
        generator: trained point generator, or the path of its file; feature enhancement needs it.
        adapter: where the student's feature is: an ``Adapter``, the name of one, or None to find one.
        objectives: in place of the paper's ``[FeatureEnhancement(weight=30.0),
            ClassifierEnhancement(weight=0.3)]``.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.
        points: a few clouds as the network takes them, for objectives whose heads are sized by the network.
        unlabelled: objectives of clouds without labels, which stand behind the labelled ones of a pass::

            with PointCMT(teacher, student, objectives=[SoftLabels()], unlabelled=[SoftLabels()]) as cmt:
                for (points, labels), more in zip(labelled, unlabelled):
                    clouds = torch.cat([points, more])
                    loss = criterion(student(clouds)[: len(labels)], labels)
                    loss = loss + cmt.loss(views=teacher.project(clouds), labels=labels)

    Raises:
        ValueError: feature enhancement without a generator.
        FileNotFoundError: no file at the generator's path.

    Source: Yan et al., "Let Images Give You More: Point Cloud Cross-Modal Training for Shape Analysis",
    NeurIPS 2022.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        generator: nn.Module | str | os.PathLike[str] | None = None,
        adapter: Adapter | str | None = None,
        objectives: Iterable[Objective] | None = None,
        guard: Guard | None = None,
        points: Any = None,
        unlabelled: Iterable[Objective] = (),
    ) -> None:
        if objectives is None:
            objectives = [FeatureEnhancement(weight=30.0), ClassifierEnhancement(weight=0.3)]
        super().__init__(
            teacher,
            student,
            objectives=objectives,
            generator=_loaded(generator),
            adapter=adapter,
            guard=guard,
            points=points,
            unlabelled=unlabelled,
        )


def _loaded(generator: nn.Module | str | os.PathLike[str] | None) -> nn.Module | None:
    if generator is None or isinstance(generator, nn.Module):
        return generator
    return PointGenerator.load(generator)
