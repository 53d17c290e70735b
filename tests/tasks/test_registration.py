"""Metrics of registration: against scipy, and against the known figures of doing nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pointcmt.tasks.registration import (
    euler_degrees,
    metrics_table,
    modified_chamfer,
    registration_metrics,
    rotation_errors,
    translation_errors,
    without_symmetric,
)


def about(axis: str, degrees: float) -> np.ndarray:
    return Rotation.from_euler(axis, degrees, degrees=True).as_matrix()


def protocol_poses(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    angles = random.uniform(0, 45, (count, 3))
    rotations = np.stack([about("x", x) @ about("y", y) @ about("z", z) for x, y, z in angles])
    return rotations, random.uniform(-0.5, 0.5, (count, 3))


def test_extrinsic_zyx_of_the_angles_is_rx_ry_rz():
    angles = np.array([[10.0, 20.0, 30.0], [44.0, 1.0, 3.0]])  # z, y, x
    product = np.stack([about("x", x) @ about("y", y) @ about("z", z) for z, y, x in angles])
    np.testing.assert_allclose(euler_degrees(product), angles, atol=1e-9)
    np.testing.assert_allclose(Rotation.from_euler("zyx", angles, degrees=True).as_matrix(), product)


def test_doing_nothing_has_the_known_figures():
    rotation, translation = protocol_poses(20000)
    identity, still = np.broadcast_to(np.eye(3), rotation.shape), np.zeros_like(translation)
    found = registration_metrics(identity, still, rotation, translation)
    assert found["rotation_rmse"] == pytest.approx(25.99, abs=0.15)
    assert found["rotation_mae"] == pytest.approx(22.5, abs=0.15)
    assert found["rotation_r2"] == pytest.approx(-3.0, abs=0.05)
    assert found["rotation_error"] == pytest.approx(44.8, abs=0.6)
    assert found["translation_rmse"] == pytest.approx(0.289, abs=0.003)
    assert found["translation_mae"] == pytest.approx(0.250, abs=0.003)
    assert found["translation_error"] == pytest.approx(0.48, abs=0.005)
    assert found["translation_r2"] == pytest.approx(0, abs=0.01)
    other = registration_metrics(identity, still, rotation, translation, convention="xyz")
    assert other["rotation_rmse"] == pytest.approx(28.1, abs=0.15)
    assert other["rotation_mae"] == pytest.approx(24.1, abs=0.15)


def test_right_poses_have_no_error():
    rotation, translation = protocol_poses(50)
    found = registration_metrics(torch.from_numpy(rotation), translation, rotation, translation)
    assert found["rotation_rmse"] < 1e-9 and found["rotation_r2"] == pytest.approx(1)
    assert found["recall_5_0.05"] == found["recall_10_0.1"] == 1


def test_isotropic_errors_are_scipys_magnitude_also_when_tiny_and_at_half_a_turn():
    random = np.random.default_rng(1)
    truth = Rotation.random(200, random)
    estimate = Rotation.random(200, random)
    expected = np.degrees((truth.inv() * estimate).magnitude())
    np.testing.assert_allclose(rotation_errors(estimate.as_matrix(), truth.as_matrix()), expected, atol=1e-5)
    for degrees in (1e-5, 179.99):
        found = rotation_errors(about("y", degrees)[None], np.eye(3)[None])
        np.testing.assert_allclose(found, degrees, rtol=1e-4)
    np.testing.assert_allclose(translation_errors([[3.0, 4.0, 0.0]], [[0.0, 0.0, 0.0]]), 5)


def test_recall_needs_both_the_angle_and_the_place():
    rotation = np.stack([about("z", 4), about("z", 4), about("z", 7)])
    translation = np.array([[0.01, 0, 0], [0.2, 0, 0], [0.01, 0, 0]])
    found = registration_metrics(rotation, translation, np.stack([np.eye(3)] * 3), np.zeros((3, 3)))
    assert found["recall_5_0.05"] == pytest.approx(1 / 3)
    assert found["recall_10_0.1"] == pytest.approx(2 / 3)


def test_modified_chamfer_is_zero_for_the_right_pose_of_clouds_that_overlap_in_part():
    random = np.random.default_rng(2)
    complete = random.standard_normal((100, 3))
    rotation, translation = about("x", 30), np.array([0.1, 0.2, 0.3])
    source, target = complete[:70], complete[30:] @ rotation.T + translation
    right = modified_chamfer(source, target, complete, rotation, translation, rotation, translation)
    assert right == pytest.approx(0, abs=1e-20)
    shift = np.array([1e-3, 0, 0])
    wrong = modified_chamfer(source, target, complete, rotation, translation + shift, rotation, translation)
    assert wrong == pytest.approx(2e-6)  # squared, each way


def test_symmetric_classes_are_left_out():
    kept = without_symmetric(torch.tensor([0, 1, 2, -1]), ["airplane", "flower pot", "Vase"])
    assert kept.tolist() == [True, False, False, True]


def test_the_table_has_a_column_for_each_method():
    rotation, translation = protocol_poses(5)
    row = registration_metrics(rotation, translation, rotation, translation, chamfer=np.zeros(5))
    table = metrics_table({"ours": row, "nothing": row}, "protocol")
    assert [column.header for column in table.columns][1:] == ["ours", "nothing"]
    assert table.row_count == len(row) and table.title == "protocol"


@pytest.mark.parametrize(
    ("rotation", "translation", "words"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), "shape"),
        (np.zeros((1, 3, 3)), np.zeros((2, 3)), "as many of each"),
        (np.full((2, 3, 3), np.nan), np.zeros((2, 3)), "not finite"),
        (np.zeros((0, 3, 3)), np.zeros((0, 3)), "as many of each"),
    ],
)
def test_bad_poses_are_named(rotation, translation, words):
    truth = np.stack([np.eye(3)] * max(1, len(translation)))
    with pytest.raises(ValueError, match=words):
        registration_metrics(rotation, translation, truth[: len(translation)], np.zeros_like(translation))
