"""Parts of a set: subsets and held-out parts keep what they were cut from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pointcmt.data import PointDataset, holdout, subset
from pointcmt.data.dataset import in_unit_sphere
from pointcmt.data.loading import epoch_order


def random_set(seed: int, count: int = 40, classes: int = 4, dense: int | None = None) -> PointDataset:
    rng = np.random.default_rng(seed)
    return PointDataset(
        rng.standard_normal((count, 8, 3)),
        rng.integers(0, classes, count),
        [f"class{k}" for k in range(classes)],
        [f"shape_{k:04d}" for k in range(count)],
        None if dense is None else rng.standard_normal((count, dense, 3)),
    )


def test_subset_keeps_attributes() -> None:
    data = random_set(0, dense=12)
    for rows in ([5, 3, 30], np.array([5, 3, 30]), torch.tensor([5, 3, 30])):
        part = subset(data, rows)
        np.testing.assert_array_equal(part.points, data.points[[5, 3, 30]])
        np.testing.assert_array_equal(part.view_points, data.view_points[[5, 3, 30]])
        np.testing.assert_array_equal(part.labels, data.labels[[5, 3, 30]])
        assert part.shape_ids == ["shape_0005", "shape_0003", "shape_0030"]
        assert part.class_names == data.class_names
        assert part.source_index.tolist() == [5, 3, 30]
        assert [part[k][2] for k in range(3)] == [0, 1, 2]
    assert subset(part, [2, 0]).source_index.tolist() == [30, 5], "rows of the first set, not of the last"
    mask = np.zeros(40, dtype=bool)
    mask[[3, 9]] = True
    assert subset(data, mask).source_index.tolist() == [3, 9]
    assert len(subset(data, [])) == 0


def test_changing_an_item_in_place_leaves_the_set_alone() -> None:
    data = random_set(0)
    before = data.points.copy()
    data[3][0].mul_(2)
    np.testing.assert_array_equal(data.points, before)


@pytest.mark.parametrize("rows", [[40], [-1], np.ones(3, dtype=bool)])
def test_subset_outside(rows) -> None:
    with pytest.raises(ValueError, match="set of 40"):
        subset(random_set(0), rows)


def test_fingerprint_is_of_the_contents() -> None:
    data = random_set(1)
    assert data.fingerprint() == random_set(1).fingerprint() == subset(data, range(40)).fingerprint()
    others = [
        random_set(2),
        random_set(1, dense=5),
        subset(data, range(39)),
        subset(data, [1, 0, *range(2, 40)]),
    ]
    renamed = random_set(1)
    renamed.shape_ids[3] = "other_0001"
    nudged = random_set(1)
    nudged.points[7, 2, 1] = np.nextafter(nudged.points[7, 2, 1], np.float32(9))
    prints = {other.fingerprint() for other in [data, *others, renamed, nudged]}
    assert len(prints) == 7


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_holdout_is_stratified(fraction: float) -> None:
    data = random_set(3, 200)
    kept, held = holdout(data, fraction, seed=5)
    together = np.concatenate([kept.source_index, held.source_index])
    assert sorted(together.tolist()) == list(range(200))
    for label in range(4):
        size = (data.labels == label).sum()
        assert (held.labels == label).sum() == pytest.approx(fraction * size, abs=0.51)
    assert holdout(data, fraction, seed=5)[1].fingerprint() == held.fingerprint()
    assert holdout(data, fraction, seed=6)[1].fingerprint() != held.fingerprint()


def test_holdout_leaves_small_classes_on_both_sides() -> None:
    data = subset(random_set(4, 60), [])
    data = PointDataset(np.zeros((5, 2, 3)), np.array([0, 0, 1, 1, 2]), list("abc"), list("vwxyz"))
    kept, held = holdout(data, 0.05)
    assert kept.labels.tolist() == [0, 1, 2] and held.labels.tolist() == [0, 1]
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match="fraction"):
            holdout(data, fraction)


def test_set_that_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        PointDataset(np.zeros((4, 3)), np.zeros(4), ["a"], list("wxyz"))
    with pytest.raises(ValueError, match="4 clouds, 3 labels"):
        PointDataset(np.zeros((4, 2, 3)), np.zeros(3), ["a"], list("wxyz"))
    with pytest.raises(ValueError, match="labels run from 0 to 1"):
        PointDataset(np.zeros((2, 2, 3)), np.arange(2), ["a"], list("wx"))
    with pytest.raises(ValueError, match="view_points"):
        PointDataset(np.zeros((2, 2, 3)), np.zeros(2), ["a"], list("wx"), np.zeros((3, 2, 3)))


def test_labels_are_whole_numbers_with_a_name() -> None:
    """Case 25: a label of -1, or above the names."""
    points, ids = np.zeros((3, 2, 3)), list("xyz")
    for labels, words in (
        ([0, 0.5, 1], "expected whole numbers"),
        ([0, np.nan, 1], "expected whole numbers"),
        ([0, -1, 1], r"shape 'y' \(row 1\) has label -1"),
        ([0, 1, 2], r"shape 'z' \(row 2\) has label 2.*2 class names"),
        (["a", "b", "a"], "expected whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            PointDataset(points, np.array(labels), ["a", "b"], ids)
    assert PointDataset(points, np.array([0.0, 1.0, 1.0]), ["a", "b"], ids).labels.dtype == np.int64
    with pytest.raises(ValueError, match="up is 'up'"):
        PointDataset(points, np.zeros(3), ["a"], ids, up="up")  # type: ignore[arg-type]


def test_into_the_unit_sphere_with_the_views() -> None:
    points = 5 + np.random.default_rng(0).standard_normal((3, 50, 6)).astype(np.float32)
    normal, dense = in_unit_sphere(points[:, :40], points[..., :3])
    np.testing.assert_allclose(normal[..., :3].mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normal[..., :3], axis=2).max(1), 1, atol=1e-6)
    np.testing.assert_array_equal(normal[..., 3:], points[:, :40, 3:])
    np.testing.assert_allclose(dense[:, :40], normal[..., :3], atol=1e-5)
    np.testing.assert_array_equal(in_unit_sphere(np.full((1, 4, 3), 0.25), None)[0], 0)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): epoch_order(53, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    np.random.seed(5)
    np.testing.assert_array_equal(epoch_order(53, 1, 1), orders[1, 1])
    assert sorted(orders[0, 0]) == list(range(53)) == epoch_order(53, 1, 1, shuffle=False).tolist()
