"""Every kind of small input that once went wrong has a test that says so: ``grep -rn "Case N:" tests``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

KINDS = 29  # numbered as they were found, from wrong labels (1) to dtypes and copies (29)


def test_every_case_has_a_test_that_names_it():
    """Numbers in the docstrings of tests alone count: that the value is right is for each of them to show."""
    named: dict[int, list[str]] = {}
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in re.findall(r"\bCase (\d+):", ast.get_docstring(node) or ""):
                    named.setdefault(int(number), []).append(f"{path.name}::{node.name}")
    assert sorted(named) == list(range(1, KINDS + 1)), named
