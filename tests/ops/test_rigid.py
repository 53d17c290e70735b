"""Weighted Procrustes: right poses, proper rotations, degenerate clouds, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pointcmt.ops import weighted_procrustes

IDENTITY = torch.eye(3, dtype=torch.float64)


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(count, np.random.default_rng(seed)).as_matrix())


def angle(rotation: torch.Tensor) -> torch.Tensor:
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos())


def check_proper(rotation: torch.Tensor) -> None:
    rotation = rotation.double()
    torch.testing.assert_close(rotation @ rotation.mT, IDENTITY.expand_as(rotation), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(len(rotation)).double())


def test_the_motion_is_found_also_far_from_the_origin():
    source, rotation, shift = cloud(5, 40, 3), rotations(5), 1e4 * cloud(5, 3, seed=1)
    target = source @ rotation.mT + shift[:, None]
    found = weighted_procrustes(source, target, torch.rand(5, 40, dtype=torch.float64) + 0.1)
    torch.testing.assert_close(found.rotation, rotation, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.translation, shift, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.move(source), target, atol=1e-7, rtol=0)


def test_it_is_the_least_squares_optimum_of_scipy_with_weights():
    source, target = cloud(4, 30, 3), cloud(4, 30, 3, seed=1)
    weights = torch.rand(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = weighted_procrustes(source, target, weights)
    for row in range(4):
        share = weights[row] / weights[row].sum()
        centred = [points[row] - share @ points[row] for points in (source, target)]
        expected, _ = Rotation.align_vectors(centred[1].numpy(), centred[0].numpy(), weights[row].numpy())
        np.testing.assert_allclose(found.rotation[row].numpy(), expected.as_matrix(), atol=1e-9)


def test_weights_only_matter_by_their_ratio_and_zero_leaves_a_pair_out():
    source, target = cloud(2, 20, 3), cloud(2, 20, 3, seed=1)
    weights = torch.rand(2, 20, dtype=torch.float64)
    weights[:, 10:] = 0
    found = weighted_procrustes(source, target, weights)
    for other in (
        weighted_procrustes(source, target, weights * 1e-20),
        weighted_procrustes(source[:, :10], target[:, :10], weights[:, :10]),
    ):
        torch.testing.assert_close(found.rotation, other.rotation)
        torch.testing.assert_close(found.translation, other.translation)


def test_a_mirrored_cloud_still_gives_a_proper_rotation():
    source = cloud(8, 30, 3)
    found = weighted_procrustes(source, source * torch.tensor([1.0, 1.0, -1.0]), None)
    check_proper(found.rotation)
    # a regular octahedron, mirrored: every direction is as good as another, and least is no rotation
    octahedron = torch.cat([IDENTITY, -IDENTITY])[None]
    found = weighted_procrustes(octahedron, -octahedron, None)
    check_proper(found.rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_degenerate_clouds_take_the_least_rotation(dtype, shift):
    steps = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    line = steps * torch.tensor([1.0, 0.0, 0.0]).double() + shift
    turned = steps * torch.tensor([0.0, 1.0, 0.0]).double() - shift
    found = weighted_procrustes(line[None].to(dtype), turned[None].to(dtype))
    check_proper(found.rotation)
    expected = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    np.testing.assert_allclose(found.rotation[0].numpy(), expected, atol=1e-6)
    # a line turned round: half a turn, the same one each time
    opposite = weighted_procrustes(line[None].to(dtype), line[None].flip(1).to(dtype))
    check_proper(opposite.rotation)
    assert float(angle(opposite.rotation.double())) == pytest.approx(180, abs=1e-3)
    again = weighted_procrustes(line[None].to(dtype), line[None].flip(1).to(dtype))
    assert torch.equal(opposite.rotation, again.rotation)
    # in one place, and a single point: no rotation
    for count in (1, 7):
        source = torch.full((1, count, 3), 0.1 + shift, dtype=dtype)
        found = weighted_procrustes(source, source + 2)
        torch.testing.assert_close(found.rotation, IDENTITY[None].to(dtype), atol=0, rtol=0)
        torch.testing.assert_close(found.translation, torch.full((1, 3), 2.0, dtype=dtype))


def test_a_plane_has_one_rotation():
    flat = cloud(3, 20, 3) * torch.tensor([1.0, 1.0, 0.0])
    rotation = rotations(3)
    found = weighted_procrustes(flat, flat @ rotation.mT)
    torch.testing.assert_close(found.rotation, rotation, atol=1e-7, rtol=0)


def test_zero_weights_leave_everything_where_it_is_and_have_a_finite_gradient():
    source, weights = cloud(2, 5, 3).requires_grad_(), torch.zeros(2, 5, dtype=torch.float64)
    found = weighted_procrustes(source, cloud(2, 5, 3, seed=1), weights.requires_grad_())
    torch.testing.assert_close(found.rotation, IDENTITY.expand(2, 3, 3))
    assert torch.equal(found.translation, torch.zeros(2, 3).double())
    (found.rotation.sum() + found.translation.sum()).backward()
    assert torch.isfinite(source.grad).all() and torch.isfinite(weights.grad).all()


def test_the_gradient_is_right():
    source, target = cloud(2, 6, 3), cloud(2, 6, 3, seed=1)
    weights = torch.rand(2, 6, dtype=torch.float64) + 0.1
    inputs = tuple(tensor.requires_grad_() for tensor in (source, target, weights))
    assert torch.autograd.gradcheck(weighted_procrustes, inputs)


def test_the_gradient_is_right_where_singular_values_are_equal():
    octahedron = torch.cat([IDENTITY, -IDENTITY])[None]  # covariance: a multiple of the identity
    disc = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=torch.float64)[None]
    for source in (octahedron, disc):
        target = source @ rotations(1).mT
        weights = torch.ones(source.shape[:2], dtype=torch.float64)
        inputs = tuple(tensor.clone().requires_grad_() for tensor in (source, target, weights))
        assert torch.autograd.gradcheck(weighted_procrustes, inputs)


def test_the_gradient_is_finite_where_the_rotation_is_undetermined():
    line = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 3.0]).double()
    for source in (line[None], torch.ones(1, 5, 3).double(), torch.ones(1, 1, 3).double()):
        source = source.clone().requires_grad_()
        found = weighted_procrustes(source, source.detach().flip(1) + 1)
        (found.rotation * cloud(3, 3)).sum().add(found.translation.sum()).backward()
        assert torch.isfinite(source.grad).all()


def test_half_precision_comes_back_in_float32_and_float32_is_computed_in_double():
    source = cloud(1, 50, 3).float() + 500
    rotation = rotations(1)
    target = ((source.double() - 500) @ rotation.mT).float()
    found = weighted_procrustes(source, target)
    assert found.rotation.dtype == torch.float32
    torch.testing.assert_close(found.rotation.double(), rotation, atol=1e-6, rtol=0)
    assert weighted_procrustes(source.half(), target.half()).rotation.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": torch.zeros(1, 3, 4)}, "source must be"),
        ({"target": torch.zeros(1, 4, 3)}, "correspond point by point"),
        ({"source": torch.zeros(1, 0, 3), "target": torch.zeros(1, 0, 3)}, "at least one pair"),
        ({"weights": torch.ones(1, 4)}, "weights must be"),
        ({"weights": -torch.ones(1, 3)}, "not be negative"),
        ({"source": torch.full((1, 3, 3), torch.nan)}, "source holds a NaN"),
        ({"target": torch.full((1, 3, 3), torch.inf)}, "target holds a NaN"),
        ({"weights": torch.full((1, 3), torch.nan)}, "weights holds a NaN"),
    ],
)
def test_bad_input_is_named(change, words):
    right = {"source": torch.zeros(1, 3, 3), "target": torch.zeros(1, 3, 3), "weights": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=words):
        weighted_procrustes(**{**right, **change})
