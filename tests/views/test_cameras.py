import math

import pytest
import torch

from pointcmt.views import Rig, list_rigs, register_rig, rig
from pointcmt.views import cameras as module

NAMES = ["simpleview", "ring12", "dodecahedron20"]


def test_the_three_rigs_and_their_sizes():
    assert set(NAMES) <= set(list_rigs())
    assert [len(rig(name)) for name in NAMES] == [6, 12, 20]


@pytest.mark.parametrize("up", ["x", "y", "z"])
@pytest.mark.parametrize("name", NAMES)
def test_frames_are_right_handed_and_look_at_the_origin(name, up):
    cameras = rig(name, up)
    rotation, eyes = cameras.frames()
    identity = torch.eye(3).expand(len(cameras), 3, 3)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(len(cameras)))
    # the origin is straight ahead, at the camera's distance
    origin = -(rotation @ eyes[:, :, None]).squeeze(-1)
    expected = torch.zeros(len(cameras), 3)
    expected[:, 2] = eyes.norm(dim=1)
    torch.testing.assert_close(origin, expected, atol=1e-6, rtol=0)
    # up never points down in the image
    axis = torch.tensor([float(up == a) for a in "xyz"])
    assert ((rotation[:, 1] @ axis) < 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_turning_the_shape_and_the_up_axis_changes_nothing(name):
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    seen = {}
    for up, turned in {"z": points, "x": points[:, [2, 0, 1]], "y": points[:, [1, 2, 0]]}.items():
        rotation, eyes = rig(name, up).frames()
        seen[up] = torch.einsum("vij,vnj->vni", rotation, turned[None] - eyes[:, None])
    torch.testing.assert_close(seen["x"], seen["z"])
    torch.testing.assert_close(seen["y"], seen["z"])


def test_simpleview_stands_on_the_axes():
    eyes = torch.tensor(rig("simpleview").eyes)
    assert torch.equal(eyes.abs().amax(1), torch.full((6,), 1.4))
    assert torch.equal((eyes != 0).sum(1), torch.ones(6, dtype=torch.int64))
    assert len(set(rig("simpleview").eyes)) == 6
    assert rig("simpleview").field_of_view == 90


def test_ring_is_at_thirty_degrees_all_around():
    eyes = torch.tensor(rig("ring12").eyes, dtype=torch.float64)
    elevation = torch.rad2deg(torch.atan2(eyes[:, 2], eyes[:, :2].norm(dim=1)))
    torch.testing.assert_close(elevation, torch.full((12,), 30.0, dtype=torch.float64))
    azimuth = torch.rad2deg(torch.atan2(eyes[:, 1], eyes[:, 0])) % 360
    torch.testing.assert_close(azimuth.sort().values, torch.arange(0, 360, 30, dtype=torch.float64))


def test_dodecahedron_has_twenty_vertices_with_three_nearest_neighbours_each():
    eyes = torch.tensor(rig("dodecahedron20").eyes, dtype=torch.float64)
    torch.testing.assert_close(eyes.norm(dim=1), torch.full((20,), 2.0, dtype=torch.float64))
    distance = torch.cdist(eyes, eyes).fill_diagonal_(math.inf)
    edge = distance.min()
    assert ((distance - edge).abs() < 1e-9).sum(1).tolist() == [3] * 20


def test_a_rig_can_be_added(monkeypatch):
    monkeypatch.setattr(module, "_RIGS", dict(module._RIGS))
    mine = Rig("pair", ((2.0, 0, 0), (0, 2.0, 0)), ((0, 0, 1.0),) * 2, 60.0)
    assert register_rig(mine) is mine
    assert rig("pair") is mine
    assert rig("pair", "y").eyes == ((0, 0, 2.0), (2.0, 0, 0))
    assert rig(mine, "y") is mine
    with pytest.raises(ValueError, match="'pair' already"):
        register_rig(mine)


def test_errors():
    with pytest.raises(ValueError, match="unknown rig 'circle'; expected one of dodecahedron20, ring12"):
        rig("circle")
    with pytest.raises(ValueError, match="unknown up axis 'w'"):
        rig("ring12", "w")
    with pytest.raises(ValueError, match="1 eyes and 0 ups"):
        Rig("a", ((1.0, 0, 0),), (), 60)
    with pytest.raises(ValueError, match="along its view axis"):
        Rig("a", ((0, 0, 1.0),), ((0, 0, -2.0),), 60)
    with pytest.raises(ValueError, match="field of view of 180"):
        Rig("a", ((0, 0, 1.0),), ((0, 1.0, 0),), 180)
