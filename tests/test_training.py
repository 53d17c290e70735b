"""PointCMT in real loops: the right losses, and no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointcmt.adapters import AdapterError
from pointcmt.methods import PointCMT
from pointcmt.objectives import (
    ClassifierEnhancement,
    FeatureEnhancement,
    FeatureL2,
    NeuronSelectivityTransfer,
    Objective,
    SoftLabels,
    SoftmaxRegression,
)
from pointcmt.training import CrossModalTraining
from pointcmt.types import StudentState, TeacherOutput
from tests.toys import (
    BATCH,
    CLASSES,
    FEATURE,
    BentEnd,
    DeepHead,
    DefinedFirst,
    Dictionary,
    Generator,
    LogProbabilities,
    Student,
    Teacher,
    batch,
    deep_head_adapter,
    hooks,
)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(100)
    teacher = Teacher()
    teacher(torch.rand(32, 2, 3, 4, 4))  # running statistics that are not the defaults
    return teacher


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(101)
    return Generator()


def make(kind=Student, seed: int = 102, **options) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**options)


def scores(output) -> torch.Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def fingerprint(module: nn.Module) -> dict:
    """Everything about a network that a context could leave something in."""
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "hooks": hooks(module),
        "attributes": {path: sorted(child.__dict__) for path, child in module.named_modules()},
        "modes": {path: child.training for path, child in module.named_modules()},
        "grads": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "class": {path: type(child) for path, child in module.named_modules()},
    }


def assert_same(before: dict, after: dict) -> None:
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for key in ("hooks", "attributes", "modes", "grads", "class"):
        assert before[key] == after[key], key


# ---- the loss itself


def test_the_loss_is_the_papers_and_reaches_what_it_should(teacher, generator):
    student, (points, _, views) = make(), batch(1)
    with PointCMT(teacher, student, generator=generator) as cmt:
        logits = student(points)
        feature = cmt.feature
        loss = cmt.loss(views=views)
        assert loss.ndim == 0
        named = cmt.losses
    twin = copy.deepcopy(student)
    again = twin.feature(points)
    torch.testing.assert_close(feature, again)
    teacher.eval()
    image = teacher.encode(views).detach()
    enhancement = FeatureEnhancement(generator=generator)
    fe = enhancement(_state(again, twin), TeacherOutput(image, image))
    ce = F.kl_div(F.log_softmax(twin.head(image), 1), F.softmax(twin.head(again), 1), reduction="sum")
    assert named == {
        "feature_enhancement": pytest.approx(fe.item(), rel=1e-5),
        "classifier_enhancement": pytest.approx(ce.item(), rel=1e-5),
    }
    torch.testing.assert_close(loss, 30 * fe + 0.3 * ce)
    torch.testing.assert_close(logits, twin.head(again))
    loss.backward()
    (30 * fe + 0.3 * ce).backward()
    expected = gradients(twin)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert all(p.grad is None for p in [*teacher.parameters(), *generator.parameters()])


def _state(feature, student):
    return StudentState(feature, student.head(feature), student.head)


@pytest.mark.parametrize("kind", [Student, LogProbabilities, Dictionary, DefinedFirst])
def test_every_form_of_output_gives_the_same_losses(kind, teacher, generator):
    plain, other = make(Student), make(kind)
    # one set of weights, whatever the order of definition
    other.load_state_dict({**other.state_dict(), **plain.state_dict()})
    points, labels, views = batch(2)
    results = []
    for student in (plain, other):
        with PointCMT(teacher, student, generator=generator) as cmt:
            F.cross_entropy(scores(student(points)), labels).add(cmt.loss(views=views)).backward()
            results.append((cmt.losses, gradients(student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], msg=name)


def test_views_cached_features_and_teacher_outputs_are_one(teacher, generator):
    student, (points, _, views) = make(), batch(3)
    teacher.eval()
    output = teacher(views)
    teacher.train()
    values = []
    with PointCMT(teacher, student, generator=generator, objectives=every_objective()) as cmt:
        for given in (
            {"views": views},
            {"image_features": output.feature.detach()},
            {"image_features": TeacherOutput(output.feature.detach(), output.logits.detach())},
        ):
            student(points)
            values.append(cmt.loss(**given).item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)


def every_objective() -> list[Objective]:
    return [
        FeatureEnhancement(),
        ClassifierEnhancement(),
        SoftLabels(),
        NeuronSelectivityTransfer(),
        SoftmaxRegression(),
        FeatureL2(),
        FeatureEnhancement(distance="chamfer", name="fe_chamfer"),
    ]


def test_any_objectives_replace_the_papers(teacher, generator):
    student, (points, _, views) = make(), batch(4)
    with PointCMT(teacher, student, generator=generator, objectives=every_objective()) as cmt:
        student(points)
        total = cmt.loss(views=views)
        named = cmt.losses
        total.backward()
        expected = sum(objective.weight * named[objective.name] for objective in cmt.objectives)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weights_may_change_between_steps_and_zero_skips(teacher, generator):
    student, (points, _, views) = make(), batch(5)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points)
        first = cmt.loss(views=views).item()
        assert set(cmt.losses) == {"feature_enhancement", "classifier_enhancement"}
        cmt.objectives[0].weight *= 2
        cmt.objectives[1].weight = 0
        student(points)
        second = cmt.loss(views=views).item()
        named = cmt.losses
        cmt.objectives[0].weight = 0
        student(points)
        nothing = cmt.loss(views=views)
    assert set(named) == {"feature_enhancement"}
    assert second == pytest.approx(60 * named["feature_enhancement"], rel=1e-5)
    assert first != second
    assert nothing.item() == 0


def test_an_objective_of_ones_own_is_one_class(teacher):
    class Cosine(Objective):
        default_name = "cosine"

        def forward(self, student, teacher):
            return 1 - F.cosine_similarity(student.feature, teacher.feature).mean()

    student, (points, _, views) = make(), batch(6)
    with CrossModalTraining(teacher, student, objectives=[Cosine(weight=2.0)]) as cmt:
        student(points)
        loss = cmt.loss(views=views)
        assert loss.item() == pytest.approx(2 * cmt.losses["cosine"])
        assert torch.equal(cmt.loss_tensors["cosine"] * 2, loss.detach())


def test_trainable_parts_of_objectives_are_handed_out(teacher):
    objective = SoftmaxRegression(student_dim=FEATURE, teacher_dim=FEATURE)
    student, (points, _, views) = make(), batch(7)
    with CrossModalTraining(teacher, student, objectives=[objective]) as cmt:
        assert {id(p) for p in cmt.parameters()} == {id(p) for p in objective.connector.parameters()}
        student(points)
        cmt.loss(views=views).backward()
    assert all(p.grad is not None for p in objective.parameters())


# ---- the image feature in the student's classifier


def test_image_features_use_batch_statistics_and_leave_none(teacher, generator):
    student, (points, _, views) = make(DeepHead, dropout=0.0), batch(8)
    teacher.eval()
    image = teacher.encode(views).detach() * 7 + 3  # far from the student's own features
    twin = copy.deepcopy(student)
    with PointCMT(teacher, student, generator=generator, adapter=deep_head_adapter()) as cmt:
        for _ in range(3):
            student(points)
            twin(points)
            cmt.loss(image_features=image).backward()
            # in training mode, by the statistics of the image features alone
            hidden = F.linear(image, student.head[1].weight, student.head[1].bias)
            expected = F.leaky_relu(F.batch_norm(hidden, None, None, training=True), 0.2)
            torch.testing.assert_close(
                cmt.classify(image),
                F.linear(expected, student.head[5].weight, student.head[5].bias),
                rtol=1e-4,
                atol=1e-5,
            )
    for (name, ours), theirs in zip(student.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert student.head[2].num_batches_tracked == 3


def test_a_frozen_norm_stays_frozen(teacher, generator):
    student, (points, _, views) = make(DeepHead, dropout=0.0), batch(9)
    student.head[2].eval()
    nn.init.constant_(student.head[2].running_mean, 0.5)
    with PointCMT(teacher, student, generator=generator, adapter=deep_head_adapter()) as cmt:
        student(points)
        cmt.loss(views=views)
        image = torch.randn(BATCH, FEATURE)
        hidden = student.head[2](student.head[1](image))  # eval: running statistics
        torch.testing.assert_close(cmt.classify(image), student.head[5](F.leaky_relu(hidden, 0.2)))
    assert not student.head[2].training
    assert student.head[2].track_running_stats


def test_other_modules_that_keep_statistics_are_put_back_too(teacher, generator):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(FEATURE))

        def forward(self, x):
            self.seen += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x

    student, (points, _, views) = make(DeepHead, dropout=0.0), batch(10)
    student.head.insert(0, Counting())
    twin = copy.deepcopy(student)
    with PointCMT(teacher, student, generator=generator, adapter=deep_head_adapter()) as cmt:
        for _ in range(3):
            student(points)
            twin(points)
            cmt.loss(views=views)
    assert student.head[0].seen == 3
    for (name, ours), theirs in zip(student.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_batch_of_one(teacher, generator):
    student, (points, _, views) = make(Student, norm=False), batch(11, size=1)
    with PointCMT(teacher, student, generator=generator, objectives=every_objective()) as cmt:
        student(points)
        loss = cmt.loss(views=views)
    assert torch.isfinite(loss)


def test_dropout_is_active_on_the_image_feature(teacher, generator):
    student, (points, _, _) = make(DeepHead), batch(12)
    with PointCMT(teacher, student, generator=generator, adapter=deep_head_adapter()) as cmt:
        student(points)
        image = torch.ones(BATCH, FEATURE)
        assert not torch.equal(cmt.classify(image), cmt.classify(image))
        assert torch.equal(image, torch.ones(BATCH, FEATURE))  # the dropout works in place


# ---- real loops


def test_gradient_accumulation_is_the_sum(teacher, generator):
    student, twin = make(norm=False), make(norm=False)
    parts = [batch(seed) for seed in (13, 14)]
    with PointCMT(teacher, student, generator=generator) as cmt:
        for points, labels, views in parts:
            (F.cross_entropy(student(points), labels) + cmt.loss(views=views)).backward()
    total = {}
    for points, labels, views in parts:
        with PointCMT(teacher, twin, generator=generator) as cmt:
            (F.cross_entropy(twin(points), labels) + cmt.loss(views=views)).backward()
        for name, gradient in gradients(twin).items():
            total[name] = total.get(name, 0) + gradient
        twin.zero_grad()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, total[name], msg=name)


def test_validation_inside_the_context_is_not_seen(teacher, generator):
    student, (points, _, views) = make(), batch(15)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points)
        feature = cmt.feature
        student.eval()
        student(points[:2])  # gradients on, but eval mode
        with torch.no_grad():
            student(points[:2])
        student.train()
        with torch.no_grad():
            student(points[:2])
        with torch.inference_mode():
            student(points[:2])
        assert cmt.feature is feature
        cmt.loss(views=views).backward()
        student.eval()
        with torch.no_grad():
            student(points)
        with pytest.raises(RuntimeError, match="already called"):
            cmt.loss(views=views)


def test_only_validation_so_far_is_explained(teacher, generator):
    student, (points, _, views) = make(), batch(16)
    student.eval()
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points)
        with pytest.raises(RuntimeError, match=r"student\.train\(\)"):
            cmt.loss(views=views)


def test_the_loss_is_for_the_latest_pass(teacher, generator):
    student, (points, _, views) = make(), batch(17)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points + 1)
        student(points)
        feature = cmt.feature
        cmt.loss(views=views)
    torch.testing.assert_close(feature, student.feature(points))


def test_the_graph_is_not_kept(teacher, generator):
    student, (points, _, views) = make(), batch(18)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points)
        kept = weakref.ref(cmt.feature)
        loss = cmt.loss(views=views)
        loss.backward()
        del loss
        gc.collect()
        assert kept() is None
        assert not cmt.feature.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype, teacher, generator):
    student, twin = make(DeepHead, dropout=0.0), make(DeepHead, dropout=0.0)
    points, labels, views = batch(19)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    with PointCMT(teacher, student, generator=generator, adapter=deep_head_adapter()) as cmt:
        with torch.autocast("cpu", dtype=dtype):
            logits = student(points)
            assert cmt.feature.dtype in (dtype, torch.float32)
            loss = F.cross_entropy(logits.float(), labels) + cmt.loss(views=views)
        assert loss.dtype == torch.float32
        half = cmt.losses
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    # the same by hand, without the proof or any hook: a cast of a weight that was made without gradients
    # must not have been reused
    teacher.eval()
    with torch.autocast("cpu", dtype=dtype):
        feature, image = twin.feature(points), teacher.encode(views).detach()
        logits = twin.head(feature.clone())
        with torch.no_grad():
            mean = twin.head[2].running_mean.clone()
        answer = twin.head(image.clone())
        assert not torch.equal(mean, twin.head[2].running_mean)
        fe = FeatureEnhancement(generator=generator)(
            StudentState(feature, logits, twin.head), TeacherOutput(image, image)
        )
        ce = F.kl_div(F.log_softmax(answer.float(), 1), F.softmax(logits.float(), 1), reduction="sum")
        expected = F.cross_entropy(logits.float(), labels) + 30 * fe + 0.3 * ce
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert half == pytest.approx(
        {"feature_enhancement": fe.item(), "classifier_enhancement": ce.item()}, rel=1e-4
    )
    ours, theirs = gradients(student), gradients(twin)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3, msg=name)


def test_the_loss_outside_of_autocast(teacher, generator):
    student, (points, _, views) = make(), batch(20)
    with PointCMT(teacher, student, generator=generator, objectives=every_objective()) as cmt:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student(points)
        cmt.loss(views=views).backward()


def test_a_student_in_half_precision(teacher, generator):
    student, (points, _, views) = make().bfloat16(), batch(21)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points.bfloat16())
        loss = cmt.loss(views=views)
        loss.backward()
    assert loss.dtype == torch.float32


# ---- leaves no trace


@pytest.mark.parametrize("kind", [Student, DeepHead, LogProbabilities, Dictionary])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_remains(kind, fails, teacher, generator):
    # without dropout, so that the untouched twin draws the same
    student = make(kind, dropout=0.0) if kind is DeepHead else make(kind)
    untouched = copy.deepcopy(student)
    adapter = deep_head_adapter() if kind is DeepHead else None
    points, _, views = batch(22)
    before = fingerprint(student)
    owned = fingerprint(teacher), fingerprint(generator)
    try:
        with PointCMT(teacher, student, generator=generator, adapter=adapter) as cmt:
            for step in range(3):
                scores(student(points)).sum().backward(retain_graph=False)
                student(points)
                cmt.loss(views=views).backward()
                if fails and step == 1:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert hooks(student) == 0
    after = fingerprint(student)
    # the passes that the loop itself made are the only thing that happened to the buffers
    for _ in range(4 if fails else 6):
        untouched(points)
    before["state"] = {**before["state"], **{n: b.clone() for n, b in untouched.named_buffers()}}
    assert_same(before, after)
    assert_same(owned[0], fingerprint(teacher))
    assert_same(owned[1], fingerprint(generator))
    student.eval()
    untouched.eval()
    assert torch.equal(scores(student(points)), scores(untouched(points)))
    copied = pickle.loads(pickle.dumps(student))
    assert torch.equal(scores(copied(points)), scores(untouched(points)))


def test_entering_and_leaving_alone_changes_nothing(teacher, generator):
    student = make(DeepHead)
    before = fingerprint(student)
    for _ in range(2):
        with PointCMT(teacher, student, generator=generator):
            assert hooks(student) > 0
        assert_same(before, fingerprint(student))


def test_the_students_own_hooks_survive(teacher, generator):
    student, (points, _, views) = make(), batch(23)
    calls = []
    early = student.head.register_forward_hook(lambda *_: calls.append("early"))
    with PointCMT(teacher, student, generator=generator) as cmt:
        late = student.head.register_forward_hook(lambda *_: calls.append("late"))
        student(points)
        cmt.loss(views=views)
        early.remove()
    assert hooks(student) == 1
    calls.clear()
    student(points)
    assert calls == ["late"]
    late.remove()
    assert hooks(student) == 0


def test_copies_and_pickles_made_inside_carry_no_hook(teacher, generator):
    student, (points, _, views) = make(), batch(24)
    kept = student.norm.register_forward_hook(forward_hook)
    with PointCMT(teacher, student, generator=generator) as cmt:
        copies = [
            copy.deepcopy(student),
            copy.copy(student),
            pickle.loads(pickle.dumps(student)),
            torch.optim.swa_utils.AveragedModel(student).module,
            copy.deepcopy(student.head),
            copy.deepcopy(nn.DataParallel(student)).module,
        ]
        student(points)
        feature = cmt.feature
        for twin in copies[:4]:
            assert type(twin) is Student
            twin(points + 1)
        assert cmt.feature is feature
        for number, twin in enumerate(copies):
            # copy.copy shares its children, the tapped head included
            expected = 0 if number == 4 else 1
            if number != 1:
                assert hooks(twin) == expected, number  # the user's own is kept
            assert "__getstate__" not in twin.__dict__
        cmt.loss(views=views)
    kept.remove()
    assert "__getstate__" not in student.__dict__


def forward_hook(module, args, output):
    return None


def test_re_entering(teacher, generator):
    student, (points, _, views) = make(), batch(25)
    training = PointCMT(teacher, student, generator=generator)
    for _ in range(2):
        with training as cmt:
            with pytest.raises(RuntimeError, match="before a training pass"):
                cmt.loss(views=views)
            student(points)
            cmt.loss(views=views)
    with training, pytest.raises(RuntimeError, match="entered already"):
        training.__enter__()
    assert hooks(student) == 0


def test_two_contexts_one_after_the_other(teacher, generator):
    student, (points, _, views) = make(), batch(26)
    values = []
    for objectives in ([FeatureL2()], None, [FeatureL2()]):
        with PointCMT(teacher, student, generator=generator, objectives=objectives) as cmt:
            student(points)
            values.append(cmt.loss(views=views).item())
    assert values[0] == pytest.approx(values[2])
    assert values[0] != values[1]


def test_a_student_cannot_be_in_two_contexts_at_once(teacher, generator):
    student, (points, _, views) = make(), batch(27)
    with PointCMT(teacher, student, generator=generator) as cmt:
        inner = PointCMT(teacher, nn.DataParallel(student), generator=generator)
        with pytest.raises(RuntimeError, match="several objectives"):
            inner.__enter__()
        student(points)
        cmt.loss(views=views)  # the outer one goes on
    assert hooks(student) == 0
    other = make(seed=1)
    with PointCMT(teacher, student, generator=generator), PointCMT(teacher, other, generator=generator):
        pass  # two students may share a teacher
    assert teacher.training


def test_the_teacher_is_in_eval_mode_even_if_the_loop_turns_it(teacher, generator):
    student, (points, _, views) = make(), batch(28)
    teacher.train()
    teacher.norm.eval()
    before = fingerprint(teacher)
    with PointCMT(teacher, student, generator=generator) as cmt:
        assert not teacher.training
        values = []
        for _ in range(2):
            teacher.train()
            student(points)
            values.append(cmt.loss(views=views).item())
    assert teacher.training
    assert not teacher.norm.training
    assert_same(before, fingerprint(teacher))
    assert values[0] == pytest.approx(values[1])  # no dropout in it


# ---- misuse


def test_loss_outside_of_the_context(teacher, generator):
    student, (points, _, views) = make(), batch(29)
    training = PointCMT(teacher, student, generator=generator)
    for use in (
        lambda: training.loss(views=views),
        lambda: training.feature,
        lambda: training.classify(points),
        lambda: training.adapter,
    ):
        with pytest.raises(RuntimeError, match="with PointCMT"):
            use()
    with training:
        student(points)
    with pytest.raises(RuntimeError, match="outside the context"):
        training.loss(views=views)


def test_loss_before_a_pass_and_twice_for_one(teacher, generator):
    student, (points, _, views) = make(), batch(30)
    with PointCMT(teacher, student, generator=generator) as cmt:
        with pytest.raises(RuntimeError, match="before a training pass of Student"):
            cmt.loss(views=views)
        with pytest.raises(RuntimeError, match="before a training pass"):
            _ = cmt.feature
        student(points)
        cmt.loss(views=views)
        with pytest.raises(RuntimeError, match="already called for this forward pass"):
            cmt.loss(views=views)
        student(points)
        cmt.loss(views=views)


def test_forward_called_directly_is_explained(teacher, generator):
    student, (points, _, views) = make(), batch(31)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student.forward(points)
        with pytest.raises(RuntimeError, match=r"not student\.forward"):
            cmt.loss(views=views)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda views: {}, "neither of views and image_features"),
        (lambda views: {"views": views, "image_features": torch.zeros(BATCH, FEATURE)}, "both of views"),
        (lambda views: {"views": views[:2]}, r"views holds 2 shapes, .* had 6"),
        (lambda views: {"views": views[:, 0]}, r"expected \[B, V, C, H, W\]"),
        (lambda views: {"image_features": torch.zeros(4, FEATURE)}, "image_features holds 4 shapes"),
        (
            lambda views: {"image_features": torch.zeros(BATCH, 9)},
            r"expected \[B, 16\], features of this teacher",
        ),
        (lambda views: {"image_features": torch.zeros(FEATURE)}, r"expected \[B, 16\]"),
    ],
)
def test_wrong_arguments_are_explained_and_the_pass_is_not_lost(arguments, message, teacher, generator):
    student, (points, _, views) = make(), batch(32)
    with PointCMT(teacher, student, generator=generator) as cmt:
        student(points)
        with pytest.raises(ValueError, match=message):
            cmt.loss(**arguments(views))
        cmt.loss(views=views)


def test_a_student_of_another_feature_size_is_explained(teacher, generator):
    student, (points, _, views) = make(Student, feature_dim=24), batch(33)
    for objectives in (None, [ClassifierEnhancement()], [FeatureL2()]):
        with (
            pytest.raises(
                ValueError, match=r"student's feature has size 24, the teacher's 16.*--feature-dim 24"
            ),
            PointCMT(teacher, student, generator=generator, objectives=objectives) as cmt,
        ):
            student(points)
            cmt.loss(views=views)
    assert hooks(student) == 0
    with PointCMT(teacher, student, objectives=[SoftLabels()]) as cmt:  # needs no equal sizes
        student(points)
        cmt.loss(views=views)


def test_a_generator_of_another_feature_size_is_explained(teacher):
    student, (points, _, views) = make(), batch(34)
    with PointCMT(teacher, student, generator=Generator(9)) as cmt:
        student(points)
        with pytest.raises(ValueError, match="generator takes features of size 9"):
            cmt.loss(views=views)


def test_what_is_missing_or_doubled_is_explained(teacher, generator, tmp_path):
    student = make()
    with pytest.raises(ValueError, match="pointcmt train-generator"), PointCMT(teacher, student):
        pass
    assert hooks(student) == 0 and teacher.training
    with pytest.raises(ValueError, match="objectives is empty"):
        PointCMT(teacher, student, objectives=[])
    with pytest.raises(ValueError, match="equal names"):
        PointCMT(teacher, student, objectives=[FeatureL2(), FeatureL2()])
    with pytest.raises(ValueError, match="holds a Linear"):
        PointCMT(teacher, student, objectives=[nn.Linear(1, 1)])
    PointCMT(teacher, student, objectives=[SoftLabels()])  # no generator needed


# ---- the adapter is proved


def test_the_adapter_is_proved_on_the_first_training_pass(teacher, generator):
    student, (points, _, _) = make(), batch(35)
    with PointCMT(teacher, student, generator=generator) as cmt:
        assert cmt.report is None
        student.eval()
        student(points)
        student.train()
        assert cmt.report is None
        student(points)
        assert cmt.report.feature_shape == (BATCH, FEATURE)
        assert cmt.report.logits_shape == (BATCH, CLASSES)
        assert cmt.adapter is cmt.report.adapter


def test_a_wrong_adapter_stops_training_and_leaves_no_hook(teacher, generator):
    from dataclasses import replace

    student, (points, _, views) = make(DeepHead), batch(36)
    wrong = replace(deep_head_adapter(), classify=lambda module, feature: module.head[1:](feature) + 1)
    with (
        pytest.raises(AdapterError, match="differs from"),
        PointCMT(teacher, student, generator=generator, adapter=wrong) as cmt,
    ):
        student(points)
        cmt.loss(views=views)
    assert hooks(student) == 0
    assert student.training
    with pytest.raises(AdapterError, match="no such submodule"):
        PointCMT(
            teacher, student, generator=generator, adapter=replace(wrong, feature_module="x")
        ).__enter__()
    assert hooks(student) == 0
    assert teacher.training


def test_a_student_without_a_linear_end_stops_training_with_instructions(teacher, generator):
    student, (points, _, _) = make(BentEnd), batch(37)
    with PointCMT(teacher, student, generator=generator), pytest.raises(AdapterError, match="Write one"):
        student(points)
    assert hooks(student) == 0


def test_the_proof_draws_no_random_numbers_and_changes_nothing_in_the_first_step(teacher, generator):
    points, _, _ = batch(38)
    results = []
    for proved in (False, True):
        student = make(DeepHead)
        torch.manual_seed(7)
        if proved:
            with PointCMT(teacher, student, generator=generator):
                output = student(points)
        else:
            output = student(points)
        results.append((output, student.state_dict(), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True))


def test_points_that_the_student_changes_in_place_reach_it_unchanged(teacher, generator):
    class Centring(Student):
        def forward(self, points):
            points -= points.mean(1, keepdim=True)
            points *= 2
            return super().forward(points)

    points, _, _ = batch(39)
    student, twin = make(Centring), make(Centring)
    with PointCMT(teacher, student, generator=generator):
        output = student(points.clone())
    assert torch.equal(output, twin(points.clone()))


def test_logits_module_serves_scripts_that_call_another_method(teacher, generator):
    from pointcmt.adapters import Adapter

    class Framework(Student):
        def get_logits_loss(self, points, labels):
            logits = self.forward(points)
            return logits, F.cross_entropy(logits, labels)

    adapter = Adapter(
        name="framework",
        matches=lambda module: type(module).__name__ == "Framework",
        feature_module="head",
        feature_from="input",
        classify=lambda module, feature: module.head(feature),
        logits_module="head",
    )
    student, twin, (points, labels, views) = make(Framework), make(Framework), batch(40)
    with PointCMT(teacher, student, generator=generator, adapter=adapter) as cmt:
        _, loss = student.get_logits_loss(points, labels)
        (loss + cmt.loss(views=views)).backward()
        assert cmt.report is not None
    with PointCMT(teacher, twin, generator=generator) as cmt:
        (F.cross_entropy(twin(points), labels) + cmt.loss(views=views)).backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(student)[name], gradient, msg=name)


@pytest.mark.cuda
def test_the_teacher_follows_the_student_to_its_device_and_comes_home(cuda, teacher, generator):
    student, (points, _, views) = make(DeepHead).to(cuda), batch(41)
    before = fingerprint(teacher)
    with PointCMT(teacher, student, generator=generator, objectives=every_objective()) as cmt:
        student(points.to(cuda))
        cmt.loss(views=views).backward()  # the views come from a loader on the CPU
        student(points.to(cuda))
        cmt.loss(image_features=torch.randn(BATCH, FEATURE)).backward()
    assert next(teacher.parameters()).device.type == "cpu"
    assert_same(before, fingerprint(teacher))
