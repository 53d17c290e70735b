"""Every point of a cloud of any size gets its class scores: by overlapping blocks, resumable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointcmt.checkpoint import atomic_write
from pointcmt.data.checks import Up
from pointcmt.data.dataset import padded
from pointcmt.data.labelled import LabelledCloud
from pointcmt.data.scenes import framed, nearest
from pointcmt.ops import voxel_subsample
from pointcmt.types import Batch
from pointcmt.views import unit_sphere


@dataclass(frozen=True)
class Blocks:
    """How a cloud is cut.

    Attributes:
        num_points: of a block, as in training.
        rooms: blocks are places: the points nearest to one, thinned as in training. Otherwise they are the
            whole shape, each with a part of its points, in the unit sphere.
        voxel: edge of the cubes that rooms are thinned to; 0: not.
        up: the axis that points up.
        normalize: shapes are centred and scaled into the unit sphere first.
        rounds: a thinned room is gone through at most so often, each time with another point of every cube;
            points that no round reached take the mean of their cube. 0: until every point was visited.
    """

    num_points: int
    rooms: bool
    voxel: float = 0.0
    up: Up = "z"
    normalize: bool = True
    rounds: int = 0


@dataclass
class Visits:
    """What is known of the m points so far: ``sums`` float32 [m, K] of logits, ``counts`` int32 [m]."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def none(cls, points: int, classes: int) -> Visits:
        return cls(np.zeros((points, classes), dtype=np.float32), np.zeros(points, dtype=np.int32))

    def save(self, path: Path, key: str) -> None:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, sums=self.sums, counts=self.counts, key=np.array(key))

    @classmethod
    def load(cls, path: Path, key: str) -> Visits | None:
        """What :meth:`save` wrote for the same ``key``; None where there is none, or of another cloud."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if str(arrays["key"]) != key:
                    return None
                return cls(arrays["sums"], arrays["counts"])
        except Exception:  # absent, or damaged in whatever way: a copy of what can be computed again
            return None


def predict_cloud(
    forward: Callable[[Batch], Tensor],
    cloud: LabelledCloud,
    classes: int,
    blocks: Blocks,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    fields: tuple[str, ...] = (),
    category: int | None = None,
    partial: Path | None = None,
    key: str = "",
    every: float = 20.0,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, int]:
    """Mean logits of every point.

    Blocks of rooms are the points nearest to a point that was not visited yet, in an order by chance that is
    always the same; of a thinned room each round takes another point of every cube, until all points were
    visited. Blocks overlap; where they do, logits are averaged. Memory is that of the cloud, its scores
    [m, K] float32 and one batch.

    Args:
        forward: batch on ``device`` → logits [B, N, K].
        cloud: m points.
        classes: K.
        blocks: how it is cut.
        device: of the batches.
        batch_size: blocks at once.
        fields: what of ``colors``, ``normals`` and ``features`` the network was trained with.
        category: of the shape, for networks of parts.
        partial: file that keeps what is done, every ``every`` seconds, so that a killed run goes on; removed
            at the end.
        key: what the result depends on beside the cloud, so that a file of something else is not taken up.
        progress: told how many points were visited so far.

    Returns:
        Logits float32 [m, K], and how many points took the mean of their cube (``blocks.rounds``).

    Raises:
        ValueError: the cloud lacks a field that the network was trained with.
    """
    if missing := [name for name in fields if name != "features" and getattr(cloud, name) is None]:
        raise ValueError(
            f"the network was trained with {', '.join(missing)}, and the cloud has none: give a file that "
            "has them, or train with --inputs points"
        )
    total = len(cloud.points)
    digest = hashlib.sha256(f"{key} {blocks} {classes} {fields} {category} {batch_size}".encode())
    digest.update(np.ascontiguousarray(cloud.points).data)
    key = digest.hexdigest()
    found = None if partial is None else Visits.load(partial, key)
    visits = found or Visits.none(total, classes)
    low, high = cloud.points.min(0), cloud.points.max(0)
    if not blocks.rooms and blocks.normalize:
        cloud = cloud._replace(points=unit_sphere(torch.from_numpy(cloud.points)[None])[0].numpy())
    cut = (
        _places(cloud.points, low, blocks, visits, batch_size)
        if blocks.rooms
        else _parts(total, blocks, visits, batch_size)
    )
    saved = time.monotonic()
    for waiting in cut:
        made = [_block(cloud, rows, own, low, high, blocks, fields) for rows, own in waiting]
        batch = Batch(
            **{name: torch.from_numpy(np.stack([one[name] for one in made])) for name in made[0]},
            category=None if category is None else torch.full((len(made),), category),
        )
        logits = forward(batch.to(device)).float().cpu().numpy()
        for (rows, own), scores in zip(waiting, logits, strict=True):
            visits.sums[rows[:own]] += scores[:own]
            visits.counts[rows[:own]] += 1
        if progress is not None:
            progress(int((visits.counts > 0).sum()))
        if partial is not None and time.monotonic() - saved > every:
            visits.save(partial, key)
            saved = time.monotonic()
    filled = _fill(cloud.points - low if blocks.rooms else cloud.points, visits, blocks)
    if progress is not None:
        progress(total)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return visits.sums / visits.counts[:, None], filled


def _order(count: int) -> np.ndarray:
    return np.random.default_rng(count).permutation(count)


def _places(
    points: np.ndarray, low: np.ndarray, blocks: Blocks, visits: Visits, batch_size: int
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Blocks of a room: each gives its rows, and how many of them are its own."""
    for chosen in _rounds(points, low, blocks):
        order = _order(len(chosen))
        here = points[chosen]
        pending = np.zeros(len(chosen), dtype=bool)
        at, waiting = 0, []
        while True:
            while at < len(order) and (visits.counts[chosen[order[at]]] or pending[order[at]]):
                at += 1
            if at < len(order):
                rows = nearest(here, here[order[at]], blocks.num_points)
                pending[rows] = True
                # furthest point sampling starts at the first row: not always at the room's first point
                mixed = rows[_order(len(rows))]
                waiting.append(padded(chosen[mixed], blocks.num_points))
            if waiting and (len(waiting) == batch_size or at == len(order)):
                yield waiting
                waiting = []
            elif at == len(order):
                break


