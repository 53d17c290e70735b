"""From meshes to a student: render-views makes the images that train-teacher and cache-features read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pointcmt import ImageTeacher
from pointcmt.cli import main
from pointcmt.data import FeatureCache, MultiViewImages

pytest.importorskip("pyvista", reason="rendering needs the mesh extra: pip install pointcmt[mesh]")
trimesh = pytest.importorskip("trimesh")


QUIET = ["--no-tensorboard", "--no-progress", "--device", "cpu"]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Two classes of meshes, laid out as raw ModelNet."""
    meshes = tmp_path_factory.mktemp("meshes")
    for split, count in (("train", 4), ("test", 2)):
        for name, make in (("box", trimesh.creation.box), ("ball", trimesh.creation.icosphere)):
            folder = meshes / name / split
            folder.mkdir(parents=True)
            for number in range(count):
                shape = make()
                shape.apply_scale([1, 1 + 0.1 * number, 1])
                shape.export(folder / f"{name}_{number + 1 + 10 * (split == 'test'):04d}.off")
    return meshes


@pytest.fixture(scope="module")
def images(meshes, tmp_path_factory):
    """Folder of their rendered views, rendered by the command line."""
    out = tmp_path_factory.mktemp("images")
    code = main(["render-views", str(meshes), "--out", str(out), "--rig", "simpleview", "--size", "32"])
    if code:
        pytest.skip("no off-screen rendering here: `pointcmt render-views` says why on stderr")
    return out


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """Run folder of a teacher trained on those images."""
    out = tmp_path_factory.mktemp("run") / "teacher"
    arguments = ["train-teacher", "--out", str(out), "--images", str(images), "--size", "32"]
    arguments += ["--image-channels", "3", "--feature-dim", "16", "--holdout", "0", "--batch-size", "4"]
    arguments += ["--backbone-options", "width=0.25", "layers=(1,)", "--epochs", "2", "--accumulate", "1"]
    assert main([*arguments, *QUIET]) == 0
    return out


@pytest.fixture
def own(teacher, tmp_path):
    """A copy of that run folder, to put features into."""
    return shutil.copytree(teacher, tmp_path / "teacher")


def points(meshes):
    return ["--data", str(meshes), "--num-points", "64", "--holdout", "0"]


@pytest.mark.slow
def test_a_teacher_learns_from_rendered_meshes(images, teacher):
    assert len(list(images.rglob("*.png"))) == 2 * (4 + 2) * 6
    results = json.loads((teacher / "results.json").read_text())
    assert 0 <= results["last"]["test_oa"] <= 100
    assert (teacher / "teacher.safetensors").exists()


@pytest.mark.slow
def test_its_features_are_cached_in_the_order_of_the_clouds(meshes, images, own):
    asked = ["cache-features", "--teacher", str(own), *points(meshes), "--batch-size", "3", "--device", "cpu"]
    assert main([*asked, "--images", str(images)]) == 0
    network = ImageTeacher.load(own / "teacher.safetensors")
    files = {path.name.partition("-")[0]: path for path in (own / "features").glob("*.safetensors")}
    assert set(files) == {"train", "test"}
    for split, path in files.items():
        cache = FeatureCache.open(path, teacher_fingerprint=network.fingerprint())
        shapes = sorted((mesh.parts[-3], mesh.stem) for mesh in meshes.glob(f"*/{split}/*.off"))
        views = MultiViewImages(images, split, size=32, in_chans=3)
        assert len(cache) == len(shapes) == len(views)
        for row, (label, name) in enumerate(shapes):
            shape = f"{split}/{label}/{name}"
            with torch.no_grad():
                expected = network(views[views.shape_ids.index(shape)][0][None])
            got = cache.output(torch.tensor([row]))
            torch.testing.assert_close(got.feature, expected.feature, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_cache_features_needs_is_said(meshes, images, own, tmp_path, capsys):
    asked = ["cache-features", "--teacher", str(own), *points(meshes), "--device", "cpu"]
    assert main(asked) == 1
    assert "was trained from images" in (said := capsys.readouterr().err) and "--images" in said
    fewer = shutil.copytree(images, tmp_path / "fewer")
    for image in fewer.rglob("box_0002_*"):
        image.unlink()
    assert main([*asked, "--images", str(fewer)]) == 1
    assert "no images of 1 of 8 shapes: box_0002" in capsys.readouterr().err
    # features of other images of the same shapes are not taken for these
    assert main([*asked, "--images", str(images)]) == 0
    other = shutil.copytree(images, tmp_path / "other")
    capsys.readouterr()
    assert main([*asked, "--images", str(other)]) == 1
    assert "were made from" in (said := capsys.readouterr().err) and str(images) in said


@pytest.mark.slow
def test_images_teach_a_student(meshes, images, own, tmp_path):
    """All stages from rendered images; once the features are there, the images are not needed."""
    common = ["--teacher", str(own), *points(meshes), "--batch-size", "4", "--epochs", "1", *QUIET]
    generator = tmp_path / "generator"
    assert main(["train-generator", "--out", str(generator), *common, "--images", str(images)]) == 0
    run = tmp_path / "student"
    student = ["--student", "dgcnn", "--width", "0.125", "--feature-dim", "16", "--method", "pointcmt"]
    assert main(["train", "--out", str(run), *common, *student, "--generator", str(generator)]) == 0
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["feature_enhancement"] > 0 and last["classifier_enhancement"] > 0


@pytest.mark.slow
def test_a_folder_without_images_is_explained(tmp_path, capsys):
    code = main(["train-teacher", "--out", str(tmp_path / "teacher"), "--images", str(tmp_path / "nowhere")])
    assert code == 1
    assert "nowhere" in capsys.readouterr().err
