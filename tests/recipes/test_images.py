"""From meshes to a teacher: render-views makes the images that train-teacher --images reads."""

from __future__ import annotations

import json

import pytest

from pointcmt.cli import main

pytest.importorskip("pyvista", reason="rendering needs the mesh extra: pip install pointcmt[mesh]")
trimesh = pytest.importorskip("trimesh")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of rendered views of two classes of meshes, rendered by the command line."""
    meshes, out = tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("images")
    for split, count in (("train", 4), ("test", 2)):
        for name, make in (("box", trimesh.creation.box), ("ball", trimesh.creation.icosphere)):
            folder = meshes / name / split
            folder.mkdir(parents=True)
            for number in range(count):
                shape = make()
                shape.apply_scale([1, 1 + 0.1 * number, 1])
                shape.export(folder / f"{name}_{number + 1:04d}.off")
    code = main(["render-views", str(meshes), "--out", str(out), "--rig", "simpleview", "--size", "32"])
    if code:
        pytest.skip("no off-screen rendering here: `pointcmt render-views` says why on stderr")
    return out


@pytest.mark.slow
def test_a_teacher_learns_from_rendered_meshes(images, tmp_path):
    assert len(list(images.rglob("*.png"))) == 2 * (4 + 2) * 6
    arguments = ["train-teacher", "--out", str(tmp_path / "teacher"), "--images", str(images), "--size", "32"]
    arguments += ["--image-channels", "3", "--feature-dim", "16", "--holdout", "0", "--batch-size", "4"]
    arguments += ["--backbone-options", "width=0.25", "layers=(1,)", "--epochs", "2", "--accumulate", "1"]
    assert main([*arguments, "--no-tensorboard", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "teacher" / "results.json").read_text())
    assert 0 <= results["last"]["test_oa"] <= 100
    assert (tmp_path / "teacher" / "teacher.safetensors").exists()


@pytest.mark.slow
def test_a_folder_without_images_is_explained(tmp_path, capsys):
    code = main(["train-teacher", "--out", str(tmp_path / "teacher"), "--images", str(tmp_path / "nowhere")])
    assert code == 1
    assert "nowhere" in capsys.readouterr().err
