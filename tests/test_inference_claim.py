"""The promise: after training with PointCMT a network is what it was before, and costs what it cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pointcmt import students
from pointcmt.generator import PointGenerator
from pointcmt.methods import PointCMT
from pointcmt.teacher import ImageTeacher
from tests.toys import hooks

CLASSES, FEATURE, BATCH, POINTS = 7, 32, 4, 128
STUDENTS = ("pointnet2", "dgcnn", "rscnn", "pointmlp")


def flops(student, points) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(points)
    return counter.get_total_flops()


def description(student, points) -> dict:
    student.eval()
    facts = {
        "keys": list(student.state_dict()),
        "parameters": [(name, tuple(p.shape), p.requires_grad) for name, p in student.named_parameters()],
        "attributes": [sorted(module.__dict__) for module in student.modules()],
        "hooks": hooks(student),
        "flops": flops(student, points),
    }
    student.train()
    return facts


@pytest.mark.parametrize("name", STUDENTS)
def test_nothing_is_left_in_any_reference_student(name):
    torch.manual_seed(500)
    student = getattr(students, name)(CLASSES, width=0.125, feature_dim=FEATURE)
    untouched = getattr(students, name)(CLASSES, width=0.125, feature_dim=FEATURE)
    teacher = ImageTeacher(CLASSES, backbone="simpleview_resnet", in_chans=1, feature_dim=FEATURE)
    generator = PointGenerator(FEATURE, 32)
    points, views = torch.rand(BATCH, POINTS, 3) * 2 - 1, torch.rand(BATCH, 2, 1, 32, 32)
    before = description(student, points)
    assert before["hooks"] == 0
    assert before["flops"] > 0
    with PointCMT(teacher, student, generator=generator) as cmt:
        logits = student(points)
        loss = cmt.loss(views=views) + logits.square().mean()
        loss.backward()
        norms = {name: buffer.clone() for name, buffer in student.named_buffers()}
        # the classifier's batch norm sees an image feature, and keeps nothing of it
        cmt.classify(torch.full((BATCH, FEATURE), 100.0) + torch.randn(BATCH, FEATURE))
        assert all(torch.equal(norms[name], buffer) for name, buffer in student.named_buffers())
        assert cmt.report.adapter.name == f"students-{name}"
        assert cmt.report.conclusive
    assert description(student, points) == before
    # an untouched network with these weights gives the same bits
    untouched.load_state_dict(student.state_dict())
    student.eval(), untouched.eval()
    with torch.no_grad():
        torch.manual_seed(1)
        ours = student(points)
        torch.manual_seed(1)
        assert torch.equal(ours, untouched(points))
    assert next(student.parameters()).grad.abs().sum() > 0  # it reached the very first layer
