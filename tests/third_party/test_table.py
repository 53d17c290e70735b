"""The record of what ran, and the tables that docs/adapters.md shows of it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.third_party import table
from tests.third_party.table import Row

ROW = Row(
    "owner/name",
    "abc123",
    "Net",
    "net",
    "512-d, input of `drop`",
    "B3N",
    3,
    "",
    "",
    "",
    1_480_000,
    "cpu",
    False,
)


def test_the_page_shows_the_record():
    page = table.PAGE.read_text(encoding="utf-8")
    for name, text in table.tables().items():
        assert table.between(page, name) == text, "run: python -m tests.third_party.table"


def test_a_later_run_takes_the_place_of_an_earlier_one_of_the_same_class(tmp_path):
    record = tmp_path / "classes.json"
    table.keep([ROW, dataclasses.replace(ROW, label="Net (big)")], record)
    table.keep([dataclasses.replace(ROW, commit="def456"), dataclasses.replace(ROW, device="cuda")], record)
    assert [(row.label, row.commit, row.device) for row in table.read(record)] == [
        ("Net", "def456", "cpu"),
        ("Net", "abc123", "cuda"),
        ("Net (big)", "abc123", "cpu"),
    ]


def test_the_table_counts_what_needs_help_and_what_does_not_pass():
    rows = [
        ROW,
        dataclasses.replace(ROW, label="B", adapter="generic", local="64 of 32-d"),
        dataclasses.replace(ROW, label="C", help="3 lines: feature="),
        dataclasses.replace(ROW, label="D", adapter="", feature="", failure="no single layer classifies"),
    ]
    text = table.classes(rows)
    assert "4 classes of 1 codebases, on a CPU: 2 need no help, 1 of them through the generic adapter" in text
    assert "Refused: 1. With local features: 1." in text
    assert "| owner/name `abc123` | B | `generic`: 512-d, input of `drop` | 64 of 32-d | none |" in text
    assert "| owner/name `abc123` | D | no single layer classifies | – | none |" in text


def test_a_page_without_markers_is_an_error(tmp_path):
    (tmp_path / "other.md").write_text("# No markers\n")
    with pytest.raises(ValueError, match="has no line"):
        table.write(tmp_path / "other.md")


def test_what_checkouts_import_is_counted_once_each(tmp_path):
    for name, text in (("a", "import chamfer\nfrom pointnet2_ops import x\n"), ("b", "    import chamfer\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.py").write_text(text)
        (tmp_path / name / "two.py").write_text("import chamfer_of_ours\nimport chamfer\n")
    found = table.scan(tmp_path)
    assert found["codebases"] == 2
    assert found["extensions"] == {
        "chamfer": {"codebases": 2, "stand_in": True},
        "pointnet2_ops": {"codebases": 1, "stand_in": True},
    }
