"""Teacher features on disk: computed once from un-augmented views, looked up by row in training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pointcmt.types import TeacherOutput

_KIND = "pointcmt feature cache"
_REBUILD = "rebuild it with `pointcmt cache-features`"


class FeatureCache:
    """Features float32 [n, D] and logits float32 [n, K] of a teacher for the n shapes of a set.

    The file is a safetensors file, read memory-mapped: opening costs nothing and processes share it. It is
    bound to the teacher and to the data by their fingerprints, so features of another teacher or of other
    shapes are never used by mistake.

    Building::

        cache = FeatureCache.create(path, teacher.fingerprint(), data.fingerprint(), views={...},
                                    n=len(data), feature_dim=512, num_classes=40)
        for rows in cache.missing().split(64):       # all of them, or the rest of a build that was killed
            output = teacher(views_of(rows))
            cache.write(rows, output.feature, output.logits)
        cache = cache.finish()

    Using::

        cache = FeatureCache.open(path, teacher_fingerprint=..., data_fingerprint=...)
        cmt.loss(image_features=cache[index])
    """

    def __init__(self, path: Path, header: dict[str, str], writable: bool = False) -> None:
        """Use :meth:`open` or :meth:`create`."""
        self.path = path
        self.teacher_fingerprint = header["teacher"]
        self.data_fingerprint = header["data"]
        self.views: dict[str, Any] = json.loads(header["views"])
        self._header = header
        self._writable = writable
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        tensors, start = _layout(header)
        source = _partial(path) if writable else path
        self._arrays = {
            name: np.memmap(source, np.dtype(dtype), mode, start + offset, shape)
            if np.prod(shape)
            else np.empty(shape, dtype)
            for name, (dtype, shape, offset) in tensors.items()
        }

    @classmethod
    def create(
        cls,
        path: str | Path,
        teacher_fingerprint: str,
        data_fingerprint: str,
        views: dict[str, Any],
        n: int,
        feature_dim: int,
        num_classes: int,
    ) -> FeatureCache:
        """Begin a cache, or go on with one of the same teacher, data, views and sizes that was interrupted.

        It grows in ``<path>.partial``; ``path`` appears, or is replaced, when :meth:`finish` is called.

        Args:
            path: the file to make.
            teacher_fingerprint: ``teacher.fingerprint()``.
            data_fingerprint: ``dataset.fingerprint()``.
            views: how the views were made (rig, size, …), kept with the features; JSON values.
            n: number of shapes.
            feature_dim: D.
            num_classes: K.
        """
        path = Path(path)
        if n < 0 or feature_dim < 1 or num_classes < 1:
            raise ValueError(
                f"n {n}, feature_dim {feature_dim}, num_classes {num_classes}: expected at least 0, 1 and 1"
            )
        header = {
            "kind": _KIND,
            "teacher": teacher_fingerprint,
            "data": data_fingerprint,
            "views": json.dumps(views, sort_keys=True),
            "n": str(n),
            "feature_dim": str(feature_dim),
            "num_classes": str(num_classes),
        }
        partial = _partial(path)
        try:
            resumable = _read_header(partial) == header
        except (OSError, ValueError):
            resumable = False
        if not resumable:
            partial.parent.mkdir(parents=True, exist_ok=True)
            head = _encode(header)
            tensors, start = _layout(header)
            size = start + sum(
                np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape, _ in tensors.values()
            )
            with open(partial, "wb") as file:
                file.write(head)
                file.truncate(size)
        return cls(path, header, writable=True)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
        views: dict[str, Any] | None = None,
    ) -> FeatureCache:
        """Open a finished cache and check that it is the one that is meant.

        Args:
            path: the file.
            teacher_fingerprint: expected teacher; None does not check.
            data_fingerprint: expected data; None does not check.
            views: expected making of the views; None does not check.

        Raises:
            FileNotFoundError: no such file, or one whose building was not finished.
            ValueError: another teacher, other data or other views; or the file is truncated or no cache.
        """
        path = Path(path)
        if not path.is_file():
            hint = (
                " (its building was interrupted: run it again and it goes on)"
                if _partial(path).is_file()
                else ""
            )
            raise FileNotFoundError(f"{path} does not exist{hint}; make it with `pointcmt cache-features`")
        header = _read_header(path)
        for what, expected, found in (
            ("teacher", teacher_fingerprint, header["teacher"]),
            ("data", data_fingerprint, header["data"]),
            ("views", None if views is None else json.dumps(views, sort_keys=True), header["views"]),
        ):
            if expected is not None and expected != found:
                raise ValueError(
                    f"the feature cache {path} is stale: it was made with {what} {found}, "
                    f"but this run has {what} {expected}; {_REBUILD}"
                )
        return cls(path, header)

    @property
    def feature_dim(self) -> int:
        return self._arrays["feature"].shape[1]

    @property
    def num_classes(self) -> int:
        return self._arrays["logits"].shape[1]

    def __len__(self) -> int:
        return len(self._arrays["feature"])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Features float32 [B, D] of rows int64 [B], on the device of ``index``."""
        return self._rows("feature", index)

    def output(self, index: Tensor) -> TeacherOutput:
        """Features and logits of rows int64 [B], on the device of ``index``."""
        return TeacherOutput(self._rows("feature", index), self._rows("logits", index))

    def missing(self) -> Tensor:
        """Rows not yet written: int64 [m], ascending."""
        return torch.from_numpy(np.flatnonzero(self._arrays["written"] == 0))

    def write(self, index: Tensor, feature: Tensor, logits: Tensor) -> None:
        """Keep features [B, D] and logits [B, K] of rows [B].

        Raises:
            RuntimeError: the cache was opened for reading.
            ValueError: shapes that do not fit, or values that are not finite.
        """
        if not self._writable:
            raise RuntimeError(
                f"{self.path} is open for reading; FeatureCache.create(…) begins one to write to"
            )
        rows = self._check(index)
        for name, value in (("feature", feature), ("logits", logits)):
            expected = (len(rows), self._arrays[name].shape[1])
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(expected)}")
            value = value.detach().to("cpu", torch.float32)
            if not value.isfinite().all():
                raise ValueError(
                    f"{name} holds NaN or infinite values; the teacher is broken, train it again"
                )
            self._arrays[name][rows] = value.numpy()
        self._arrays["written"][rows] = 1  # last, so that a row marked written is written

    def finish(self) -> FeatureCache:
        """Put the finished file in its place, at once or not at all, and open it for reading.

        Raises:
            RuntimeError: rows are missing, or the cache is already finished.
        """
        if not self._writable:
            raise RuntimeError(f"{self.path} is finished already")
        if len(missing := self.missing()):
            raise RuntimeError(
                f"{len(missing)} of {len(self)} rows of {self.path} are not written (first {int(missing[0])})"
            )
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self._arrays = {}
        self._writable = False
        os.replace(_partial(self.path), self.path)
        finished = FeatureCache(self.path, self._header)
        self._arrays = finished._arrays
        return finished

    def _rows(self, name: str, index: Tensor) -> Tensor:
        rows = self._check(index)
        return torch.from_numpy(np.asarray(self._arrays[name][rows])).to(index.device)

    def _check(self, index: Tensor) -> np.ndarray:
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index is {index.dtype} {list(index.shape)}; expected integers [B]")
        rows = index.detach().cpu().numpy()
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} of a feature cache of {len(self)} shapes ({self.path}); "
                "the index must count the shapes of the set that the cache was made for"
            )
        return rows


