"""What every benchmark shares: fair timing, the machine's description, the JSON record.

A benchmark times its candidates interleaved, A B C A B C ..., so that a slow minute of the machine
falls on all alike, and reports medians with their spread. Figures are ratios within one run.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pointcmt.checkpoint import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("torch", "numpy", "scipy", "pot", "geomloss", "timm", "torch-cluster", "pointnet2_ops"),
    *("fpsample", "faiss-cpu"),
)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the repeats, and the quartiles around it."""

    median: float
    low: float
    high: float
    repeats: int

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def over(self, other: Timing) -> float:
        """How many times longer this took than ``other``."""
        return self.median / other.median


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
    at_least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times callables in turns.

    Args:
        candidates: name → a callable that does the whole work once.
        repeats: rounds; each round calls every candidate once.
        warmup: calls of each candidate before the first round.
        device: on CUDA, time is taken between synchronisations.
        seconds: stop after the round in which this much time has passed.
        at_least: rounds that are run however long they take.
        clock: seconds; ``time.process_time`` counts the work of all threads, and only this process's.

    Returns:
        name → :class:`Timing`, in seconds.
    """
    device = torch.device(device)

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for run in candidates.values():
        for _ in range(warmup):
            run()
    synchronise()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of one candidate would be charged to it
    started = time.perf_counter()
    try:
        for done in range(1, repeats + 1):
            for name, run in candidates.items():
                begin = clock()
                run()
                synchronise()
                times[name].append(clock() - begin)
            if seconds is not None and done >= at_least and time.perf_counter() - started > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: Sequence[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(middle, low, high, len(values))


def machine() -> dict[str, Any]:
    """The machine and the versions a figure was measured with."""
    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {},
    }
    for package in PACKAGES:
        try:
            info["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return info


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def process_memory(field: str) -> int:
    """Bytes that this process has of main memory: ``VmRSS`` now, ``VmHWM`` at most (that of ``getrusage`` may
    be its parent's).

    Raises:
        RuntimeError: the system does not say, as Linux does.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{status} has no {field}: this needs Linux")


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` where tracked files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [
                *git,
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ".",
                ":!benchmarks/results",
                ":!docs",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def record(
    path: str | os.PathLike[str],
    question: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    skipped: Mapping[str, str] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes one benchmark's answer as JSON, atomically, and returns it.

    Args:
        path: the file; its folder is made.
        question: what the benchmark asks, one sentence.
        rows: one mapping per measured line. A :class:`Timing` in it becomes its fields.
        skipped: peer → why it was not measured.
        notes: anything else worth keeping, such as the settings.
    """
    answer = {
        "question": question,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "notes": dict(notes or {}),
        "skipped": dict(skipped or {}),
        "rows": [{k: _plain(v) for k, v in row.items()} for row in rows],
    }
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json.dumps(answer, indent=2) + "\n")
    return answer


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return {**asdict(value), "spread": value.spread}
    return value.item() if isinstance(value, torch.Tensor) else value


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table with aligned columns."""
    if not rows:
        return
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [columns] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, Timing):
        return f"{value.median * 1e3:.3f} ms ±{value.spread / 2:.0%}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def is_timing(value: Any) -> bool:
    """Whether a cell is a recorded ``Timing``."""
    return isinstance(value, Mapping) and {"median", "spread"} <= value.keys()


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which what is generated stands."""
    return f"<!-- begin:{name} -->", f"<!-- end:{name} -->"


def between(page: Path, name: str) -> str:
    """What stands between the marks of that name.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = marks(name)
    _, found, rest = page.read_text().partition(begin)
    text, ended, _ = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page} has no line {begin!r} followed by {end!r}")
    return text.strip()


def put_between(page: Path, name: str, text: str) -> None:
    """Writes ``text`` between the marks of that name.

    Raises:
        ValueError: the page lacks them.
    """
    between(page, name)
    begin, end = marks(name)
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def as_text(value: Any) -> str:
    """One value as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " × ".join(map(as_text, value))
    return str(value).replace("|", "\\|")


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; timings become one column, their spread."""
    flat = []
    for row in rows:
        timings = [value for value in row.values() if is_timing(value)]
        line = {key: as_text(value) for key, value in row.items() if not is_timing(value)}
        if timings:
            line["spread"] = f"{max(timing['spread'] for timing in timings):.0%}"
        flat.append(line)
    columns = list(dict.fromkeys(key for line in flat for key in line))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(line.get(column, "") for column in columns) + " |" for line in flat]
    return "\n".join(lines)
