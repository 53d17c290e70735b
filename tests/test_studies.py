"""docs/results.md says what the records say, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import _harness, studies
from pointcmt.studies.tables import paired_interval

STUDENTS, SEEDS = ("pointnet2", "dgcnn"), (0, 1, 2, 3)


def environment(gpu=None):
    return {
        "processor": "A Processor", "gpu": gpu, "cores": 2, "threads": 1, "commit": "0123456789abcdef",
        "versions": {"torch": "2.9.0"},
    }  # fmt: skip


def cell(student, method, teacher, seed, oa, hard):
    return {
        "student": student, "method": method, "teacher": teacher, "seed": seed,
        "teacher_oa": {"few": 71.0, "all": 82.0}.get(teacher),
        "last": {"test_oa": oa}, "best": {"test_oa": oa + 0.5, "chosen_by": "held-out shapes"},
        "tests": {"hard": {"oa": hard, "macc": hard, "shapes": 2468}},
        "shapes": {"train": 720, "heldout": 80, "test": 2468}, "seconds": 90.0, "cpu_seconds": 120.0,
        "parts": 1, "environment": environment(),
        "inputs": {"teacher": f"{teacher}-{student if teacher == 'few' else ''}"},
    }  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A mini-study in a folder of its own: gains that are clear, absent and negative."""
    rng = np.random.default_rng(7)
    run = tmp_path / "runs" / "mini"
    (run / "records/teachers").mkdir(parents=True)
    records = []
    for student in STUDENTS:
        for seed in SEEDS:
            oa = 75 + rng.normal()
            records.append(cell(student, "none", None, seed, oa, oa - 30))
            noise = rng.normal(0, 0.05, 4)
            records.append(cell(student, "FE+CE", "all", seed, oa + 2 + noise[0], oa - 30 + rng.normal(0, 4)))
            records.append(cell(student, "FE+CE", "few", seed, oa - 3 + noise[1], oa - 35 + noise[2]))
    for record in records:
        name = "-".join(str(record[k]) for k in ("student", "method", "teacher", "seed"))
        (run / f"records/{name}.json").write_text(json.dumps(record))
    for name, oa in (("few", 71.0), ("all", 82.0)):
        teacher = {
            "teacher": name, "last": {"test_oa": oa}, "best": {"test_oa": oa},
            "views": {"rig": "simpleview", "size": 64}, "generator": {"test_emd": 0.0712},
            "shapes": {"train": 720}, "cpu_seconds": 600.0, "seconds": 400.0, "parts": 2,
            "environment": environment(),
        }  # fmt: skip
        (run / f"records/teachers/{name}.json").write_text(json.dumps(teacher))
    study = {
        "about": "Mini\nA study of nothing.", "baseline": "none", "paper": {"pointnet2": {"none": 93.4}},
        "fixed": {"data": {"num_points": 512}},
        "named": {"students": dict.fromkeys(STUDENTS), "methods": {"none": {}, "FE+CE": {}},
                  "teachers": {"few": {}, "all": {}}},
    }  # fmt: skip
    (run / "study.json").write_text(json.dumps(study))
    oa = {"jitter": [75.0, 50.0]}
    curves = {
        "settings": {"seed": 0}, "severities": {"jitter": [0.0, 0.05]},
        "runs": [{"run": f"{m}-{s}", "student": "pointnet2", "method": m, "teacher": None, "seed": s,
                  "shapes": 400, "oa": oa} for m in ("none", "FE+CE") for s in (0, 1)],
    }  # fmt: skip
    (run / "robustness.json").write_text(json.dumps(curves))
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(studies, "PAGE", tmp_path / "docs" / "results.md")
    (tmp_path / "docs/images").mkdir(parents=True)
    return run, records


def gain(records, student, teacher, test="test"):
    def value(r):
        return r["last"]["test_oa"] if test == "test" else r["tests"][test]["oa"]

    of = {(r["method"], r["teacher"], r["seed"]): value(r) for r in records if r["student"] == student}
    return np.array([of["FE+CE", teacher, s] - of["none", None, s] for s in SEEDS])


