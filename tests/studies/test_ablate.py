"""Studies: every cell once, alone or several at a time; records that stand on their own; tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pointcmt.cli import main
from pointcmt.recipes.engine import MachineOptions
from pointcmt.recipes.evaluate import Evaluate, evaluate
from pointcmt.recipes.run import held
from pointcmt.studies import ablate as study
from pointcmt.studies import tables
from pointcmt.studies.configuration import check_unchanged, read_study
from pointcmt.studies.tables import paired_interval, read_records, rows_of, table_of

ABLATION = """
data: {per_class: 4, test_per_class: 2, num_points: 64, holdout: 0.25}
views: {size: 16}
teachers:
  only:
    teacher: {feature_dim: 32, backbone_options: ["layers=(1,1)", "stem_stride=2"], loop: {epochs: 1}}
    generator: {loop: {epochs: 1}}
students:
  net: {student: pointnet2, width: 0.125, train: {loop: {lr: 5e-3}}}
methods:
  none: {method: none}
  FE: {ce_weight: 0}
  Hinton: {fe_weight: 0, ce_weight: 0, objectives: ["soft_labels=1"]}
seeds: [0, 1]
train: {loop: {epochs: 1, batch_size: 16}}
tests:
  few: {votes: 2}
paper: {net: {none: 93.4}}
"""


def words(config: Path, out: Path, *more: object) -> list[str]:
    command = ["ablate", "--config", config, "--out", out, "--device", "cpu", "--no-tensorboard", *more]
    return [str(word) for word in command]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json")}


@pytest.mark.slow
def test_every_cell_is_run_once_and_compared_in_pairs(tmp_path, capsys, monkeypatch):
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(ABLATION)
    original, done = study.run_cell, []

    def stumbling(plan, cell, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell.name)
        return original(plan, cell, *rest)

    monkeypatch.setattr(study, "run_cell", stumbling)
    assert main(words(config, out)) == 130
    monkeypatch.undo()
    records = contents(out / "records")
    assert len(records) == 2 + 1  # with the teacher's
    teacher = (out / "teachers/only/teacher/teacher.safetensors").stat().st_mtime_ns
    # as after a kill between the training of the teacher and its record
    (out / "records/teachers/only.json").unlink()
    before = json.loads(records.pop("teachers/only.json"))
    assert main(words(config, out, "--debug")) == 0
    again = json.loads((out / "records/teachers/only.json").read_text())
    assert {name: again[name] for name in ("last", "shapes")} == {n: before[n] for n in ("last", "shapes")}
    assert again["cpu_seconds"] >= before["cpu_seconds"]  # of both commands
    assert len(list((out / "records").glob("*.json"))) == 6
    for name, text in records.items():  # finished cells, and the teacher, were not done again
        assert (out / "records" / name).read_text() == text
    assert (out / "teachers/only/teacher/teacher.safetensors").stat().st_mtime_ns == teacher
    cells = read_records(out)
    table = (out / "table.md").read_text()
    assert f"| net | FE | only | {cells[0]['teacher_oa']:.1f} | 2 |" in table
    assert "93.4" in table and (out / "chart.png").exists()
    rows = json.loads((out / "summary.json").read_text())["rows"]
    gain = [
        next(c for c in cells if (c["method"], c["seed"]) == ("FE", s))["last"]["test_oa"]
        - next(c for c in cells if (c["method"], c["seed"]) == ("none", s))["last"]["test_oa"]
        for s in (0, 1)
    ]
    assert rows[1]["difference"]["test"][0] == pytest.approx(np.mean(gain))

    # what a record holds: enough to judge by, nothing of where it was made
    cell = out / "cells/net-FE-only-0"
    record = json.loads((out / "records/net-FE-only-0.json").read_text())
    assert record["cpu_seconds"] > 0 and record["parts"] == 1 and record["environment"]["cores"] >= 1
    assert json.loads((cell / "config.json").read_text())["config"]["loop"]["lr"] == 5e-3
    assert (
        record["inputs"]["teacher"]
        == json.loads((cell / "config.json").read_text())["inputs"]["teacher"][:16]
    )
    for text in contents(out / "records").values():
        assert str(tmp_path) not in text and str(Path.home()) not in text and len(text) < 4000
    # what stays of a cell: its student, not its training state
    assert {file.name for file in cell.iterdir()} == {
        "student.safetensors", "config.json", "environment.json", "results.json", "metrics.jsonl",
        "shapes.json",
    }  # fmt: skip
    assert evaluate(Evaluate(cell), quiet=True)["oa"] == pytest.approx(record["last"]["test_oa"])

    # a test that is added is measured on the students that are there, without training them again
    more = ABLATION.replace("  few: {votes: 2}", "  few: {votes: 2}\n  held: {split: heldout}")
    config.write_text(more)
    student = (cell / "student.safetensors").stat().st_mtime_ns
    assert main(words(config, out, "--debug")) == 0
    after = {record["seed"]: record for record in read_records(out) if record["method"] == "FE"}
    assert after[0]["tests"]["held"]["shapes"] == 16 and after[0]["last"] == record["last"]
    assert after[0]["parts"] == 2 and (cell / "student.safetensors").stat().st_mtime_ns == student

    # the records alone are the study: elsewhere nothing is done again, and the table is the same
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out / "records", elsewhere / "records")
    shutil.copy(out / "study.json", elsewhere)
    assert main(words(config, elsewhere, "--debug")) == 0
    assert (elsewhere / "table.md").read_text() == (out / "table.md").read_text()
    assert not (elsewhere / "cells").exists() and not (elsewhere / "teachers").exists()

    # options of a newer version are at their defaults in older records; a plain student's do not matter
    described = json.loads((elsewhere / "study.json").read_text())
    for method in described["named"]["methods"].values():
        del method["draws"]
    described["named"]["methods"]["none"]["guard"] = "none"
    (elsewhere / "study.json").write_text(json.dumps(described))
    assert main(words(config, elsewhere, "--debug")) == 0
    described["named"]["methods"]["FE"]["ce_weight"] = 1.0
    (elsewhere / "study.json").write_text(json.dumps(described))
    assert main(words(config, elsewhere)) == 1
    assert "methods.FE" in capsys.readouterr().err

    config.write_text(more.replace("num_points: 64", "num_points: 32"))
    assert main(words(config, out)) == 1
    assert "a configuration with other data" in capsys.readouterr().err


def test_two_commands_do_not_share_a_folder(tmp_path, capsys):
    pytest.importorskip("fcntl")
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(ABLATION)
    out.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from pointcmt.recipes.run import hold\n"
        "hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert main(words(config, out)) == 1
        assert "another process is at work in" in capsys.readouterr().err
        assert not (out / "cells").exists()
        assert main(words(config, out, "--table")) == 0  # looks, and trains nothing
    finally:
        other.kill()
        other.wait()
    with held(out):  # the lock went with the process
        pass


@pytest.mark.slow
def test_cells_at_a_time_with_one_that_fails(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def Net(num_classes):\n    raise ValueError('no such network')\n")
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(ABLATION)
    raw["students"]["broken"] = {"student": "mine:Net"}
    raw["methods"].pop("FE")
    raw["tests"] = {}
    raw["seeds"] = [0]
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(raw))
    assert main(words(config, out)) == 1  # a file imports nothing
    assert "if you trust that module, add --import mine" in capsys.readouterr().err.lower()
    more = ("--import", "mine")
    assert main(words(config, out, "--jobs", 2, *more)) == 1
    said = capsys.readouterr()
    assert "2 failed" in said.err and "broken-none-0: ValueError: no such network" in said.err
    assert str(out / "logs/broken-none-0.txt") in said.err.replace("\n", "")
    assert "[1/4] net-none-0: test" in said.out and "left, about" in said.out
    assert {record["method"] for record in read_records(out)} == {"none", "Hinton"}
    assert "epoch 1/1" in (out / "logs/net-none-0.txt").read_text()
    # what failed is tried again, what is done is not
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, feature_dim=8):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(3, feature_dim), nn.Linear(feature_dim, num_classes)\n"
        "    def forward(self, points):\n"
        "        return self.b(self.a(points).relu().amax(1))\n"
    )
    before = contents(out / "records")
    monkeypatch.delitem(sys.modules, "mine")
    assert main(words(config, out, "--debug", *more)) == 0
    assert len(read_records(out)) == 4
    assert before.items() <= contents(out / "records").items()


def record(student, method, teacher, seed, oa, hard=None, seconds=10.0, **more):
    return {
        "student": student, "method": method, "teacher": teacher, "seed": seed,
        "last": {"test_oa": oa}, "best": {"test_oa": oa + 1, "chosen_by": "held-out shapes"},
        "tests": {} if hard is None else {"hard": {"oa": hard}}, "seconds": seconds, **more,
    }  # fmt: skip


def test_rows_pair_seeds_and_show_each_teachers_accuracy():
    records = [record("net", "none", None, seed, oa, oa - 30) for seed, oa in enumerate((60.0, 62, 64))]
    records += [record("net", "FE", "weak", s, oa, teacher_oa=50.04) for s, oa in ((0, 59.0), (2, 60.0))]
    records += [record("net", "FE", "strong", s, 65.0 + s, 40.0, teacher_oa=90) for s in (0, 1, 2, 3)]
    rows = rows_of(records, ["net", "absent"], ["none", "FE"], ["weak", "strong"])
    assert [(r.method, r.teacher, r.teacher_oa) for r in rows] == [
        ("none", None, None),
        ("FE", "weak", 50.04),
        ("FE", "strong", 90),
    ]
    weak, strong = rows[1:]
    assert weak.oa == {"test": [59.0, 60.0]} and weak.difference["test"][0] == pytest.approx(-2.5)
    # seed 3 has no plain student: it counts in the mean, not in the difference
    assert len(strong.best) == 4 and strong.difference["test"][0] == pytest.approx(4.0)
    assert strong.difference["hard"][0] == pytest.approx(8.0)
    headings, lines = table_of(rows, ["test", "hard"])
    assert headings[:5] == ["student", "method", "teacher", "teacher OA %", "seeds"]
    assert "paper" not in headings
    assert [line[3] for line in lines] == ["–", "50.0", "90.0"]
    difference = lines[2][headings.index("difference")]
    assert tables.excludes_zero(strong.difference["test"]) == difference.startswith("**+4.00")


def test_the_time_left_follows_the_same_student_and_method():
    records = [record("a", "none", None, 0, 1.0, seconds=60), record("a", "FE", "t", 0, 1.0, seconds=300)]
    cells = [study.Cell("a", "FE", 1, "t"), study.Cell("a", "Hinton", 1, "t"), study.Cell("b", "FE", 1, "t")]
    # 300 known; 180 the student's mean; 180 the mean of all: 660 s on two places
    assert study.time_left(records, cells, 2) == "3 left, about 5.5 min"
    assert study.time_left(records, cells[:1] * 36, 1) == "36 left, about 3 h 00 min"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_studies_of_the_repository_are_sound(name):
    path = Path(__file__).resolve().parents[2] / f"benchmarks/configs/{name}.yaml"
    made = study.read_study(path)
    assert next(iter(made.students)) == "pointnet2" and len(made.students) == 4
    assert made.data.dataset == "modelnet40" and not Path(made.data.data).is_absolute()
    assert {"none", "FE+CE"} <= made.methods.keys() and "hard" in made.tests
    assert len(made.seeds) >= 5
    published = {"pointnet2": 94.4, "dgcnn": 93.5, "rscnn": 93.8}
    assert {name: figures["FE+CE"] for name, figures in made.paper.items()} == published
    if name == "cpu":
        assert {"none", "FE", "CE", "FE+CE", "Hinton"} <= made.methods.keys()
        assert (made.data.num_points, made.data.per_class) == (512, 20)
        assert made.teachers.keys() == {"few", "all"} and made.teachers["all"]["data"] == {"per_class": None}
    else:
        assert (made.data.num_points, made.data.per_class) == (1024, None)


@pytest.mark.parametrize("name", ["guard", "weights"])
def test_the_side_studies_are_sound(name):
    made = study.read_study(Path(__file__).resolve().parents[2] / f"benchmarks/configs/{name}.yaml")
    main_study = study.read_study(Path(__file__).resolve().parents[2] / "benchmarks/configs/cpu.yaml")
    assert made.data == main_study.data and made.views == main_study.views
    assert made.students == {"pointnet2": main_study.students["pointnet2"]}  # so that they can be compared
    assert "none" in made.methods and "hard" in made.tests


@pytest.mark.parametrize("name", ["unlabelled", "unlabelled-details", "losses", "students", "princeton"])
def test_the_studies_of_what_images_add_are_sound(name):
    made = study.read_study(Path(__file__).resolve().parents[2] / f"benchmarks/configs/{name}.yaml")
    assert "none" in made.methods and len(made.seeds) >= 3 and next(iter(made.students)) == "pointnet2"
    assert all(method.guard == "none" for method in made.methods.values() if method.method != "none")
    with_others = [n for n, m in made.methods.items() if m.method != "none" and m.unlabelled_ratio]
    few = made.data.labels_per_class
    if name in ("unlabelled", "students"):
        assert few == 20 and with_others and "hard" in made.tests
        assert (
            made.views
            == study.read_study(Path(__file__).resolve().parents[2] / "benchmarks/configs/cpu.yaml").views
        )
    elif name in ("unlabelled-details", "losses"):
        # as many held out as labelled, to choose by
        assert (few or made.data.per_class, made.data.holdout) == (40, 0.5)
        assert bool(with_others and few) == (name == "unlabelled-details")
    else:
        assert made.data.dataset == "princeton36" and made.train["images"] == "runs/princeton/princeton36"
    if name in ("students", "princeton"):
        assert len(made.students) == 4 and len(made.seeds) >= 5
        assert {"FE", "CE", "FE+CE", "Hinton", "SRRL", "FE+CE+Hinton"} <= made.methods.keys()


def test_the_paired_interval_against_the_textbook():
    # n = 5, t(0.975, 4) = 2.776; differences 1 … 5: mean 3, sd 1.5811
    mean, half = paired_interval(np.array([1.0, 2, 3, 4, 5]))
    assert mean == 3 and half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3)
    assert paired_interval(np.array([1.0])) is None


def test_what_stands_among_many_comparisons():
    # Holm: 0.01 < 0.05/4, 0.016 < 0.05/3, and 0.03 > 0.05/2 ends it, though 0.04 < 0.05/1
    assert tables.holm([0.04, 0.01, 0.03, 0.016]) == [False, True, False, True]
    assert tables.holm([0.049]) == [True] and tables.holm([]) == []
    # t = 3 / (1.5811 / sqrt 5) = 4.243 with 4 degrees of freedom
    assert tables.p_value(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(0.01324, abs=1e-4)
    assert tables.p_value(np.array([2.0, 2.0])) == 0 and tables.p_value(np.array([0.0, 0.0])) == 1
    assert tables.p_value(np.array([1.0])) == 1
    assert tables.interval_text((4.0, 1.0), True) == "**+4.00 ± 1.00** †"
    assert tables.interval_text((0.5, 1.0), True) == "+0.50 ± 1.00"
    records = [record("net", "none", None, seed, 50 + seed) for seed in range(4)]
    for method, gains in (("sure", (9.0, 9.1, 8.9, 9.2)), ("hardly", (1, 2, 0.2, 1)), ("not", (1, -1, 0, 1))):
        records += [record("net", method, "t", s, 50 + s + gain) for s, gain in enumerate(gains)]
    rows = rows_of(records, ["net"], ["none", "sure", "hardly", "not"], ["t"])
    headings, lines = table_of(rows, ["test"])
    said = {line[1]: line[headings.index("difference")] for line in lines[1:]}
    assert said["sure"].endswith("** †") and said["not"][0] != "*"
    # 0.067 by itself
    assert tables.p_value(np.array([1, 2, 0.2, 1])) > 0.05 and "†" not in said["hardly"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("studnets: {}", "unknown section studnets"),
        ("students: {a: {}}\nmethods: {none: {method: none}}", "'seeds' is missing"),
        ("students: {a: {widht: 1}}\nmethods: {none: {}}\nseeds: [0]", "no option 'widht'"),
        ("students: {a: {}}\nmethods: {b: {}}\nseeds: [0]", "the baseline 'none' is not among"),
        ("[", "is not YAML"),
        (ABLATION.replace("lr: 5e-3", "lrr: 5e-3"), r"students.net.train.loop: there is no option 'lrr'"),
        (ABLATION.replace("votes", "vote"), "tests.few: there is no option 'vote'"),
        (ABLATION.replace("feature_dim: 32", "feature_dmi: 32"), "teachers.only.teacher: there is no option"),
        # what trained something else, exit 0
        (
            ABLATION.replace("batch_size: 16", "optimizer: AdamW"),
            r"loop\.optimizer is 'AdamW'; expected one of",
        ),
        (
            ABLATION.replace("ce_weight: 0}", "guard: heldotu}"),
            r"methods\.FE\.guard is 'heldotu'; expected one of",
        ),
        (ABLATION.replace("ce_weight: 0}", "decay: linaer}"), r"methods\.FE\.decay is 'linaer'"),
        (
            ABLATION.replace("num_points: 64", "num_points: {a: 1}"),
            r"data\.num_points is \{'a': 1\}; expected",
        ),
        (
            ABLATION.replace("ce_weight: 0}", "fe_weight: null}"),
            r"methods\.FE\.fe_weight is None; expected a number",
        ),
        (
            ABLATION.replace("ce_weight: 0}", "ce_weight: -1}"),
            "under methods.FE: the weights of the objectives",
        ),
        (ABLATION.replace("soft_labels=1", "sotf_labels=1"), "--objectives sotf_labels: expected one of"),
        (ABLATION.replace("soft_labels=1", "soft_labels=0"), "is no method"),
        (ABLATION.replace("size: 16", "rig: simplview"), "simplview"),
        (ABLATION.replace("votes: 2", "split: tset"), r"tests\.few\.split is 'tset'"),
        ("students: {a: {}}\nmethods: [{method: none}]\nseeds: [0]", r"methods is \[.*; expected a mapping"),
        ("students: [a]\nmethods: {none: {}}\nseeds: [0]", r"students is \['a'\]; expected a mapping"),
        # what went missing, exit 0, or was written elsewhere
        (ABLATION.replace("seeds: [0, 1]", "seeds: [0, 0]"), "seeds: 0 stands twice"),
        (ABLATION.replace("seeds: [0, 1]", "seeds: [0.5]"), r"seeds is 0\.5; expected a whole number"),
        (ABLATION.replace("seeds: [0, 1]", "seeds: 3"), "seeds is 3; expected a list"),
        (ABLATION.replace("  FE:", "  FE/CE:"), "methods: 'FE/CE' is no name"),
        (ABLATION.replace("  FE:", "  ../../x:"), r"methods: '\.\./\.\./x' is no name"),
        (ABLATION.replace("  FE:", "  no:"), "methods: False is no name"),
        (ABLATION.replace("  FE:", "  none:"), "line 12: 'none' stands twice"),
        (ABLATION.replace("  only:", "  /etc/x:"), "teachers: '/etc/x' is no name"),
        (ABLATION.replace("  FE:", "  NONE:"), "methods: 'none' and 'NONE' differ in nothing but capitals"),
        (ABLATION.replace("  net:", "  Net: {}\n  net:"), "students: 'Net' and 'net' differ in nothing but"),
        (ABLATION.replace("  only:", "  Only: {}\n  only:"), "teachers: 'Only' and 'only' differ in nothing"),
        (
            ABLATION.replace("  FE:", "  gro\u0308\u00dfe:").replace("  Hinton:", "  gr\u00f6SSE:"),
            r"methods: 'gro\\u0308\\xdfe' and 'gr\\xf6SSE' differ in nothing but capitals or how an accent",
        ),
        (
            ABLATION.replace("  net:", "  net-FE: {}\n  net:").replace(
                "  Hinton:", "  FE-FE: {ce_weight: 0}\n  H:"
            ),
            "two cells are called net-fe-fe-only-0",
        ),
        (
            ABLATION.replace("  few: {votes", "  test: {votes"),
            "tests.test: test is the name of the data's own",
        ),
        (ABLATION.replace("{net: {none", "{nte: {none"), "paper.nte: there is no such student"),
        (
            ABLATION.replace("student: pointnet2", "student: 'os:system'"),
            "code of a module that you did not name",
        ),
    ],
)
def test_a_wrong_configuration_is_named(text, words, tmp_path):
    """Case 25: methods given as a list, and every other slip, with the file and the place."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        study.read_study(tmp_path / "c.yaml")
    assert "c.yaml" in str(error.value)


