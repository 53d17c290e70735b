"""What is measured of a set before training, on shapes whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pointcmt.data import ModelNet40, SyntheticShapes, guess_up, subset
from pointcmt.data.checks import check_coordinates, frame_of


@pytest.mark.parametrize("turn", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_synthetic_shapes_stand(turn: tuple[int, int, int]) -> None:
    data = SyntheticShapes("train", 256, per_class=6)
    guess = guess_up(data.points[..., turn], data.labels)
    assert guess.axis == "xyz"[turn.index(2)] and guess.clear
    for axis in "xyz":
        assert guess.contradicts(axis) == (axis != guess.axis)  # type: ignore[arg-type]
    one = subset(data, data.labels == 0)
    assert not guess_up(one.points, one.labels).contradicts("x"), "one class says too little to warn"


def test_real_modelnet40_is_z_up_and_a_turned_copy_is_found(modelnet40_root) -> None:
    """Over subsets of ten classes: the rates that the margin was chosen by, on the real shapes."""
    data = ModelNet40(modelnet40_root, "test", 256, per_class=20)
    each = [guess_up((part := subset(data, data.labels == k)).points, part.labels).scores for k in range(40)]
    rng = np.random.default_rng(0)
    wrong = found = 0
    for _ in range(300):
        mean = np.mean([each[k] for k in rng.choice(40, 10, replace=False)], axis=0)
        wrong += mean.max() > 1.3 * mean[2]
        found += mean.max() > 1.3 * mean[1]
    assert wrong <= 3 and found >= 270
    whole = guess_up(data.points, data.labels)
    assert whole.axis == "z" and whole.clear and not whole.contradicts("z") and whole.contradicts("y")


def test_guess_of_nothing() -> None:
    assert guess_up(np.zeros((0, 8, 3)), np.zeros(0, int)).scores == (0, 0, 0)
    flat = guess_up(np.zeros((4, 8, 3)), np.arange(4))
    assert not flat.clear and not flat.contradicts("z")


def test_frames() -> None:
    points = np.random.default_rng(0).standard_normal((5, 200, 3))
    points /= np.linalg.norm(points, axis=2).max(1)[:, None, None]
    assert frame_of(points).problem() is None
    for other in (points * 1000, points + np.array([3, 0, 0]), points * 0.2):
        assert "--normalize True" in (frame_of(other.astype(np.float32)).problem() or "")
    centimetres = frame_of(points * 100)
    assert centimetres.radius == pytest.approx(100) and centimetres.part_outside > 0.9


def test_absurd_coordinates() -> None:
    points = np.random.default_rng(0).standard_normal((3, 50, 6)).astype(np.float32)
    check_coordinates(points, list("abc"))
    check_coordinates(points * 1e9, list("abc"))  # large units are not absurd
    check_coordinates(np.zeros((2, 4, 3), np.float32), list("ab"))
    for value in (np.nan, -np.inf, 2e30, 1e8):
        broken = points.copy()
        broken[1, 31, 4 if value != 1e8 else 0] = value
        with pytest.raises(ValueError, match=r"shape 'b' \(row 1\): point 31 is \["):
            check_coordinates(broken, list("abc"))
