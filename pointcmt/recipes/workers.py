"""Jobs one after another in this process, or several at a time in processes of their own.

A process serves many jobs, so that an interpreter is started and data are read once and not per job. Nothing
is lost by a kill: a worker whose parent is gone ends, and what a job has written itself stays.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from pointcmt.recipes import engine
from pointcmt.recipes.engine import MachineOptions, OutOfTime, out_of_time
from pointcmt.recipes.options import shared_shapes
from pointcmt.recipes.run import cores


@dataclass(frozen=True)
class Job:
    """One piece of work: ``call(*arguments)``, where a worker can import ``call``."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    """Names of jobs that must have succeeded before; names of no job here are held to have."""


@dataclass(frozen=True)
class Slot:
    """Where one job at a time runs."""

    threads: int
    """Threads of torch and OpenMP."""
    gpu: int | None = None
    """The only GPU that is visible there; None: as here."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    result: Any = None
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

    One place: in this process. Several: a process each, whose output goes to ``logs/<job>.txt``. A job that
    needs one that failed fails without being run. No job is begun once ``machine.minutes`` are over.

    Raises:
        OutOfTime: time was over before all jobs were done.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with shared_shapes():
        yield from _here(jobs, machine, logs) if len(places) == 1 else _apart(jobs, places, machine, logs)


def _missing(job: Job, failed: Mapping[str, str]) -> Outcome | None:
    broken = [name for name in job.needs if name in failed]
    return Outcome(job, failure=f"needs {', '.join(broken)}, which failed") if broken else None


def _left(count: int) -> OutOfTime:
    return OutOfTime(f"{count} left to do; run the same command again")


def _here(jobs: Sequence[Job], machine: MachineOptions, logs: Path) -> Generator[Outcome, None, None]:
    failed: dict[str, str] = {}
    for number, job in enumerate(jobs):
        outcome = _missing(job, failed)
        if outcome is None and out_of_time(machine):
            raise _left(len(jobs) - number)
        if outcome is None:
            try:
                outcome = Outcome(job, job.call(*job.arguments))
            except OutOfTime:
                raise _left(len(jobs) - number) from None
            except Exception as error:
                log = _log(logs, job)
                log.write_text(traceback.format_exc())
                outcome = Outcome(job, failure=_one_line(error), log=log)
        if outcome.failure is not None:
            failed[job.name] = outcome.failure
        yield outcome


def _log(logs: Path, job: Job) -> Path:
    return logs / f"{job.name.replace(os.sep, '-')}.txt"


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


class _Worker:
    """A process that does the jobs it is sent."""

    def __init__(self, place: Slot) -> None:
        context = get_context("spawn")  # a forked process inherits threads' locks, and cannot use CUDA
        self.place = place
        self.job: Job | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, place.threads, engine.STARTED))
        # read when a library is loaded, so they must be there before the process is
        with _environment(
            {"OMP_NUM_THREADS": str(place.threads)}
            | ({} if place.gpu is None else {"CUDA_VISIBLE_DEVICES": _gpu(place.gpu)})
        ):
            self.process.start()
        theirs.close()

    def begin(self, job: Job, logs: Path) -> None:
        self.job = job
        self.pipe.send((job, _log(logs, job)))

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _gpu(number: int) -> str:
    """The name of a GPU for a process that sees no other; of those that this one sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)


@contextmanager
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


def _apart(
    jobs: Sequence[Job], places: Sequence[Slot], machine: MachineOptions, logs: Path
) -> Generator[Outcome, None, None]:
    waiting = list(jobs)
    unfinished = {job.name for job in jobs}
    failed: dict[str, str] = {}
    stopped = 0
    free = list(places[: len(jobs)])
    workers: list[_Worker] = []
    try:
        while True:
            idle = [worker for worker in workers if worker.job is None]
            while waiting and not stopped and not out_of_time(machine):
                job = next((job for job in waiting if not unfinished & set(job.needs)), None)
                if job is None:
                    break
                if (outcome := _missing(job, failed)) is None:
                    if not idle and not free:
                        break
                    worker = idle.pop() if idle else _Worker(free.pop(0))
                    if worker not in workers:
                        workers.append(worker)
                    worker.begin(job, logs)
                waiting.remove(job)
                if outcome is not None:
                    unfinished.discard(job.name)
                    failed[job.name] = str(outcome.failure)
                    yield outcome
            busy = {worker.pipe: worker for worker in workers if worker.job is not None}
            if not busy:
                break
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                job, worker.job = worker.job, None
                assert job is not None
                log = _log(logs, job)
                try:
                    kind, value = worker.pipe.recv()
                except EOFError:  # killed, most often for want of memory
                    worker.process.join()
                    kind, value = "failed", f"its process ended with code {worker.process.exitcode}"
                    workers.remove(worker)
                    free.append(worker.place)
                if kind == "out of time":
                    stopped += 1
                    continue
                unfinished.discard(job.name)
                if kind == "failed":
                    failed[job.name] = value
                    yield Outcome(job, failure=value, log=log)
                else:
                    yield Outcome(job, value, log=log)
        if waiting or stopped:
            raise _left(len(waiting) + stopped)
    finally:
        for worker in workers:
            worker.end()


def _serve(pipe: Any, threads: int, started: float) -> None:
    """What a worker does: jobs from the pipe until it is closed."""
    torch.set_num_threads(threads)
    engine.STARTED = started  # the time budget is the whole command's; the clock is the system's
    # the parent is told of an interrupt, and ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    with shared_shapes():
        while True:
            try:
                job, log = pipe.recv()
            except EOFError:
                return
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            answer: tuple[str, Any]
            try:
                answer = "done", job.call(*job.arguments)
            except OutOfTime as stop:
                answer = "out of time", str(stop)
            except Exception as error:
                traceback.print_exc()
                answer = "failed", _one_line(error)
            sys.stdout.flush()
            sys.stderr.flush()
            try:
                pipe.send(answer)
            except BrokenPipeError:
                return
