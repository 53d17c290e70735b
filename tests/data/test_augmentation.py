"""The paper's augmentation and voting scale, and the corruptions of robustness curves."""

from __future__ import annotations

import math

import pytest
import torch

from pointcmt.data import SEVERITIES, Augmentation, augment, corrupt, vote_scale


def clouds(seed: int, batch: int = 64, count: int = 32, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, count, channels, generator=generator)
    points[..., 3:] = torch.nn.functional.normalize(points[..., 3:], dim=-1)
    return points


def affine(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift per cloud and axis, by least squares: [B, 3] each."""
    x, y = before.double(), after.double()
    x0, y0 = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    scale = ((x - x0) * (y - y0)).sum(1) / ((x - x0) ** 2).sum(1)
    return scale, (y0.squeeze(1) - scale * x0.squeeze(1))


def test_ranges_are_the_papers() -> None:
    points = clouds(0, 2000, 8)
    scale, shift = affine(points, Augmentation(shuffle=False)(points, torch.Generator().manual_seed(1)))
    assert 2 / 3 <= scale.min() < 0.67 and 1.49 < scale.max() <= 1.5
    assert -0.2 <= shift.min() < -0.199 and 0.199 < shift.max() <= 0.2001
    assert scale.mean() == pytest.approx((2 / 3 + 3 / 2) / 2, abs=0.02)
    assert shift.mean() == pytest.approx(0, abs=0.01)
    assert torch.corrcoef(scale.T).abs().fill_diagonal_(0).max() < 0.1, "axes are stretched alike"


def test_points_are_shuffled_cloud_by_cloud() -> None:
    points = clouds(1)
    mixed = Augmentation(scale=None, translation=0.0)(points, torch.Generator().manual_seed(3))
    assert not torch.equal(mixed, points)
    orders = (mixed.unsqueeze(2) == points.unsqueeze(1)).all(-1).int().argmax(2)
    assert torch.equal(orders.sort(1).values, torch.arange(32).expand(64, 32)), "not a permutation"
    assert len({tuple(order.tolist()) for order in orders}) == 64


def test_default_does_all_three_and_leaves_its_input() -> None:
    points = clouds(2)
    before = points.clone()
    first = augment(points, torch.Generator().manual_seed(4))
    assert torch.equal(points, before)
    assert torch.equal(first, augment(points, torch.Generator().manual_seed(4)))
    assert not torch.equal(first, augment(points, torch.Generator().manual_seed(5)))
    assert torch.equal(Augmentation(None, 0.0, False)(points), points)


def test_normals_stay_perpendicular() -> None:
    """A normal of a plane is a normal of the stretched plane."""
    normal = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, -0.5]), dim=0)
    flat = torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(0))
    flat = flat - (flat @ normal).unsqueeze(-1) * normal
    points = torch.cat([flat, normal.expand(5, 40, 3)], -1)
    for changed in (
        augment(points),
        vote_scale(points),
        corrupt(points, "scale", 2.0),
        corrupt(points, "rotation", 60.0),
    ):
        offset = changed[..., :3] - changed[:, :1, :3]
        assert (offset * changed[..., 3:]).sum(-1).abs().max() < 1e-5
        torch.testing.assert_close(changed[..., 3:].norm(dim=-1), torch.ones(5, 40))


def test_vote_scale() -> None:
    points = clouds(3, 1000, 8)
    scale, shift = affine(points, vote_scale(points, torch.Generator().manual_seed(0)))
    assert 0.85 <= scale.min() < 0.852 and 1.148 < scale.max() <= 1.1501
    assert shift.abs().max() < 1e-5


@pytest.mark.parametrize("wrong", [torch.zeros(3, 3), torch.zeros(2, 5, 4), torch.zeros(2, 5, 3).long()])
def test_wrong_points(wrong: torch.Tensor) -> None:
    for change in (augment, vote_scale, lambda points: corrupt(points, "jitter", 0.1)):
        with pytest.raises(ValueError, match=r"expected floating \[B, N, 3\]"):
            change(wrong)
    with pytest.raises(ValueError, match="scale"):
        Augmentation(scale=(1.5, 0.5))
    with pytest.raises(ValueError, match="translation"):
        Augmentation(translation=-1)


@pytest.mark.parametrize("kind", SEVERITIES)
@pytest.mark.parametrize("channels", [3, 6])
def test_corruptions_start_at_none_and_are_seeded(kind: str, channels: int) -> None:
    points = clouds(4, channels=channels)
    levels = SEVERITIES[kind]
    assert torch.equal(corrupt(points, kind, levels[0]), points)
    assert list(levels) == sorted(set(levels))
    for level in levels[1:]:
        first = corrupt(points, kind, level, torch.Generator().manual_seed(1))
        assert first.shape == points.shape and first.isfinite().all() and not torch.equal(first, points)
        assert torch.equal(first, corrupt(points, kind, level, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_a_turn_about_the_vertical_keeps_heights(up: str) -> None:
    points = clouds(11)
    axis = "xyz".index(up)
    turned = corrupt(points, "rotation_up", 180.0, torch.Generator().manual_seed(2), up=up)
    torch.testing.assert_close(turned[..., axis], points[..., axis])
    torch.testing.assert_close(turned.norm(dim=-1), points.norm(dim=-1))
    assert (turned - points).abs().amax((1, 2)).min() > 1e-3
    # and the other turn does not
    free = corrupt(points, "rotation", 180.0, torch.Generator().manual_seed(2))
    torch.testing.assert_close(free.norm(dim=-1), points.norm(dim=-1))
    assert (free[..., axis] - points[..., axis]).abs().max() > 1e-2


def test_dropout_keeps_the_part_it_says() -> None:
    points = clouds(5, 10, 64)
    less = corrupt(points, "dropout", 0.75, keep_count=False)
    assert less.shape == (10, 16, 3)
    same = corrupt(points, "dropout", 0.75)
    for cloud, source in zip(same, points, strict=True):
        left, times = cloud.unique(dim=0, return_counts=True)
        assert len(left) == 16 and set(times.tolist()) == {4}
        assert (left.unsqueeze(1) == source.unsqueeze(0)).all(-1).any(1).all(), "a point that was not there"
    assert corrupt(points, "dropout", 0.999, keep_count=False).shape == (10, 1, 3)


def test_jitter_has_its_deviation() -> None:
    points = clouds(6, 100, 100)
    noise = corrupt(points, "jitter", 0.03, torch.Generator().manual_seed(0)) - points
    assert noise.std().item() == pytest.approx(0.03, rel=0.02)


def test_rotation_is_rigid_and_bounded() -> None:
    points = clouds(7, 500, 16).double()
    turned = corrupt(points, "rotation", 40.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cdist(turned, turned), torch.cdist(points, points))
    matrix = torch.linalg.lstsq(points, turned).solution.transpose(1, 2)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(500).double())
    cosine = (matrix.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2
    angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    assert 39 < angle.max() <= 40.001 and angle.mean() == pytest.approx(20, abs=1.5)


def test_scale_is_even_both_ways() -> None:
    points = clouds(8, 3000, 8)
    scale, _ = affine(points, corrupt(points, "scale", 2.0, torch.Generator().manual_seed(0)))
    assert 0.4999 <= scale.min() < 0.505 and 1.98 < scale.max() <= 2.0001
    assert scale.log().mean() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "severity"),
    [
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("scale", 0.5),
        ("jitter", -1),
        ("rotation", math.nan),
        ("shear", 1),
    ],
)
def test_wrong_severity(kind: str, severity: float) -> None:
    with pytest.raises(ValueError, match=kind):
        corrupt(clouds(0), kind, severity)  # type: ignore[arg-type]


@pytest.mark.cuda
def test_on_the_device_with_a_cpu_generator(cuda: torch.device) -> None:
    points = clouds(9)
    here = augment(points, torch.Generator().manual_seed(0))
    there = augment(points.to(cuda), torch.Generator().manual_seed(0))
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), here)
