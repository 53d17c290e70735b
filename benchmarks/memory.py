"""What does it bring on a CPU that freed memory is kept for the next step?

glibc gives large blocks back to the system as they are freed; the next step asks for the same again and gets
them page by page, zeroed. Commands of pointcmt keep them (``keep_freed_memory`` in recipes/engine.py). Each
network trains in two processes, one with it and one without, which take turns.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import functools
import resource
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._harness import RESULTS, interleave, record, show
from pointcmt import students
from pointcmt.recipes.engine import keep_freed_memory

QUESTION = "What does it bring on a CPU that freed memory is kept for the next step?"
# name -> factory of students, its options, points
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "PointNet++ SSG": ("pointnet2", {}, 1024),
    "PointNet++ SSG, a quarter as wide": (
        "pointnet2",
        {"width": 0.25, "npoints": (128, 32), "nsamples": (16, 16)},
        512,
    ),
    "DGCNN": ("dgcnn", {}, 1024),
    "DGCNN, an eighth as wide, k 10": ("dgcnn", {"width": 0.125, "k": 10}, 512),
    "RS-CNN": ("rscnn", {}, 1024),
    "PointMLP-Elite": ("pointmlp", {"variant": "elite"}, 1024),
}


def serve(pipe: Connection, name: str, batch: int, threads: int, keep: bool) -> None:
    """A process: one training step for each message; answers with its page faults."""
    torch.set_num_threads(threads)
    if keep and not keep_freed_memory():
        raise RuntimeError("this C library has no mallopt: there is nothing to compare")
    factory, options, points = NETWORKS[name]
    torch.manual_seed(0)
    model = getattr(students, factory)(40, **options)
    clouds, labels = torch.rand(batch, points, 3), torch.arange(batch) % 40
    while pipe.recv():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(clouds), labels).backward()
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
        "network": name,
        "points": NETWORKS[name][2],
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
    parser.add_argument("--seconds", type=float, default=20.0, help="per network, once three rounds are done")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--out", default=RESULTS / "memory-cpu.json")
    options = parser.parse_args(argv)
    rows = [compare(name, options) for name in NETWORKS if options.only in name]
    record(options.out, QUESTION, rows, notes={"batch": options.batch, "threads": options.threads})
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
