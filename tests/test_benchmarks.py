"""The pages that benchmarks write say what the records say."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as bench
from benchmarks import _harness, reliability, runs, studies, tables


@pytest.fixture
def written(tmp_path, monkeypatch):
    results = tmp_path / "results"
    readme = tmp_path / "README.md"
    begin, end = _harness.marks("results")
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "performance.md")
    timing = _harness.Timing(median=0.123456, low=0.1, high=0.15, repeats=5)
    _harness.record(
        results / "emd-cpu.json",
        "Is it fast?",
        [{"case": "a", "ratio": 2.5, "ours": timing}],
        skipped={"x": "absent"},
    )
    return tmp_path


def test_the_page_shows_ratios_and_spread_and_no_times(written):
    tables.main()
    page = (written / "performance.md").read_text()
    assert "| a | 2.5 | 41% |" in page
    assert "0.123" not in page
    assert "Not measured: x (absent)" in page


def test_results_go_between_the_marks_and_twice_is_once(written):
    tables.main()
    first = (written / "README.md").read_text()
    assert first.startswith("before\n") and first.endswith("after\n") and "old" not in first
    assert "no records of a study" in first
    tables.main()
    assert (written / "README.md").read_text() == first


def test_runs_of_single_commands_go_to_the_page_of_results(written, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", written / "results")
    row = {"": "teacher", "OA %": "91.0", "OA by seed": [91.0]}
    _harness.record(written / "results" / "runs-a.json", "Runs.", [row], notes={"command": "make demo"})
    page = studies.page()
    assert "| teacher | 91.0 |" in page and "`make demo`" in page and "OA by seed" not in page


def test_a_readme_without_marks_is_left_alone(written):
    (written / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="has no line"):
        tables.main()
    assert (written / "README.md").read_text() == "nothing here"


def test_the_pages_in_the_repository_are_those_of_its_records(monkeypatch, tmp_path):
    page, readme = tables.PAGE.read_text(), tables.README.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(readme)
    monkeypatch.setattr(tables, "README", copy)
    target = tables.ROOT / "docs" / "performance.md"
    monkeypatch.setattr(tables, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    notes = target.parents[1] / "benchmarks" / "notes.md"
    if notes.exists():
        (tmp_path / "benchmarks" / "notes.md").write_text(notes.read_text())
    tables.main()
    assert (tmp_path / "performance.md").read_text() == page, "run python -m benchmarks.tables"
    assert copy.read_text() == readme, "run python -m benchmarks.tables"


def test_runs_that_are_not_there_are_explained_and_leave_no_record(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        runs.main([str(tmp_path), "--command", "make demo", "--out", str(tmp_path / "record.json")])
    assert not (tmp_path / "record.json").exists()


def test_peers_are_passed_where_they_are(tmp_path):
    (tmp_path / "someone+dgcnn.pytorch").mkdir()
    assert bench.arguments("neighbors", tmp_path, None) == [
        "--antao97",
        str(tmp_path / "someone+dgcnn.pytorch"),
    ]
    assert bench.arguments("emd", tmp_path, None) == []


def test_timings_are_taken_in_turns():
    order = []
    timings = _harness.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warmup=1
    )
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert json.dumps({k: t.repeats for k, t in timings.items()}) == '{"a": 3, "b": 3}'


def test_the_page_of_reliability_is_that_of_its_records():
    assert reliability.PAGE.read_text() == reliability.page(), "run python -m benchmarks.reliability"
