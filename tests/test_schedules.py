"""Guards scale the weights and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from pointcmt.methods import PointCMT
from pointcmt.schedules import Decay, HeldOutAdvantage, ScheduleLength
from tests.toys import Generator, Student, Teacher, batch


def test_decay_follows_the_schedule():
    guard = Decay(start=0.2, end=0.6)
    for progress, factor in (
        (0.0, 1.0),
        (0.2, 1.0),
        (0.3, 0.5 + math.sqrt(0.125)),
        (0.4, 0.5),
        (0.6, 0.0),
        (1.0, 0.0),
    ):
        guard.observe(progress=progress)
        assert guard.factor("anything") == pytest.approx(factor, abs=1e-12)


def test_the_teacher_falls_silent_as_the_student_catches_up():
    guard = HeldOutAdvantage(full=0.1, margin=0.1, initial=0.7)
    assert guard.factor("x") == 0.7
    guard.observe(teacher_accuracy=0.8)
    assert guard.factor("x") == 0.7  # the student is not measured yet
    for student, factor in ((0.2, 1.0), (0.7, 1.0), (0.8, 0.5), (0.85, 0.25), (0.9, 0.0), (0.99, 0.0)):
        guard.observe(student_accuracy=student)
        assert guard.factor("x") == pytest.approx(factor)


def test_short_schedules_get_a_part_of_the_paper_s_weights():
    assert ScheduleLength(300_000).factor("x") == ScheduleLength(10**6).factor("x") == 1.0
    assert ScheduleLength(3_000).factor("x") == pytest.approx(0.1)
    assert ScheduleLength(25, full=100, names=["a"]).factor("a") == 0.5
    assert ScheduleLength(25, full=100, names=["a"]).factor("b") == 1.0


def test_guards_multiply_and_know_their_objectives():
    guard = HeldOutAdvantage(full=0.2, margin=0) * Decay(end=0.5, names=["b"])
    guard.observe(teacher_accuracy=0.9, student_accuracy=0.8, progress=0.25)
    assert guard.factor("a") == pytest.approx(0.5)
    assert guard.factor("b") == pytest.approx(0.25)
    again = HeldOutAdvantage(full=0.2, margin=0) * Decay(end=0.5, names=["b"])
    again.load_state_dict(guard.state_dict())
    assert again.factor("b") == guard.factor("b")


def test_training_multiplies_the_weights_by_the_guard():
    torch.manual_seed(1)
    teacher, student, (points, _, views) = Teacher(), Student(), batch(1)
    guard = Decay(names=["classifier_enhancement"])
    with PointCMT(teacher, student, generator=Generator(), guard=guard) as cmt:
        student(points)
        full = cmt.loss(views=views).item()
        named = cmt.losses
        guard.observe(progress=0.5)
        student(points)
        half = cmt.loss(views=views).item()
        assert cmt.weights == {"feature_enhancement": 30.0, "classifier_enhancement": pytest.approx(0.15)}
        guard.observe(progress=1.0)
        student(points)
        cmt.loss(views=views)
        assert set(cmt.losses) == {"feature_enhancement"}  # not computed at all
    assert full - half == pytest.approx(0.15 * named["classifier_enhancement"], rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Decay(start=0.5, end=0.5),
        lambda: HeldOutAdvantage(full=0),
        lambda: HeldOutAdvantage(margin=-0.1),
        lambda: ScheduleLength(0),
        lambda: Decay().observe(progress=1.5),
    ],
)
def test_values_out_of_range_are_explained(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()
