"""Each objective against a formula written out independently, in float64 on fresh random tensors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import nn

from pointcmt.objectives import (
    ClassifierEnhancement,
    DecoupledSoftLabels,
    FeatureEnhancement,
    FeatureL2,
    ImageLabels,
    NeuronSelectivityTransfer,
    Objective,
    ProjectedL2,
    RelationalDistillation,
    ScaledClassifierEnhancement,
    Sizes,
    SoftLabels,
    SoftmaxRegression,
    StandardisedSoftLabels,
)
from pointcmt.objectives.cloud_distances import DISTANCES, chamfer, sinkhorn, sliced_wasserstein
from pointcmt.ops.emd import DEFAULT_TOLERANCE
from pointcmt.types import StudentState, TeacherOutput
from tests.toys import CLASSES, FEATURE, Generator


def states(seed: int, batch: int = 4, dtype: torch.dtype = torch.float64):
    """A student state with gradients, a teacher output, and the student's classifier."""
    torch.manual_seed(seed)
    classifier = nn.Linear(FEATURE, CLASSES).to(dtype)
    feature = torch.randn(batch, FEATURE, dtype=dtype).requires_grad_()
    student = StudentState(feature, classifier(feature), classifier)
    teacher = TeacherOutput(
        torch.randn(batch, FEATURE, dtype=dtype), torch.randn(batch, CLASSES, dtype=dtype)
    )
    return student, teacher, classifier


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def unit(cloud: np.ndarray) -> np.ndarray:
    low, high = cloud.min(0), cloud.max(0)
    return (cloud - (low + high) / 2) / (high - low).max()


def test_default_weights_are_the_papers():
    weights = {
        FeatureEnhancement: 30.0,
        ClassifierEnhancement: 0.3,
        SoftLabels: 1.0,
        NeuronSelectivityTransfer: 50.0,
        SoftmaxRegression: 1.0,
        FeatureL2: 100.0,
    }
    for kind, weight in weights.items():
        objective = kind()
        assert isinstance(objective, Objective)
        assert objective.weight == weight
        assert kind(weight=0.5).weight == 0.5
    assert len({kind().name for kind in weights}) == len(weights)
    assert FeatureL2(name="mine").name == "mine"


