"""Teacher features on disk: computed once from un-augmented views, looked up by row in training."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pointcmt import locks
from pointcmt.checkpoint import atomic_write, disk_full, naming_file
from pointcmt.types import TeacherOutput

_KIND = "pointcmt feature cache 2"
_TENSORS = ("feature", "logits", "per_view", "maps")
_CHECKED = 64 << 20  # bytes whose checksums are compared on opening

Fill = Callable[[Tensor], Iterable[tuple[Tensor, TeacherOutput]]]


class FeatureCache:
    """What a teacher says of the n shapes of a set: features [n, D], and logits [n, K], features of each view
    [n, V, D] and feature maps [n, V, C, h, w] where it gives them.

    The file is a safetensors file, read memory-mapped: opening costs little and processes share it. It is
    bound to the teacher and to the data by their fingerprints, so features of another teacher or of other
    shapes are never used by mistake, and every row has a checksum.

    Opening, or building first where the file is absent, bad or of something else::

        def fill(rows):                              # int64 [m], ascending: all of them, or the rest
            for part in rows.split(64):
                yield part, teacher(views_of(part))

        cache = FeatureCache.build(path, teacher.fingerprint(), data.fingerprint(), views={...},
                                   n=len(data), fill=fill)
        cmt.loss(image_features=cache[index])
    """

    def __init__(self, path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
        """Use :meth:`open` or :meth:`build`."""
        self.path = path
        self.teacher_fingerprint = header["teacher"]
        self.data_fingerprint = header["data"]
        self.views: dict[str, Any] = json.loads(header["views"])
        self._tensors = tensors

    @classmethod
    def build(
        cls,
        path: str | Path,
        teacher_fingerprint: str,
        data_fingerprint: str,
        views: dict[str, Any] | Callable[[], dict[str, Any]],
        n: int,
        fill: Fill,
    ) -> FeatureCache:
        """Open the cache at ``path`` if it is this one; else compute it.

        A build grows in the folder ``<path>.partial``, a file for each piece that ``fill`` yields, so that
        one that was killed goes on. Only one process builds: others that want the same wait for it, and take
        over if it dies. ``path`` appears, or is replaced, when all is there; the cache is then in memory.

        Args:
            path: the file to make.
            teacher_fingerprint: ``teacher.fingerprint()``.
            data_fingerprint: ``dataset.fingerprint()``.
            views: how the views were made (rig, size, …), kept with the features; JSON values. A function
                that gives them is called only where there is something to build; the views of a cache that is
                there are then not compared.
            n: number of shapes.
            fill: rows int64 [m] → pieces ``(rows [b], TeacherOutput of those)`` that cover them; called only
                where there is something to build.

        Raises:
            ValueError: outputs that are not finite, or whose shapes change from piece to piece.
            OSError: the disk is full; the message names file and disk.
            RuntimeError: ``fill`` left rows out.
        """
        path = Path(path)
        with naming_file(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)

        def there() -> FeatureCache | None:
            try:
                return cls.open(
                    path,
                    teacher_fingerprint=teacher_fingerprint,
                    data_fingerprint=data_fingerprint,
                    views=None if callable(views) else views,
                )
            except (FileNotFoundError, ValueError) as error:
                if path.exists():
                    warnings.warn(f"{error}: this is done now", stacklevel=3)
                return None

        lock = path.with_name(f".{path.name}.lock")
        if (found := there()) is not None:  # before the lock, which a read-only folder does not give
            # of a build that was killed when all was there: as it was about to be deleted
            shutil.rmtree(_partial(path), ignore_errors=True)
            locks.forget(lock)
            return found

        def waiting(holder: str) -> None:
            warnings.warn(f"another process builds {path} ({holder}): waiting for it", stacklevel=4)

        with locks.taken(lock, waiting):
            # another process may have made it meanwhile
            if path.exists() and (found := there()) is not None:
                return found
            header = {
                "kind": _KIND,
                "teacher": teacher_fingerprint,
                "data": data_fingerprint,
                "views": json.dumps(views() if callable(views) else views, sort_keys=True),
                "n": str(n),
            }
            _Builder(path, header, n).run(fill)
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
        views: dict[str, Any] | None = None,
    ) -> FeatureCache:
        """Open a finished cache and check that it is the one that is meant, and whole.

        The checksums of all rows are compared, or, in a large file, of rows spread over 64 MB.

        Args:
            path: the file.
            teacher_fingerprint: expected teacher; None does not check.
            data_fingerprint: expected data; None does not check.
            views: expected making of the views; None does not check.

        Raises:
            FileNotFoundError: no such file, or one whose building was not finished.
            ValueError: another teacher, other data or other views; or the file is damaged or no cache.
        """
        path = Path(path)
        if not path.is_file():
            hint = (
                " (its building was interrupted: run it again and it goes on)"
                if _partial(path).exists()
                else ""
            )
            raise FileNotFoundError(f"{path} does not exist{hint}; make it with `pointcmt cache-features`")
        header, tensors = _read(path)
        for what, expected, found in (
            ("teacher", teacher_fingerprint, header["teacher"]),
            ("data", data_fingerprint, header["data"]),
            ("views", None if views is None else json.dumps(views, sort_keys=True), header["views"]),
        ):
            if expected is not None and expected != found:
                raise ValueError(
                    f"the feature cache {path} is stale: it was made with {what} {found}, "
                    f"but this run has {what} {expected}; `pointcmt cache-features` makes it anew"
                )
        sums = tensors.pop("checksum")
        row = sum(tensor[:1].nbytes for tensor in tensors.values())
        few = max(1, min(len(sums), _CHECKED // max(row, 1)))
        rows = (
            np.unique(np.linspace(0, len(sums) - 1, few).astype(np.int64)) if len(sums) else np.zeros(0, int)
        )
        for start in range(0, len(rows), 256):
            part = torch.from_numpy(rows[start : start + 256])
            if not torch.equal(_checksums({k: v[part] for k, v in tensors.items()}), sums[part]):
                raise ValueError(
                    f"{path} is damaged: rows between {part[0]} and {part[-1]} are not those that were "
                    "written; `pointcmt cache-features` makes it anew"
                )
        return cls(path, header, tensors)

    @property
    def feature_dim(self) -> int:
        return self._tensors["feature"].shape[1]

    @property
    def num_classes(self) -> int | None:
        """K; None where the teacher has no classifier."""
        logits = self._tensors.get("logits")
        return None if logits is None else logits.shape[1]

    def __len__(self) -> int:
        return len(self._tensors["feature"])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Features float32 [B, D] of rows int64 [B], on the device of ``index``."""
        return self._rows("feature", index)

    def output(self, index: Tensor) -> TeacherOutput:
        """All that is kept of rows int64 [B], on the device of ``index``."""
        kept = {name: self._rows(name, index) for name in self._tensors}
        return TeacherOutput(kept["feature"], kept.get("logits"), kept.get("per_view"), kept.get("maps"))

    def _rows(self, name: str, index: Tensor) -> Tensor:
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index is {index.dtype} {list(index.shape)}; expected integers [B]")
        rows = index.detach().cpu().long()
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} of a feature cache of {len(self)} shapes ({self.path}); "
                "the index must count the shapes of the set that the cache was made for"
            )
        return self._tensors[name][rows].to(index.device)


