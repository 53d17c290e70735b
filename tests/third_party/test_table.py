"""The record of what ran, and the page that is written from it."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks._harness import between
from pointcmt.compat import STAND_INS
from tests.third_party import table
from tests.third_party.extensions import search
from tests.third_party.table import Row, classes, keep, read, tables, write

ROW = Row(
    codebase="owner/name",
    commit="abc123",
    label="Net",
    adapter="generic",
    feature="512-d, input of `drop`",
    layout="B3N",
    channels=3,
    local="64 of 384-d",
    help="",
    failure="",
    parameters=1_480_000,
    device="cpu",
    redirected=False,
)


def test_the_page_shows_the_record():
    for name, expected in tables().items():
        assert between(table.PAGE, name) == expected


def test_the_record_is_of_enough_classes_and_most_need_no_help():
    rows = read()
    assert len(rows) >= 55 and len({row.codebase for row in rows}) >= 35
    assert sum(not row.help and not row.failure for row in rows) >= 50


def test_rows_join_what_is_there_or_take_its_place(tmp_path):
    record = tmp_path / "folder" / "classes.json"
    keep([ROW], record)
    keep([dataclasses.replace(ROW, device="cuda"), dataclasses.replace(ROW, commit="def456")], record)
    assert [(row.device, row.commit) for row in read(record)] == [("cpu", "def456"), ("cuda", "abc123")]


def test_a_class_with_help_and_one_that_fails_are_counted_and_shown():
    helped = dataclasses.replace(ROW, label="Helped", adapter="own", help="an adapter", local="")
    failed = dataclasses.replace(ROW, label="Failed", adapter="", failure="does not run: why")
    text = classes([ROW, helped, failed])
    assert "3 classes of 1 codebases, on a CPU: 1 need no help, 1 of them through the generic" in text
    assert "| owner/name `abc123` | Net | `generic`: 512-d, input of `drop` | 64 of 384-d | none |" in text
    assert "| Helped | `own`: 512-d, input of `drop` | – | an adapter |" in text
    assert "| Failed | does not run: why |" in text


def test_a_page_without_markers_is_an_error(tmp_path):
    (tmp_path / "other.md").write_text("# No markers\n")
    with pytest.raises(ValueError, match="has no line"):
        write(tmp_path / "other.md")


def test_the_search_finds_what_is_built_and_imported(tmp_path):
    (tmp_path / "owner+one").mkdir()
    (tmp_path / "one").mkdir()  # the same codebase again
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "setup.py").write_text("CUDAExtension('own_cuda', [])")
    (tmp_path / "two" / "old.py").write_text("import own_cuda\nimport chamfer\nprint 'of another age'\n")
    for folder in ("owner+one", "one"):
        (tmp_path / folder / "net.py").write_text("from pointnet2_ops import pointnet2_utils\nimport os\n")
    found = search(tmp_path)
    assert found["codebases"] == 2
    counts = {name: entry["codebases"] for name, entry in found["extensions"].items()}
    assert counts["own_cuda"] == counts["chamfer"] == counts["pointnet2_ops"] == 1 and "os" not in counts
    assert set(STAND_INS) <= set(counts) and counts["knn_cuda"] == 0
    assert found["extensions"]["chamfer"]["stand_in"] and not found["extensions"]["own_cuda"]["stand_in"]
