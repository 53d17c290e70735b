"""The short form of ``make fuzz``: the first cases of every reader, and those that once were wrong."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz.run import cases, run_case, whole_files

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")


@pytest.mark.slow
def test_damaged_files_are_read_rightly_or_refused_by_name():
    said = list(cases(0, 560, seconds=60))
    wrong = [
        f"python -m tests.fuzz.run --case {number}: {one['wrong']}" for number, one in said if one["wrong"]
    ]
    assert wrong == []
    assert len(said) == 560, "the process that reads took more than a minute"
    assert {"read", "refused"} <= {one["how"] for _, one in said}


# a crash of the library that read register's clouds; files without their name; a list that named a file
# twice; cameras of NaN; a weight beyond all floats; a network that does not say how many classes it has; a
# module without a name; a first line without a letter
@pytest.mark.parametrize(
    "number",
    [6, 46, 160, 483, 557, 1728, 1876, 2253, 2939, 4989, 5095, 14980, 17332, 23085, 31765, 41229, 50283],
)
def test_cases_that_were_wrong(number, tmp_path, seeds):
    assert run_case(number, tmp_path / "case", seeds)["wrong"] == ""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("seeds"))
