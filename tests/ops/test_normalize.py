"""unit_cube: the scaling under every EMD of the method."""

from __future__ import annotations

import pytest
import torch

from pointcmt.ops import unit_cube


def test_longest_side_is_one_and_the_box_is_centred():
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(5, 200, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])
    cube = unit_cube(points * 40 + 7)
    low, high = cube.amin(1), cube.amax(1)
    torch.testing.assert_close((high - low).amax(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(low, -high)
    torch.testing.assert_close(cube, unit_cube(points), msg="scale and translation must not matter")


def test_a_cloud_without_extent_is_centred_and_has_finite_gradients():
    points = torch.full((2, 6, 3), 4.0, requires_grad=True)
    cube = unit_cube(points)
    assert torch.equal(cube, torch.zeros_like(cube))
    cube.square().sum().backward()
    assert points.grad is not None and points.grad.isfinite().all()


def test_gradient_includes_the_box():
    points = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(unit_cube, points.requires_grad_())


@pytest.mark.parametrize("points", [torch.zeros(2, 4), torch.zeros(1, 0, 3), torch.zeros(1, 4, 3).long()])
def test_wrong_input_is_explained(points):
    with pytest.raises(ValueError, match="unit_cube"):
        unit_cube(points)
