"""``pointcmt report``: pictures and one page of the runs in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pointcmt.recipes.progress import say
from pointcmt.report import write_report


@dataclass
class Report:
    """Write report.html and its pictures of all finished runs in a folder and below it."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a folder of run folders."""
    title: str = "PointCMT: images teach a point-cloud network"
    """Heading of the page."""


def report(options: Report) -> None:
    """Run the command."""
    say(f"report: {write_report(options.folder, options.title)}")
