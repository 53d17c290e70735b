"""What a recipe shows while it runs: bars with losses on a terminal, one line per evaluation elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

console = Console(highlight=False)


def say(text: str, show: bool = True) -> None:
    """One line to the terminal."""
    if show:
        console.print(text, markup=False, soft_wrap=True)


def warn(text: str, show: bool = True) -> None:
    """One warning to the terminal, in yellow where there is colour."""
    if show:
        console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def show_table(
    headings: Sequence[str], lines: Sequence[Sequence[str]], title: str = "", keys: int = 1
) -> None:
    """A table that is whole at the terminal's width, and at 80 columns in a file or a pipe.

    Where it is wider, its columns are shown in several tables below each other, each with the first ``keys``.
    """
    width = console.width if console.is_terminal else 80
    room = [max(map(cell_len, column)) + 2 for column in zip(headings, *lines, strict=True)]
    groups: list[list[int]] = [[]]
    for column in range(keys, len(headings)):
        if groups[-1] and sum(room[:keys]) + sum(room[c] for c in [*groups[-1], column]) - 2 > width:
            groups.append([])
        groups[-1].append(column)
    if title:
        say(title)
    for group in groups:
        shown = [*range(keys), *group]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for column in shown:
            table.add_column(Text(headings[column]), justify="left" if column < keys else "right")
        for line in lines:
            table.add_row(*(Text(line[column]) for column in shown))  # Text: no markup in names
        console.print(table, width=width)


class EpochProgress:
    """Epochs and steps of a training run."""

    def __init__(self, name: str, epochs: int, steps: int, first: int, show: bool) -> None:
        self.name, self.epochs, self.steps, self.first, self.show = name, epochs, steps, first, show
        self.bar: Progress | None = None
        self.task: Any = None
        self.done = first * steps
        self.shown = 0.0
        self.scores = ""

    def __enter__(self) -> EpochProgress:
        if self.show and console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                escape(self.name), total=self.epochs * self.steps, completed=self.done, losses=""
            )
        return self

    def step(self, number: int, sums: Mapping[str, Tensor]) -> None:
        """Step ``number`` of the epoch is done; ``sums`` are the losses summed over the epoch so far."""
        self.done += 1
        # reading a loss waits for the device: not more than twice a second
        if self.bar is not None and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            text = "  ".join(f"{name} {float(value) / (number + 1):.3f}" for name, value in sums.items())
            self.bar.update(self.task, completed=self.done, losses=f"{text}  {self.scores}")

    def evaluated(self, epoch: int, losses: Mapping[str, float], scores: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self.scores = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        if self.show and self.bar is None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            say(f"{self.name}  epoch {epoch}/{self.epochs}  {text}  {self.scores}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
            if kind is None:
                say(f"{self.name}  {self.epochs} epochs  {self.scores}")
