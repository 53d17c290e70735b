"""The commands: training resumes to the same bits and is measured; register reads, judges, writes, draws."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcmt.cli import main
from pointcmt.recipes.register import NOT_TRUSTED, Cloud, read_cloud, write_cloud
from pointcmt.registration import CMIGNet
from pointcmt.studies.report import write_report
from pointcmt.tasks.registration import rotation_errors
from tests.registration.real import library
from tests.registration.test_align import MOTION, apply, bumpy

o3d = library("open3d")

TRAIN = [
    "train-registration", "--per-class", "2", "--test-per-class", "1", "--pair-points", "64",
    "--width", "0.06", "--keypoints", "16", "--iterations", "1", "--view-size", "8", "--views", "2",
    "--batch-size", "8", "--epochs", "2", "--baselines", "icp", "--device", "cpu", "--drawn", "6",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("registration") / "run"
    assert main([*TRAIN, "--out", str(folder)]) == 0
    return folder


def test_training_prints_the_protocol_and_figures_beside_doing_nothing(finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert set(results["test"]) >= {"CMIGNet", "nothing", "icp", "nothing (no symmetric classes)"}
    assert results["test"]["nothing"]["rotation_rmse"] == pytest.approx(26, abs=4)
    assert 0.7 < results["overlap"] < 0.85 and "independent" in results["protocol"]
    assert main(["evaluate", str(finished), "--json", str(finished / "again.json")]) == 0
    printed = capsys.readouterr().out
    assert (
        "rotation error" in printed and "nothing" in printed and "sampled twice" in printed.replace("\n", " ")
    )
    again = json.loads((finished / "again.json").read_text())
    assert again["methods"] == results["test"]
    assert CMIGNet.load(finished / "registration.safetensors").config["points"] == 48


def test_the_report_shows_pairs_curves_and_what_was_changed(finished, tmp_path):
    curves = json.loads((finished / "curves.json").read_text())
    assert set(curves["errors"]) == {"CMIGNet", "nothing", "icp"} and curves["noise"][0] == "0"
    nothing = curves["errors"]["nothing"]
    assert nothing["0"] == nothing["0.06"]  # noise moves no cloud, so doing nothing is as wrong with it
    assert all(len(values) == len(curves["overlap"]) for values in nothing.values())
    for name in ("one", "other"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    config = json.loads((tmp_path / "runs/other/config.json").read_text())
    config["config"]["network"]["mask"] = False
    (tmp_path / "runs/other/config.json").write_text(json.dumps(config))
    page = write_report(tmp_path / "runs").read_text()
    assert "network.mask False" in page and page.count("data:image/png;base64,") == 4
    error = json.loads((finished / "results.json").read_text())["test"]["CMIGNet"]["rotation_error"]
    assert f"{error:.2f}" in page and "independent: 64 points" in page


def test_a_stopped_run_resumes_to_the_same_bits(finished, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert main([*TRAIN, *out, "--minutes", "0.000001"]) == 1  # stops after its first epoch
    assert main([*TRAIN, *out, "--resume"]) == 0
    whole = CMIGNet.load(finished / "registration.safetensors").state_dict()
    resumed = CMIGNet.load(tmp_path / "run" / "registration.safetensors").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-m", "pointcmt", *TRAIN, "--out", str(out)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (out / "state.pt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (out / "results.json").exists()
    assert main([*TRAIN, "--out", str(out), "--resume"]) == 0
    whole, resumed = (json.loads((path / "results.json").read_text())["test"] for path in (finished, out))
    assert whole == resumed
    files = [CMIGNet.load(path / "registration.safetensors").state_dict() for path in (finished, out)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize(
    "options",
    [
        ["--unseen", "--protocol", "rpmnet", "--holdout", "0", "--images", "canonical"],
        ["--protocol", "prnet", "--images", "none", "--overlap-contrast", "0", "--no-mask"],
    ],
)
def test_other_protocols_and_switches_train(options, tmp_path):
    assert main([*TRAIN, "--epochs", "1", *options, "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["unseen"] == ("--unseen" in options)


def save(path: Path, points: np.ndarray, normals: np.ndarray | None = None) -> Path:
    if path.suffix == ".npy":
        np.save(path, points if normals is None else np.concatenate([points, normals], 1))
    elif path.suffix == ".xyz":
        np.savetxt(path, points)
    elif path.suffix == ".obj":
        path.write_text("".join(f"v {x} {y} {z}\n" for x, y, z in points))
    else:
        cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
        if normals is not None:
            cloud.normals = o3d.utility.Vector3dVector(normals)
        assert o3d.io.write_point_cloud(str(path), cloud)
    return path


@pytest.mark.parametrize("suffix", [".ply", ".pcd", ".xyz", ".obj", ".npy"])
def test_every_format_is_read(suffix, tmp_path):
    points = bumpy(50)
    read = read_cloud(save(tmp_path / f"cloud{suffix}", points))
    np.testing.assert_allclose(read.points, points, atol=1e-6)
    assert read.normals is None


def test_a_mesh_gives_points_on_its_surface(tmp_path):
    path = tmp_path / "square.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3\nf 1 3 4\n")
    cloud, again = read_cloud(path), read_cloud(path)
    assert len(cloud.points) > 1000 and np.ptp(cloud.points[:, 2]) == 0
    np.testing.assert_array_equal(cloud.points, again.points)
    np.testing.assert_allclose(np.abs(cloud.normals[:, 2]), 1)


def test_what_is_written_is_what_is_read(tmp_path):
    points, normals = bumpy(20), bumpy(20, seed=1)
    colors = np.random.default_rng(0).integers(0, 256, (20, 3)) / 255
    write_cloud(tmp_path / "cloud.ply", Cloud(points, normals, colors=colors))
    read = read_cloud(tmp_path / "cloud.ply")
    np.testing.assert_array_equal(read.points, points)
    np.testing.assert_allclose(read.normals, normals, atol=1e-6)
    np.testing.assert_allclose(read.colors, colors, atol=1e-6)


def test_register_prints_writes_and_draws(tmp_path, capsys):
    points = bumpy()
    normals = points / np.linalg.norm(points, axis=1, keepdims=True)
    source = save(tmp_path / "a.npy", points, normals)
    target = save(tmp_path / "b.ply", apply(bumpy(seed=1)))
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    code = main(
        ["register", str(source), str(target), "--refine", "--out", str(out), "--picture", str(picture)]
    )
    printed = capsys.readouterr().out
    assert code == 0 and "fitness" in printed and "overlap" in printed and "DO NOT USE" not in printed
    shown = np.array([[float(x) for x in line.split()] for line in printed.splitlines()[:4]])
    matrix = np.loadtxt(out / "matrix.txt")
    np.testing.assert_allclose(shown, matrix, rtol=1e-7, atol=1e-12)
    assert rotation_errors(matrix[None, :3, :3], MOTION[None, :3, :3])[0] < 1
    moved = read_cloud(out / "moved.ply")
    np.testing.assert_allclose(moved.points, apply(points, matrix), atol=1e-12)
    np.testing.assert_allclose(moved.normals, normals @ matrix[:3, :3].T, atol=1e-6)
    result = json.loads((out / "result.json").read_text())
    assert result["trusted"] and result["reasons"] == [] and result["inliers"] > 15
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_network_that_ships_is_better_than_doing_nothing(tmp_path):
    from pointcmt.data import SyntheticShapes
    from pointcmt.recipes.train_registration import predict_poses
    from pointcmt.registration import PairOptions, ShapePairs
    from pointcmt.registration.align import default_model

    shapes = SyntheticShapes("test", 256, per_class=2, seed=1, dense_points=512)
    pairs = ShapePairs(shapes, PairOptions(pair_points=256), seed=1)
    poses = predict_poses(default_model(), pairs, 32, "cpu")
    error = rotation_errors(poses["rotation"], poses["true_rotation"]).mean()
    nothing = rotation_errors(np.stack([np.eye(3)] * len(pairs)), poses["true_rotation"]).mean()
    assert error < 0.6 * nothing


def test_a_result_that_cannot_be_trusted_has_its_own_exit_code(tmp_path, capsys):
    source = save(tmp_path / "a.npy", bumpy())
    target = save(tmp_path / "b.npy", np.random.default_rng(0).uniform(-1, 1, (2500, 3)))
    for method in ("fgr", "cmignet"):
        code = main(
            ["register", str(source), str(target), "--out", str(tmp_path / "out"), "--method", method]
        )
        assert code == NOT_TRUSTED == 3
        assert "DO NOT USE" in capsys.readouterr().out.replace("\n", " ")
        assert not json.loads((tmp_path / "out" / "result.json").read_text())["trusted"]


def test_points_that_are_not_finite_are_left_out_and_said(tmp_path, capsys):
    points = bumpy()
    points[:3] = np.nan
    source, target = save(tmp_path / "a.npy", points), save(tmp_path / "b.npy", bumpy(seed=1))
    assert main(["register", str(source), str(target), "--refine"]) == 0
    assert "3 of 2500 points are not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "a.ply", "cannot be read as a mesh"),
        (b"", "a.npy", "a.npy cannot be read"),
        (b"nothing", "a.pcd", "has no DATA line"),
        (b"v 0 0 0", "a.obj", "1 finite points"),
        (b"0 0 0\n", "a.stl", "no known format"),
        (None, "a.ply", "no such file"),
    ],
)
def test_bad_files_are_one_message(content, name, words, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["register", str(path), str(save(tmp_path / "b.npy", bumpy(100)))]) == 1
    assert words in capsys.readouterr().err


def test_a_model_belongs_to_its_method(tmp_path, capsys):
    cloud = str(save(tmp_path / "a.npy", bumpy(100)))
    assert main(["register", cloud, cloud, "--model", str(tmp_path)]) == 1
    assert "--method cmignet" in capsys.readouterr().err
    assert main(["register", cloud, cloud, "--model", str(tmp_path), "--method", "cmignet"]) == 1
    assert "pointcmt train-registration" in capsys.readouterr().err
