"""Options of the conformance suite, and the table that it can write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.third_party.table import Row, write


def pytest_addoption(parser):
    group = parser.getgroup("third-party codebases")
    group.addoption(
        "--repos",
        type=Path,
        metavar="DIR",
        help="checkouts of public repositories, whose real classes are run",
    )
    group.addoption(
        "--table",
        type=Path,
        metavar="FILE",
        help="rewrite the table between the markers in FILE with what ran",
    )


ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()


@pytest.fixture(scope="session")
def repos(request) -> Path:
    """The folder of ``--repos``; skips without it."""
    folder = request.config.getoption("--repos")
    if folder is None:
        pytest.skip("needs checkouts of the public repositories: pytest tests/third_party --repos DIR")
    if not folder.is_dir():
        pytest.fail(f"--repos {folder}: there is no such folder")
    return folder.resolve()


@pytest.fixture(scope="session")
def rows(request) -> list[Row]:
    """Collects what the table shows."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_sessionfinish(session):
    target = session.config.getoption("--table", None)
    if target is not None:
        write(target, session.config.stash.get(ROWS, []))
