"""A second process where one is at work: an error that names folder and process, and nothing is changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.kill import CPU, RECIPES, prepare
from pointcmt import locks
from pointcmt.cli import COMMANDS, main
from pointcmt.data import FeatureCache
from pointcmt.recipes.run import RunFolder, held
from pointcmt.types import TeacherOutput

ROOT = Path(__file__).resolve().parents[2]
KILLED = {one.name: one for one in RECIPES if one.processes == 1}
# cache-features waits: see below
LOCKED = [name for name in KILLED if name != "cache-features"] + ["demo", "robustness", "segment --run"]
# these write single files, each whole or not at all, or nothing
WHOLE_FILES = {"probe", "few-shot", "register", "evaluate", "report", "check-data", "adapters", "doctor"}


@contextmanager
def other_process(*paths: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that holds locks until it is ended."""
    pytest.importorskip("fcntl")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    code = (  # what pointcmt.locks does, without the time that its imports take
        "import fcntl, os, sys\n"
        "files = [open(path, 'w') for path in sys.argv[1:]]\n"
        "for file in files:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    print(f'process {os.getpid()} on this machine', file=file, flush=True)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the recipes start from."""
    made = tmp_path_factory.mktemp("second") / "made"
    prepare(made, lambda words, folder: (main([str(word) for word in words]), ""))
    return made


def words_of(name: str, out: Path, made: Path) -> tuple[list[str], Path]:
    """A command line, and the file of its lock."""
    if name == "demo":
        words, lock = ["demo", "--out", out / "run", *CPU], out / "run/.lock"
    elif name == "robustness":
        words = ["robustness", made / "student", "--out", out / "r.json"]
        lock = out / ".r.json.lock"
    elif name == "segment --run":
        words, lock = ["segment", "--run", made / "student", "--out", out / "run"], out / "run/.lock"
    else:
        words = list(KILLED[name].words(out, made))
        lock = out / ("images" if name == "render-views" else "run") / ".lock"
    return [str(word) for word in words], lock


def test_every_command_is_here():
    assert {name.split()[0] for name in (*LOCKED, "cache-features")} | WHOLE_FILES == COMMANDS.keys()


@pytest.fixture(scope="module")
def at_work(made, tmp_path_factory) -> Iterator[tuple[Path, int]]:
    """Folders in all of which another process is at work, and its number."""
    root = tmp_path_factory.mktemp("busy")
    with other_process(*(words_of(name, root / name, made)[1] for name in LOCKED)) as child:
        yield root, child.pid


@pytest.mark.parametrize("name", LOCKED)
def test_a_second_one_is_an_error_that_names_folder_and_process(name, made, at_work, capsys, monkeypatch):
    root, number = at_work
    out = root / name
    words, lock = words_of(name, out, made)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert before[lock].startswith(f"process {number} on ".encode())
    for more in ((), *((KILLED[name].resume,) if name in KILLED else ())):
        assert main([*words, *more]) == 1
        said = capsys.readouterr().err
        place = out / "r.json" if name == "robustness" else lock.parent
        assert f"another process is at work in {place} (process {number} on " in said, said
        assert "wait for it, stop it, or give another --out" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_folder_is_free_when_the_other_is_gone_however_it_ended(tmp_path):
    with (
        other_process(tmp_path / ".lock"),
        pytest.raises(RuntimeError, match="another process is at work"),
        held(tmp_path),
    ):
        pass
    assert (tmp_path / ".lock").exists()  # it was killed
    with held(tmp_path), held(tmp_path):
        assert f"process {os.getpid()} on".encode() in (tmp_path / ".lock").read_bytes()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_whose_file_was_deleted_meanwhile_is_not_one(tmp_path):
    """The other ends, and deletes the file, between our opening it and our locking it."""
    path, waited = tmp_path / ".lock", []
    with other_process(path) as child:

        def waiting(holder: str) -> None:
            waited.append(holder)
            path.unlink()
            child.kill()

        with locks.taken(path, waiting):
            assert path.exists(), "a lock that nobody else sees"
    assert len(waited) == 1


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    """Loaders are children: they outlive a run that was killed for some seconds."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = (
        "import os, sys, time; from pathlib import Path; from pointcmt import locks\n"
        "locks.take(Path(sys.argv[1]))\n"
        "if os.fork() == 0: time.sleep(60); os._exit(0)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    try:
        assert parent.stdout is not None and parent.stdout.readline() == b"held\n"
        parent.kill()
        parent.wait()
        with held(tmp_path):
            pass
    finally:
        os.killpg(parent.pid, 9)


def test_one_that_builds_the_same_features_is_waited_for(tmp_path):
    """cache-features, and every recipe that needs features."""
    path, said = tmp_path / "features.safetensors", []
    lock = tmp_path / ".features.safetensors.lock"

    def build() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FeatureCache.build(path, "t", "d", {}, 3, lambda rows: [(rows, TeacherOutput(torch.ones(3, 2)))])
        said.extend(str(one.message) for one in caught)

    with other_process(lock) as child:
        thread = threading.Thread(target=build)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not path.exists()
        child.kill()
        thread.join(60)
    assert len(FeatureCache.open(path)) == 3
    assert len(said) == 1 and re.search(
        rf"another process builds {path} \(process {child.pid} on .*wait", said[0]
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_a_run_that_was_killed_left_goes_whoever_wrote_it(tmp_path):
    """A folder that is held has no other writer: also another machine's files, and those of a number that a
    new process has got."""
    from pointcmt import checkpoint

    run = RunFolder.open(tmp_path / "r", {}, command="train")
    run.save_state({"epoch": 1})
    for owner in (f"{checkpoint._HOST}-{os.getppid()}", "elsewhere-17"):
        (tmp_path / "r" / f".state.{owner}-0123abcd.tmp.pt").touch()
    RunFolder.open(tmp_path / "r", {}, command="train", resume=True)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        ".lock", "config.json", "environment.json", "state.pt",
    ]  # fmt: skip


def test_files_are_written_whole():
    """A kill or a second process leaves no half of one: what writes does so in a temporary file."""
    writes = re.compile(r"(\w+)\.(write_text|write_bytes|savefig|save_file|export|tofile)\(")
    log = "pointcmt/studies/jobs.py"  # of a job: text that grows
    for path in sorted((ROOT / "pointcmt").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for name, call in writes.findall(line):
                place = f"{path.relative_to(ROOT)}:{number}"
                assert "temporary" in (name, *re.findall(r"\w+", line)) or place.startswith(log), (
                    place,
                    call,
                )
