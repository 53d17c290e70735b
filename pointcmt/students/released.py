"""Loads checkpoints that the public repositories released into this package's students."""

from __future__ import annotations

import codecs
import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

# where public training scripts keep the weights: yanx27; Lightning (erikwijmans); ma-xu; others
_CONTAINERS = ("model_state_dict", "state_dict", "net", "model", "model_state")


def load_released_checkpoint(student: Module, path: str | os.PathLike[str]) -> Module:
    """Load weights that a public repository's training script saved into the matching student.

    Accepts a bare state_dict or one under ``model_state_dict``, ``state_dict``, ``net``, ``model`` or
    ``model_state``, with or without the ``module.`` that DataParallel puts before every name. Nothing is
    unpickled but tensors and plain numbers (``torch.load(weights_only=True)``).

    Args:
        student: a student of :mod:`pointcmt.students` with the checkpoint's num_classes and options.
        path: the file (``.pth``, ``.t7``, …).

    Returns:
        The student, with the weights loaded; its mode and device are unchanged.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: a file that torch cannot read without unpickling code, one that holds no state_dict, or
            names or shapes that do not fit the student; the message lists them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the file that the public repository released")
    try:
        with _numpy_scalars():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights only: {error}\nIf you trust its "
            "source, load it with the torch version that wrote it and save its state_dict alone: "
            "torch.save(model.state_dict(), …)"
        ) from error
    state = _state_dict(loaded, path)
    own = student.state_dict()
    # released before BatchNorm counted its batches; the counter is of no effect with a fixed momentum
    for name in own.keys() - state.keys():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(own[name])
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in (
            ("missing in the checkpoint", sorted(own.keys() - state.keys())),
            ("unknown to the student", sorted(state.keys() - own.keys())),
            (
                "of another shape",
                [
                    f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
                    for name in own
                    if name in state and state[name].shape != own[name].shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {type(student).__name__}; {'; '.join(problems)}. Build the student with "
            "the checkpoint's variant, num_classes and options (the default options are the published ones)."
        )
    student.load_state_dict(state)
    return student


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict inside whatever a training script saved, without DataParallel's prefix."""
    found = loaded
    if isinstance(loaded, dict):
        found = next((loaded[key] for key in _CONTAINERS if isinstance(loaded.get(key), dict)), loaded)
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(value, Tensor) for value in found.values())
    ):
        inside = sorted(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise ValueError(
            f"{path} holds no state_dict: looked for one at the top and under {', '.join(_CONTAINERS)}; "
            f"found {inside}"
        )
    state = dict(found)
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


@contextlib.contextmanager
def _numpy_scalars() -> Iterator[None]:
    """Lets weights_only loading read numpy numbers: yanx27 and ma-xu save accuracies beside the weights."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    allowed = [np.dtype, codecs.encode, *dtypes, *((scalar, name) for name in names)]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        yield
