"""What a user of the reference students relies on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pointcmt import students
from pointcmt.adapters import find_adapter, verify_adapter

PUBLIC = json.loads((Path(__file__).parent / "public_names.json").read_text())


def warmed(student: nn.Module, points: torch.Tensor) -> nn.Module:
    """The student in eval mode, its running statistics those of ``points``, so that outputs are O(1)."""
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        student.train()(points)
    for norm in norms:
        norm.momentum = 0.1
    return student.eval()


def test_names_shapes_and_parameter_counts_are_those_of_the_public_class(variant, build):
    student = build(40)
    own = {
        name: list(value.shape)
        for name, value in student.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert own == PUBLIC[variant]["state"]
    assert sum(p.numel() for p in student.parameters()) == PUBLIC[variant]["parameters"]


def test_logits_and_a_gradient_for_every_parameter(small, variant, clouds):
    student = small(5)
    logits = student(clouds(4))
    assert logits.shape == (4, 5) and logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    # DistributedDataParallel waits for the gradient of each
    assert not [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert not logits.exp().sum(-1).allclose(torch.ones(4)), "log-probabilities, not logits"


@pytest.mark.cuda
def test_same_on_the_gpu(small, clouds, cuda):
    student, points = small(), clouds(4)
    expected = warmed(student, points)(points)
    student.to(cuda)
    torch.testing.assert_close(student(points.to(cuda)).cpu(), expected, rtol=1e-3, atol=1e-3)
    student.train()(points.to(cuda)).sum().backward()


def test_eval_is_deterministic_and_independent_of_the_batch(small, clouds):
    points = clouds(6)
    student = warmed(small(), points)
    once = student(points)
    assert torch.equal(once, student(points))
    torch.testing.assert_close(student(points[2:4]), once[2:4], rtol=1e-4, atol=1e-5)
    assert (once[0] - once[1]).abs().max() > 1e-3, "the output does not depend on the cloud"


def test_the_order_of_points_does_not_matter(small, variant, clouds):
    points = clouds(3, 96)
    order = torch.randperm(95, generator=torch.Generator().manual_seed(1)) + 1
    # the sampled centres are all the points, or point 0, where sampling starts, keeps its place; a ball
    # holds fewer points than nsample, so that nothing is cut off by index
    options = {}
    if variant == "pointnet2-msg":
        options["nsamples"] = ((96,) * 3, (96,) * 3)
    elif variant in ("pointnet2-ssg", "rscnn"):
        options["nsamples"] = (96, 96)
    student = warmed(small(**options), points).double()
    shuffled = torch.cat([points[:, :1], points[:, order]], 1)
    with torch.no_grad():
        before, after = student(points.double()), student(shuffled.double())
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [16, 40, 300])
def test_any_number_of_points(small, clouds, count):
    student = small()
    student(clouds(2, count)).sum().backward()
    assert student.eval()(clouds(1, count)).isfinite().all()


@pytest.mark.parametrize("width", [0.05, 0.25, 0.5])
def test_width_scales_all_but_the_feature(variant, build, clouds, width):
    student = build(6, width=width, feature_dim=32)
    full = PUBLIC[variant]["parameters"]
    assert sum(p.numel() for p in student.parameters()) < 1.3 * width * full
    seen = {}
    adapter = find_adapter(student)
    tap = student.get_submodule(adapter.feature_path(student))
    tap.register_forward_pre_hook(lambda _, inputs: seen.update(feature=inputs[0]))
    student(clouds(2, 64))
    assert seen["feature"].shape == (2, 32)
    assert seen["feature"].min() >= (0 if variant != "dgcnn" else -torch.inf)


def test_adapter_is_ours_and_true(small, variant, clouds):
    points = clouds(4)
    student = warmed(small(), points)
    assert find_adapter(student).name == f"students-{variant.split('-')[0]}"
    report = verify_adapter(student, points)
    assert report.conclusive and report.feature_shape == (4, 64)


@pytest.mark.slow
def test_compiles(small, variant, clouds):
    if variant in ("pointmlp", "pointnet2-msg"):
        pytest.skip("the layers of its smaller sibling, many times over")
    points = clouds(3, 48)
    student = small(dropout=0.0)
    twin = copy.deepcopy(student)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager")
    expected, got = student(points), compiled(points)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    got.sum().backward()
    for (name, value), other in zip(student.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=name)


def test_autocast(small, clouds):
    points = clouds(16, 32)
    student = warmed(small(), points)
    expected = student(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = student(points)
        student.train()
        student(points).float().sum().backward()
    # an untrained network tells clouds apart by little, so eight bits of mantissa blur what it says
    assert (half.float() - expected).abs().mean() < 0.6 * expected.std(0).mean()


def test_random_start_only_in_training(small, variant, clouds):
    if variant == "dgcnn":
        pytest.skip("DGCNN samples no centres")
    options = {"npoints": (24, 8)} if variant.startswith(("pointnet2", "rscnn")) else {}
    points = clouds(4)
    student = warmed(small(random_start=True, dropout=0.0, **options), points)
    assert torch.equal(student(points), student(points))
    student.train()
    assert not torch.equal(student(points), student(points))


def test_a_copy_is_independent_and_equal(small, clouds):
    points = clouds(2)
    student = warmed(small(), points)
    twin = copy.deepcopy(student)
    assert torch.equal(twin(points), student(points))


def test_normals(clouds):
    points = clouds(3, 64, channels=6)
    for build in (
        lambda: students.pointnet2(4, width=0.125, in_channels=6),
        lambda: students.pointnet2(4, "msg", width=0.125, in_channels=6),
        lambda: students.rscnn(4, width=0.125, in_channels=6),
    ):
        student = warmed(build(), points)
        other = torch.cat([points[..., :3], points[..., 3:].flip(0)], -1)
        assert (student(points) - student(other)).abs().max() > 1e-4, "the normals are not used"
        with pytest.raises(ValueError, match=r"\[B, N, 6\].*\[3, 64, 3\]"):
            student(points[..., :3])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 64), r"expects .*\[B, N, 3\], got torch.float32 of shape \[2, 3, 64\]; transpose"),
        ((64, 3), r"got torch.float32 of shape \[64, 3\]"),
        ((2, 0, 3), r"needs at least \d+ points per cloud.*\[2, 0, 3\]"),
        ((0, 64, 3), "at least one cloud"),
    ],
)
def test_wrong_points_are_explained(small, shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.rand(shape))


def test_too_few_points_are_explained():
    with pytest.raises(ValueError, match=r"at least 20 points .*smaller k.*\[2, 19, 3\]"):
        students.dgcnn(4, width=0.1)(torch.rand(2, 19, 3))
    with pytest.raises(ValueError, match=r"at least 16 points .*halves"):
        students.pointmlp(4, width=0.1)(torch.rand(2, 15, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: students.pointnet2(4, "mgs"), "'ssg' or 'msg', got 'mgs'"),
        (lambda: students.pointmlp(4, "mini"), "'full' or 'elite', got 'mini'"),
        (lambda: students.dgcnn(0), "num_classes must be at least 1, got 0"),
        (lambda: students.rscnn(4, width=0), "width must be positive, got 0"),
        (lambda: students.rscnn(4, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: students.dgcnn(4, k=0), "k must be at least 1"),
        (lambda: students.pointnet2(4, in_channels=2), "in_channels .* at least 3, got 2"),
    ],
)
def test_wrong_options_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()