# The safetensors format: 8 bytes with the length of a JSON header, the header, the bytes of the tensors.
# Written here by hand, because a file that grows row by row cannot be written by its library in one go.

_Layout = dict[str, tuple[str, tuple[int, ...], int]]
_CODES = {"float32": "F32", "uint8": "U8"}


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _layout(header: dict[str, str]) -> tuple[_Layout, int]:
    """dtype, shape and offset of every tensor, and where the first one starts in the file."""
    n, width, classes = (int(header[key]) for key in ("n", "feature_dim", "num_classes"))
    tensors: _Layout = {
        "feature": ("float32", (n, width), 0),
        "logits": ("float32", (n, classes), 4 * n * width),
        "written": ("uint8", (n,), 4 * n * (width + classes)),
    }
    return tensors, len(_encode(header, tensors))


def _encode(header: dict[str, str], tensors: _Layout | None = None) -> bytes:
    if tensors is None:
        tensors, _ = _layout(header)
    entries: dict[str, Any] = {"__metadata__": header}
    for name, (dtype, shape, offset) in tensors.items():
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> dict[str, str]:
    """The metadata of a cache file, after checking that the file is whole."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length < size else b""
    try:
        header = json.loads(text)["__metadata__"]
        if header["kind"] != _KIND:
            raise KeyError(header["kind"])
        tensors, start = _layout(header)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a feature cache, or its start is damaged; {_REBUILD}") from error
    expected = start + sum(
        np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape, _ in tensors.values()
    )
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes instead of {expected}: it is truncated or damaged; {_REBUILD}"
        )
    return header
