"""Errors that a GPU finds and the host hears of later: nothing waits, is lost, or is said twice."""

from __future__ import annotations

import warnings

import pytest
import torch

from pointcmt.methods import PointCMT
from pointcmt.objectives import FeatureEnhancement
from pointcmt.ops import _deferred, check_deferred, emd
from pointcmt.ops import emd as emd_face
from pointcmt.ops._deferred import DeferredErrors
from pointcmt.types import StudentState, TeacherOutput
from tests.toys import Generator, Student, Teacher, batch, hooks


class Line:
    """Stands for the copy engine: what was sent arrives when the test says so, or when somebody waits."""

    def __init__(self) -> None:
        self.sent: list[Parcel] = []

    def send(self, count):
        parcel = Parcel(count)
        self.sent.append(parcel)
        return parcel.host, parcel


class Parcel:
    def __init__(self, count) -> None:
        self.count, self.host, self.there, self.waited = count, torch.full((), -1), False, 0

    def arrive(self) -> None:
        self.host.copy_(self.count)
        self.there = True

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.waited += 1
        self.arrive()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def errors(line) -> DeferredErrors:
    return DeferredErrors(line.send)


def test_what_has_not_arrived_is_not_waited_for_and_not_lost(errors, line):
    errors.watch(torch.tensor(2), "{count} pairs")
    errors.look()
    assert line.sent[0].waited == 0
    line.sent[0].arrive()
    with pytest.raises(ValueError, match=r"^2 pairs$"):
        errors.look()
    errors.look()  # said once


def test_what_is_well_says_nothing(errors, line):
    errors.watch(torch.tensor(0), "never")
    errors.look(wait=True)
    assert line.sent[0].waited == 1
    errors.look(wait=True)
    assert line.sent[0].waited == 1


def test_waiting_hears_of_everything(errors, line):
    for count in (0, 0, 3):
        errors.watch(torch.tensor(count), "{count} pairs")
    with pytest.raises(ValueError, match="3 pairs"):
        errors.look(wait=True)


def test_what_arrives_out_of_order_is_heard_of(errors, line):
    """Two streams, or two GPUs."""
    for count in (0, 5):
        errors.watch(torch.tensor(count), "{count} pairs")
    line.sent[1].arrive()
    with pytest.raises(ValueError, match="5 pairs"):
        errors.look()


def test_the_first_error_is_the_only_one(errors, line):
    """A step of NaN makes every later step NaN."""
    for count in (1, 2, 3):
        errors.watch(torch.tensor(count), "{count} pairs")
    with pytest.raises(ValueError, match="1 pairs"):
        errors.look(wait=True)
    errors.look(wait=True)


def test_what_is_tolerated_is_a_warning_and_what_follows_an_error_again(errors, line):
    with errors.tolerated(True):
        errors.watch(torch.tensor(4), "{count} pairs")
    errors.watch(torch.tensor(0), "none")
    with errors.tolerated(False):
        errors.watch(torch.tensor(6), "{count} pairs")
    with pytest.warns(RuntimeWarning, match="4 pairs"), pytest.raises(ValueError, match="6 pairs"):
        errors.look(wait=True)


def test_forgetting(errors, line):
    errors.watch(torch.tensor(1), "{count}")
    errors.forget()
    errors.look(wait=True)


# ---- as emd and PointCMT use it, with a GPU acted by the CPU


@pytest.fixture
def acted(monkeypatch, line):
    """emd as on a GPU: NaN coordinates give a NaN distance, and the finding goes over ``line``."""
    watched = DeferredErrors(line.send)
    real = emd_face.__globals__["_emd"]

    def on_gpu(x, y, *options):
        bad = ~(x.isfinite().flatten(1).all(1) & y.isfinite().flatten(1).all(1))
        clean = [torch.where(bad[:, None, None], torch.zeros_like(cloud), cloud) for cloud in (x, y)]
        distance, *rest = real(*clean, *options)
        return torch.where(bad, torch.nan, distance), *rest

    monkeypatch.setitem(emd_face.__globals__, "_emd", on_gpu)
    monkeypatch.setitem(emd_face.__globals__, "deferred", watched)
    monkeypatch.setitem(emd_face.__globals__, "can_watch", lambda tensor: True)
    monkeypatch.setattr("pointcmt.objectives.feature_enhancement.deferred", watched)
    monkeypatch.setattr("pointcmt.training.deferred", watched)
    monkeypatch.setattr(_deferred, "deferred", watched)
    return line


