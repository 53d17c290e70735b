"""ModelNet40Hard on real shapes: cut, cluttered, off-centre, and always the same."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pointcmt.data import ModelNet40, ModelNet40Hard


@pytest.fixture(scope="module")
def hard(modelnet40_root: Path) -> ModelNet40Hard:
    return ModelNet40Hard(modelnet40_root, "test", 512, per_class=6, seed=7)


def test_frame_and_labels(hard: ModelNet40Hard, modelnet40_root: Path) -> None:
    clean = ModelNet40(modelnet40_root, "test", 512, per_class=6, seed=7)
    assert hard.shape_ids == clean.shape_ids
    np.testing.assert_array_equal(hard.labels, clean.labels)
    assert hard.points.shape == clean.points.shape and np.isfinite(hard.points).all()
    np.testing.assert_allclose(np.linalg.norm(hard.points, axis=2).max(1), 1, atol=1e-5)


def test_shapes_are_cut_and_clutter_comes_in(hard: ModelNet40Hard) -> None:
    part = hard.foreground.mean(1)
    assert part.min() > 0, "a cloud without any of its object"
    assert 0.5 < part.mean() < 0.95
    assert (part < 0.95).mean() > 0.5, "too few clouds have clutter"


def test_objects_are_off_centre_by_up_to_half_their_size(hard: ModelNet40Hard) -> None:
    """The box's centre is the origin; what is left of the object lies to one side of it."""
    offset = []
    for cloud, own in zip(hard.points, hard.foreground, strict=True):
        low, high = cloud[own].min(0), cloud[own].max(0)
        offset.append(np.abs((low + high) / 2) / np.maximum(np.ptp(cloud, axis=0) / 2, 1e-6))
    assert 0.1 < np.mean(offset) < 0.5
    # nor is the cloud centred again on what was kept
    assert np.abs(hard.points.mean(1)).mean() > 0.05


def test_fixed_by_seed(hard: ModelNet40Hard, modelnet40_root: Path, tmp_path: Path) -> None:
    for _ in ("made", "read from the cache"):
        again = ModelNet40Hard(modelnet40_root, "test", 512, per_class=6, seed=7, cache_dir=tmp_path)
        assert again.fingerprint() == hard.fingerprint()
        np.testing.assert_array_equal(again.foreground, hard.foreground)
    assert len(list(tmp_path.iterdir())) == 1
    other = ModelNet40Hard(modelnet40_root, "test", 512, per_class=6, seed=8)
    assert other.fingerprint() != hard.fingerprint()


def test_refuses_what_makes_no_sense(modelnet40_root: Path) -> None:
    with pytest.raises(ValueError, match="min_visible is 0"):
        ModelNet40Hard(modelnet40_root, "test", min_visible=0)
    with pytest.raises(ValueError, match="num_points is 0"):
        ModelNet40Hard(modelnet40_root, "test", 0)


def test_shapes_stand_on_the_axis_that_the_set_records(tmp_path: Path) -> None:
    """A y-up copy gives the same scenes, y up: turned, on a floor, and cut as the z-up set's are."""
    rng = np.random.default_rng(0)
    points = rng.random((6, 200, 3)).astype(np.float32) * [1, 0.5, 0.8] - 0.4
    made = {}
    for up, axes in (("z", [0, 1, 2]), ("y", [1, 2, 0])):  # (z, x, y) of the y-up copy are (x, y, z)
        folder = tmp_path / up
        folder.mkdir()
        with h5py.File(folder / "ply_data_train0.h5", "w") as file:
            file["data"], file["label"] = points[..., axes].astype(np.float32), np.arange(6) % 2
        (folder / "shape_names.txt").write_text("a\nb\n")
        made[up] = ModelNet40Hard(folder, "train", 128, up=up)  # type: ignore[arg-type]
        assert made[up].up == up
    np.testing.assert_allclose(made["y"].points, made["z"].points[..., [1, 2, 0]], atol=1e-6)
    np.testing.assert_array_equal(made["y"].foreground, made["z"].foreground)
