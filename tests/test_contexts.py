"""Contexts that train something themselves: heads, local features, copies, state; and several at once."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointcmt import CrossModalTraining, PointCMT
from pointcmt.adapters import Adapter, AdapterError, Tap, find_adapter
from pointcmt.objectives import FeatureL2, Objective, SoftLabels, SoftmaxRegression
from pointcmt.teacher import ImageTeacher
from pointcmt.types import ImageFeatures, TeacherOutput, Views
from tests.toys import BATCH, CLASSES, FEATURE, POINTS, Generator, Student, Teacher, batch, hooks

ROOT = Path(__file__).resolve().parents[1]


def build(seed: int = 0):
    torch.manual_seed(seed)
    return Teacher(), Student()


class PerPoint(nn.Module):
    """[B, 3, N] -> [B, K], with a feature for each point."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.neck = nn.Linear(8, FEATURE)
        self.head = nn.Linear(FEATURE, CLASSES)

    def forward(self, points):
        return self.head(self.neck(self.local(points).amax(2)).relu())


PER_POINT = Adapter(
    name="per point",
    matches=lambda module: isinstance(module, PerPoint),
    feature_module="head",
    feature_from="input",
    classify=lambda module, feature: module.head(feature),
    input_layout="B3N",
    # before the activation, which works in place on the very tensor
    local=Tap(
        "local.1", "output", lambda _m, tapped, inputs: (tapped.transpose(1, 2), inputs[0].transpose(1, 2))
    ),
    global_=Tap("neck", "input", lambda _m, tapped, _inputs: tapped[0]),
)


class LocalHead(Objective):
    """Pulls local features, through a head sized on entering, to the teacher's shape feature."""

    default_name = "local_head"
    needs_local = needs_global = True

    def bind(self, *, generator=None, classify=None, sizes=None):
        if sizes.local is None or sizes.image is None:
            raise ValueError(f"{self.name}: give points=<a few clouds>, for the size of its head")
        self.head = nn.Sequential(nn.Linear(sizes.local, sizes.image), nn.BatchNorm1d(sizes.image))

    def forward(self, student, teacher):
        self.seen = student
        ours = self.head(student.local.flatten(0, 1)).view(*student.local.shape[:2], -1)
        return (ours.mean(1) - teacher.feature).square().mean()


def test_local_features_and_centres_are_captured_with_their_graph():
    torch.manual_seed(1)
    teacher, network = Teacher(), PerPoint()
    points, _, views = batch(1)
    points = points.transpose(1, 2).contiguous()
    objective = LocalHead(1.0)
    with CrossModalTraining(
        teacher, network, objectives=[objective], adapter=PER_POINT, points=points[:2]
    ) as cmt:
        assert cmt.report.local_shape == (2, POINTS, 8) and cmt.report.global_shape == (2, 8)
        assert cmt.sizes.local == 8 and cmt.sizes.global_ == 8 and cmt.sizes.image == FEATURE
        network(points)
        loss = cmt.loss(views=views)
        loss.backward()
        # equal to what the network computes, before the activation that follows in place
        network.local[1].momentum = 0.0
        expected = network.local[1](network.local[0](points)).transpose(1, 2)
        torch.testing.assert_close(objective.seen.local, expected)
        torch.testing.assert_close(objective.seen.centers, points.transpose(1, 2))
        torch.testing.assert_close(objective.seen.global_, expected.relu().amax(1))
    assert network.local[0].weight.grad.abs().sum() > 0
    assert hooks(network) == 0


def test_local_features_inside_a_compiled_network():
    torch.manual_seed(1)
    teacher, network = Teacher(), PerPoint()
    points, _, views = batch(1)
    points = points.transpose(1, 2).contiguous()
    results = []
    for compiled in (False, True):
        copied = copy.deepcopy(network)
        run = torch.compile(copied, backend="eager") if compiled else copied
        torch.manual_seed(2)
        objective = LocalHead(1.0)
        with CrossModalTraining(
            teacher, run, objectives=[objective], adapter=PER_POINT, points=points[:2]
        ) as cmt:
            run(points)
            cmt.loss(views=views).backward()
        results.append(copied.local[0].weight.grad)
    torch.testing.assert_close(results[0], results[1])