def test_one_piece_of_a_study_is_a_command(tmp_path, capsys, monkeypatch):
    """As --submit hands it to a cluster."""
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(ABLATION)
    options = study.Ablate(config, out, keep="all", machine=MachineOptions(device="cpu", tensorboard=False))
    command = study.command_of(options, out, "net-none-1")
    assert command[:3] == ["-m", "pointcmt", "ablate"] and "--no-tensorboard" in command
    assert main(command[2:]) == 0
    assert [record["seed"] for record in read_records(out)] == [1]
    assert (out / "cells/net-none-1/state.pt").exists()
    # stopped where the training state is about to go: the same command makes it go
    again = [*words(config, out), "--cell", "net-none-0"]

    def stopped(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study, "forget_training", stopped)
        assert main(again) == 130
    assert (out / "cells/net-none-0/state.pt").exists()
    assert main(again) == 0 and len(read_records(out)) == 2
    assert not (out / "cells/net-none-0/state.pt").exists()
    assert main([*words(config, out), "--only", "nte"]) == 1
    assert "--only nte: no cell's name contains it; there are net-none-0" in capsys.readouterr().err
    assert main([*command[2:], "--cell", "net-none-7"]) == 1
    assert "expected one of teacher-only, net-none-0" in capsys.readouterr().err


def test_the_file_of_a_write_that_was_killed_is_no_record(tmp_path):
    for folder in (tmp_path / "records", tmp_path / "records/teachers"):
        folder.mkdir()
        (folder / "a.json").write_text('{"cell": 1}')
        (folder / ".b.host-1-0123abcd.tmp.json").write_text('{"cel')
    assert read_records(tmp_path) == [{"cell": 1}]
    assert tables.read_teachers(tmp_path) == {"a": {"cell": 1}}


def test_a_study_is_not_extended_by_a_name_of_the_same_file(tmp_path):
    """On a system that tells no capitals apart, its records would be taken for the new method's."""
    config = tmp_path / "study.yaml"
    config.write_text(ABLATION)
    check_unchanged(tmp_path / "study.json", read_study(config))
    config.write_text(ABLATION.replace("  FE:", "  fe:"))
    with pytest.raises(ValueError, match=r"holds methods: 'fe' and 'FE' differ in nothing but capitals"):
        check_unchanged(tmp_path / "study.json", read_study(config))
