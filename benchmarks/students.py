"""How fast do the reference students train, next to the public code of the same networks?

    python -m benchmarks.students --repos DIR
    python -m benchmarks.students --plain [--autocast]

DIR holds checkouts of the public repositories, in folders of any name; a repository that is not there is
skipped by name. Both sides do the same work in the same run, in turns: forward, cross-entropy, backward on
the same batch of real or random clouds, with the same weights. On a CPU each pair is timed twice: as any
process starts, where the C library gives a step's memory back and faults it in again, and with that memory
kept, as commands of pointcmt keep it (see benchmarks/memory.py). Beside the ratios stand the part of our
step that its matrix products alone would take, the largest difference of the logits in eval mode, each with
its own search for neighbours and with the same neighbours, and both parameter counts.

``--plain`` asks instead what the fused operator (``ops.norm_act_max``) brings: a whole training step of each
student with it, and with the same algebra in PyTorch operations, in turns and with freed memory kept.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._harness import RESULTS, interleave, record, show
from benchmarks._public_students import PUBLIC_STUDENTS, PublicStudent
from pointcmt import ops, students
from pointcmt.recipes.engine import keep_freed_memory
from pointcmt.students._blocks import rows

QUESTION = "How fast do the reference students train, next to the public code of the same networks?"
CLASSES = 40


def clouds(batch: int, points: int, modelnet40: str | None) -> tuple[Tensor, str]:
    """[B, N, 3] in the unit sphere and what they are: real shapes where a folder is given."""
    generator = torch.Generator().manual_seed(0)
    if modelnet40 is not None:
        from pointcmt.data import ModelNet40

        data = ModelNet40(modelnet40, "test", num_points=points)
        chosen = torch.randperm(len(data), generator=generator)[:batch]
        return torch.stack([torch.as_tensor(data[int(i)][0]) for i in chosen]), "ModelNet40 test shapes"
    directions = torch.randn(batch, points, 3, generator=generator)
    stretch = 0.3 + 0.7 * torch.rand(batch, 1, 3, generator=generator)
    return F.normalize(directions, dim=-1) * stretch, "random ellipsoids"


def step(run: Callable[[Tensor], Tensor], module: nn.Module, points: Tensor, labels: Tensor) -> None:
    """One training step without the optimiser, which is the same for both."""
    module.zero_grad(set_to_none=True)
    F.cross_entropy(run(points), labels).backward()


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second that a large matrix product of float32 reaches, the best of some."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device)
    times = interleave({"product": lambda: a @ b}, 9, warmup=2, device=device)
    return 2 * size**3 / times["product"].low


def operations(run: Callable[[Tensor, Tensor], None], points: Tensor, labels: Tensor, few: int = 4) -> float:
    """Floating-point operations of a step's matrix products and convolutions, counted on a few clouds."""
    with FlopCounterMode(display=False) as counter:
        run(points[:few], labels[:few])
    return counter.get_total_flops() * len(points) / few