def test_the_page_follows_from_the_records_and_only_from_them(made, tmp_path):
    run, records = made
    (run / "cells").mkdir()
    (run / "cells/big.safetensors").write_text("weights")
    assert studies.main(["--keep", str(run)]) == 0
    page = (tmp_path / "docs/results.md").read_text()
    kept = {p.name for p in (tmp_path / "results/mini").rglob("*") if p.is_file()}
    assert "study.json" in kept and "robustness.json" in kept and "big.safetensors" not in kept
    for student in STUDENTS:
        mean, half = paired_interval(gain(records, student, "all"))
        assert f"**{mean:+.2f} ± {half:.2f}**" in page
        assert (
            f"FE+CE minus none, taught by `all`, on test: {mean:+.2f} ± {half:.2f}. The interval excludes "
            in page
        )
    both = np.mean([gain(records, student, "few", "hard") for student in STUDENTS], axis=0)
    mean, half = paired_interval(both)
    assert f"on hard: {mean:+.2f} ± {half:.2f}. The interval excludes zero: FE+CE is worse." in page
    mean, half = paired_interval(gain(records, "dgcnn", "all", "hard"))
    assert abs(mean) < half, "the fixture shall have an unclear gain"
    assert f"{mean:+.2f} ± {half:.2f}. The interval includes zero: no difference is shown." in page
    # 24 cells of 2 core-minutes, two teachers of 10
    assert "Cost: 68 core-minutes, of which the teachers and generators 20." in page
    assert "A Processor, 2 cores" in page and "93.4" in page and "not the setting of this study" in page
    assert "| few | 720 | simpleview | 64 | 71.0 | 71.0 | 0.0712 |" in page and "## Mini" in page
    assert "`few` was trained 2 times by this recipe: taught were pointnet2 by one with 71.0; dgcnn" in page
    assert "`all` was trained" not in page
    for picture in ("results-mini.png", "robustness-mini.png"):
        assert f"images/{picture}" in page and (tmp_path / "docs/images" / picture).stat().st_size > 5000
    assert "| pointnet2 | FE+CE | 50.0 |" in page
    assert studies.page() == page
    # a record that changes changes the page
    path = next((tmp_path / "results/mini/records").glob("dgcnn-FE+CE-all-0.json"))
    changed = json.loads(path.read_text())
    changed["last"]["test_oa"] += 1
    path.write_text(json.dumps(changed))
    assert studies.page() != page


def test_the_readme_s_summary(made):
    run, records = made
    text = studies.summary(studies.Kept(studies.keep(run)))
    mean, half = paired_interval(gain(records, "dgcnn", "few"))
    [line] = [line for line in text.splitlines() if line.startswith("| FE+CE | few, 71.0 |")]
    assert abs(mean) > half and f"**{mean:+.2f} ± {half:.2f}**" in line
    both = paired_interval(np.mean([gain(records, student, "few") for student in STUDENTS], axis=0))
    # of a hundred that are alike to so little it stands among all
    assert (
        line.endswith(f"**{both[0]:+.2f} ± {both[1]:.2f}** † |") and "differences of the table (Holm)" in text
    )
    assert "4 seeds" in text and text.startswith("Mini. A study of nothing.")


def test_notes_take_their_figures_from_records(made, tmp_path):
    run, records = made
    studies.keep(run)
    _harness.record(tmp_path / "results/explore/views.json", "Views?", [
        {"views": 6, "OA": 88.25}, {"views": 12, "OA": 89.0}])  # fmt: skip
    notes = tmp_path / "results/notes.md"
    notes.write_text(
        "With `0.3` it gains {{difference mini student=dgcnn method=FE+CE teacher=all test=test}}, reaching "
        "{{oa mini student=dgcnn method=FE+CE teacher=all}} under {{teacher mini all}}; twelve views give "
        "{{value views OA views=12}}. Over all, {{pooled mini method=FE+CE teacher=few test=hard}}."
        "\n\n{{rows views}}\n\n{{table mini}}\n"
    )
    page = studies.page()
    mean, half = paired_interval(gain(records, "dgcnn", "all"))
    assert f"it gains **{mean:+.2f} ± {half:.2f}**, reaching" in page
    both = paired_interval(np.mean([gain(records, student, "few", "hard") for student in STUDENTS], axis=0))
    assert f"Over all, **{both[0]:+.2f} ± {both[1]:.2f}**." in page
    assert "under 82.0; twelve views give 89." in page and "| 6 | 88.2 |" in page
    for text, words in (
        ("It gains 3.9 points.", "typed by hand"),
        ("It gains 4 % then.", "typed by hand"),
        ("{{sum mini}}", "expected one of difference"),
        ("{{oa mini student=dgcnn method=CE}}", "has no record"),
        ("{{pooled mini method=CE teacher=all}}", "has not two seeds"),
        ("{{rows nothing}}", "cannot be filled in"),
        ("{{value views OA views=7}}", "0 rows of explore/views.json"),
    ):
        notes.write_text(text)
        with pytest.raises(ValueError, match=words):
            studies.page()


def test_the_page_in_the_repository_is_that_of_its_records():
    assert studies.PAGE.read_text() == studies.page(), "run python -m benchmarks.studies"
    for study in studies.studies():
        assert (studies.PAGE.parent / f"images/results-{study.name}.png").exists()


def test_a_folder_that_is_no_study_is_not_kept(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no study\.json"):
        studies.keep(tmp_path)
