"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def modelnet40_root() -> Path:
    """Real ModelNet40: ``POINTCMT_MODELNET40``, or ``../shared/data`` beside the checkout."""
    folder = Path(
        os.environ.get("POINTCMT_MODELNET40", ROOT.parent / "shared" / "data" / "modelnet40_ply_hdf5_1024")
    )
    if not (folder / "test_files.txt").exists():
        pytest.skip(
            f"ModelNet40 is not at {folder}; set POINTCMT_MODELNET40 to a folder in one of its public formats"
        )
    return folder


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device, for tests marked ``cuda``."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its settings for the life of the process; no test shall inherit another's."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