def _rounds(points: np.ndarray, low: np.ndarray, blocks: Blocks) -> Iterator[np.ndarray]:
    """Rows of a point of each cube, again and again, until every point was there or ``blocks.rounds`` are
    over; all at once without cubes."""
    if blocks.voxel <= 0:
        yield np.arange(len(points))
        return
    _, inverse = voxel_subsample(torch.from_numpy(points - low), blocks.voxel)
    cell = inverse.numpy()
    by_cell = np.argsort(cell, kind="stable")
    counts = np.bincount(cell)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rounds = int(counts.max())
    for number in range(min(rounds, blocks.rounds or rounds)):
        yield by_cell[first + number % counts]


def _parts(
    total: int, blocks: Blocks, visits: Visits, batch_size: int
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Blocks of a shape: each has a part of its points, spread over all of it."""
    order = _order(total)
    number = -(-total // blocks.num_points)
    waiting = []
    for k in range(number):
        rows = order[k::number]
        if visits.counts[rows].all():
            continue
        if len(rows) < blocks.num_points:  # filled up with others of the shape, which count once more
            others = np.setdiff1d(order, rows)[: blocks.num_points - len(rows)]
            rows = np.concatenate([rows, others])
        waiting.append(padded(rows, blocks.num_points))
        if len(waiting) == batch_size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _block(
    cloud: LabelledCloud,
    rows: np.ndarray,
    own: int,
    low: np.ndarray,
    high: np.ndarray,
    blocks: Blocks,
    fields: tuple[str, ...],
) -> dict[str, Any]:
    if blocks.rooms:
        made = framed(cloud, rows, low, high, blocks.up, own)
    else:
        parts = {"points": cloud.points, "colors": cloud.colors, "normals": cloud.normals}
        made = {name: part[rows] for name, part in parts.items() if part is not None}
    return {name: part for name, part in made.items() if name == "points" or name in fields}


def _fill(points: np.ndarray, visits: Visits, blocks: Blocks) -> int:
    """Gives points that no round reached the mean of their cube; returns how many."""
    rest = visits.counts == 0
    if not rest.any():
        return 0
    _, inverse = voxel_subsample(torch.from_numpy(points), blocks.voxel)
    cell = inverse.numpy()
    classes = visits.sums.shape[1]
    visited = np.bincount(cell, weights=visits.counts)
    for k in range(classes):
        sums = np.bincount(cell, weights=visits.sums[:, k])
        visits.sums[rest, k] = (sums / visited)[cell[rest]]
    visits.counts[rest] = 1
    return int(rest.sum())
