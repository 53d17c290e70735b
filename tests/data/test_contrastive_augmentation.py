"""Changes to clouds in pre-training, and the motion that is said with them."""

from __future__ import annotations

import pytest
import torch

from pointcmt.data.contrastive import CloudAugmentation
from pointcmt.types import Batch


def cloud(channels: int = 3) -> torch.Tensor:
    points = torch.randn(4, 50, channels, generator=torch.Generator().manual_seed(0))
    if channels == 6:
        points[..., 3:] = torch.nn.functional.normalize(points[..., 3:], dim=-1)
    return points


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_the_motion_is_what_moved_the_points(up):
    change = CloudAugmentation(True, (0.5, 2.0), up, translate=0.5)
    points = cloud()
    changed, motion = change.with_motion(points, torch.Generator().manual_seed(1))
    expected = torch.einsum("bij,bnj->bni", motion[:, :3, :3], points) + motion[:, None, :3, 3]
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    turned = motion[:, :3, :3] / motion[:, :3, :3].det().abs().pow(1 / 3)[:, None, None]
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).repeat(4, 1, 1), rtol=1e-5, atol=1e-5)
    axis = torch.eye(3)["xyz".index(up)]
    torch.testing.assert_close(turned @ axis, axis.repeat(4, 1), rtol=1e-5, atol=1e-5)
    assert (motion[0] - motion[1]).abs().max() > 0.01


def test_pic_at_point_only_turns_and_normals_turn_along():
    points = cloud(6)
    changed, motion = CloudAugmentation.pic_at_point("z").with_motion(points)
    torch.testing.assert_close(changed[..., 2], points[..., 2])
    torch.testing.assert_close(
        changed[..., 3:], torch.einsum("bij,bnj->bni", motion[:, :3, :3], points[..., 3:])
    )
    batch = CloudAugmentation.pic_at_point("z").on(
        Batch(points=points[..., :3], normals=points[..., 3:], labels=torch.arange(4))
    )
    assert batch.points is not None and batch.normals is not None and batch.labels is not None
    assert not torch.equal(batch.points, points[..., :3])
    torch.testing.assert_close(batch.normals.norm(dim=-1), torch.ones(4, 50))
    assert torch.equal(batch.labels, torch.arange(4))


def test_crosspoints_ranges():
    points = cloud().repeat(50, 1, 1)
    change = CloudAugmentation.crosspoint("y")
    changed = change(points, torch.Generator().manual_seed(2))
    assert changed.shape == points.shape and torch.isfinite(changed).all()
    same = (changed == changed[:, :1]).all(-1).float().mean(1)  # the part that became the first point
    assert same.max() > 0.7 and same.min() < 0.1
    assert same.mean().item() == pytest.approx(0.875 / 2, abs=0.1)
    sizes = CloudAugmentation(True, (0.5, 2.0))(points).norm(dim=-1).amax(1)
    assert 0.5 <= sizes.min() < 0.6 and 1.9 < sizes.max() <= 2.0


def test_a_generator_on_the_cpu_fixes_it():
    change = CloudAugmentation.crosspoint("z")
    runs = [change(cloud(), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], change(cloud(), torch.Generator().manual_seed(4)))


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="0 < low <= high"):
        CloudAugmentation(scale=(2.0, 1.0))
    with pytest.raises(ValueError, match="expected 'x', 'y', 'z' or None"):
        CloudAugmentation(rotate="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected floating \[B, N, 3\]"):
        CloudAugmentation()(torch.zeros(3, 5, 4))
