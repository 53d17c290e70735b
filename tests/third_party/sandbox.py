"""Imports a codebase from its checkout and takes it out of ``sys.modules`` again.

Most of these repositories call their packages ``models``, ``utils`` or ``util`` and put folders on
``sys.path`` while they are imported, so two of them cannot be imported side by side without this.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pointcmt import compat


@contextmanager
def checkout(
    folder: Path,
    *paths: str,
    stubs: Mapping[str, Mapping[str, Any]] | None = None,
    cuda_on_cpu: bool = False,
) -> Iterator[None]:
    """``folder``'s code can be imported inside the block, over pointcmt's stand-ins for extensions.

    Args:
        folder: root of the checkout; the working directory inside the block.
        paths: folders in it to put on ``sys.path`` (".": the root).
        stubs: packages that the code imports but does not use for what is tested here: name → attributes.
        cuda_on_cpu: redirect what the code asks of CUDA by name, where there is no GPU.
    """
    entries = [folder / path for path in paths]
    theirs = {path.stem for entry in entries for path in entry.iterdir()} | set(stubs or {})
    path_before, cwd = list(sys.path), Path.cwd()
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _belongs(name, theirs)}
    sys.path[:0] = map(str, entries)
    os.chdir(folder)
    try:
        for name, attributes in (stubs or {}).items():
            module = types.ModuleType(name)
            module.__dict__.update(attributes)
            module.__path__ = []  # type: ignore[attr-defined]
            sys.modules[name] = module
        compat.install(force=True, cuda_on_cpu=cuda_on_cpu)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, about deprecated names
            yield
    finally:
        compat.uninstall()
        os.chdir(cwd)
        sys.path[:] = path_before
        for name in [name for name in sys.modules if _belongs(name, theirs)]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _belongs(name: str, theirs: set[str]) -> bool:
    """Whether a module is one of theirs, or in a package of theirs; a stub may be a part of a real
    package.
    """
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in theirs for i in range(len(parts)))


def load(name: str) -> Any:
    """``module:attribute`` imported inside :func:`checkout`."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
