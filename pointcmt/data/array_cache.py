"""One array kept on disk, because what it was made from is slow to read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pointcmt.checkpoint import atomic_write


def cached_array(
    cache_dir: str | Path | None, settings: str, sources: Sequence[Path], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """``make()``, kept in ``cache_dir`` as ``.npy`` and read from there the next time.

    The file's name holds a hash of ``settings`` and of the path, size and time of every source, so a
    changed source or setting makes a new file. A file that cannot be read is made anew. The write is
    atomic: a killed run leaves no half file, and of two processes that make it at once both end well.

    Args:
        cache_dir: folder, created where needed; None only calls ``make``.
        settings: everything but the sources that the array depends on.
        sources: the files it is made from.
        make: gives the array.
    """
    if cache_dir is None:
        return make()
    digest = hashlib.sha256(settings.encode())
    for source in sources:
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist, though the split lists it")
        status = source.stat()
        digest.update(f"\0{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    path = Path(cache_dir) / f"{settings.replace(os.sep, '-')}-{digest.hexdigest()[:16]}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        pass
    except (ValueError, EOFError, OSError):
        path.unlink(missing_ok=True)  # damaged: only a copy, so make it again
    array = np.ascontiguousarray(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        # as np.save, whose own way of writing does not say that a disk is full
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    return array