def test_classifier_enhancement_is_the_kl_from_the_student_to_the_image_branch_summed():
    student, teacher, classifier = states(1)
    image = classifier(teacher.feature)
    rows = zip(student.logits.tolist(), image.tolist(), strict=True)
    expected = sum(kl(softmax(ours), softmax(theirs)) for ours, theirs in rows)
    assert ClassifierEnhancement()(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_classifier_enhancement_teaches_through_both_arguments():
    student, teacher, classifier = states(2)
    feature_only, *_ = torch.autograd.grad(
        ClassifierEnhancement()(student, teacher), student.feature, retain_graph=True
    )
    assert feature_only.abs().sum() > 0
    both, *_ = torch.autograd.grad(
        ClassifierEnhancement()(student, teacher), classifier.weight, retain_graph=True
    )
    # through the student's branch alone, the image branch held fixed
    fixed = student._replace(classify=lambda feature: classifier(feature).detach())
    one, *_ = torch.autograd.grad(
        ClassifierEnhancement()(fixed, teacher), classifier.weight, retain_graph=True
    )
    detached = student._replace(logits=student.logits.detach())
    other, *_ = torch.autograd.grad(ClassifierEnhancement()(detached, teacher), classifier.weight)
    assert one.abs().sum() > 0
    assert other.abs().sum() > 0
    torch.testing.assert_close(both, one + other)


@pytest.mark.parametrize("objective", [ClassifierEnhancement(), SoftLabels()])
def test_log_probabilities_serve_as_well_as_logits(objective):
    student, teacher, classifier = states(3)
    logs = student._replace(
        logits=student.logits.log_softmax(1), classify=lambda feature: classifier(feature).log_softmax(1)
    )
    torch.testing.assert_close(objective(logs, teacher), objective(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels(temperature):
    student, teacher, _ = states(4)
    rows = list(zip(student.logits.tolist(), teacher.logits.tolist(), strict=True))
    expected = 0.0
    for ours, theirs in rows:
        p, q = softmax([v / temperature for v in theirs]), softmax([v / temperature for v in ours])
        expected += temperature**2 * kl(p, q) / len(rows)
    assert SoftLabels(temperature=temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="temperature"):
        SoftLabels(temperature=0)


def test_soft_labels_of_a_teacher_that_is_sure():
    student, teacher, _ = states(8)
    teacher = teacher._replace(logits=teacher.logits * torch.tensor([[0.1], [9.0], [0.1], [9.0]]))
    kept = torch.tensor([1, 3])
    some = SoftLabels(confidence=0.9)(student, teacher)
    assert (teacher.logits.softmax(1).amax(1) > 0.9).tolist() == [False, True, False, True]
    those = SoftLabels()(
        student._replace(logits=student.logits[kept]), teacher.map(lambda value: value[kept])
    )
    assert some.item() == pytest.approx(those.item() / 2)
    with pytest.raises(ValueError, match="confidence is 1"):
        SoftLabels(confidence=1.0)


def test_feature_l2():
    student, teacher, _ = states(5)
    pairs = zip(student.feature.flatten().tolist(), teacher.feature.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / student.feature.numel()
    assert FeatureL2()(student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(FEATURE, FEATURE), (FEATURE, 11)])
def test_nst_is_the_squared_mmd_over_pairs_of_neurons(sizes):
    student, teacher, _ = states(6)
    teacher = teacher._replace(feature=teacher.feature[:, : sizes[1]])

    def patterns(feature):
        rows = feature.detach().numpy().T
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def mean_kernel(a, b):
        return sum((x @ y) ** 2 for x, y in itertools.product(a, b)) / (len(a) * len(b))

    ours, theirs = patterns(student.feature), patterns(teacher.feature)
    expected = mean_kernel(theirs, theirs) + mean_kernel(ours, ours) - 2 * mean_kernel(ours, theirs)
    assert NeuronSelectivityTransfer()(student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("connected", [False, True])
def test_srrl_adds_the_feature_and_the_softmax_regression_loss(connected):
    student, teacher, _ = states(7)
    theirs = nn.Linear(9 if connected else FEATURE, CLASSES).double()
    objective = SoftmaxRegression(student_dim=FEATURE, teacher_dim=9) if connected else SoftmaxRegression()
    if connected:
        teacher = teacher._replace(feature=teacher.feature[:, :9])
    objective.double().bind(classify=theirs)
    ours = student.feature.detach().numpy()
    if connected:
        linear = objective.connector[0].weight.detach().numpy()
        hidden = ours @ linear.T
        hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)  # a fresh batch norm
        ours = np.maximum(hidden, 0)
    logits = ours @ theirs.weight.detach().numpy().T + theirs.bias.detach().numpy()
    expected = np.mean((ours - teacher.feature.numpy()) ** 2) + np.mean(
        (logits - teacher.logits.numpy()) ** 2
    )
    assert objective(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert len(list(objective.parameters())) == (3 if connected else 0)


def test_srrl_says_what_it_lacks():
    student, teacher, _ = states(8)
    with pytest.raises(RuntimeError, match="classifier"):
        SoftmaxRegression()(student, teacher)
    with pytest.raises(ValueError, match="both, or neither"):
        SoftmaxRegression(student_dim=3)
    objective = SoftmaxRegression()
    objective.bind(classify=nn.Identity())
    with pytest.raises(ValueError, match="teacher_dim=9"):
        objective(student, teacher._replace(feature=teacher.feature[:, :9]))


def test_feature_enhancement_is_the_optimal_matching_of_the_generated_clouds():
    student, teacher, _ = states(9)
    generator = Generator().double()
    weight = generator.linear.weight.detach().numpy()
    expected = []
    for ours, theirs in zip(student.feature.detach().numpy(), teacher.feature.numpy(), strict=True):
        x, y = unit((weight @ ours).reshape(-1, 3)), unit((weight @ theirs).reshape(-1, 3))
        distances = np.linalg.norm(x[:, None] - y[None], axis=-1)
        expected.append(distances[linear_sum_assignment(distances)].mean())
    objective = FeatureEnhancement(generator=generator)
    assert objective(student, teacher).item() == pytest.approx(np.mean(expected), rel=DEFAULT_TOLERANCE)


def test_feature_enhancement_teaches_the_students_feature_only():
    student, teacher, classifier = states(10)
    generator = Generator().double().train()
    objective = FeatureEnhancement(generator=generator)
    image = teacher.feature.clone().requires_grad_()
    objective(student, teacher._replace(feature=image)).backward()
    assert student.feature.grad.abs().sum() > 0
    assert image.grad is None
    assert all(p.grad is None for p in [*generator.parameters(), *classifier.parameters()])
    assert generator.training
    assert generator.linear.weight.requires_grad
    # dropout is off: the same again
    assert objective(student, teacher) == objective.train()(student, teacher)


def test_the_gradient_of_feature_enhancement_is_that_of_its_value():
    student, teacher, _ = states(11, batch=2)
    objective = FeatureEnhancement(generator=Generator(num_points=8).double())
    objective(student, teacher).backward()
    feature, step = student.feature.detach(), 1e-6
    for row, column in ((0, 0), (1, 5), (0, 9)):
        moved = []
        for sign in (1, -1):
            other = feature.clone()
            other[row, column] += sign * step
            moved.append(objective(student._replace(feature=other), teacher).item())
        numeric = (moved[0] - moved[1]) / (2 * step)
        assert student.feature.grad[row, column].item() == pytest.approx(numeric, rel=1e-3, abs=1e-7)


def test_feature_enhancement_takes_any_distance():
    student, teacher, _ = states(12)
    generator = Generator().double()
    values = {}
    for distance in ["emd", *DISTANCES, lambda x, y: (x - y).norm(dim=-1).mean(1)]:
        objective = FeatureEnhancement(generator=generator, distance=distance)
        loss = objective(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student.feature, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
        values[str(distance)] = loss.item()
    # the identity is one matching of many, so the optimal one is no farther; and nothing is nearer than the
    # nearest point
    emd, identity = values["emd"], list(values.values())[-1]
    assert values["chamfer"] <= emd * 1.001
    assert values["sliced_wasserstein"] <= emd * 1.001
    assert emd <= identity * 1.002
    with pytest.raises(ValueError, match="expected one of emd, chamfer"):
        FeatureEnhancement(distance="emmd")


def test_feature_enhancement_says_what_does_not_fit():
    student, teacher, _ = states(13)
    with pytest.raises(ValueError, match="pointcmt train-generator"):
        FeatureEnhancement().bind(generator=None)
    with pytest.raises(RuntimeError, match="no generator"):
        FeatureEnhancement()(student, teacher)
    with pytest.raises(ValueError, match="generator takes features of size 9"):
        FeatureEnhancement(generator=Generator(9))(student, teacher)


@pytest.mark.parametrize("kind", [FeatureEnhancement, ClassifierEnhancement, FeatureL2])
def test_feature_sizes_that_differ_are_explained(kind):
    student, teacher, _ = states(14)
    objective = kind(generator=Generator()) if kind is FeatureEnhancement else kind()
    with pytest.raises(ValueError, match="--feature-dim 16"):
        objective(student, teacher._replace(feature=teacher.feature[:, :9]))


def test_class_counts_that_differ_are_explained():
    student, teacher, _ = states(15)
    with pytest.raises(ValueError, match="same classes"):
        SoftLabels()(student, teacher._replace(logits=teacher.logits[:, :3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_give_full_precision_losses(dtype):
    student, teacher, _ = states(16, dtype=torch.float32)
    half = StudentState(
        student.feature.to(dtype), student.logits.to(dtype), lambda f: student.classify(f.float()).to(dtype)
    )
    half_teacher = TeacherOutput(teacher.feature.to(dtype), teacher.logits.to(dtype))
    srrl = SoftmaxRegression()
    srrl.bind(classify=lambda feature: feature[:, :CLASSES])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for objective in (
            FeatureEnhancement(generator=Generator()),
            ClassifierEnhancement(),
            SoftLabels(),
            FeatureL2(),
            NeuronSelectivityTransfer(),
            srrl,
        ):
            loss = objective(half, half_teacher)
            assert loss.dtype == torch.float32, objective
            assert loss.item() == pytest.approx(objective(student, teacher).item(), rel=0.05, abs=1e-3), (
                objective
            )


# ---- distances between clouds


def clouds(seed: int, n: int = 20):
    torch.manual_seed(seed)
    return torch.rand(3, n, 3, dtype=torch.float64), torch.rand(3, n, 3, dtype=torch.float64)


def test_chamfer():
    x, y = clouds(1)
    expected = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
        expected.append((distances.min(0).mean() + distances.min(1).mean()) / 2)
    np.testing.assert_allclose(chamfer(x, y), expected, rtol=1e-9)
    assert chamfer(x, x).max() < 1e-5
    x.requires_grad_()
    chamfer(x, x.detach()).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_sinkhorn_is_near_the_optimal_transport():
    x, y = clouds(2)
    for a, b, ours in zip(
        x.numpy(), y.numpy(), sinkhorn(x, y, blur=0.001, scaling=0.95).tolist(), strict=True
    ):
        distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
        assert ours == pytest.approx(distances[linear_sum_assignment(distances)].mean(), rel=0.02)


def test_sliced_wasserstein_is_the_mean_transport_of_shadows():
    x, y = clouds(4)
    y = y**2 - 0.2  # another distribution, so that the distance is not noise
    directions = np.random.default_rng(0).normal(size=(3000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for a, b, ours in zip(x.numpy(), y.numpy(), sliced_wasserstein(x, y, projections=3000), strict=True):
        shadows = [wasserstein_distance(a @ u, b @ u) for u in directions]
        assert ours.item() == pytest.approx(np.mean(shadows), rel=0.04)


def test_sliced_wasserstein_of_a_shifted_cloud_is_the_mean_shadow_of_the_shift():
    x, _ = clouds(3)
    # along a direction u the shift s moves everything by |s.u|, whose mean over the sphere is |s| / 2
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    ours = sliced_wasserstein(x, x + shift, projections=2000)
    torch.testing.assert_close(ours, (shift.norm() / 2).expand(3), rtol=2e-3, atol=0)
    state = torch.get_rng_state()
    sliced_wasserstein(x, x)
    assert torch.equal(state, torch.get_rng_state())


# ---- labels, scale, a map, relations, logits in other forms


LABELS = torch.tensor([1, 0, 2, 1])


def labelled(seed: int) -> tuple[StudentState, TeacherOutput, nn.Linear]:
    student, teacher, classifier = states(seed)
    return student._replace(labels=LABELS), teacher, classifier


def test_image_labels_teach_the_classifier_what_the_images_show():
    student, teacher, classifier = labelled(31)
    loss = ImageLabels(label_smoothing=0.2)(student, teacher)
    rows = [softmax(row) for row in classifier(teacher.feature).tolist()]
    smooth = 0.2 / CLASSES
    expected = [
        -sum((smooth + 0.8 * (k == label)) * math.log(p) for k, p in enumerate(row))
        for row, label in zip(rows, LABELS.tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(expected) / 4)
    loss.backward()
    assert classifier.weight.grad is not None and student.feature.grad is None


def test_scaled_ce_does_not_depend_on_the_length_of_image_features():
    student, teacher, _ = states(32)
    scaled = ScaledClassifierEnhancement()
    longer = teacher._replace(feature=7 * teacher.feature)
    value = scaled(student, teacher)
    assert scaled(student, longer).item() == pytest.approx(value.item())
    factor = student.feature.norm(dim=1).mean() / teacher.feature.norm(dim=1).mean()
    same = ClassifierEnhancement()(student, teacher._replace(feature=factor.detach() * teacher.feature))
    assert value.item() == pytest.approx(same.item(), rel=1e-6)


def test_a_map_takes_up_a_change_of_coordinates():
    student, teacher, _ = states(33)
    objective = ProjectedL2()
    with pytest.raises(ValueError, match="size of the student's feature is not known"):
        objective.bind()
    objective.bind(sizes=Sizes(feature=FEATURE, image=FEATURE))
    objective.double()
    turn = torch.linalg.qr(torch.randn(FEATURE, FEATURE, dtype=torch.float64))[0]
    with torch.no_grad():
        objective.map.weight.copy_(turn)
        objective.map.bias.zero_()
    turned = teacher._replace(feature=3 * student.feature.detach() @ turn.T)
    assert objective(student, turned).item() == pytest.approx(0, abs=1e-12)
    assert 0 < objective(student, teacher).item() < 4
    with pytest.raises(ValueError, match="use a new objective"):
        objective.bind(sizes=Sizes(feature=FEATURE + 1, image=FEATURE))


def test_relations_are_those_of_every_two_and_three_shapes():
    student, teacher, _ = states(34)
    moved = teacher._replace(feature=5 * student.feature.detach() + 2)  # the same relations
    assert RelationalDistillation()(student, moved).item() == pytest.approx(0, abs=1e-10)

    def relations(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        x = features.detach().numpy()
        n = len(x)
        apart = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(n)] for i in range(n)])
        apart = apart / apart[~np.eye(n, dtype=bool)].mean()
        angle = np.zeros((n, n, n))
        for i, j, k in itertools.product(range(n), repeat=3):
            a, b = x[j] - x[i], x[k] - x[i]
            if i not in (j, k):
                angle[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return apart, angle

    def huber(a: np.ndarray, b: np.ndarray) -> float:
        d = np.abs(a - b)
        return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())

    (apart, angle), (theirs, their_angle) = relations(student.feature), relations(teacher.feature)
    expected = 25 * huber(apart, theirs) + 50 * huber(angle, their_angle)
    loss = RelationalDistillation()(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.feature.grad.isfinite().all()


def test_standardised_soft_labels_do_not_see_the_scale_of_logits():
    student, teacher, _ = states(35)
    objective = StandardisedSoftLabels()
    value = objective(student, teacher).item()
    other = objective(student._replace(logits=0.1 * student.logits - 3), teacher)
    assert other.item() == pytest.approx(value, rel=1e-5)

    def soft(row: list[float]) -> list[float]:
        x = np.array(row)
        return softmax(list((x - x.mean()) / x.std(ddof=1) / 2))

    pairs = zip(teacher.logits.tolist(), student.logits.tolist(), strict=True)
    expected = 4 * np.mean([kl(soft(theirs), soft(ours)) for theirs, ours in pairs])
    assert value == pytest.approx(expected, rel=1e-5)


def test_decoupled_soft_labels_are_two_parts_of_hinton_s():
    student, teacher, _ = labelled(36)
    right, others = [], []
    for ours, theirs, label in zip(
        student.logits.tolist(), teacher.logits.tolist(), LABELS.tolist(), strict=True
    ):
        p, q = softmax([x / 4 for x in theirs]), softmax([x / 4 for x in ours])
        right.append(kl([p[label], 1 - p[label]], [q[label], 1 - q[label]]))
        rest = [k for k in range(CLASSES) if k != label]
        others.append(kl(*([values[k] / (1 - values[label]) for k in rest] for values in (p, q))))
    loss = DecoupledSoftLabels(alpha=1.5, beta=3.0)(student, teacher)
    assert loss.item() == pytest.approx(16 * (1.5 * np.mean(right) + 3 * np.mean(others)))
    # with the second part weighed by how unsure the teacher is, it is Hinton's loss
    unsure = [
        1 - softmax([x / 4 for x in row])[k] for row, k in zip(teacher.logits.tolist(), LABELS, strict=True)
    ]
    hinton = 16 * np.mean([a + w * b for a, w, b in zip(right, unsure, others, strict=True)])
    assert SoftLabels()(student, teacher).item() == pytest.approx(hinton)
