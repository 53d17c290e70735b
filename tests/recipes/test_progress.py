"""What is printed: whole at 80 columns, and names are names, not markup."""

from __future__ import annotations

import re

import pytest

from pointcmt.recipes.progress import say, show_table, warn
from pointcmt.studies.charts import HEADINGS


@pytest.mark.parametrize("columns", [2, 6, 14])
def test_tables_are_whole_in_80_columns_when_piped(columns, capsys):
    headings = ["student", "method", *(f"a long heading {k}" for k in range(columns))]
    lines = [
        [f"net{k}", "FE+CE+Hinton", *(f"{100 * k + c}.25 ± 1.50" for c in range(columns))] for k in range(3)
    ]
    show_table(headings, lines, keys=2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    words = printed.split()
    for line in lines:
        for cell in line[2:]:
            assert words.count(cell.split()[0]) == 1
    for heading in headings[2:]:
        assert heading in printed
    assert printed.count("net0") == printed.count("student")  # each part has the names of its lines


def test_the_demo_s_table_is_one_in_80_columns(capsys):
    show_table(HEADINGS, [["PointCMT student", "84.3 ± 1.3", "84.3 ± 1.3", "83.9 ± 1.2", "94.75 k", "0.54"]])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and max(map(len, printed)) <= 80 and "parameters" in printed[0]


def test_names_from_data_are_text(capsys):
    show_table(("class", "n"), [["[/red]", "1"], ["[bold]x[/bold]", "2"]], "[/title]")
    say("[/red] class")
    warn("[/red] class")
    printed = capsys.readouterr().out
    assert re.findall(r"\[/?\w+\]", printed) == [
        "[/title]",
        "[/red]",
        "[bold]",
        "[/bold]",
        "[/red]",
        "[/red]",
    ]
