"""Files that are whole or absent: atomic writes, and modules as safetensors with their configuration."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules import module as registration

from pointcmt._version import __version__

PathLike = str | os.PathLike[str]
Module = TypeVar("Module", bound=nn.Module)

# what to run when a checkpoint of this kind is missing or is not one
_MAKERS = {
    "teacher": "pointcmt train-teacher",
    "generator": "pointcmt train-generator",
    "network": "pointcmt pretrain",
    "student": "pointcmt train",
    "registration": "pointcmt train-registration",
    "segmenter": "pointcmt segment",
}


@contextmanager
def naming_file(path: PathLike) -> Iterator[None]:
    """Inside, an error of the file system is one that names ``path`` and says what to do.

    torch and safetensors report a full disk as errors of their own, without a file's name.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        text = str(error)
        by_torch = "PytorchStreamWriter" in text or "inline_container" in text
        about_files = by_torch or isinstance(error, OSError | SafetensorError)
        if not about_files or (isinstance(error, FileNotFoundError | FileExistsError) and number is None):
            raise
        hint = "look at the free space and the permissions there"
        if number in (errno.EEXIST, errno.ENOTDIR):
            hint = "a file is where a folder is needed: give another path"
        elif number == errno.ENOENT:
            hint = "its folder was deleted or renamed meanwhile: leave it there, and start again"
        elif (
            number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            or by_torch
            or "large" in text
            or "space" in text
        ):
            hint = "the disk, or a quota, is full: make room, or write elsewhere; what was there is as it was"
        elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = "the folder may not be written to: give another one, or change its permissions"
        raise OSError(f"{path} cannot be written ({text}): {hint}") from error


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on leaving without an error it becomes ``path``.

    A reader, or a run that was killed, sees the old file or the new one, never half of one. The
    temporary file lies in the same folder because a rename is atomic only within one file system.
    Missing parent folders are made. On an error the temporary file is removed and ``path`` is as it was;
    what killed runs left in the folder is removed by the next write there (see :func:`remove_stale`).

    Raises:
        OSError: among others, where the disk is full: the message names file and disk.

    Example::

        with atomic_write("run/config.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _tidied:
            _tidied.add(path.parent)
            remove_stale(path.parent)
        # the suffix is kept: numpy, matplotlib and others choose a format, or a name, by it
        unique = f"{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        temporary = path.with_name(f".{path.stem[:100]}.{unique}.tmp{path.suffix}")
        try:
            # made by open, so that it has the user's own mode: the umask is read by no other call that is
            # safe among threads
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a crash of the machine can leave the new name on an empty file
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


_HOST = re.sub(r"[^A-Za-z0-9]", "_", platform.node()) or "host"
_TEMPORARY = re.compile(
    r"\..*\.(?P<host>[A-Za-z0-9_]+)-(?P<process>\d+)-[0-9a-f]{8}\.tmp(\..*)?"
    r"|\.tmp[A-Za-z0-9]{6}",  # safetensors' own, from which it makes the file that it is given
    re.DOTALL,
)
_tidied: set[Path] = set()


def remove_stale(folder: PathLike, held: bool = False) -> int:
    """Remove the temporary files that killed runs left in ``folder``; returns how many.

    Removed are those of processes of this machine that are no more, and all after a day: another process may
    have got the number of one that was killed, and whether those of other machines, and safetensors' own, are
    still written is not known.

    Args:
        folder: nothing below it is looked at.
        held: no other process writes there (see :mod:`pointcmt.locks`): all of others are removed.
    """
    count = 0
    for path in Path(folder).glob(".*"):
        matched = _TEMPORARY.fullmatch(path.name)
        if matched is None:
            continue
        try:
            mine = matched["host"] == _HOST and int(matched["process"]) == os.getpid()
            stale = not mine and (held or time.time() - path.stat().st_mtime > 86_400)
            if not stale and matched["host"] == _HOST:
                os.kill(int(matched["process"]), 0)  # raises where there is no such process
        except (ProcessLookupError, OverflowError):
            stale = True
        except OSError:  # somebody else's process, or a file that is gone
            stale = False
        if stale:
            path.unlink(missing_ok=True)
            count += 1
    return count


def disk_full(path: PathLike, needed: int | None = None) -> OSError:
    """The error of a disk without room for ``path``."""
    folder = Path(path).absolute().parent
    free = shutil.disk_usage(folder).free
    wanted = "" if needed is None else f"; {needed / 1e6:.1f} MB are needed"
    return OSError(
        errno.ENOSPC,
        f"no space for {path}: the disk of {folder} has {free / 1e6:.1f} MB free{wanted}. Free some, or "
        "give a folder on another disk",
    )


def save_module(
    path: PathLike,
    module: nn.Module,
    kind: str,
    config: dict[str, Any],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``module``'s state_dict as safetensors, with what is needed to build it again in the metadata.

    Args:
        path: file to write, atomically.
        module: any module; tensors that share storage (tied weights) are written once for each name.
        kind: what it is (``"teacher"``, ``"generator"``, ``"student"``): checked when it is loaded.
        config: JSON-serialisable keyword arguments of the module's class.
        about: what else its users need, JSON-serialisable: names of the classes, data, views; see
            :func:`read_about`.

    Returns:
        The path.
    """
    metadata = {"kind": kind, "config": json.dumps(config), "pointcmt": __version__}
    if about:
        metadata["about"] = json.dumps(dict(about))
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


def read_about(path: PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself beside its configuration; {} for one of an older version.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_config`.
    """
    return _metadata(Path(path)).get("about") or {}


def kind_of(path: PathLike) -> str:
    """``teacher``, ``generator`` or ``student``, as the checkpoint says.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_config`.
    """
    return _metadata(Path(path))["kind"]


def load_module(
    path: PathLike,
    kind: str,
    cls: Callable[..., Module],
    check: Callable[[dict[str, Any], PathLike], None] | None = None,
) -> Module:
    """Build ``cls(**config)`` from a checkpoint of ``save_module`` and load its weights: eval mode, CPU.

    Draws no random numbers: a training script that is seeded goes on as it would without the module. A file
    is data: its configuration cannot have anything downloaded or read, and a network that is larger than
    the weights in the file is refused while it is built.

    Args:
        path: the file.
        kind: what it must be.
        cls: what is built.
        check: what the configuration must satisfy; default: :func:`check_configuration`.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: not a safetensors file, a truncated one, one of another kind, or weights that do not
            fit the class or are not finite.
    """
    config, tensors = _open(path, kind, weights=True)
    (check or check_configuration)(config, path)
    name = getattr(cls, "__name__", str(cls))
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{path}: the weights {key} are not finite: the file was damaged, or its training diverged. "
                f"Copy it again, or train again: {maker(kind)}"
            )
    try:
        # initial weights, which are about to be replaced
        with torch.random.fork_rng(devices=[]), no_larger_than(tensors, path):
            module = cls(**config)
    except TypeError as error:
        raise ValueError(
            f"{path}: {name} does not take the configuration in this checkpoint ({config}): {error}. "
            f"It was written by another version of pointcmt (here {__version__})."
        ) from error
    except (ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        # a class refuses its arguments, or trips over them
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {name} cannot be built from the configuration in it: {error}") from error
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
            f"{path}: the weights do not fit {name}(**{config}); {'; '.join(problems)}. "
            f"Load it with the pointcmt version that wrote it, or train again: {maker(kind)}"
        )
    module.load_state_dict(tensors)
    return module.eval()


# arguments by which a library would read another file or open the network (timm.create_model and its kind)
_REACHES_OUT = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights", "url")
_LARGEST_NUMBER = 1 << 20


def check_configuration(value: Any, path: PathLike, name: str = "config") -> None:
    """Raise a ValueError where the configuration in a file asks for more than building a network.

    Nothing in it may have weights downloaded or another file opened, nor sizes beyond all measure.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _REACHES_OUT or (key == "pretrained" and inner is not False):
                raise ValueError(
                    f"{path}: its configuration has {key}={inner!r}, which would read another file or open "
                    "the network; a checkpoint holds its weights itself. It was changed, or is not to be "
                    "trusted"
                )
            check_configuration(inner, path, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            check_configuration(inner, path, f"{name}[{place}]")
    elif isinstance(value, str):
        if re.search(r"://|^[\w-]+:|^[/~]", value) or "hf-hub" in value or "hf_hub" in value:
            raise ValueError(
                f"{path}: its configuration has {name}={value!r}, an address or a path; expected the name of "
                "a network that is built here. A checkpoint is data, and opens nothing"
            )
        if re.search(r"\d{7}|\de\d", value):
            raise ValueError(
                f"{path}: its configuration has {name}={value!r:.80}; expected numbers below a million"
            )
    elif isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
        raise ValueError(f"{path}: its configuration has {name}={value}; expected a number below a million")


@contextmanager
def no_larger_than(tensors: Mapping[str, Tensor], path: PathLike) -> Iterator[None]:
    """Inside, a module that is built is refused once it outgrows the weights that are to be loaded into it.

    A damaged file may name a million layers; the error comes before they take memory or time. What is left
    out of a state_dict, and layers that are replaced while a network is built, have room for as much again.

    Raises:
        ValueError: more than twice as many parameters and buffers, or numbers in them, as the file has.
    """
    most_tensors = 2 * len(tensors) + 100
    most_numbers = 2 * sum(value.numel() for value in tensors.values()) + (1 << 22)
    have, thread = [0, 0], threading.get_ident()

    def count(_: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None or threading.get_ident() != thread:  # the hooks are the whole process's
            return
        have[0] += 1
        have[1] += value.numel()
        if have[0] > most_tensors or have[1] > most_numbers:
            raise ValueError(
                f"{path}: its configuration makes a network far larger than the weights in the file "
                f"({len(tensors)} tensors): one of the two was changed"
            )

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def names_digest(names: Iterable[str]) -> str:
    """Which names these are, in 8 characters each: a file says what it was trained on without their list."""
    return "".join(sorted({_name_digest(name) for name in names}))


def seen_before(names: Iterable[str], digest: str) -> list[str]:
    """Those of the names that ``digest`` of :func:`names_digest` has."""
    known = {digest[start : start + 8] for start in range(0, len(digest), 8)}
    return [name for name in names if _name_digest(name) in known]


def _name_digest(name: str) -> str:
    return base64.b64encode(hashlib.sha256(name.encode()).digest()[:6]).decode()


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


def maker(kind: str) -> str:
    """The command that writes checkpoints of a kind."""
    return _MAKERS.get(kind, f"whatever writes a {kind}")


def _open(path: PathLike, kind: str, weights: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("[!.]*.safetensors"))
        raise ValueError(
            f"{path} is a folder; expected a {kind} checkpoint (.safetensors). "
            + (f"It holds: {', '.join(inside)}" if inside else f"Make one with: {maker(kind)}")
        )
    if not path.exists():
        raise FileNotFoundError(f"no {kind} checkpoint at {path}. Make one with: {maker(kind)}")
    metadata = _metadata(path, kind)
    if metadata["kind"] != kind:
        raise ValueError(
            f"{path} holds a {metadata['kind']}, expected a {kind}. Give the path of a {kind}, as written "
            f"by: {maker(kind)}"
        )
    tensors = {}
    if weights:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return metadata["config"], tensors


def _metadata(path: Path, kind: str = "") -> dict[str, Any]:
    """``kind``, ``config`` and ``about`` of a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {error}. Expected a "
            f"{kind} checkpoint of pointcmt; copy it again, or make one with: {maker(kind)}"
        ) from error
    if "kind" not in raw or "config" not in raw:
        raise ValueError(
            f"{path} is a safetensors file without pointcmt's metadata; expected a {kind} checkpoint, "
            f"as written by: {maker(kind)}"
        )
    found: dict[str, Any] = {"kind": raw["kind"]}
    for name in ("config", "about"):
        try:
            found[name] = json.loads(raw.get(name, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its {name} is not JSON ({error}); copy the file again") from error
        if not isinstance(found[name], dict):
            raise ValueError(f"{path}: its {name} is {found[name]!r:.60}; expected a JSON object")
    return found
