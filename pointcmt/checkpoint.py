"""Files that are whole or absent: atomic writes, and modules as safetensors with their configuration."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pointcmt._version import __version__

PathLike = str | os.PathLike[str]
Module = TypeVar("Module", bound=nn.Module)

# what to run when a checkpoint of this kind is missing or is not one
_MAKERS = {
    "teacher": "pointcmt train-teacher",
    "generator": "pointcmt train-generator",
    "student": "pointcmt train",
    "registration": "pointcmt train-registration",
}


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on leaving without an error it becomes ``path``.

    A reader, or a run that was killed, sees the old file or the new one, never half of one. The
    temporary file lies in the same folder because a rename is atomic only within one file system.
    Missing parent folders are made. On an error the temporary file is removed and ``path`` is as it was.

    Example::

        with atomic_write("run/config.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept: numpy, matplotlib and others choose a format, or a name, by it
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a checkpoint has the user's own default
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine can leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_module(path: PathLike, module: nn.Module, kind: str, config: dict[str, Any]) -> Path:
    """Write ``module``'s state_dict as safetensors, with what is needed to build it again in the metadata.

    Args:
        path: file to write, atomically.
        module: any module; tensors that share storage (tied weights) are written once for each name.
        kind: what it is (``"teacher"``, ``"generator"``, ``"student"``): checked when it is loaded.
        config: JSON-serialisable keyword arguments of the module's class.

    Returns:
        The path.
    """
    metadata = {"kind": kind, "config": json.dumps(config), "pointcmt": __version__}
    # clone: safetensors refuses views of one storage
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return Path(path)


def read_config(path: PathLike, kind: str) -> dict[str, Any]:
    """The configuration in a checkpoint's metadata; reads no weights.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: not a safetensors file, a truncated one, or one of another kind.
    """
    return _open(path, kind)[0]


def load_module(path: PathLike, kind: str, cls: type[Module]) -> Module:
    """Build ``cls(**config)`` from a checkpoint of ``save_module`` and load its weights: eval mode, CPU.

    Draws no random numbers: a training script that is seeded goes on as it would without the module.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: not a safetensors file, a truncated one, one of another kind, or weights that do not
            fit the class.
    """
    config, tensors = _open(path, kind, weights=True)
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights, which are about to be replaced
            module = cls(**config)
    except TypeError as error:
        raise ValueError(
            f"{path}: {cls.__name__} does not take the configuration in this checkpoint ({config}): {error}. "
            f"It was written by another version of pointcmt (here {__version__})."
        ) from error
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if missing or surplus or shapes:
        problems = [
            f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (
                ("missing", missing),
                ("not known", surplus),
                ("of another shape", sorted(shapes)),
            )
            if names
        ]
        raise ValueError(
            f"{path}: the weights do not fit {cls.__name__}(**{config}); {'; '.join(problems)}. "
            f"Load it with the pointcmt version that wrote it, or train again: {_maker(kind)}"
        )
    module.load_state_dict(tensors)
    return module.eval()


def fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """sha256 over a configuration and a module's weights: the same for the same function, on any device.

    Features that were computed by a module are bound to it by this (see ``pointcmt.data.FeatureCache``).
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{list(value.shape)}".encode())
        # through uint8, because numpy has no bfloat16
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _maker(kind: str) -> str:
    return _MAKERS.get(kind, f"whatever writes a {kind}")


def _open(path: PathLike, kind: str, weights: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        raise ValueError(
            f"{path} is a folder; expected a {kind} checkpoint (.safetensors). "
            + (f"It holds: {', '.join(inside)}" if inside else f"Make one with: {_maker(kind)}")
        )
    if not path.exists():
        raise FileNotFoundError(f"no {kind} checkpoint at {path}. Make one with: {_maker(kind)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {error}. Expected a "
            f"{kind} checkpoint of pointcmt; copy it again, or make one with: {_maker(kind)}"
        ) from error
    if "kind" not in metadata or "config" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file without pointcmt's metadata; expected a {kind} checkpoint, "
            f"as written by: {_maker(kind)}"
        )
    if metadata["kind"] != kind:
        raise ValueError(
            f"{path} holds a {metadata['kind']}, expected a {kind}. Give the path of a {kind}, as written "
            f"by: {_maker(kind)}"
        )
    return json.loads(metadata["config"]), tensors
