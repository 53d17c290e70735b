"""SyntheticShapes: deterministic, varied, drawn from the surface, not trivially told apart."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.neighbors import KNeighborsClassifier

from pointcmt.data import SyntheticShapes
from pointcmt.data.primitives import box, cylinder, join, lathe, sample, slab, tube


def area(mesh) -> float:
    corner = mesh.vertices[mesh.faces]
    return (
        np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1).sum() / 2
    )


def test_areas_of_primitives() -> None:
    """Against the formulas of solid geometry; round ones within what their facets lose."""
    assert area(box(1, 2, 3)) == pytest.approx(22)
    assert area(slab([(0, 0), (2, 0), (2, 1), (0, 1)], 0.5)) == pytest.approx(2 * 2 + 6 * 0.5)
    assert area(cylinder(1, 2, around=200)) == pytest.approx(2 * np.pi + 4 * np.pi, rel=1e-3)
    assert area(lathe([(1, 0), (0, 1)], 200)) == pytest.approx(np.pi * np.sqrt(2), rel=1e-3)
    assert area(tube([(0, 0, 0), (1, 2, 2)], 0.1, 200)) == pytest.approx(2 * np.pi * 0.1 * 3, rel=1e-3)
    ring = np.linspace(0, 2 * np.pi, 401)
    torus = tube(np.column_stack([np.cos(ring), np.sin(ring), 0 * ring]), 0.1, 100)
    assert area(torus) == pytest.approx(4 * np.pi**2 * 0.1, rel=1e-2)


def test_sampling_is_uniform_by_area() -> None:
    mesh = join([box(1, 1, 1), box(2, 2, 2, (10, 0, 0))])
    points = sample(mesh, 20000, np.random.default_rng(0))
    assert (points[:, 0] > 5).mean() == pytest.approx(24 / 30, abs=0.015)
    # and within a face: the unit box's top
    top = points[(np.abs(points[:, 2] - 1) < 1e-9) & (points[:, 0] < 5)]
    counts, _, _ = np.histogram2d(top[:, 0], top[:, 1], bins=2)
    assert counts.max() / counts.min() < 1.35


def test_contract() -> None:
    data = SyntheticShapes("train", 64, per_class=3, seed=4)
    assert len(data) == 48 and data.num_classes == 16 and data.points.dtype == np.float32
    assert data.class_names == sorted(data.class_names)
    assert len(set(data.shape_ids)) == 48
    points, label, index = data[-1]
    assert points.shape == (64, 3) and label == 15 and index == 47
    np.testing.assert_allclose(np.linalg.norm(data.points, axis=2).max(1), 1, atol=1e-5)
    np.testing.assert_allclose(data.points.mean(1), 0, atol=1e-5)


def test_deterministic_by_seed_and_by_shape() -> None:
    few = SyntheticShapes("train", 64, per_class=2, seed=4)
    assert few.fingerprint() == SyntheticShapes("train", 64, per_class=2, seed=4).fingerprint()
    more = SyntheticShapes("train", 64, per_class=5, seed=4)
    for row, shape in enumerate(few.shape_ids):
        np.testing.assert_array_equal(few.points[row], more.points[more.shape_ids.index(shape)])
    for other in (
        SyntheticShapes("train", 64, per_class=2, seed=5),
        SyntheticShapes("test", 64, per_class=2, seed=4),
    ):
        assert not (other.points == few.points).all((1, 2)).any()


def test_points_lie_on_the_mesh() -> None:
    """Without noise a point is as near the mesh as samples of it are dense, also of a part seen."""
    data = SyntheticShapes("test", 64, per_class=1, noise=0.0, occlusion=0.5)
    for index in range(0, 16, 3):
        dense = sample(data.mesh(index), 40000, np.random.default_rng(1))
        distance, _ = cKDTree(dense).query(data.points[index])
        assert distance.max() < 0.05 and distance.mean() < 0.015


def test_dense_points_show_the_whole_shape() -> None:
    data = SyntheticShapes("train", 128, per_class=4, dense_points=512, occlusion=0.6)
    assert data.view_points.shape == (64, 512, 3)
    # in one frame: a point of the cloud has a view point near it, though the cloud is but a part
    distance = np.sqrt(((data.points[:, :, None] - data.view_points[:, None]) ** 2).sum(-1))
    assert np.median(distance.min(2)) < 0.06
    assert np.median(distance.min(1).max(1)) > 0.3
    assert (SyntheticShapes("train", 128, per_class=4).view_points.shape) == (64, 128, 3)


def test_few_classes_are_the_ones_hard_to_tell_apart() -> None:
    names = SyntheticShapes("train", 8, per_class=1, num_classes=4).class_names
    assert names == ["bench", "chair", "stool", "table"]


def test_hard_enough_and_learnable() -> None:
    """What simple descriptors reach: far above chance, far from perfect."""

    def describe(data: SyntheticShapes) -> np.ndarray:
        radius = np.sort(np.linalg.norm(data.points, axis=2), 1)[:, ::16]
        return np.hstack([radius, np.sort(data.points[..., 2], 1)[:, ::16], 2 * data.points.std(1)])

    train = SyntheticShapes("train", 256, per_class=30)
    test = SyntheticShapes("test", 256, per_class=15)
    neighbour = KNeighborsClassifier(3).fit(describe(train), train.labels)
    accuracy = neighbour.score(describe(test), test.labels)
    assert 0.4 < accuracy < 0.85


def test_within_class_variation() -> None:
    """No two shapes of a class are alike, even before noise, turning and occlusion."""
    data = SyntheticShapes("train", 256, per_class=6, noise=0, occlusion=0, yaw=0)
    extent = np.ptp(data.points, axis=1)
    for label in range(data.num_classes):
        own = extent[data.labels == label]
        gap = np.abs(own[:, None] - own[None]).max(-1) + np.eye(len(own))
        assert gap.min() > 0.005


def test_fast_enough_for_a_demo() -> None:
    started = time.process_time()
    SyntheticShapes("train", 512, per_class=20)
    assert time.process_time() - started < 5  # measured at 0.6 s


@pytest.mark.parametrize(
    "wrong",
    [{"num_classes": 17}, {"num_classes": 1}, {"per_class": 0}, {"occlusion": 1.0}, {"noise": -1}],
)
def test_wrong_values(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticShapes("train", 8, **wrong)
