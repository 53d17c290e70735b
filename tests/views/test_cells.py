"""From points to cells, by a case that was worked out by hand, and its hazards."""

from __future__ import annotations

import math

import pytest
import torch

from pointcmt.types import Views
from pointcmt.views import pixels_of
from pointcmt.views.cells import cells_of, moved, visible_at
from tests.pretraining_toys import cameras, clouds


def rotation(angle: float) -> torch.Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def test_a_case_worked_out_by_hand():
    """The first camera stands at x = 3 and looks at the origin, z up: to the right is +y, down is −z. It is
    60° wide, so at depth 3 the image's half width is √3."""
    view, projection = cameras(1, 1)
    half = math.sqrt(3)
    points = torch.tensor(
        [[[0, 0, 0], [0, half / 2, 0], [0, 0, half / 2], [0, -half / 2, -half / 2], [1, 0, 0.5]]]
    )
    pixels = pixels_of(points, view, projection)[0][0, 0]
    expected = torch.tensor(
        [[0.5, 0.5], [0.75, 0.5], [0.5, 0.25], [0.25, 0.75], [0.5, 0.5 - 0.25 * half / 2]]
    )
    torch.testing.assert_close(pixels, expected)
    # 7 columns and 5 rows: u is the column and v, downwards, the row
    cell = cells_of(pixels, 5, 7)
    assert cell.tolist() == [2 * 7 + 3, 2 * 7 + 5, 1 * 7 + 3, 3 * 7 + 1, 1 * 7 + 3]


def test_the_last_cell_takes_the_border_and_outside_is_none():
    pixels = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.01, 0.5], [0.5, -0.01], [math.nan, 0.5]])
    assert cells_of(pixels, 7, 7).tolist() == [48, 6, 42, -1, -1, -1]


def test_points_behind_the_camera_are_in_no_cell():
    view, projection = cameras(1, 1)
    points = torch.tensor([[[4.0, 0.1, 0], [3.0, 0, 0], [2.0, 0, 0]]])
    pixels, inside = pixels_of(points, view, projection)
    assert torch.where(inside, cells_of(pixels, 7, 7), -1).tolist() == [[[-1, -1, 24]]]


def test_cameras_turned_with_the_clouds_see_the_same():
    points = clouds(3, 16)
    view, projection = cameras(3, 2)
    turn = torch.stack([rotation(angle) for angle in (0.3, 2.0, -1.0)])
    views = Views(torch.zeros(3, 2, 1, 4, 4), view_matrix=view, projection_matrix=projection)
    before = pixels_of(points, view, projection)[0]
    turned = torch.einsum("bij,bnj->bni", turn, points)
    after = moved(views, turn)
    assert after.view_matrix is not None
    torch.testing.assert_close(pixels_of(turned, after.view_matrix, projection)[0], before)
    assert (pixels_of(turned, view, projection)[0] - before).abs().max() > 0.05
    # scaled and shifted as well
    motion = torch.eye(4).repeat(3, 1, 1)
    motion[:, :3, :3] = 1.5 * turn
    motion[:, :3, 3] = torch.tensor([0.1, -0.2, 0.3])
    after = moved(views, motion)
    assert after.view_matrix is not None
    there = 1.5 * turned + motion[:, None, :3, 3]
    torch.testing.assert_close(pixels_of(there, after.view_matrix, projection)[0], before)


def test_hidden_points_are_found_by_the_cloud_point_at_their_place():
    view, projection = cameras(1, 1)
    # the camera is at x = 3: the first point hides the second
    cloud = torch.tensor([[[0.5, 0.1, 0.2], [-0.5, 0.141, 0.28], [0.0, -0.3, 0.0]]])
    pixels, _ = pixels_of(cloud, view, projection)
    views = Views(torch.zeros(1, 1, 1, 4, 4), pixels, torch.tensor([[[True, False, True]]]), view, projection)
    assert visible_at(pixels[:, :, [2, 1]], views).tolist() == [[[True, False]]]


def test_errors_say_what_to_do():
    view, _ = cameras(2, 1)
    bare = Views(torch.zeros(2, 1, 1, 4, 4))
    with pytest.raises(ValueError, match="cameras=True"):
        moved(bare, torch.eye(3).repeat(2, 1, 1))
    with pytest.raises(ValueError, match=r"expected \[2, 3, 3\] or \[2, 4, 4\]"):
        moved(bare._replace(view_matrix=view), torch.eye(3))
    with pytest.raises(ValueError, match="which points are visible"):
        visible_at(torch.zeros(2, 1, 3, 2), bare)
