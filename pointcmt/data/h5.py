"""Reading the HDF5 files in which the field publishes point clouds, with errors that help."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

# A file may unpack to so many times its size, and this much more: real clouds pack to about a half, and a
# small file can declare, or inflate to, more than there is memory.
_EXPANSION = 64
_ALLOWANCE = 64 << 20


def read_clouds(path: Path, num_points: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [n, N, 3] and labels int64 [n] of a file with the datasets ``data`` and ``label``.

    Args:
        path: the file.
        num_points: read only this many points of each cloud, from the first; None reads all.

    Raises:
        FileNotFoundError: no such file.
        OSError: not HDF5, truncated or damaged.
        ValueError: a dataset is missing, of another shape or type, stored in other files, or declared
            larger than the file can hold; labels that are not whole numbers from 0; or ``num_points`` is more
            than there are.
    """
    (data, label), available = read_datasets(path, {"data": (3, "fiu"), "label": (0, "fiub")}, num_points)
    if data.shape[2] != 3:
        raise ValueError(f"data in {path} has shape {list(data.shape)}; expected [n, N, 3]")
    check_num_points(num_points, available, path)
    if label.size != len(data) or label.shape[:1] != data.shape[:1]:
        raise ValueError(f"{path} holds {len(data)} clouds and labels of shape {list(label.shape)}")
    labels = label.reshape(-1)
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    if len(wrong := np.flatnonzero((whole != labels) | (whole < 0))):
        raise ValueError(
            f"{path}, row {wrong[0]}: the label is {labels[wrong[0]]}; expected whole numbers from 0. "
            "Leave out the shapes that have none"
        )
    return data.astype(np.float32), whole


def read_datasets(
    path: Path, expected: dict[str, tuple[int, str]], num_points: int | None = None
) -> tuple[list[np.ndarray], int]:
    """Datasets at the top of an HDF5 file, which is taken for data by somebody unknown.

    Args:
        path: the file.
        expected: name → (number of axes, 0 for any; kinds of numpy dtype).
        num_points: read only so many along the second axis of datasets with at least three.

    Returns:
        The arrays in that order, and the length of the first one's second axis in the file.

    Raises:
        As :func:`read_clouds`; every message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    arrays: list[np.ndarray] = []
    available = 0
    bound = _EXPANSION * path.stat().st_size + _ALLOWANCE
    try:
        with h5py.File(path, "r") as file:
            if missing := sorted(expected.keys() - set(file)):
                raise _Refused(
                    f"has no dataset {missing}; it holds {sorted(file)}. Expected {list(expected)}"
                )
            for name, (axes, kinds) in expected.items():
                data = _local_dataset(file, name)
                if (axes and data.ndim != axes) or data.ndim == 0 or data.dtype.kind not in kinds:
                    raise _Refused(
                        f"has {name} of shape {list(data.shape)} and type {data.dtype}; expected "
                        + ("[n, N, 3]" if name == "data" else f"{axes or 'some'} axes")
                        + " of numbers"
                    )
                chunk = int(np.prod(data.chunks or (0,), dtype=np.float64)) * data.dtype.itemsize
                declared = float(np.prod(data.shape, dtype=np.float64)) * data.dtype.itemsize
                if max(declared, chunk) > bound:
                    raise _Refused(
                        f"declares {name} of {declared / 1e6:.0f} MB, more than {_EXPANSION} times the "
                        f"file's {path.stat().st_size / 1e6:.3g} MB: refused"
                    )
                if not arrays:
                    available = data.shape[1] if data.ndim > 1 else 0
                arrays.append(data[:, :num_points] if data.ndim >= 3 else data[...])
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, … of damaged files
        raise OSError(
            f"{path} cannot be read as HDF5 ({type(error).__name__}: {error}). The file is probably "
            "truncated or damaged: compare its size with the original and download it again"
        ) from error
    return arrays, available


class _Refused(Exception):
    """What the file holds is readable and not acceptable."""


def _local_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose bytes lie in this very file."""
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise _Refused(f"has {name} as a link elsewhere ({type(link).__name__}); expected the data itself")
    data = file[name]
    if not isinstance(data, h5py.Dataset):
        raise _Refused(f"has {name} as a {type(data).__name__}; expected a dataset")
    if data.external or data.is_virtual:
        raise _Refused(f"keeps {name} in other files (external or virtual storage); expected the data itself")
    return data


def check_num_points(num_points: int | None, available: int, where: Path | str) -> None:
    """Raise ``ValueError`` unless ``1 <= num_points <= available`` (None means all)."""
    if num_points is not None and not 1 <= num_points <= available:
        raise ValueError(
            f"num_points is {num_points}, but {where} has {available} points per shape; "
            f"ask for 1 to {available}"
        )
