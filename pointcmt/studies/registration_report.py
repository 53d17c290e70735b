"""The part of a report that is of registration: runs of ``pointcmt train-registration`` below a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pointcmt.recipes.config import read_json

PARTS = ("pairs", "network", "losses", "data", "loop")
"""Groups of options whose differences between runs are an ablation."""


class RegistrationRun(NamedTuple):
    """A finished run folder."""

    path: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]


def find_registration_runs(folder: Path) -> list[RegistrationRun]:
    """The finished runs of train-registration in ``folder`` or below it, by name."""
    runs = []
    for config in sorted(Path(folder).rglob("config.json")):
        place = config.parent
        described = read_json(config)
        if described.get("command") == "train-registration" and (place / "results.json").exists():
            runs.append(RegistrationRun(place, described["config"], read_json(place / "results.json")))
    return runs


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """``group.option`` → value of the options that make one run another than the next."""
    options = {
        f"{part}.{name}": str(value) for part in PARTS for name, value in (config.get(part) or {}).items()
    }
    return {**options, "unseen": str(config.get("unseen"))}


def method_rows(run: RegistrationRun) -> list[list[str]]:
    """The figures of a run's network and what was measured beside it, headings first."""
    rows = [
        ["", "rotation error, degrees", "median", "translation error", "recall at 10° and 0.1", "Chamfer"]
    ]
    for name, figures in run.results["test"].items():
        rows.append(
            [
                name,
                f"{figures['rotation_error']:.2f}",
                f"{figures['rotation_median']:.2f}",
                f"{figures['translation_error']:.3f}",
                f"{100 * figures['recall_10_0.1']:.0f} %",
                f"{figures['chamfer']:.5f}" if "chamfer" in figures else "–",
            ]
        )
    return rows


def ablation_rows(runs: Sequence[RegistrationRun]) -> list[list[str]]:
    """One line per run: the options in which it differs from the first, and the network's figures; headings
    first. Nothing for a single run."""
    if len(runs) < 2:
        return []
    first = flat(runs[0].config)
    rows = [["run", "differs from the first in", "rotation error, degrees", "median", "translation error"]]
    for run in runs:
        mine = flat(run.config)
        changed = [
            f"{name} {mine.get(name)}" for name in sorted(mine | first) if mine.get(name) != first.get(name)
        ]
        figures = run.results["test"]["CMIGNet"]
        rows.append(
            [
                run.path.name,
                ", ".join(changed) or "–",
                f"{figures['rotation_error']:.2f}",
                f"{figures['rotation_median']:.2f}",
                f"{figures['translation_error']:.3f}",
            ]
        )
    return rows
