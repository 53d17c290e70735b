"""Killed and resumed is never killed: the short form of ``make kill``, and that it sees what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill import RANK_FAULTS, RECIPES, contents, differences
from pointcmt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


# what rank 1 of two meets; `make kill` tries all with all
LOST = {
    "train-teacher": "it dies",
    "train-generator": "its gradient is NaN",
    "train": "it stops answering",
    "train --unlabelled": "its gradient is NaN",
    "pretrain": "its loss is NaN",
    "segment": "it has an error",
    "train-registration": "its gradient is NaN",
}


def test_every_command_that_writes_a_run_is_killed():
    named = {one.name.split(",")[0].split()[0] for one in RECIPES}
    # demo is these, and the rest reads, or writes one file
    assert named == COMMANDS.keys() & {
        "train-teacher", "train-generator", "cache-features", "train", "pretrain", "segment",
        "train-registration", "render-views", "ablate",
    }  # fmt: skip
    trained = {one.name for one in RECIPES if one.processes == 1}
    trained -= {"cache-features", "render-views", "ablate"}
    assert trained == {one.name.split(",")[0] for one in RECIPES if one.processes > 1} == set(LOST)
    assert set(LOST.values()) == set(RANK_FAULTS)


@pytest.mark.slow
def test_runs_that_were_killed_and_resumed_are_equal(tmp_path):
    """In a process of its own: it forks, which one that has threads must not."""
    recipes = ["cache-features", "train", "segment"]
    command = [sys.executable, "-m", "benchmarks.kill", "--minutes", "2", "--kills", "1", "--writes", "2"]
    command += ["--state", str(tmp_path / "state.json"), "--out", str(tmp_path / "record.json"), "--recipes"]
    done = subprocess.run([*command, *recipes], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == recipes
    assert all(row["killed at a write"] == 2 and row["killed at random instants"] == 1 for row in rows)


@pytest.mark.slow
def test_a_process_of_two_that_is_lost_or_has_a_nan_is_named(tmp_path):
    code = (
        "import json, os, sys; from pathlib import Path; from benchmarks import kill\n"
        "os.environ['OMP_NUM_THREADS'] = '1'; kill.load_libraries()\n"
        "made, work = Path(sys.argv[1], 'made'), Path(sys.argv[1], 'work')\n"
        "kill.prepare(made)\n"
        "for recipe in kill.RECIPES:\n"
        "    fault = json.loads(sys.argv[2]).get(recipe.name.split(',')[0])\n"
        "    if recipe.processes > 1 and (wrong := kill.lose_a_rank(recipe, work, made, fault)):\n"
        "        print(recipe.name, wrong)\n"
        "print('done')"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(LOST)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_what_differs_is_seen(tmp_path):
    for name, loss, more in (("a", 0.5, ""), ("b", 0.25, ".x.tmp")):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run/metrics.jsonl").write_text(json.dumps({"loss": loss, "seconds": loss}) + "\n")
        if more:
            (tmp_path / name / "run" / more).touch()
    one, other = (contents(tmp_path / name) for name in "ab")
    assert differences(one, one) == []
    assert differences(one, other) == [("run/.x.tmp", ""), ("run/metrics.jsonl", "/0/loss")]