def test_a_network_without_local_features_is_explained():
    teacher, student = build()
    with (
        pytest.raises(ValueError, match=r"local=Tap"),
        CrossModalTraining(
            teacher,
            student,
            objectives=[LocalHead(1.0)],
            adapter=find_adapter(student),  # without points it knows of none
            points=batch(0)[0],
        ),
    ):
        pass
    assert hooks(student) == 0 and teacher.training


@pytest.mark.parametrize(
    ("field", "tap", "message"),
    [
        ("local", Tap("local.1", "output", lambda _m, t, i: (t, i[0])), "one feature for each centre"),
        ("local", Tap("none", "output", lambda _m, t, i: (t, i[0])), "no such submodule"),
        ("global_", Tap("local.1", "output", lambda _m, t, i: t), r"expected \[B, D\]"),
    ],
)
def test_a_wrong_tap_is_refused_on_entering(field, tap, message):
    from dataclasses import replace

    network = PerPoint()
    adapter = replace(PER_POINT, **{field: tap})
    with (
        pytest.raises(AdapterError, match=message),
        CrossModalTraining(
            Teacher(),
            network,
            objectives=[LocalHead(1.0)],
            adapter=adapter,
            points=torch.randn(2, 3, POINTS),
        ),
    ):
        pass
    assert hooks(network) == 0


def test_parameters_are_complete_on_entering_and_the_state_comes_back():
    teacher, network = Teacher(), PerPoint()
    points = torch.randn(BATCH, 3, POINTS)
    views = batch(2)[2]

    def context():
        return CrossModalTraining(
            teacher, network, objectives=[LocalHead(1.0)], adapter=PER_POINT, points=points[:2]
        )

    with context() as cmt:
        assert len(list(cmt.parameters())) == 4
        optimizer = torch.optim.SGD([*network.parameters(), *cmt.parameters()], lr=0.1)
        network(points)
        cmt.loss(views=views).backward()
        optimizer.step()
        state = {name: value.clone() for name, value in cmt.state_dict().items()}
    assert state["local_head.head.1.num_batches_tracked"] == 1
    with context() as cmt:
        name = "local_head.head.0.weight"
        assert not torch.equal(cmt.state_dict()[name], state[name])
        cmt.load_state_dict(state)
        for name, value in cmt.state_dict().items():
            assert torch.equal(value, state[name]), name
        with pytest.raises(ValueError, match="does not fit"):
            cmt.load_state_dict({})
    # what trains nothing has nothing to keep: a frozen generator is no state
    with PointCMT(teacher, build()[1], generator=Generator()) as cmt:
        assert cmt.state_dict() == {} and list(cmt.parameters()) == []