class _Builder:
    """The pieces of a cache that is not finished, in the folder ``<path>.partial``."""

    def __init__(self, path: Path, header: dict[str, str], n: int) -> None:
        self.path, self.header, self.n = path, header, n
        self.folder = _partial(path)
        self.pieces: list[tuple[Tensor, Path]] = []
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.written = torch.zeros(n, dtype=torch.bool)
        if self.folder.is_file():  # of an earlier version
            self.folder.unlink()
        # not the temporary file of a write that was killed: the next write deletes it
        for piece in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                found, tensors = _read(piece)
                rows = tensors.pop("rows")
                if found != header or not torch.equal(_checksums(tensors), tensors.pop("checksum")):
                    raise ValueError(f"{piece} is of another build, or damaged")
                self._keep(rows, tensors, piece)
            except (ValueError, KeyError):
                piece.unlink()

    def run(self, fill: Fill) -> None:
        todo = (~self.written).nonzero().squeeze(1)
        for rows, output in fill(todo) if len(todo) else ():
            if len(rows):
                rows = rows.detach().cpu().long()
                self._write(rows, self._check(rows, output))
        if missing := int((~self.written).sum()):
            first = int((~self.written).nonzero()[0])
            raise RuntimeError(
                f"{missing} of {self.n} rows of {self.path} are not written (first {first}): fill(rows) left "
                "them out"
            )
        shapes = self.shapes or {"feature": (0,)}
        merged = {name: torch.empty(self.n, *shape) for name, shape in shapes.items()}
        for rows, piece in self.pieces:
            tensors = _read(piece)[1]
            for name, tensor in merged.items():
                tensor[rows] = tensors[name]
        self._reserve(sum(tensor.nbytes for tensor in merged.values()))
        merged["checksum"] = _checksums(merged)
        with atomic_write(self.path) as temporary:
            save_file(merged, temporary, metadata=self.header)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check(self, rows: Tensor, output: TeacherOutput) -> dict[str, Tensor]:
        tensors = {}
        for name in _TENSORS:
            value = getattr(output, name)
            if value is None:
                continue
            if len(value) != len(rows):
                raise ValueError(f"{name} has shape {list(value.shape)}; expected {len(rows)} rows")
            value = value.detach().to("cpu", torch.float32).contiguous()
            if not value.isfinite().all():
                raise ValueError(
                    f"{name} holds NaN or infinite values; the teacher is broken, train it again"
                )
            tensors[name] = value
        return tensors

    def _write(self, rows: Tensor, tensors: dict[str, Tensor]) -> None:
        if self.shapes is None:  # what the pieces to come, and then the whole, will take
            each = sum(tensor.nbytes for tensor in tensors.values()) / len(rows)
            self._reserve(int(2 * each * self.n))
        self._fits(rows, tensors)
        piece = self.folder / f"{int(rows[0]):09d}-{len(rows):06d}.safetensors"
        with atomic_write(piece) as temporary:
            whole = {**tensors, "rows": rows, "checksum": _checksums(tensors)}
            save_file({name: value.clone() for name, value in whole.items()}, temporary, metadata=self.header)
        self._keep(rows, tensors, piece)

    def _fits(self, rows: Tensor, tensors: dict[str, Tensor]) -> None:
        if not 0 <= int(rows.min()) <= int(rows.max()) < self.n:
            raise ValueError(f"rows {int(rows.min())} to {int(rows.max())} of a cache of {self.n}")
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        if self.shapes is not None and shapes != self.shapes:
            raise ValueError(f"outputs of shapes {shapes} after {self.shapes}; expected the same of all rows")
        self.shapes = shapes

    def _keep(self, rows: Tensor, tensors: dict[str, Tensor], piece: Path) -> None:
        self._fits(rows, tensors)
        self.pieces.append((rows, piece))
        self.written[rows] = True

    def _reserve(self, needed: int) -> None:
        if shutil.disk_usage(self.path.parent).free < needed:
            raise disk_full(self.path, needed)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and memory-mapped tensors of a cache, or of a piece of one."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != _KIND or not {"teacher", "data", "views", "n"} <= header.keys():
                raise ValueError(f"{path} is not a feature cache; `pointcmt cache-features` makes one")
            json.loads(header["views"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a feature cache, or is damaged or truncated ({error}); `pointcmt cache-features` "
            "makes it anew"
        ) from error
    known = {"checksum", "rows", *_TENSORS}
    lengths = {len(tensor) for tensor in tensors.values() if tensor.ndim}
    if not {"checksum", "feature"} <= tensors.keys() <= known or len(lengths) != 1:
        raise ValueError(
            f"{path} is damaged: it holds {sorted(tensors)}; `pointcmt cache-features` makes it anew"
        )
    return header, tensors


def _checksums(tensors: dict[str, Tensor]) -> Tensor:
    """CRC-32 of every row over all tensors, in the order of their names: int64 [n]."""
    arrays = [tensors[name].contiguous().numpy() for name in _TENSORS if name in tensors]
    sums = []
    for row in range(len(arrays[0]) if arrays else 0):
        value = 0
        for array in arrays:
            value = zlib.crc32(array[row].tobytes(), value)
        sums.append(value)
    return torch.tensor(sums, dtype=torch.int64)
