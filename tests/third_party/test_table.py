"""The table of what ran: rows of later runs join those of earlier ones, or replace those of other commits."""

from __future__ import annotations

import dataclasses

import pytest

from tests.third_party.table import BEGIN, END, Row, write

ROW = Row("owner/name", "abc123", "Net", "net", "512-d, input of `drop`", 1_480_000, "cpu", "")


def rows_of(path):
    return [
        line for line in path.read_text().splitlines() if line.startswith("| ") and "codebase" not in line
    ]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"# Above\n\n{BEGIN}\n{END}\n\nBelow.\n")
    return path


def test_rows_are_written_between_the_markers_only(page):
    write(page, [ROW])
    assert rows_of(page) == [
        "| owner/name | `abc123` | Net | `net` | 512-d, input of `drop` | 1.48 M | passed | not yet |"
    ]
    text = page.read_text()
    assert text.startswith(f"# Above\n\n{BEGIN}\n| codebase |") and text.endswith(f"{END}\n\nBelow.\n")
    write(page, [ROW])
    assert page.read_text() == text


def test_another_device_and_another_class_join_what_is_there(page):
    write(page, [ROW])
    write(page, [dataclasses.replace(ROW, device="cuda"), dataclasses.replace(ROW, label="Net (big)")])
    write(page, [dataclasses.replace(ROW, how=" (CUDA redirected)")])
    assert [
        row.strip("| ").split(" | ")[2:3] + row.strip("| ").split(" | ")[-2:] for row in rows_of(page)
    ] == [
        ["Net", "passed (CUDA redirected)", "passed"],
        ["Net (big)", "passed", "not yet"],
    ]


def test_another_commit_takes_the_place_of_the_row(page):
    write(page, [ROW])
    write(page, [dataclasses.replace(ROW, commit="def456", device="cuda")])
    assert [row.split(" | ")[1] for row in rows_of(page)] == ["`def456`"]
    assert rows_of(page)[0].endswith("| not yet | passed |")


def test_a_page_without_markers_or_a_run_without_rows_is_an_error(page, tmp_path):
    with pytest.raises(ValueError, match="nothing to write"):
        write(page, [])
    (tmp_path / "other.md").write_text("# No markers\n")
    with pytest.raises(ValueError, match="has no line"):
        write(tmp_path / "other.md", [ROW])
