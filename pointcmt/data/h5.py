"""Reading the HDF5 files in which the field publishes point clouds, with errors that help."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np


def read_clouds(path: Path, num_points: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [n, N, 3] and labels int64 [n] of a file with the datasets ``data`` and ``label``.

    Args:
        path: the file.
        num_points: read only this many points of each cloud, from the first; None reads all.

    Raises:
        FileNotFoundError: no such file.
        OSError: not HDF5, or truncated.
        ValueError: a dataset is missing or of another shape, or ``num_points`` is more than there are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with h5py.File(path, "r") as file:
            if missing := {"data", "label"} - set(file):
                raise ValueError(
                    f"{path} has no dataset {sorted(missing)}; it holds {sorted(file)}. "
                    "Expected data [n, N, 3] and label [n] or [n, 1]"
                )
            data, label = file["data"], file["label"]
            if data.ndim != 3 or data.shape[2] != 3:
                raise ValueError(f"data in {path} has shape {list(data.shape)}; expected [n, N, 3]")
            check_num_points(num_points, data.shape[1], path)
            points = data[:, :num_points].astype(np.float32)
            labels = label[:].astype(np.int64).reshape(-1)
    except OSError as error:
        raise OSError(
            f"{path} cannot be read as HDF5 ({error}). The file is probably truncated or damaged: "
            "compare its size with the original and download it again"
        ) from error
    if len(points) != len(labels):
        raise ValueError(f"{path} holds {len(points)} clouds and {len(labels)} labels")
    return points, labels


def check_num_points(num_points: int | None, available: int, where: Path | str) -> None:
    """Raise ``ValueError`` unless ``1 <= num_points <= available`` (None means all)."""
    if num_points is not None and not 1 <= num_points <= available:
        raise ValueError(
            f"num_points is {num_points}, but {where} has {available} points per shape; "
            f"ask for 1 to {available}"
        )
