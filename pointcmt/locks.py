"""One process at a time: locks of the operating system, which say who holds them and go with the process."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import platform
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from pointcmt.checkpoint import naming_file

try:
    import fcntl
except ImportError:  # not POSIX: no locks; files are written whole all the same
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, int] = {}


class BusyError(RuntimeError):
    """Another process holds a lock."""


def take(path: Path, waiting: Callable[[str], object] | None = None) -> bool:
    """Take the lock whose file is ``path``, until :func:`release` or the end of the process, however it ends.

    The file says which process holds the lock, and is deleted by :func:`release`. Where the file system or
    the operating system has no locks, this keeps nobody out.

    Args:
        path: of the lock's file; its folder is made.
        waiting: is told who holds the lock, where another process or thread does, and the lock is waited for.

    Returns:
        Whether it is new; without ``waiting``, a process that holds the lock may take it again.

    Raises:
        BusyError: another process holds it, and there is no ``waiting``; the message says which.
        OSError: the file cannot be written.
    """
    path = path.parent.resolve() / path.name
    if fcntl is None or (waiting is None and path in _held):
        return False
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock(path, waiting)
    with contextlib.suppress(OSError):  # on a full disk it does not say who: the next write says the rest
        os.ftruncate(handle, 0)
        os.pwrite(handle, _myself().encode(), 0)
    _held[path] = handle
    return True


def _lock(path: Path, waiting: Callable[[str], object] | None) -> int:
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return handle  # a file system without locks
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "it does not say which"
            if waiting is None:
                os.close(handle)
                raise BusyError(holder) from None
            waiting(holder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:  # who held it deletes the file: a lock on a file without a name keeps nobody out
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def release(path: Path) -> None:
    """Give up what :func:`take` took, and delete its file."""
    path = path.parent.resolve() / path.name
    handle = _held.pop(path, None)
    if handle is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def taken(path: Path, waiting: Callable[[str], object] | None = None) -> Iterator[None]:
    """:func:`take`, for the time of a ``with``; of one inside another the outer one counts."""
    new = take(path, waiting)
    try:
        yield
    finally:
        if new:
            release(path)


def forget(path: Path) -> None:
    """Delete the lock's file that a process left which was killed; where one holds it, leave it."""
    if path.exists():
        with contextlib.suppress(BusyError, OSError), taken(path):
            pass


def _myself() -> str:
    program = Path(sys.argv[0]).name.replace("__main__.py", "pointcmt") if sys.argv else ""
    command = " ".join([program, *sys.argv[1:]])
    now = datetime.now().isoformat(" ", "minutes")
    return f"process {os.getpid()} on {platform.node() or 'this machine'}, since {now}: {command[:120]}"


def _release_all() -> None:
    for path in list(_held):
        release(path)


def _not_mine() -> None:
    """In a child: what its parent holds is the parent's, also when that is gone."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


atexit.register(_release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_not_mine)
