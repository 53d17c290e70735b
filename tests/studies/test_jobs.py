"""Jobs in turn and in processes of their own: failures, deaths, time, interrupts, a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pointcmt.recipes import engine
from pointcmt.recipes.engine import MachineOptions, OutOfTime
from pointcmt.studies import jobs as module
from pointcmt.studies.jobs import OUT_OF_TIME, Job, Outcome, Slot, run_jobs, serve, slots, submit

MACHINE = MachineOptions(device="cpu")


def job(name: str, call=print, needs: tuple[str, ...] = (), *words: object) -> Job:
    return Job(name, partial(call, *words), (), needs)


def fail() -> None:
    raise ValueError("this cell is broken\nand says more")


def speak() -> None:
    print(
        "job speaks",
        torch.get_num_threads(),
        *map(os.environ.get, ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")),
    )


def stop() -> None:
    raise OutOfTime("stopped")


JOBS = [
    job("a", speak),
    job("broken", fail),
    job("b", speak, ("a",)),
    job("hopeless", needs=("broken",)),
    job("free", needs=("not of these",)),
]


def check(outcomes: dict[str, Outcome]) -> None:
    assert outcomes.keys() == {job.name for job in JOBS}
    assert outcomes["broken"].failure == "ValueError: this cell is broken"
    assert "and says more" in outcomes["broken"].log.read_text()
    assert outcomes["hopeless"].failure == "needs broken, which failed"
    assert all(outcomes[name].failure is None for name in ("a", "b", "free"))


def test_in_this_process_a_failure_stops_no_other_job(tmp_path):
    done = []
    jobs = [job(one.name, done.append, one.needs, one.name) for one in JOBS]
    jobs[1] = JOBS[1]
    check({outcome.job.name: outcome for outcome in run_jobs(jobs, [Slot(1)], MACHINE, tmp_path)})
    assert done == ["a", "b", "free"]


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path, monkeypatch):
    """Also a job whose process dies, and the interpreters are used again."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = os.environ.get("OMP_NUM_THREADS")
    jobs = [*JOBS[:3], job("dead", os._exit, (), 7), *JOBS[3:], job("late", stop)]
    jobs.append(job("clock", judge, (), engine.STARTED))
    outcomes = {}
    with pytest.raises(OutOfTime, match="left to do"):
        for outcome in run_jobs(jobs, [Slot(3, 1), Slot(3, 1)], MACHINE, tmp_path):
            outcomes[outcome.job.name] = outcome
    assert "its process ended in the middle" in outcomes.pop("dead").failure
    if "clock" in outcomes:
        assert outcomes.pop("clock").failure is None
    check(outcomes)
    assert outcomes["b"].log.read_text() == "job speaks 3 3 1\n"
    assert os.environ.get("OMP_NUM_THREADS") == before


def judge(started: float) -> None:
    assert started == engine.STARTED, "the time budget is that of the command, in its processes too"


def test_the_time_is_that_of_the_whole_command(tmp_path):
    minutes = MachineOptions(device="cpu", minutes=1e-9)
    for places in ([Slot(1)], [Slot(1)] * 2):
        with pytest.raises(OutOfTime, match="2 left to do"):
            list(run_jobs(JOBS[:2], places, minutes, tmp_path))
    with pytest.raises(OutOfTime, match="1 left to do"):
        list(run_jobs([job("late", stop)], [Slot(1)], MACHINE, tmp_path))
    assert [serve(call) for call in (stop, fail, list)] == [OUT_OF_TIME, 1, 0]


def rest(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)


@pytest.mark.slow
def test_a_job_does_not_outlive_the_command(tmp_path):
    """The command is killed outright."""
    script = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from pointcmt.recipes.engine import MachineOptions\n"
        "from pointcmt.studies.jobs import Job, Slot, run_jobs\n"
        "from tests.studies.test_jobs import rest\n"
        "if __name__ == '__main__':\n"
        "    jobs = [Job('long', partial(rest, sys.argv[1] + '/pid'))]\n"
        "    list(run_jobs(jobs, [Slot(1)] * 2, MachineOptions(), Path(sys.argv[1]) / 'logs'))\n"
    )
    (tmp_path / "main.py").write_text(script)
    root = str(Path(__file__).resolve().parents[2])
    command = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(tmp_path)], env={**os.environ, "PYTHONPATH": root}
    )
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
    monkeypatch.setattr(module, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert slots(MachineOptions(device="cpu"), 3) == [Slot(2)] * 3
    assert slots(MachineOptions(), 2) == [Slot(2, 0), Slot(2, 0), Slot(2, 1), Slot(2, 1)]
    with pytest.raises(ValueError, match="--jobs is 0"):
        slots(MachineOptions(), 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [Slot(1, number).environment()["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["5", "7"]


@pytest.mark.slow
def test_a_cluster_runs_jobs_after_those_that_they_need(tmp_path):
    """By submitit's executor of this machine, which is the one of a cluster but for its queue."""
    pytest.importorskip("submitit")
    file = str(tmp_path / "made")
    codes = {
        "first": f"import time; time.sleep(1); open({file!r}, 'w').write('x')",
        "second": f"assert open({file!r}).read(); open({file!r}, 'a').write('y')",
    }
    jobs = [
        Job(name, print, ("-c", code), () if name == "first" else ("first",)) for name, code in codes.items()
    ]
    handed = submit(jobs, tmp_path / "logs", {"cluster": "local", "timeout_min": 1})
    assert handed.keys() == {"first", "second"}
    assert wait(lambda: Path(file).read_text() == "xy", 60)
