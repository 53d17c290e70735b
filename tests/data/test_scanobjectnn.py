"""ScanObjectNN in the official HDF5 layout, on files of that layout written here."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pointcmt.data import ScanObjectNN

NAMES = {
    ("obj_bg", "train"): "main_split/training_objectdataset.h5",
    ("obj_bg", "test"): "main_split/test_objectdataset.h5",
    ("obj_only", "train"): "main_split_nobg/training_objectdataset.h5",
    ("obj_only", "test"): "main_split_nobg/test_objectdataset.h5",
    ("pb_t50_rs", "train"): "main_split/training_objectdataset_augmentedrot_scale75.h5",
    ("pb_t50_rs", "test"): "main_split/test_objectdataset_augmentedrot_scale75.h5",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    for number, name in enumerate(NAMES.values()):
        path = tmp_path / "h5_files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            # the number of scans tells the files apart
            file["data"] = (3 + rng.standard_normal((15 + number, 128, 3))).astype(np.float32)
            file["label"] = (np.arange(15 + number) % 15).astype(np.int32)
            file["mask"] = np.zeros((15 + number, 128), dtype=np.int32)
    return tmp_path


@pytest.mark.parametrize(("number", "key"), list(enumerate(NAMES)))
def test_each_variant_reads_its_own_file(root: Path, number: int, key: tuple) -> None:
    variant, split = key
    data = ScanObjectNN(root, variant, split, 100)
    assert len(data) == 15 + number
    assert data.num_classes == 15 and data.class_names[0] == "bag" and data.class_names[14] == "toilet"
    with h5py.File(root / "h5_files" / NAMES[key]) as file:
        np.testing.assert_array_equal(data.points, file["data"][:, :100])
        np.testing.assert_array_equal(data.labels, file["label"][:])
    assert len(set(data.shape_ids)) == len(data)
    assert ScanObjectNN(root / "h5_files", variant, split, 100).fingerprint() == data.fingerprint()
    assert (
        ScanObjectNN((root / "h5_files" / NAMES[key]).parent, variant, split, 100).fingerprint()
        == data.fingerprint()
    )


def test_background_is_never_confused_with_none(root: Path) -> None:
    """The two variants have files of one name: a folder given directly must be the right one."""
    with pytest.raises(FileNotFoundError, match="obj_only"):
        ScanObjectNN(root / "h5_files" / "main_split", "obj_only", "train")


def test_options(root: Path) -> None:
    data = ScanObjectNN(root, "pb_t50_rs", "test", 32, normalize=True, dense_points=64, per_class=1)
    assert np.bincount(data.labels).tolist() == [1] * 15
    assert data.points.shape == (15, 32, 3) and data.view_points.shape == (15, 64, 3)
    assert np.abs(data.view_points).max() <= 1


def test_errors(root: Path) -> None:
    with pytest.raises(ValueError, match=r"'hardest'.*obj_bg, obj_only, pb_t50_rs"):
        ScanObjectNN(root, "hardest", "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split is 'training'"):
        ScanObjectNN(root, "obj_bg", "training")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_points is 129.*has 128"):
        ScanObjectNN(root, "obj_bg", "train", 129)
    path = root / "h5_files" / NAMES["obj_bg", "train"]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OSError, match=r"training_objectdataset\.h5.*truncated"):
        ScanObjectNN(root, "obj_bg", "train")
    with pytest.raises(FileNotFoundError, match=r"(?s)tried.*main_split/test_objectdataset_augmentedrot"):
        ScanObjectNN(root / "elsewhere", "pb_t50_rs", "test")