def models(public: PublicStudent, checkout: Path, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = public.build(checkout, CLASSES).to(device)
    ours = public.ours(CLASSES).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def agreement(public: PublicStudent, theirs: nn.Module, ours: nn.Module, points: Tensor) -> dict[str, Any]:
    """How far the logits are apart in eval mode, and the parameters of both."""
    # float64: rounding picks no other neighbours. Of two at exactly the same distance, which real clouds have
    # now and then at the last place of k, either code takes one, so once more with the same neighbours.
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        plain, quick = (copy.deepcopy(model).eval().double() for model in (theirs, ours))
        some = points[:8].double()
        got = quick(some)
        if public.repository.startswith("yanx27/"):  # it returns log-probabilities
            got = got.log_softmax(-1)
        own = (public.run(plain, some) - got).abs().max().item()
        with public.sharing_search(plain):
            shared = (public.run(plain, some) - got).abs().max().item()
    torch.set_default_dtype(torch.float32)
    return {
        "max difference, float64, own search": own,
        "same neighbours": shared,
        "parameters public": sum(p.numel() for p in theirs.parameters()),
        "parameters ours": sum(p.numel() for p in ours.parameters()),
    }


def compare(
    public: PublicStudent, theirs: nn.Module, ours: nn.Module, points: Tensor, repeats: int, seconds: float
) -> dict[str, Any]:
    """The times of a training step, and what its matrix products alone would take of ours."""
    device = points.device
    labels = torch.arange(len(points), device=device) % CLASSES
    theirs.train()
    ours.train()
    candidates = {
        "public": lambda p, y: step(lambda p: public.run(theirs, p), theirs, p, y),
        "ours": lambda p, y: step(ours, ours, p, y),
    }
    count = {name: operations(run, points, labels) for name, run in candidates.items()}  # warms up as well
    times = interleave(
        {name: functools.partial(run, points, labels) for name, run in candidates.items()},
        repeats,
        warmup=0,
        device=device,
        seconds=seconds,
        at_least=2,
    )
    for model in (theirs, ours):
        model.zero_grad(set_to_none=True)
    return {
        "ratio": times["public"].over(times["ours"]),
        "public": times["public"],
        "ours": times["ours"],
        "matrix products, part of ours": count["ours"] / matrix_rate(device) / times["ours"].median,
        "their operations, times ours": count["public"] / count["ours"],
    }


OWN: dict[str, Callable[[int], nn.Module]] = {public.name: public.ours for public in PUBLIC_STUDENTS}
OWN["pointnext"] = students.pointnext


def against_plain(name: str, points: Tensor, repeats: int, seconds: float, autocast: bool) -> dict[str, Any]:
    """A student's training step with the fused operator and with the same algebra in PyTorch operations."""
    torch.manual_seed(0)
    student = OWN[name](CLASSES).to(points.device).train()
    labels = torch.arange(len(points), device=points.device) % CLASSES

    def once() -> None:
        with torch.autocast(points.device.type, dtype=torch.bfloat16, enabled=autocast):
            step(student, student, points, labels)

    def without() -> None:
        with mock.patch.object(ops, "norm_act_max", _in_torch):
            once()

    times = interleave(
        {"fused": once, "plain": without}, repeats, device=points.device, seconds=seconds, at_least=3
    )
    return {"student": name, "plain / fused": times["plain"].over(times["fused"]), **times}


def _in_torch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
    centres: Tensor | None = None,
    idx: Tensor | None = None,
) -> Tensor:
    """``ops.norm_act_max`` in PyTorch's quickest operations: amax where its twin takes the first maximum."""
    if centres is not None and idx is not None:
        x = rows(x, idx).add_(centres[:, :, None])
    y = F.batch_norm(
        x.reshape(-1, x.shape[-1]), running_mean, running_var, weight, bias, training, momentum, eps
    )
    return F.leaky_relu_(y, slope).view(x.shape).amax(-2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--repos", type=Path, help="folder that holds checkouts of the public repositories")
    parser.add_argument("--modelnet40", help="folder of ModelNet40; random clouds without it")
    parser.add_argument("--students", nargs="*", help="only these, of: " + ", ".join(_names()))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="per line, once two rounds are done")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="the JSON file; benchmarks/results/students-<device>.json by default")
    parser.add_argument("--plain", action="store_true", help="compare with plain PyTorch operations instead")
    parser.add_argument("--autocast", action="store_true", help="with --plain: in bfloat16")
    options = parser.parse_args(argv)

    if options.plain:
        keep_freed_memory()
        points, source = clouds(options.batch, options.points, options.modelnet40)
        lines = [
            against_plain(name, points.to(options.device), options.repeats, options.seconds, options.autocast)
            for name in options.students or OWN
        ]
        record(
            options.out or RESULTS / f"students-plain-{torch.device(options.device).type}.json",
            "What does the fused operator bring to a training step?",
            lines,
            notes={"batch": options.batch, "clouds": source, "autocast": options.autocast},
        )
        show(lines)
        return 0
    unknown = set(options.students or ()) - set(_names())
    if unknown:
        parser.error(f"no such student: {', '.join(sorted(unknown))}; choose of {', '.join(_names())}")
    points, source = clouds(options.batch, options.points, options.modelnet40)
    points = points.to(options.device)
    found: list[tuple[PublicStudent, Path]] = []
    skipped: dict[str, str] = {}
    for public in PUBLIC_STUDENTS:
        if options.students and public.name not in options.students:
            continue
        checkout = None if options.repos is None else public.find(options.repos)
        if checkout is None:
            skipped[public.name] = f"no checkout of {public.repository} (--repos DIR)"
            continue
        found.append((public, checkout))
    agreements: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    memories = ("given back", "kept") if points.device.type == "cpu" else ("",)
    for memory in memories:
        if memory == "kept" and not keep_freed_memory():
            continue  # no C library that gives memory back
        for public, checkout in found:
            theirs, ours = models(public, checkout, points.device)
            if public.name not in agreements:
                agreements[public.name] = agreement(public, theirs, ours, points)
            times = compare(public, theirs, ours, points, options.repeats, options.seconds)
            rows.append(
                {
                    "student": public.name,
                    "repository": public.repository,
                    "freed memory": memory,
                    **times,
                    **agreements[public.name],
                    "replaced in public": public.replaced,
                }
            )
            print(f"{public.name}, freed memory {memory}: {times['ratio']:.2f} times as fast", flush=True)
            del theirs, ours
            gc.collect()
    record(
        options.out or RESULTS / f"students-{points.device.type}.json",
        QUESTION,
        rows,
        skipped=skipped,
        notes={
            "batch": options.batch,
            "points": options.points,
            "clouds": source,
            "device": options.device,
            "work": "forward, cross-entropy and backward, both from the same weights",
        },
    )
    if rows:
        show(rows)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    return 0


def _names() -> list[str]:
    return [public.name for public in PUBLIC_STUDENTS]


if __name__ == "__main__":
    raise SystemExit(main())
