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
        kept.append(torch.ones(9_000_000))  # too large for memory that was freed before

    monkeypatch.setattr(longrun, "_optimize", leaking)
    row = summary("registration (CMIGNet)", follow("registration (CMIGNet)", 10, samples=5))
    assert row["tensors grew by"] >= 6 and row["grew by, MB"] > 100, row
