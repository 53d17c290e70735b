"""The Princeton shape and segmentation benchmarks, on their real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import princeton
from pointcmt.data import DataOptions, subset
from pointcmt.data.parts import LabeledPSB
from pointcmt.data.princeton import PrincetonShapes, mesh_of, meshes_of, read_pack
from pointcmt.views.mesh_files import read_mesh

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def folder(name: str, file: str) -> Path:
    if not (DATA / name / file).is_file():
        pytest.skip(f"{file} is not in {DATA / name}")
    return DATA / name


def test_parts_follow_their_points() -> None:
    root = folder("labeled_psb_parts", "labeled_psb.h5")
    train, test = LabeledPSB(root, "train", normals=True), LabeledPSB(root, "test", 512)
    assert (len(train), len(test), train.num_classes, len(train.part_names)) == (285, 95, 19, 94)
    for part in (train, test):
        of_part = np.array([name.split("/")[0] for name in part.part_names])[part.point_labels]
        assert (of_part == np.array(part.class_names)[part.labels][:, None]).all(), (
            "parts are of the category"
        )
        np.testing.assert_array_equal(part.category, part.labels)
    np.testing.assert_allclose(np.linalg.norm(train.normals, axis=2), 1, atol=2e-2)
    np.testing.assert_allclose(np.linalg.norm(train.points, axis=2).max(1), 1, atol=2e-2)
    batch = subset(train, [7]).batch([0])
    assert batch.point_labels.shape == (1, 2048) and batch.normals.shape == (1, 2048, 3)
    options = DataOptions(str(root), num_points=256, holdout=0.2)
    assert options.named() == "labeled_psb"
    with pytest.warns(UserWarning, match="does not record which axis"):
        splits = options.load()
    assert len(splits.train) == 228 and splits.train.point_labels.shape == (228, 256)


def test_official_split_and_coarser_classes(tmp_path: Path) -> None:
    root = folder("psb", "psb_meshes.h5")
    course = PrincetonShapes(root, "train", 32, course=True, per_class=1)
    assert course.num_classes == 36 == len(course) and {"AircraftBuoyant", "Car"} <= set(course.class_names)
    named = DataOptions(str(root), "princeton36", num_points=16, test_per_class=3).build("test", 3)
    assert named.class_names == course.class_names and len(named) == 36 * 3
    train = PrincetonShapes(root, "train", 32, per_class=2, cache_dir=tmp_path)
    test = PrincetonShapes(root, "test", 32, level=1, per_class=3, dense_points=48)
    assert (
        train.num_classes == 29
        and len(train) == 58
        and set(train.class_names) >= {"vehicle/car", "animal/biped"}
    )
    assert {"animal", "furniture", "vehicle"} < set(test.class_names) and test.view_points.shape[1:] == (
        48,
        3,
    )
    assert train.shape_ids[0].startswith("train/") and train.shape_ids[0].count("/") == 2
    np.testing.assert_allclose(np.linalg.norm(train.points, axis=2).max(1), 1, atol=1e-5)
    again = PrincetonShapes(root, "train", 32, per_class=2, cache_dir=tmp_path)
    assert again.fingerprint() == train.fingerprint() and len(list(tmp_path.iterdir())) == 1


def test_meshes_are_written_for_the_renderer(tmp_path: Path) -> None:
    path, pack = read_pack(folder("psb", "psb_meshes.h5"))
    vertices, faces = mesh_of(pack, 7, str(path))
    princeton.write_ply(tmp_path / "m.ply", vertices, faces)
    again, same = read_mesh(tmp_path / "m.ply")
    np.testing.assert_array_equal(np.asarray(again, dtype=np.float32), vertices.astype(np.float32))
    np.testing.assert_array_equal(same, faces)


def test_images_are_linked_by_split_and_class(tmp_path: Path) -> None:
    root = folder("psb", "psb_meshes.h5")
    shape = next(name for name in PrincetonShapes(root, "test", 1, course=True).shape_ids if "/Car/" in name)
    mesh = shape.rsplit("/", 1)[1]
    image = tmp_path / "rendered/test/psb" / f"{mesh}_001.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    assert princeton.link(tmp_path / "rendered", root, tmp_path, "princeton36") == 1
    assert (tmp_path / "princeton36/test/Car" / image.name).samefile(image)


def test_meshes_to_render_are_those_that_clouds_are_sampled_from(tmp_path: Path) -> None:
    root = folder("psb", "psb_meshes.h5")
    raw = PrincetonShapes(root, "train", 64, per_class=1, normals=True, normalize=False)
    meshes = meshes_of(root, "train")
    np.testing.assert_allclose(np.linalg.norm(raw.points[..., 3:], axis=2), 1, atol=1e-3)
    for name, cloud in zip(raw.shape_ids[:5], raw.points[:5, :, :3], strict=True):
        vertices, faces = meshes[Path(name)]()
        used = vertices[faces.ravel()]
        assert (cloud >= used.min(0) - 1e-3).all() and (cloud <= used.max(0) + 1e-3).all()
    scaled = PrincetonShapes(root, "train", 64, per_class=1)
    assert scaled.shape_ids == raw.shape_ids
    assert np.abs(scaled.points.mean(1)).max() < 1e-5 < np.abs(raw.points[..., :3].mean(1)).max()
