"""Options of the conformance suite, and the record that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.third_party.table import Row, keep, write


def pytest_addoption(parser):
    group = parser.getgroup("third-party codebases")
    group.addoption(
        "--repos",
        type=Path,
        metavar="DIR",
        help="checkouts of public repositories, whose real classes are run",
    )
    group.addoption(
        "--record",
        action="store_true",
        help="add what ran to benchmarks/results/third_party, and write the tables in docs/adapters.md again",
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
    rows = session.config.stash.get(ROWS, [])
    if session.config.getoption("--record", False) and rows:
        keep(rows)
        write()
