"""Nothing grows while a training goes on: the short form of ``python -m benchmarks.longrun``."""

from __future__ import annotations

import pytest
import torch

from benchmarks import longrun
from benchmarks.longrun import CASES, follow, summary

STEPS = 50


@pytest.mark.parametrize("name", CASES)
def test_nothing_grows_and_nothing_is_compiled_again(name):
    torch.compiler.reset()
    row = summary(name, follow(name, STEPS, samples=5))
    assert row["steps"] == STEPS
    assert row["open files grew by"] == 0 and row["tensors grew by"] == 0, row
    assert row["compiled again"] == 0, row
    assert row["grew by, MB"] < 16, row  # allocators take and give back some


def test_what_grows_is_seen(monkeypatch):
    kept = []
    plain = longrun._optimize

    def leaking(optimizer, loss):
        plain(optimizer, loss)
        kept.append(torch.ones(1000))

    monkeypatch.setattr(longrun, "_optimize", leaking)
    found = follow("registration (CMIGNet)", 10, samples=5)
    assert summary("leaking", found)["tensors grew by"] >= 6
    # the memory of the suite's own process also shrinks, as what tests before left is given back
    for number, one in enumerate(found):
        one["memory"], one["files"] = 100.0 + 8 * number, 7 + number
    row = summary("leaking", found)
    assert row["grew by, MB"] == 24 and row["open files grew by"] == 3, row
