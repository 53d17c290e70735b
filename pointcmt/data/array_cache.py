"""One array kept on disk, because what it was made from is slow to read."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pointcmt.checkpoint import atomic_write


def cached_array(
    cache_dir: str | Path | None, settings: str, sources: Sequence[Path], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """``make()``, kept in ``cache_dir`` as ``.npz`` and read from there the next time.

    The file's name holds a hash of ``settings`` and of the path, size and time of every source, so a
    changed source or setting makes a new file. A file that is damaged (it has a checksum) is made anew. The
    write is atomic: a killed run leaves no half file, and two processes that make it at once both end well.

    Args:
        cache_dir: folder, created where needed; None only calls ``make``.
        settings: everything but the sources that the array depends on.
        sources: the files it is made from.
        make: gives the array.
    """
    if cache_dir is None:
        return make()
    path = cached_path(cache_dir, settings, sources)
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except Exception:  # damaged, in whatever way: only a copy, so make it again
        path.unlink(missing_ok=True)
    array = np.ascontiguousarray(make())
    # as np.savez, whose own way of writing does not say that a disk is full
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(_MEMBER, "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    return array


def cached_path(cache_dir: str | Path, settings: str, sources: Sequence[Path]) -> Path:
    """Where :func:`cached_array` keeps the array of these settings and sources."""
    digest = hashlib.sha256(settings.encode())
    for source in sources:
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist, though the split lists it")
        status = source.stat()
        digest.update(f"\0{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return Path(cache_dir) / f"{settings.replace(os.sep, '-')}-{digest.hexdigest()[:16]}.npz"


_MEMBER = "array.npy"


def _read(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        # stored as it is: so much is in the file, and nothing is allocated for a header that is false
        if archive.getinfo(_MEMBER).file_size > path.stat().st_size:
            raise ValueError("larger than its file")
        with archive.open(_MEMBER) as file:
            content = io.BytesIO(file.read())  # the checksum is compared here
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError("of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
    if fortran or dtype.hasobject:
        raise ValueError("written by somebody else")
    return np.frombuffer(content.getbuffer()[content.tell() :], dtype).reshape(shape).copy()
