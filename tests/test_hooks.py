"""The private APIs of torch that hooks rest on, each behind one function: what breaks where one is gone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pointcmt import CrossModalTraining, hooks
from pointcmt.objectives import FeatureL2
from tests.toys import Student, Teacher, batch


def test_a_recomputed_forward_pass_is_told_from_a_first_one():
    """Without it, activation checkpointing would capture a pass twice."""
    seen = []
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda *_: seen.append(hooks._in_backward()))
    checkpoint(layer, torch.randn(2, 3, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


class Other(nn.Module):
    def forward(self, x):
        return 2 * x


def test_only_what_the_student_compiled_is_compiled_again():
    """Without it, a compiled student would skip the hooks, or everybody's compiled code would be dropped."""
    compiled: list[str] = []

    def backend(name):
        def compile_(graph, _inputs):
            compiled.append(name)
            return graph.forward

        return compile_

    torch.compiler.reset()
    student, points, views = Student(), *batch(0)[::2]
    run = torch.compile(student, backend=backend("student"))
    other = torch.compile(Other(), backend=backend("other"))
    run(points), other(points)
    assert compiled == ["student", "other"]
    with CrossModalTraining(Teacher(), run, objectives=[FeatureL2(1.0)]) as cmt:
        run(points)
        cmt.loss(views=views)
        other(points)
        assert "other" not in compiled[2:] and "student" in compiled[2:]
    compiled.clear()
    run(points), other(points)
    assert compiled == ["student"]
    run(points)
    assert compiled == ["student"], "and once is enough"
