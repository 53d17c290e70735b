"""Changes to views: a ladder from nothing to strong, each image by itself, depth not taken for colour."""

from __future__ import annotations

import pytest
import torch

from pointcmt.views.augmentation import ViewAugmentation, crosspoint_level, spread, view_levels


def test_the_ladder_goes_from_nothing_to_strong():
    torch.manual_seed(0)
    # waves: what a crop or a blur moves is the difference
    grid = torch.linspace(0, 6.28, 32)
    image = (0.5 + 0.25 * (grid.sin()[:, None] + (2 * grid).cos())).expand(16, 4, 3, 32, 32)
    changed = ViewAugmentation(view_levels(32))(image)
    assert changed.shape == image.shape
    moved = (changed - image).abs().mean((0, 2, 3, 4))
    assert torch.equal(changed[:, 0], image[:, 0])
    assert 0 < moved[1] < moved[3]
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-6
    # each image is changed by itself
    assert not torch.equal(changed[0, 3], changed[1, 3])


def test_levels_are_spread_over_the_views():
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert spread(2, 4) == [0, 3]
    assert spread(3, 1) == [0, 0, 0]
    assert len(view_levels(16, 2)) == 2 and len(view_levels(16, 1)) == 1


def test_depth_is_not_clamped_like_colours():
    """Distances reach beyond 1, and there are channels of normals, which are negative."""
    torch.manual_seed(0)
    depth = 2 + 0.1 * torch.rand(4, 4, 4, 16, 16)
    depth[:, :, 1:] = -0.5
    changed = ViewAugmentation(view_levels(16, photographs=False))(depth)
    assert changed.shape == depth.shape
    assert changed[:, :, 0].min() > 1 and changed[:, :, 1:].max() < 0
    assert ViewAugmentation([crosspoint_level(photographs=False)])(depth)[:, :, 0].amax() > 1


def test_the_seed_fixes_it():
    images = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    change = ViewAugmentation(view_levels(16))
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(change(images))
    assert torch.equal(*runs)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="levels is 5; expected 1 to 4"):
        view_levels(16, 5)
    with pytest.raises(ValueError, match="levels is empty"):
        ViewAugmentation([])
    with pytest.raises(ValueError, match=r"expected \[B, V, C, H, W\]"):
        ViewAugmentation([crosspoint_level()])(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="give it the images' own size"):
        ViewAugmentation(view_levels(12, 1))(torch.zeros(1, 1, 3, 8, 8))
