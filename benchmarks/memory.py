"""What does it bring on a CPU that freed memory is kept for the next step?

glibc gives large blocks back to the system as they are freed; the next step asks for the same again and gets
them page by page, zeroed. Commands of pointcmt keep them (``keep_freed_memory`` in recipes/engine.py). Each
piece of work is done in two processes, one with it and one without, which take turns.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import functools
import resource
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._harness import RESULTS, interleave, record, show
from pointcmt import ops, students
from pointcmt.recipes.engine import keep_freed_memory

QUESTION = "What does it bring on a CPU that freed memory is kept for the next step?"


def training(factory: str, points: int, **options: Any) -> Callable[[int], Callable[[], object]]:
    """A training step of one of the students, without the optimiser."""

    def make(batch: int) -> Callable[[], object]:
        model = getattr(students, factory)(40, **options)
        clouds, labels = torch.rand(batch, points, 3), torch.arange(batch) % 40

        def step() -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(clouds), labels).backward()

        return step

    return make


def grouping(batch: int) -> Callable[[], object]:
    """Our kernel on [B, 64, 1024] features and [B, 512, 32] neighbours."""
    features, neighbours = (
        torch.rand(batch, 64, 1024),
        torch.randint(1024, (batch, 512, 32), dtype=torch.int32),
    )
    return lambda: ops.group_points(features, neighbours)


def indexing(batch: int) -> Callable[[], object]:
    """The same by torch's indexing, on features [B, 1024, 64], as public code does it."""
    features, neighbours = torch.rand(batch, 1024, 64), torch.randint(1024, (batch, 512, 32))
    rows = torch.arange(batch)[:, None, None]
    return lambda: features[rows, neighbours]


WORK: dict[str, Callable[[int], Callable[[], object]]] = {
    "PointNet++ SSG": training("pointnet2", 1024),
    "DGCNN": training("dgcnn", 1024),
    "RS-CNN": training("rscnn", 1024),
    "PointMLP-Elite": training("pointmlp", 1024, variant="elite"),
    "small PointNet++": training("pointnet2", 512, width=0.25, npoints=(128, 32), nsamples=(16, 16)),
    "small RS-CNN": training("rscnn", 512, width=0.25, npoints=(128, 32), nsamples=(16, 16)),
    "small DGCNN": training("dgcnn", 512, width=0.125, k=10),
    "group_points": grouping,
    "torch's indexing": indexing,
}


def serve(pipe: Connection, name: str, batch: int, threads: int, keep: bool) -> None:
    """A process: one step for each message; answers with its page faults."""
    torch.set_num_threads(threads)
    if keep and not keep_freed_memory():
        raise RuntimeError("this C library has no mallopt: there is nothing to compare")
    torch.manual_seed(0)
    step = WORK[name](batch)
    while pipe.recv():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    context = get_context("spawn")
    pipes, processes = {}, []
    for keep in (False, True):
        pipes[keep], theirs = context.Pipe()
        processes.append(
            context.Process(target=serve, args=(theirs, name, options.batch, options.threads, keep))
        )
        processes[-1].start()
        theirs.close()
    faults = dict.fromkeys(pipes, 0)

    def step(keep: bool) -> None:
        pipes[keep].send(True)
        faults[keep] = pipes[keep].recv()

    try:
        times = interleave(
            {str(keep): functools.partial(step, keep) for keep in pipes},
            options.repeats,
            warmup=2,
            seconds=options.seconds,
        )
        for pipe in pipes.values():
            pipe.send(False)
    finally:
        for process in processes:
            process.join(5)
            process.terminate()
    return {
        "work": name,
        "given back / kept": times["False"].over(times["True"]),
        "page faults a step, given back": faults[False],
        "page faults a step, kept": faults[True],
        "given back": times["False"],
        "kept": times["True"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20.0, help="per line, once three rounds are done")
    parser.add_argument("--only", default="", help="only work whose name contains this")
    parser.add_argument("--out", default=RESULTS / "memory-cpu.json")
    options = parser.parse_args(argv)
    rows = [compare(name, options) for name in WORK if options.only in name]
    record(options.out, QUESTION, rows, notes={"batch": options.batch, "threads": options.threads})
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