def test_copies_of_the_shapes_in_one_pass():
    """k·B clouds beside B images: as the mean over k passes of B, for losses that are means."""
    teacher, student = build()
    student = Student(norm=False)
    points, _, views = batch(3)
    other = batch(4)[0]
    grads = []
    for joined in (True, False):
        student.zero_grad()
        with CrossModalTraining(
            teacher,
            student,
            objectives=[FeatureL2(1.0), SoftLabels(1.0)],
            copies=2 if joined else 1,
        ) as cmt:
            if joined:
                student(torch.cat([points, other]))
                cmt.loss(views=views).backward()
            else:
                for part in (points, other):
                    student(part)
                    (cmt.loss(views=views) / 2).backward()
        grads.append([parameter.grad.clone() for parameter in student.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
    with CrossModalTraining(teacher, student, objectives=[FeatureL2(1.0)], copies=4) as cmt:
        student(points)
        with pytest.raises(ValueError, match="4 copies"):
            cmt.loss(views=views)


def test_where_every_weight_is_zero_the_teacher_does_not_run():
    teacher, student = build()
    points, _, views = batch(5)
    runs = []
    teacher.register_forward_pre_hook(lambda *_: runs.append(1))
    with CrossModalTraining(teacher, student, objectives=[SoftLabels(1.0), FeatureL2(0.0)]) as cmt:
        student(points)
        cmt.loss(views=views)
        assert runs == [1]
        cmt.objectives[0].weight = 0.0
        student(points)
        assert cmt.loss(views=views) == 0 and cmt.losses == {}
        with pytest.raises(RuntimeError, match="already called"):
            cmt.loss(views=views)
    assert runs == [1]


def test_an_encoder_without_a_classifier():
    encoder = ImageTeacher(
        None,
        "simpleview_resnet",
        feature_dim=FEATURE,
        backbone_options={"width": 0.0625, "layers": [1], "stem_kernel": 2},
    )
    student = Student()
    points, _, views = batch(6)
    with CrossModalTraining(encoder, student, objectives=[FeatureL2(1.0)]) as cmt:
        student(points)
        cmt.loss(views=views).backward()
    for objective in (SoftLabels(1.0), SoftmaxRegression(1.0)):
        with CrossModalTraining(encoder, student, objectives=[objective]) as cmt:
            student(points)
            with pytest.raises(ValueError, match="no classifier"):
                cmt.loss(views=views)


class WantsMaps(FeatureL2):
    default_name = "wants_maps"
    needs_maps = needs_per_view = needs_cameras = True

    def forward(self, student, teacher):
        self.seen = teacher
        return super().forward(student, teacher)


def test_what_an_objective_needs_is_asked_of_the_teacher_or_explained():
    encoder = ImageTeacher(
        None,
        "simpleview_resnet",
        feature_dim=FEATURE,
        backbone_options={"width": 0.0625, "layers": [1], "stem_kernel": 2},
    )
    student, objective = Student(), WantsMaps(1.0)
    points, _, images = batch(7)
    matrices = torch.eye(4).expand(BATCH, 2, 4, 4)
    views = Views(images, view_matrix=matrices, projection_matrix=matrices)
    with CrossModalTraining(encoder, student, objectives=[objective]) as cmt:
        student(points)
        cmt.loss(views=views)
        assert objective.seen.maps.shape[:3] == (BATCH, 2, encoder.map_channels)
        assert objective.seen.per_view.shape == (BATCH, 2, FEATURE)
        assert objective.seen.views.view_matrix is not None
        student(points)
        with pytest.raises(ValueError, match="cameras=True"):
            cmt.loss(views=images)
        student(points)
        with pytest.raises(ValueError, match="feature maps"):
            cmt.loss(image_features=torch.zeros(BATCH, FEATURE))
    with CrossModalTraining(Teacher(), student, objectives=[WantsMaps(1.0)]) as cmt:
        student(points)
        with pytest.raises(ValueError, match="cannot give per_view and maps"):
            cmt.loss(views=views)


def test_features_in_any_form_serve():
    """Case 8: of inference mode, of NumPy, lists."""
    teacher, student = build()
    teacher.eval()
    points, _, views = batch(8)
    with torch.inference_mode():
        inferred = teacher(views)
    feature = inferred.feature.clone().numpy()
    values = []
    with CrossModalTraining(teacher, student, objectives=[FeatureL2(1.0)]) as cmt:
        for given in (
            inferred.feature,
            inferred,
            feature,
            feature.astype(np.float64),
            np.ascontiguousarray(feature[::-1])[::-1],
            np.broadcast_to(feature, feature.shape),  # read-only
            feature.tolist(),
            (feature, None),
            ImageFeatures(torch.from_numpy(feature)),
            (torch.from_numpy(feature), None),
            TeacherOutput(torch.from_numpy(feature)),
        ):
            student.train()
            student(points)
            loss = cmt.loss(image_features=given)
            loss.backward()
            values.append(loss.item())
        student(points)
        values.append(cmt.loss(views=views.numpy()).item())
    assert max(values) - min(values) < 1e-6


def test_a_trained_teacher_gets_gradients_and_stays_as_it_was_otherwise():
    teacher, student = build()
    points, _, views = batch(9)
    with CrossModalTraining(teacher, student, objectives=[FeatureL2(1.0)], train_teacher=True) as cmt:
        assert {id(p) for p in teacher.parameters()} <= {id(p) for p in cmt.parameters()}
        assert "teacher.encoder.weight" in cmt.state_dict()
        student(points)
        cmt.loss(views=views).backward()
    assert teacher.encoder.weight.grad is not None and teacher.training


def test_a_teacher_of_two_contexts_comes_back_as_it_was_in_whatever_order_they_are_left():
    """Case 28: also in the order entered."""
    teacher, one = build()
    other = Student()
    teacher.dropout.eval()
    first = CrossModalTraining(teacher, one, objectives=[FeatureL2(1.0)])
    second = CrossModalTraining(teacher, other, objectives=[FeatureL2(1.0)])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not teacher.training, "the second still uses it"
    second.__exit__(None, None, None)
    assert teacher.training and not teacher.dropout.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_connector_that_is_in_no_optimizer_is_warned_about_once():
    """Case 27: SRRL's connector gets gradients and does not move."""
    teacher, student = build()
    points, _, views = batch(10)

    def steps(with_connector: bool) -> list[str]:
        objective = SoftmaxRegression(1.0, FEATURE, FEATURE)
        with (
            warnings.catch_warnings(record=True) as caught,
            CrossModalTraining(teacher, student, objectives=[objective]) as cmt,
        ):
            warnings.simplefilter("always")
            mine = [*cmt.parameters()] if with_connector else []
            optimizer = torch.optim.Adam([*student.parameters(), *mine], lr=1e-3)
            for _ in range(25):
                optimizer.zero_grad(set_to_none=False)
                student(points)
                cmt.loss(views=views).backward()
                optimizer.step()
        return [str(item.message) for item in caught if "did not move" in str(item.message)]

    assert steps(True) == []
    (message,) = steps(False)
    assert "cmt.parameters()" in message


def test_a_context_cannot_be_copied():
    """Case 29: nor pickled."""
    teacher, student = build()
    with (
        CrossModalTraining(teacher, student, objectives=[FeatureL2(1.0)]) as cmt,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        for duplicate in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                duplicate(cmt)


def test_lazy_layers_are_explained():
    """Case 29: LazyBatchNorm, before and after its first batch."""

    class Lazy(Student):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LazyBatchNorm1d()

    student, points = Lazy(), batch(11)[0]
    own = hooks(student)  # lazy layers have some themselves
    with (
        pytest.raises(RuntimeError, match="run it once"),
        CrossModalTraining(Teacher(), student, objectives=[FeatureL2(1.0)]),
    ):
        pass
    assert hooks(student) == own
    student(points)
    with CrossModalTraining(Teacher(), student, objectives=[FeatureL2(1.0)]) as cmt:
        student(points)
        cmt.loss(views=batch(11)[2])


class Rewriting(Student):
    """Its classifier puts another tensor in a buffer's place, and resizes a second."""

    def __init__(self) -> None:
        super().__init__()

        class Head(nn.Linear):
            def __init__(self) -> None:
                super().__init__(FEATURE, CLASSES)
                self.register_buffer("latest", torch.zeros(2))
                self.register_buffer("seen", torch.zeros(1))

            def forward(self, feature):
                self.latest = feature.detach()[:1, :2].clone()
                self.seen.resize_(len(feature))
                self.seen.fill_(float(feature.detach().sum()))
                return super().forward(feature)

        self.head = Head()


def test_buffers_that_are_replaced_or_resized_are_put_back():
    """Case 23: in the classifier, as the loss runs it."""
    teacher, student = build()
    student = Rewriting()
    points, labels, views = batch(12)
    with CrossModalTraining(teacher, student, objectives=[_Classifies(1.0)]) as cmt:
        for _ in range(3):
            F.cross_entropy(student(points), labels)
            latest, seen = student.head.latest.clone(), student.head.seen.clone()
            cmt.loss(views=views)
            assert torch.equal(student.head.latest, latest) and torch.equal(student.head.seen, seen)


class _Classifies(FeatureL2):
    def forward(self, student, teacher):
        return student.classify(teacher.feature[:3]).sum()


def test_a_connector_stays_equal_on_both_of_two_processes_in_a_loop_of_ones_own(tmp_path):
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            str(Path(__file__).with_name("equal_worker.py")), str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert any(name.startswith("srrl.connector") for name in one["state"])
    for name, value in one["state"].items():
        if "running" not in name:  # of the last step's half, as under DDP: the next step makes them equal
            assert torch.equal(value, two["state"][name]), name
    # and the first step's gradient is the mean of what each process had by itself
    for name, gradient in one["averaged"].items():
        torch.testing.assert_close(gradient, (one["own"][name] + two["own"][name]) / 2)


def test_a_run_that_diverged_is_not_blamed_on_the_adapter():
    teacher, student = build()
    points, _, views = batch(13)
    with (
        pytest.warns(RuntimeWarning, match="class scores are NaN"),
        CrossModalTraining(teacher, student, objectives=[FeatureL2(1.0)]) as cmt,
    ):
        for _ in range(3):
            student(points)
            cmt.loss(views=views)
        with torch.no_grad():
            student.neck.weight.fill_(float("nan"))
