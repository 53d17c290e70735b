"""Jobs in turn and in processes of their own: failures, deaths, time, interrupts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pointcmt.recipes import engine, workers
from pointcmt.recipes.engine import MachineOptions, OutOfTime
from pointcmt.recipes.workers import Job, Slot, run_jobs, slots
from tests import worker_jobs

MACHINE = MachineOptions(device="cpu")
JOBS = [
    Job("a", worker_jobs.facts, (1,)),
    Job("broken", worker_jobs.fail),
    Job("b", worker_jobs.facts, (2,), needs=("a",)),
    Job("hopeless", worker_jobs.facts, (3,), needs=("broken",)),
    Job("free", worker_jobs.facts, (4,), needs=("not of these",)),
]


def check(outcomes: dict[str, workers.Outcome]) -> None:
    assert outcomes.keys() == {job.name for job in JOBS}
    assert outcomes["broken"].failure == "ValueError: this cell is broken"
    assert "and says more" in outcomes["broken"].log.read_text()
    assert outcomes["hopeless"].failure == "needs broken, which failed"
    assert all(outcomes[name].failure is None for name in ("a", "b", "free"))


def test_in_this_process_a_failure_stops_no_other_job(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcomes = {o.job.name: o for o in run_jobs(JOBS, [Slot(1)], MACHINE, tmp_path)}
    check(outcomes)
    assert outcomes["a"].result["pid"] == os.getpid()


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path, monkeypatch):
    """Also a job whose process dies, and the interpreters are used again."""
    before = os.environ.get("OMP_NUM_THREADS")
    jobs = [*JOBS[:3], Job("dead", worker_jobs.die), *JOBS[3:]]
    outcomes = {o.job.name: o for o in run_jobs(jobs, [Slot(3), Slot(3)], MACHINE, tmp_path)}
    assert outcomes.pop("dead").failure == "its process ended with code 7"
    check(outcomes)
    for name in ("a", "b", "free"):
        assert outcomes[name].result["threads"] == 3 and outcomes[name].result["omp"] == "3"
        assert outcomes[name].result["pid"] != os.getpid()
    assert "job 2 speaks" in outcomes["b"].log.read_text()
    assert os.environ.get("OMP_NUM_THREADS") == before
    # the time budget is that of the command, in the workers too
    minutes = (time.monotonic() - engine.STARTED + 8) / 60
    late = [Job("late", worker_jobs.until_time_is_over, (minutes,)), *(JOBS[0],) * 2]
    with pytest.raises(OutOfTime, match="left to do"):
        list(run_jobs([late[0]], [Slot(1), Slot(1)], MachineOptions(device="cpu", minutes=minutes), tmp_path))
    with pytest.raises(OutOfTime, match="2 left to do"):
        list(run_jobs(late[1:], [Slot(1), Slot(1)], MachineOptions(device="cpu", minutes=1e-9), tmp_path))


@pytest.mark.slow
def test_a_worker_does_not_outlive_the_command(tmp_path):
    """The command is killed outright."""
    script = tmp_path / "main.py"
    script.write_text(
        "from pathlib import Path\n"
        "from pointcmt.recipes.engine import MachineOptions\n"
        "from pointcmt.recipes.workers import Job, Slot, run_jobs\n"
        "from tests import worker_jobs\n"
        "if __name__ == '__main__':\n"
        "    jobs = [Job('long', worker_jobs.sleep, (str(Path(__file__).parent / 'pid'),))]\n"
        "    list(run_jobs(jobs, [Slot(1)] * 2, MachineOptions(), Path(__file__).parent / 'logs'))\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    try:
        assert wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 90)
    finally:
        command.kill()
        command.wait()
    pid = int((tmp_path / "pid").read_text())
    assert wait(lambda: not Path(f"/proc/{pid}").exists(), 40) or not Path("/proc").exists()


def wait(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_the_places(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert slots(MachineOptions(device="cpu"), 3) == [Slot(2)] * 3
    assert slots(MachineOptions(), 2) == [Slot(2, 0), Slot(2, 0), Slot(2, 1), Slot(2, 1)]
    with pytest.raises(ValueError, match="--jobs is 0"):
        slots(MachineOptions(), 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [workers._gpu(number) for number in (0, 1)] == ["5", "7"]
