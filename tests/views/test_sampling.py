"""Views drawn by chance: those of the whole rig, of the right shapes, and only those."""

from __future__ import annotations

import pytest
import torch

from pointcmt.views import ViewSpec
from pointcmt.views.sampling import draw_cameras, project_chosen
from tests.pretraining_toys import clouds


@pytest.mark.parametrize("normalize", [False, True])
def test_chosen_views_are_those_of_the_rig(normalize):
    spec = ViewSpec("dodecahedron20", 16, ("depth", "normal"), 1.0, normalize=normalize)
    points = clouds(5, 40)
    cameras = draw_cameras(5, 20, 3, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in cameras.tolist())
    whole = spec.project(points, cameras=True)
    chosen = project_chosen(spec, points, cameras)
    for name, mine, all_ in zip(whole._fields, chosen, whole, strict=True):
        expected = torch.stack([all_[k, cameras[k]] for k in range(5)])
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, msg=name)


def test_errors_say_what_was_expected():
    spec = ViewSpec("simpleview", 8)
    with pytest.raises(ValueError, match="7 views per step of a rig with 6 cameras"):
        draw_cameras(2, 6, 7)
    with pytest.raises(ValueError, match="a row for each cloud"):
        project_chosen(spec, clouds(2), torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="cameras go up to 6; the rig 'simpleview' has 6"):
        project_chosen(spec, clouds(1), torch.tensor([[6]]))
