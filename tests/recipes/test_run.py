"""The run folder: what is written, what is refused, and what resuming demands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pointcmt.recipes.config import plain
from pointcmt.recipes.run import RunFolder, find_checkpoint, flatten, read_metrics


@dataclass
class Inner:
    lr: float = 0.1


@dataclass
class Config:
    out: Path = Path("somewhere")
    epochs: int = 3
    loop: Inner = field(default_factory=Inner)
    resume: bool = False


@dataclass
class Taught(Config):
    teacher: Path | None = None


def start(folder: Path, config: Config | None = None, **options) -> RunFolder:
    return RunFolder.open(folder, config or Config(), command=options.pop("command", "train"), **options)


def test_a_run_folder_describes_itself(tmp_path):
    start(tmp_path / "run", inputs={"data": "abc"})
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config == {
        "command": "train",
        "config": {"out": "somewhere", "epochs": 3, "loop": {"lr": 0.1}, "resume": False},
        "inputs": {"data": "abc"},
    }
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(environment["kernels"]) == {"cpu", "cuda"}
    assert environment["device"] == "cpu"


def test_a_second_run_in_the_folder_is_an_error_that_says_what_to_do(tmp_path):
    start(tmp_path)
    with pytest.raises(FileExistsError, match=r"--resume.*--out"):
        start(tmp_path)


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            start(tmp_path, resume=resume)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        start(tmp_path / "run")


def test_resuming_with_another_configuration_names_the_fields(tmp_path):
    start(tmp_path, Config(epochs=3))
    with pytest.raises(ValueError, match=r"epochs: 3 there, 4 now; .*lr: 0\.1 there, 0\.2 now"):
        start(tmp_path, Config(epochs=4, loop=Inner(0.2)), resume=True)
    with pytest.raises(ValueError, match="a run of `pointcmt train`"):
        start(tmp_path, command="train-teacher", resume=True)


def test_resuming_from_changed_inputs_is_an_error(tmp_path):
    start(tmp_path, inputs={"teacher": "1" * 64})
    with pytest.raises(ValueError, match=r"teacher \(1{12} there, 2{12} now\)"):
        start(tmp_path, inputs={"teacher": "2" * 64}, resume=True)


def test_an_input_may_lie_elsewhere_when_it_is_the_same(tmp_path):
    inputs = {"teacher": "1" * 64}
    start(tmp_path, Taught(teacher=Path("runs/teacher")), inputs=inputs)
    start(tmp_path, Taught(teacher=Path("elsewhere/teacher")), inputs=inputs, resume=True)
    with pytest.raises(ValueError, match="teacher"):  # none at all is another input
        start(tmp_path, Taught(), resume=True)


def test_resuming_in_another_place_is_allowed_and_recorded(tmp_path):
    start(tmp_path, Config(out=Path("a")))
    start(tmp_path, Config(out=Path("b"), resume=True), resume=True)
    assert len(json.loads((tmp_path / "environment.json").read_text())["resumed"]) == 1


def test_resume_starts_a_run_where_there_is_none(tmp_path):
    start(tmp_path / "new", resume=True)
    assert (tmp_path / "new/config.json").exists()


def test_a_run_that_was_killed_while_it_began_can_be_started_again(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / ".environment.x7f.json").write_text("{")
    start(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_metrics_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    run = start(tmp_path)
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch, "loss": 1 / epoch})
    with run.metrics_path.open("a") as file:
        file.write('{"epoch": 4, "lo')
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    run.forget_metrics_after(2)
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2]
    run.metrics_path.write_text('broken\n{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1 is not JSON"):
        read_metrics(tmp_path)


def test_state_is_loaded_without_unpickling_and_damage_is_an_error(tmp_path):
    run = start(tmp_path)
    assert run.load_state() is None
    run.save_state({"epoch": 2, "model": {"w": torch.arange(3.0)}})
    loaded = torch.load(run.state_path, weights_only=True)
    assert loaded["epoch"] == 2 and torch.equal(loaded["model"]["w"], torch.arange(3.0))
    run.state_path.write_bytes(run.state_path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        run.load_state()


@dataclass
class Loop:
    epochs: int = 3
    schedule: str = "cosine"


@dataclass
class Looped:
    loop: Loop = field(default_factory=Loop)


def finished(folder: Path, epochs: int, schedule: str) -> RunFolder:
    run = start(folder, Looped(Loop(epochs, schedule)))
    run.save_state({"epoch": epochs})
    run.finish({"last": {}})
    return run


def test_a_run_goes_on_to_more_epochs_and_says_what_changes(tmp_path, capsys):
    """Case 20: --resume --epochs MORE."""
    finished(tmp_path / "r", 3, "cosine")
    run = start(tmp_path / "r", Looped(Loop(5)), resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "begun with --epochs 3 and goes on to 5 after 3" in said and "is planned anew over 5 epochs" in said
    )
    assert run.finished() is None and run.read_config()["config"]["loop"]["epochs"] == 5
    assert run.read_config()["epochs_before"] == [[3, 3]]
    run.finish({"last": {}})
    finished(tmp_path / "c", 3, "constant")
    start(tmp_path / "c", Looped(Loop(4, "constant")), resume=True)
    assert "the learning rate is constant, as it was" in " ".join(capsys.readouterr().out.split())
    # fewer than are over; or a state that is gone
    with pytest.raises(ValueError, match=r"4 epochs, of which 3 are over: it cannot go on to --epochs 2"):
        start(tmp_path / "c", Looped(Loop(2, "constant")), resume=True)
    finished(tmp_path / "s", 3, "constant").state_path.unlink()
    with pytest.raises(ValueError, match=r"state\.pt\) is gone"):
        start(tmp_path / "s", Looped(Loop(5, "constant")), resume=True)


def test_other_processes_or_threads_are_a_warning(tmp_path, capsys, monkeypatch):
    start(tmp_path)
    start(tmp_path, resume=True)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    start(tmp_path, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "begun with processes: 1, and goes on with 2" in said and "and goes on with 77" in said


def test_one_process_at_a_time_writes_a_run(tmp_path):
    pytest.importorskip("fcntl")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_run import start\n"
        "start(Path(sys.argv[1])); print('started', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r"), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"started\n"
        with pytest.raises(RuntimeError, match=r"another process is at work in .*wait for it, stop it"):
            start(tmp_path / "r", resume=True)
        assert "resumed" not in json.loads((tmp_path / "r/environment.json").read_text())
    finally:
        other.kill()
        other.wait()
    run = start(tmp_path / "r", resume=True)  # the lock went with the process
    run.finish({})
    assert not (tmp_path / "r/.lock").exists()


def test_find_checkpoint_says_what_was_tried_and_what_to_run(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no teacher at .*teacher.safetensors.*pointcmt train-teacher"
    ):
        find_checkpoint(tmp_path / "t", "teacher")
    start(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="not finished: continue it with --resume"):
        find_checkpoint(tmp_path / "t", "teacher")
    (tmp_path / "t/teacher.safetensors").write_bytes(b"")
    assert find_checkpoint(tmp_path / "t", "teacher") == tmp_path / "t/teacher.safetensors"


def test_configurations_become_plain_json():
    assert plain(Config()) == {"out": "somewhere", "epochs": 3, "loop": {"lr": 0.1}, "resume": False}
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert plain(torch.tensor(2.5)) == 2.5