def broken(batch_size: int = 3):
    x = torch.rand(batch_size, 8, 3, generator=torch.Generator().manual_seed(0))
    bad = x.clone()
    bad[1, 2, 0] = torch.nan
    return x, bad


def test_a_later_call_of_emd_says_what_an_earlier_one_found(acted):
    x, bad = broken()
    assert emd(bad, x)[0].isnan().tolist() == [False, True, False]
    emd(x, x)  # the first is still under way
    acted.sent[0].arrive()
    with pytest.raises(ValueError, match=r"earlier call .* in 1 pairs.*learning rate"):
        emd(x, x)
    assert all(parcel.waited == 0 for parcel in acted.sent)
    emd(x, bad)
    with pytest.raises(ValueError, match="in 1 pairs"):
        check_deferred()


def half(state: StudentState, dtype: torch.dtype) -> StudentState:
    return state._replace(feature=state.feature.to(dtype), logits=state.logits.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_overflow_of_float16_is_left_to_the_grad_scaler(dtype, acted):
    generator = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Unflatten(1, (8, 3)))
    objective = FeatureEnhancement(generator=generator)
    feature = torch.rand(4, 6)
    feature[2, 1] = torch.inf
    state = half(StudentState(feature, torch.rand(4, 5), torch.nn.Linear(6, 5)), dtype)
    assert objective(state, TeacherOutput(torch.rand(4, 6), torch.rand(4, 5))).isnan()
    if dtype == torch.float16:
        with pytest.warns(RuntimeWarning, match="in 1 pairs"):
            check_deferred()
    else:
        with pytest.raises(ValueError, match="in 1 pairs"):
            check_deferred()


def test_the_objective_is_still_one_graph():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 5)
    objective = FeatureEnhancement(
        generator=torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Unflatten(1, (8, 3)))
    )

    def loss(ours, theirs):
        taught = TeacherOutput(theirs, head(theirs))
        return objective(half(StudentState(ours, head(ours), head), torch.float16), taught)

    features = torch.rand(2, 4, 6)
    try:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*features), loss(*features))
    finally:
        torch.compiler.reset()


def train(*inputs, after=None):
    torch.manual_seed(1)
    student = Student()
    try:
        with PointCMT(Teacher(), student, generator=Generator()) as cmt:
            for points, views in inputs:
                student(points)
                cmt.loss(views=views).backward()
            if after is not None:
                raise after
    finally:
        assert hooks(student) == 0


def test_leaving_the_context_says_it_and_leaves_no_hook(acted):
    points, _, views = batch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train((points, views))
    bad = points.clone()
    bad[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        train((points, views), (bad, views))


def test_an_error_of_the_loop_is_not_hidden(acted):
    points, _, views = batch(2)
    bad = points.clone()
    bad[0] = torch.nan
    with pytest.raises(KeyError, match="theirs"):
        train((points, views), (bad, views), after=KeyError("theirs"))
    check_deferred()


# ---- on a GPU


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits_and_the_error_comes(cuda):
    x, bad = (cloud.to(cuda) for cloud in broken())
    check_deferred()
    torch.cuda.set_sync_debug_mode("error")  # a wait inside would raise
    try:
        emd(x, x)
        distance, _ = emd(bad, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert distance.isnan().tolist() == [False, True, False]
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="in 1 pairs"):
        emd(x, x)
    emd(bad, x)
    with pytest.raises(ValueError, match="in 1 pairs"):
        check_deferred()
    emd(x, x)
    check_deferred()


@pytest.mark.cuda
def test_on_a_gpu_a_captured_graph_is_not_watched(cuda):
    x, bad = (cloud.to(cuda) for cloud in broken())
    emd(x, x)  # warm-up
    check_deferred()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        distance, _ = emd(bad, x)
    graph.replay()
    assert distance.isnan().tolist() == [False, True, False]
    check_deferred()
