"""docs/troubleshooting.md is what the software says; and every message of it is of use."""

from __future__ import annotations

import re

import pytest

from tests.troubleshooting import MISTAKES, PAGE, message_of, page

# what was expected, or what to do: words that say it
HELPS = re.compile(
    r"\b(expected|needs?|must|near it|ask for|give|use|call|make|add|train|mend|save|name|download|look|"
    r"leave|put|divide|write|continue|count|render|install|delete|resume|expects?|convert)\b",
    re.I,
)
said: dict[str, str] = {}


@pytest.mark.parametrize("one", MISTAKES, ids=lambda one: one.done)
def test_a_message_names_what_was_given_and_what_to_do(one):
    message = said[one.done] = message_of(one)
    assert one.given in message
    assert HELPS.search(message), message
    for inner in ("Traceback", "KeyError", "AttributeError", "IndexError", "NoneType"):
        assert inner not in message


def test_the_page_is_what_is_said():
    assert len(MISTAKES) >= 50 and len({one.done for one in MISTAKES}) == len(MISTAKES)
    messages = said if len(said) == len(MISTAKES) else None
    assert PAGE.read_text(encoding="utf-8") == page(messages), "python -m tests.troubleshooting writes it"
