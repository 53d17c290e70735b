"""Real clouds, and libraries, where this machine has them; a test that needs them is skipped elsewhere, and
says why."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pointcmt.data import PointDataset
from pointcmt.registration.baselines import need

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
SCANS = Path(os.environ.get("POINTCMT_SCANS", _BESIDE / "registration"))
MODELNET40 = Path(os.environ.get("POINTCMT_MODELNET40", _BESIDE / "modelnet40_ply_hdf5_1024"))


def library(module: str, package: str | None = None) -> Any:
    """An optional library; without it the tests, or the whole file, are skipped with what to install."""
    try:
        return need(module, package)
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def scans(name: str) -> Path:
    """A file of real scans."""
    path = SCANS / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: set POINTCMT_SCANS to the folder that holds it")
    return path


@cache
def _modelnet40(count: int) -> PointDataset:
    with h5py.File(MODELNET40 / "ply_data_test0.h5") as file:
        points, labels = file["data"][:count].astype(np.float32), file["label"][:count].reshape(-1)
    names = (MODELNET40 / "shape_names.txt").read_text().split()
    return PointDataset(points, labels.astype(np.int64), names, [str(row) for row in range(count)])


def modelnet40(count: int) -> PointDataset:
    """The first test shapes of ModelNet40."""
    if not (MODELNET40 / "ply_data_test0.h5").is_file():
        pytest.skip("ModelNet40 is not here: set POINTCMT_MODELNET40 to a folder with ply_data_test0.h5")
    return _modelnet40(count)
