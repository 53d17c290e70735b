"""Pieces of work one after another in this process, or several at a time in processes of their own.

A process serves many jobs, so that an interpreter is started and data are read once and not per job. What a
kill leaves is gone on with by the same command, on this machine or, by ``submitit``, on a cluster.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pointcmt.recipes import engine
from pointcmt.recipes.build import IMPORTED, import_module
from pointcmt.recipes.engine import MachineOptions, OutOfTime, out_of_time
from pointcmt.recipes.options import shared_shapes
from pointcmt.recipes.run import cores

OUT_OF_TIME = 75
"""Exit code of a job that stopped because its time was over (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Job:
    """One piece of work, as a call and as a command that does the same on any machine."""

    name: str
    call: Callable[[], object]
    """What a process can be sent: a function of a module, or a ``functools.partial`` of one."""
    command: Sequence[str] = ()
    """Arguments of ``python``."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must have succeeded before; names of no job here are held to have."""


@dataclass(frozen=True)
class Slot:
    """Where one job at a time runs."""

    threads: int
    """Threads of torch and OpenMP."""
    gpu: int | None = None
    """The only GPU that is visible there; None: as here."""

    def environment(self) -> dict[str, str]:
        """Read when libraries are loaded, so it must be there before the process is."""
        values = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            values["CUDA_VISIBLE_DEVICES"] = visible.split(",")[self.gpu] if visible else str(self.gpu)
        return values


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    failure: str | None = None
    """What went wrong, in one line; None where nothing did."""
    log: Path | None = None
    """The job's own output, where it has any outside the terminal."""


def slots(machine: MachineOptions, jobs: int) -> list[Slot]:
    """``jobs`` places on the CPU, or that many on each GPU; the cores are shared out among them.

    Raises:
        ValueError: fewer than one job.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; expected at least 1")
    gpus = torch.cuda.device_count() if machine.device != "cpu" else 0
    places: list[int | None] = [gpu for gpu in range(gpus) for _ in range(jobs)] if gpus else [None] * jobs
    return [Slot(max(1, cores() // len(places)), place) for place in places]


def run_jobs(
    jobs: Sequence[Job], places: Sequence[Slot], machine: MachineOptions, logs: Path
) -> Generator[Outcome, None, None]:
    """Run the jobs, yielding each as it ends; a failure does not stop the others.

    One place: in this process. Several: a process each, where the output of a job goes to ``logs/<job>.txt``.
    A job that needs one that failed fails without being run. No job is begun once ``machine.minutes`` are
    over.

    Raises:
        OutOfTime: time was over before all jobs were done.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, unfinished = list(jobs), {job.name for job in jobs}
    failed: dict[str, str] = {}
    busy: dict[Future[str | None], tuple[Job, _Here | _Apart]] = {}
    late = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared_shapes())
        free = [stack.enter_context(_Apart(place) if len(places) > 1 else _Here()) for place in places]
        while True:
            ready = [job for job in waiting if not unfinished & set(job.needs)]
            for job in ready[: 0 if late or out_of_time(machine) else len(free)]:
                waiting.remove(job)
                place = free.pop()
                broken = ", ".join(name for name in job.needs if name in failed)
                if broken:
                    future: Future[str | None] = _done(f"needs {broken}, which failed")
                else:
                    future = place.submit(job.call, _log(logs, job))
                busy[future] = job, place
            if not busy:
                break
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                job, place = busy.pop(future)
                free.append(place)
                failure = place.failure(future)
                if failure == _LATE:
                    late += 1
                    continue
                unfinished.discard(job.name)
                if failure is not None:
                    failed[job.name] = failure
                yield Outcome(job, failure, _log(logs, job))
    if waiting or late:
        raise OutOfTime(f"{len(waiting) + late} left to do; run the same command again")


_LATE = "out of time"


def _done(value: str | None) -> Future[str | None]:
    future: Future[str | None] = Future()
    future.set_result(value)
    return future


def _log(logs: Path, job: Job) -> Path:
    return logs / f"{job.name.replace(os.sep, '-')}.txt"


def _attempt(call: Callable[[], object], trace: Callable[[str], object]) -> str | None:
    """What went wrong in one line, :data:`_LATE`, or None."""
    try:
        call()
    except OutOfTime:
        return _LATE
    except Exception as error:
        trace(traceback.format_exc())
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    return None


class _Here:
    """This process, which does a job at once."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Callable[[], object], log: Path) -> Future[str | None]:
        return _done(_attempt(call, log.write_text))

    def failure(self, future: Future[str | None]) -> str | None:
        return future.result()


class _Apart(_Here):
    """A process of its own, begun with its first job, and again where it died."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.pool: ProcessPoolExecutor | None = None

    def submit(self, call: Callable[[], object], log: Path) -> Future[str | None]:
        if self.pool is None:
            context = get_context("spawn")  # a forked process inherits threads' locks, and cannot use CUDA
            ours, self.life = context.Pipe(duplex=False)
            self.pool = ProcessPoolExecutor(
                1, context, _begin, (ours, self.slot.threads, engine.STARTED, list(IMPORTED))
            )
        with _environment(self.slot.environment()):  # the first job starts the process
            return self.pool.submit(_logged, call, log)

    def failure(self, future: Future[str | None]) -> str | None:
        try:
            return future.result()
        except BrokenProcessPool:  # killed, most often for want of memory
            self.__exit__()
            return "its process ended in the middle of the job (was there memory enough?)"

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.life.close()
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_shared = contextlib.ExitStack()


def _begin(life: Any, threads: int, started: float, modules: Sequence[str]) -> None:
    """The first that a process of its own does."""

    def follow() -> None:
        with contextlib.suppress(EOFError, OSError):
            life.recv()  # nothing is ever sent: it ends with the command, however that ends
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    engine.STARTED = started  # the time budget is the whole command's; the clock is the system's
    for module in modules:
        import_module(module)
    _shared.enter_context(shared_shapes())


def _logged(call: Callable[[], object], log: Path) -> str | None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        return _attempt(call, sys.stderr.write)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve(call: Callable[[], object]) -> int:
    """A job as a command of its own; returns the exit code."""
    failure = _attempt(call, sys.stderr.write)
    if failure is not None:
        print(failure, file=sys.stderr)
    return {None: 0, _LATE: OUT_OF_TIME}.get(failure, 1)


def submit(jobs: Sequence[Job], logs: Path, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Hand the jobs to the scheduler of a cluster (SLURM), each after those that it needs; returns their ids.

    Args:
        jobs: in an order in which each comes after what it needs.
        logs: folder of scripts and output.
        parameters: of ``submitit``: timeout_min, cpus_per_task, gpus_per_node, mem_gb, slurm_partition,
            cluster …

    Raises:
        ImportError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError("--submit needs submitit: pip install 'pointcmt[cluster]'") from error
    given = dict(parameters)
    executor = submitit.AutoExecutor(folder=logs / "%j", cluster=given.pop("cluster", None))
    handed: dict[str, Any] = {}
    for job in jobs:
        needs = [handed[name] for name in job.needs if name in handed]
        more: dict[str, Any] = {}
        if executor.cluster != "slurm":
            for need in needs:  # nothing but SLURM can wait by itself
                need.result()
        elif needs:
            after = ":".join(need.job_id for need in needs)
            more = {"slurm_additional_parameters": {"dependency": f"afterok:{after}"}}
        executor.update_parameters(name=job.name, **given, **more)
        handed[job.name] = executor.submit(
            submitit.helpers.CommandFunction([sys.executable, *job.command], verbose=False)
        )
    return {name: one.job_id for name, one in handed.items()}
