"""HDF5 files that somebody else wrote: read rightly, or refused by an error that names file and reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pointcmt.data.h5 import read_clouds

POINTS = np.random.default_rng(0).standard_normal((3, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2"])
@pytest.mark.parametrize("label", [np.uint8([[0], [2], [1]]), np.float64([0, 2, 1]), np.array([0, 2, 1])])
def test_what_is_read(tmp_path: Path, dtype: str, label: np.ndarray) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = POINTS.astype(dtype), label
    points, labels = read_clouds(path, 5)
    np.testing.assert_array_equal(points, POINTS.astype(dtype).astype(np.float32)[:, :5])
    assert labels.dtype == np.int64 and labels.tolist() == [0, 2, 1]


def half(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS, np.array([0, 0.5, 1])


def negative(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS, np.array([0, 1, -1])


def not_a_number(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS, np.array([0, np.nan, 1])


def complex_points(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS + 1j, np.arange(3)


def text(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS, ["a", "b", "c"]


def group(file: h5py.File) -> None:
    file.create_group("data")
    file["label"] = np.arange(3)


def flat(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS[0], np.arange(3)


def too_few_labels(file: h5py.File) -> None:
    file["data"], file["label"] = POINTS, np.arange(2)


def huge(file: h5py.File) -> None:
    file.create_dataset("data", shape=(10**6, 2048, 3), dtype="f4", chunks=(1, 2048, 3))
    file["label"] = np.arange(3)


def inflated(file: h5py.File) -> None:
    file.create_dataset("data", data=np.zeros((400, 20_000, 3), np.float32), compression="gzip")
    file["label"] = np.zeros(400, np.uint8)


def huge_chunk(file: h5py.File) -> None:
    file.create_dataset(
        "data", shape=(3, 8, 3), maxshape=(None, None, None), dtype="f4", chunks=(2**14, 2**10, 3)
    )
    file["label"] = np.arange(3)


def external_link(file: h5py.File) -> None:
    file["data"], file["label"] = h5py.ExternalLink("other.h5", "data"), np.arange(3)


def soft_link(file: h5py.File) -> None:
    file["there"] = h5py.ExternalLink("other.h5", "data")
    file["data"], file["label"] = h5py.SoftLink("/there"), np.arange(3)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("data", shape=(1, 4, 3), dtype="f4", external=[("secret.bin", 0, 48)])
    file["label"] = np.arange(1)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 8, 3), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "data", (3, 8, 3))
    file.create_virtual_dataset("data", layout)
    file["label"] = np.arange(3)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (half, "row 1: the label is 0.5"),
        (negative, "row 2: the label is -1"),
        (not_a_number, "row 1: the label is nan"),
        (complex_points, "data of shape .* and type complex64"),
        (text, "label of shape"),
        (group, "data as a Group"),
        (flat, r"data of shape \[8, 3\].*expected \[n, N, 3\]"),
        (too_few_labels, "3 clouds and labels of shape"),
        (huge, "declares data of 24576 MB"),
        (inflated, "declares data of 96 MB"),
        (huge_chunk, "declares data"),
        (external_link, "data as a link elsewhere .ExternalLink"),
        (soft_link, "data as a link elsewhere .SoftLink"),
        (external_storage, "keeps data in other files"),
        (virtual, "keeps data in other files"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, write: Callable, words: str) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = POINTS
    (tmp_path / "secret.bin").write_bytes(bytes(range(48)))
    path = tmp_path / "clouds.h5"
    with h5py.File(path, "w") as file:
        write(file)
    with pytest.raises(ValueError, match=rf"clouds\.h5.*{words}"):
        read_clouds(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """400 damaged copies: an error that names the file, or whole numbers and points of the right shape."""
    path = tmp_path / "clouds.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=POINTS, compression="gzip")
        file["label"] = np.arange(3, dtype=np.uint8)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for case in range(400):
        broken = bytearray(content)
        if case % 4 == 0:
            del broken[int(rng.integers(len(broken))) :]
        for place in rng.integers(0, max(len(broken), 1), 4 if broken else 0):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            points, labels = read_clouds(path)
            assert points.shape[2] == 3 and len(points) == len(labels)
        except (ValueError, OSError) as error:
            assert "clouds.h5" in str(error)
            refused += 1
    assert refused > 100
