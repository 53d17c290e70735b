"""Projection heads: rows of whatever shape, cells of maps, the pose joined after the first layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pointcmt.heads import LocalHead, MapHead, PoseEncoder, ProjectionHead, SizedHead


def test_leading_dimensions_are_one_batch():
    head = ProjectionHead(6, 8, 4)
    local = torch.randn(3, 5, 6)
    torch.testing.assert_close(head(local), head(local.flatten(0, 1)).view(3, 5, 4))
    assert [p.shape for p in ProjectionHead(6, 8, 4, bias=False).parameters()] == [(8, 6), (8,), (8,), (4, 8)]


def test_maps_are_projected_cell_by_cell():
    head = MapHead(6, 8, 4).eval()
    maps = torch.randn(2, 6, 3, 5)
    projected = head(maps)
    assert projected.shape == (2, 4, 3, 5)
    torch.testing.assert_close(projected[1, :, 2, 4], head.head(maps[1:2, :, 2, 4])[0], rtol=1e-5, atol=1e-6)


def test_the_pose_is_joined_after_the_first_layer():
    head = LocalHead(6, hidden=8, out_features=4, pose=3).eval()
    local, view = torch.randn(2, 5, 6), torch.randn(2, 4, 4)
    first = F.relu(head.norm(head.first(local).flatten(0, 1))).view(2, 5, 8)
    code = head.pose(view)
    assert isinstance(head.pose, PoseEncoder) and code.shape == (2, 3)
    expected = head.last(torch.cat([first, code[:, None].expand(-1, 5, -1)], -1))
    torch.testing.assert_close(head(local, view), expected)
    with pytest.raises(ValueError, match=r"needs the view matrix.*pose=0"):
        head(local)
    assert LocalHead(6, 8, 4, pose=0)(local).shape == (2, 5, 4)


def test_a_head_without_a_size_yet():
    head = SizedHead(8, 4)
    with pytest.raises(RuntimeError, match="has no size yet: enter the training context"):
        head(torch.randn(2, 6))
    head.build(6)
    made = head.head
    head.build(6)
    assert head.head is made and head(torch.randn(2, 6)).shape == (2, 4)
    with pytest.raises(ValueError, match="made for features of 6, and is given 7"):
        head.build(7)
