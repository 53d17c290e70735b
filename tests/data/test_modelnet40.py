"""ModelNet40 in each public form, and what a user sees when the folder is not right."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from pointcmt.data import ModelNet40
from pointcmt.data.modelnet40 import MODELNET10


def write_h5(path: Path, points: np.ndarray, labels: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=points.astype(np.float32), compression="gzip")
        file.create_dataset("label", data=labels.astype(np.uint8).reshape(-1, 1))


@pytest.fixture
def hdf5_root(tmp_path: Path) -> Path:
    """Three classes, two training files and a test file, listed with the prefix that copies have."""
    root = tmp_path / "modelnet40_ply_hdf5_2048"
    root.mkdir()
    rng = np.random.default_rng(5)
    for name, labels in (("train0", [2, 0, 1, 0]), ("train1", [1, 2]), ("test0", [0, 1, 2])):
        write_h5(root / f"ply_data_{name}.h5", rng.standard_normal((len(labels), 64, 3)), np.array(labels))
        entries = [f"{'abc'[label]}/{'abc'[label]}_{row:04d}.ply" for row, label in enumerate(labels)]
        (root / f"ply_data_{name[:-1]}_{name[-1]}_id2file.json").write_text(json.dumps(entries))
    prefix = "data/modelnet40_ply_hdf5_2048/"
    (root / "train_files.txt").write_text(f"{prefix}ply_data_train0.h5\n{prefix}ply_data_train1.h5\n")
    (root / "test_files.txt").write_text("ply_data_test0.h5\n\n")
    (root / "shape_names.txt").write_text("a\nb\nc\n")
    return root


def test_hdf5_keeps_order_labels_and_names(hdf5_root: Path) -> None:
    data = ModelNet40(hdf5_root, "train", 16)
    assert data.labels.tolist() == [2, 0, 1, 0, 1, 2]
    names = ["c/c_0000", "a/a_0001", "b/b_0002", "a/a_0003", "b/b_0000", "c/c_0001"]
    assert data.shape_ids == [f"train/{name}" for name in names]
    assert data.class_names == ["a", "b", "c"]
    points, label, index = data[4]
    with h5py.File(hdf5_root / "ply_data_train1.h5") as file:
        np.testing.assert_array_equal(points.numpy(), file["data"][0, :16])
    assert (label, index) == (1, 4)


def test_folder_above_is_recognised_and_lists_are_optional(hdf5_root: Path) -> None:
    listed = ModelNet40(hdf5_root.parent, "train", 64)
    for name in ("train_files.txt", "test_files.txt"):
        (hdf5_root / name).unlink()
    assert ModelNet40(hdf5_root, "train", 64).fingerprint() == listed.fingerprint()


def test_names_without_id_files_are_unique(hdf5_root: Path) -> None:
    for path in hdf5_root.glob("*.json"):
        path.unlink()
    ids = ModelNet40(hdf5_root, "train", 8).shape_ids
    assert len(set(ids)) == len(ids) == 6


def test_none_takes_all_points_and_dense_points_share_the_frame(hdf5_root: Path) -> None:
    assert ModelNet40(hdf5_root, "test", None).num_points == 64
    data = ModelNet40(hdf5_root, "test", 16, dense_points=48, normalize=True)
    assert data.view_points.shape == (3, 48, 3)
    np.testing.assert_allclose(data.view_points[:, :16], data.points, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(data.points, axis=2).max(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"split": "val"}, ValueError, "'val'.*'train' or 'test'"),
        ({"num_points": 65}, ValueError, "num_points is 65.*has 64 points"),
        ({"num_points": 0}, ValueError, "num_points is 0"),
        ({"normals": True}, ValueError, "no normals"),
        ({"per_class": 0}, ValueError, "per_class is 0"),
        ({"classes": "modelnet10"}, ValueError, "ModelNet10's classes"),
        ({"classes": "modelnet41"}, ValueError, "modelnet41"),
    ],
)
def test_wrong_values(hdf5_root: Path, change: dict, error: type[Exception], words: str) -> None:
    arguments = {"root": hdf5_root, "split": "train", "num_points": 16} | change
    with pytest.raises(error, match=words):
        ModelNet40(**arguments)


def test_truncated_h5_names_the_file_and_the_way_out(hdf5_root: Path) -> None:
    path = hdf5_root / "ply_data_train1.h5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=r"ply_data_train1\.h5.*truncated.*download it again"):
        ModelNet40(hdf5_root, "train", 16)


def test_damaged_chunk_is_an_error_too(hdf5_root: Path) -> None:
    path = hdf5_root / "ply_data_train0.h5"
    with h5py.File(path) as file:
        start, size = (lambda chunk: (chunk.byte_offset, chunk.size))(file["data"].id.get_chunk_info(0))
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"ply_data_train0\.h5.*damaged"):
        ModelNet40(hdf5_root, "train", 16)


def test_missing_files_and_datasets(hdf5_root: Path) -> None:
    (hdf5_root / "ply_data_train1.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"ply_data_train1\.h5 does not exist.*lists it"):
        ModelNet40(hdf5_root, "train")
    with h5py.File(hdf5_root / "ply_data_train1.h5", "w") as file:
        file["points"] = np.zeros((2, 64, 3))
    with pytest.raises(ValueError, match=r"no dataset \['data', 'label'\]; it holds \['points'\]"):
        ModelNet40(hdf5_root, "train", 16)


def test_labels_without_a_name(hdf5_root: Path) -> None:
    (hdf5_root / "shape_names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="names 2 classes, but the h5 files hold label 2"):
        ModelNet40(hdf5_root, "train", 16)


def test_wrong_folder_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        ModelNet40(tmp_path / "nowhere", "train")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FileNotFoundError) as caught:
        ModelNet40(tmp_path, "train")
    for part in (str(tmp_path), "photo.jpg", "ply_data_train*.h5", "modelnet40_train.txt", "*.off"):
        assert part in str(caught.value)


@pytest.fixture
def resampled_root(tmp_path: Path) -> Path:
    root = tmp_path / "modelnet40_normal_resampled"
    rng = np.random.default_rng(8)
    for name in ("night_stand_0001", "night_stand_0002", "bed_0001", "bed_0002"):
        path = root / name[:-5] / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        normals = rng.standard_normal((40, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        np.savetxt(path, np.hstack([5 + rng.random((40, 3)), normals]), delimiter=",", fmt="%.6f")
    (root / "modelnet40_train.txt").write_text("night_stand_0001\nbed_0001\nbed_0002\n")
    (root / "modelnet40_test.txt").write_text("night_stand_0002\n")
    (root / "modelnet40_shape_names.txt").write_text("bed\nnight_stand\n")
    return root


def test_resampled_text(resampled_root: Path) -> None:
    data = ModelNet40(resampled_root, "train", 32, normals=True)
    names = ["night_stand/night_stand_0001", "bed/bed_0001", "bed/bed_0002"]
    assert data.shape_ids == [f"train/{name}" for name in names] and data.up == "z"
    assert data.labels.tolist() == [1, 0, 0]
    assert data[0][0].shape == (32, 6)
    raw = np.loadtxt(resampled_root / "bed" / "bed_0002.txt", delimiter=",")[:32]
    np.testing.assert_allclose(data.points[2, :, 3:], raw[:, 3:], atol=1e-6)
    centred = raw[:, :3] - raw[:, :3].mean(0)
    np.testing.assert_allclose(
        data.points[2, :, :3], centred / np.linalg.norm(centred, axis=1).max(), atol=1e-5
    )
    np.testing.assert_allclose(
        ModelNet40(resampled_root, "train", 32, normalize=False).points[2], raw[:, :3], atol=1e-5
    )


def test_text_cache_is_used_renewed_and_repaired(resampled_root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = ModelNet40(resampled_root, "train", 16, cache_dir=cache)
    (kept,) = cache.iterdir()
    kept_bytes = kept.read_bytes()
    with np.load(kept) as arrays:
        changed = arrays["array"] * np.float32([1, 1, 3])
    with kept.open("wb") as file:
        np.savez(file, array=changed)
    assert ModelNet40(resampled_root, "train", 16, cache_dir=cache).fingerprint() != first.fingerprint(), (
        "the kept file was not read"
    )
    kept.write_bytes(kept_bytes[:100])
    assert ModelNet40(resampled_root, "train", 16, cache_dir=cache).fingerprint() == first.fingerprint()
    assert kept.read_bytes() == kept_bytes
    source = resampled_root / "bed" / "bed_0001.txt"
    source.write_text(source.read_text().replace("5.", "7.", 9))
    assert ModelNet40(resampled_root, "train", 16, cache_dir=cache).fingerprint() != first.fingerprint()


def test_damaged_text(resampled_root: Path) -> None:
    path = resampled_root / "bed" / "bed_0001.txt"
    content = path.read_text()
    path.write_text("\n".join(content.splitlines()[:20]) + "\n")
    with pytest.raises(ValueError, match=r"num_points is 32, but .*bed_0001\.txt has 20"):
        ModelNet40(resampled_root, "train", 32)
    path.write_text(content[:200])
    with pytest.raises(ValueError, match=r"bed_0001\.txt"):
        ModelNet40(resampled_root, "train", 32)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"bed_0001\.txt does not exist"):
        ModelNet40(resampled_root, "train", 32)


@pytest.fixture
def mesh_root(tmp_path: Path) -> Path:
    """Boxes of 1 × 2 × 4 as quads; one file has its counts on the line of ``OFF``, as some of ModelNet's."""
    corners = [(x, 2 * y, 4 * z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    body = "".join(f"{x} {y} {z}\n" for x, y, z in corners)
    body += "".join("4 " + " ".join(map(str, side)) + "\n" for side in sides)
    for name, split, head in (
        ("bed_0001", "train", "OFF\n8 6 0\n"),
        ("bed_0002", "test", "OFF\n8 6 0\n"),
        ("desk_0001", "train", "OFF8 6 0\n"),
        ("desk_0002", "train", "OFF\n# a comment\n8 6 0\n"),
    ):
        path = tmp_path / "ModelNet40" / name[:-5] / split / f"{name}.off"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + body)
    return tmp_path / "ModelNet40"


def test_meshes_are_sampled_uniformly(mesh_root: Path) -> None:
    data = ModelNet40(mesh_root, "train", 6000, normals=True, normalize=False)
    assert data.shape_ids == ["train/bed/bed_0001", "train/desk/desk_0001", "train/desk/desk_0002"]
    assert data.up == "z"
    assert data.labels.tolist() == [0, 1, 1]
    for cloud in data.points:
        points, normals = cloud[:, :3], cloud[:, 3:]
        on_side = np.abs(normals).argmax(1)
        # every point lies on the side that its normal says
        at = points[np.arange(len(points)), on_side]
        size = np.array([1, 2, 4])[on_side]
        np.testing.assert_allclose(np.minimum(np.abs(at), np.abs(at - size)), 0, atol=1e-5)
        np.testing.assert_allclose(np.bincount(on_side) / 6000, np.array([8, 4, 2]) / 14, atol=0.03)
    assert not np.array_equal(data.points[0], data.points[1]), "shapes share their random numbers"


def test_mesh_sampling_depends_on_seed_and_shape_alone(mesh_root: Path, tmp_path: Path) -> None:
    whole = ModelNet40(mesh_root, "train", 50, seed=3)
    part = ModelNet40(mesh_root, "train", 50, seed=3, per_class=1, cache_dir=tmp_path / "kept")
    for row, shape in enumerate(part.shape_ids):
        np.testing.assert_array_equal(part.points[row], whole.points[whole.shape_ids.index(shape)])
    assert not np.array_equal(ModelNet40(mesh_root, "train", 50, seed=4).points, whole.points)


def test_damaged_mesh(mesh_root: Path) -> None:
    path = mesh_root / "desk" / "train" / "desk_0001.off"
    path.write_text(path.read_text()[:60])
    with pytest.raises(ValueError, match=r"desk_0001\.off cannot be read as a mesh"):
        ModelNet40(mesh_root, "train", 8)
    path.write_text("OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n")
    with pytest.raises(ValueError, match=r"desk_0001\.off has a surface of area 0"):
        ModelNet40(mesh_root, "train", 8)


def test_real_modelnet40(modelnet40_root: Path) -> None:
    """The counts of the official split, for all classes and for ModelNet10's, and the frame of the clouds."""
    data = ModelNet40(modelnet40_root, "test", 1024)
    assert (len(data), data.num_classes) == (2468, 40)
    assert [data.class_names[label] for label in data.labels] == [
        name.rpartition("/")[2].rpartition("_")[0] for name in data.shape_ids
    ]
    assert data.up == "z"
    radius = np.linalg.norm(data.points, axis=2).max(1)
    np.testing.assert_allclose(radius, 1, atol=2e-3)
    ten = ModelNet40(modelnet40_root, "test", 256, classes="modelnet10")
    assert (len(ten), ten.class_names) == (908, list(MODELNET10))
    assert set(np.bincount(ten.labels)) == {50, 86, 100}


def test_real_few_shapes_are_nested_and_deterministic(modelnet40_root: Path) -> None:
    few = ModelNet40(modelnet40_root, "test", 64, per_class=5, seed=1)
    more = ModelNet40(modelnet40_root, "test", 64, per_class=10, seed=1)
    assert set(np.bincount(few.labels)) == {5}
    assert set(few.shape_ids) < set(more.shape_ids)
    again = ModelNet40(modelnet40_root, "test", 64, per_class=5, seed=1)
    assert few.fingerprint() == again.fingerprint()
    assert few.shape_ids != ModelNet40(modelnet40_root, "test", 64, per_class=5, seed=2).shape_ids
