"""Schedules: what scales the weights of the objectives while training goes on.

The paper's weights belong to a long schedule under a strong teacher. A guard multiplies them by factors that
follow the schedule, or how much better than the student the teacher still is on shapes that neither was
trained on. Guards
multiply: ``HeldOutAdvantage() * Decay(end=0.5, names=["classifier_enhancement"])``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any


class Guard(ABC):
    """A factor for the weight of each objective.

    Args:
        names: objectives that it acts on; None: all. Others keep the factor 1.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        self.names = None if names is None else frozenset(names)

    def factor(self, name: str) -> float:
        """The factor now, at least 0, for the objective of that name."""
        return self._factor() if self.names is None or name in self.names else 1.0

    @abstractmethod
    def _factor(self) -> float: ...

    def observe(self, **facts: float) -> None:
        """Tells the guard, and those it is multiplied with, how training stands; each takes what it knows.

        Args:
            facts: ``progress`` (part of the schedule that is done, in [0, 1]), ``teacher_accuracy`` and
                ``student_accuracy`` (on held-out shapes, in [0, 1]).

        Raises:
            ValueError: a value outside of [0, 1].
        """
        for name, value in facts.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected a number in [0, 1]")
        self._observe(facts)

    def _observe(self, facts: dict[str, float]) -> None:  # noqa: B027  nothing concerns a constant guard
        """Takes from the facts what concerns this guard."""

    def state_dict(self) -> dict[str, Any]:
        """What to keep so that a resumed run goes on the same; plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  nor has it a state
        """Takes up what :meth:`state_dict` gave."""

    def __mul__(self, other: Guard) -> Guard:
        return _Product(self, other)


class Decay(Guard):
    """Full weight at first, then down a cosine to nothing: 1 until ``start``, 0 from ``end`` of the schedule.

    Args:
        start: part of the schedule, in [0, 1], where the decay begins.
        end: where it has ended; above ``start``.
        names: objectives that it acts on; None: all.

    Raises:
        ValueError: not 0 <= start < end <= 1.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, names: Iterable[str] | None = None) -> None:
        super().__init__(names)
        if not 0 <= start < end <= 1:
            raise ValueError(f"start is {start} and end {end}; expected 0 <= start < end <= 1")
        self.start, self.end = start, end
        self._progress = 0.0

    def _factor(self) -> float:
        done = (self._progress - self.start) / (self.end - self.start)
        return 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))

    def _observe(self, facts: dict[str, float]) -> None:
        self._progress = facts.get("progress", self._progress)

    def state_dict(self) -> dict[str, Any]:
        return {"progress": self._progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._progress = float(state["progress"])


class ScheduleLength(Guard):
    """Weights follow the length of the schedule: the square root of its part of the paper's, at most 1.

    The paper's weights were found for some 300 000 steps. Runs of a thousand steps are helped by a tenth of
    FE's and a thirtieth of CE's, and harmed by the whole (``docs/results.md``): the network has to follow its
    labels first. The square root runs through both findings.

    Args:
        steps: optimizer steps of the whole run, at least 1.
        full: steps from which on the weights are whole; default: the paper's 300 000.
        names: objectives that it acts on; None: all.

    Raises:
        ValueError: a number of steps below 1.
    """

    def __init__(self, steps: int, full: int = 300_000, names: Iterable[str] | None = None) -> None:
        super().__init__(names)
        if steps < 1 or full < 1:
            raise ValueError(f"steps is {steps} and full {full}; expected at least 1")
        self.steps, self.full = steps, full

    def _factor(self) -> float:
        return min(1.0, math.sqrt(self.steps / self.full))


class HeldOutAdvantage(Guard):
    """Weights follow how far the teacher is ahead of the student on held-out shapes.

    0 where the teacher is ``margin`` behind or worse, 1 where it is ``full`` ahead, linear between; before
    the first measurement ``initial``. As the student leaves the teacher behind, it falls silent.

    Args:
        full: advantage in accuracy, in (0, 1], from which on the weights are whole.
        margin: how far behind the teacher may be and still be heard, in [0, 1]: accuracy on a few hundred
            shapes is uncertain by about two points, and images may teach what points do not show.
        initial: factor before the first measurement.
        names: objectives that it acts on; None: all.

    Raises:
        ValueError: values outside of these ranges.
    """

    def __init__(
        self,
        full: float = 0.05,
        margin: float = 0.05,
        initial: float = 1.0,
        names: Iterable[str] | None = None,
    ) -> None:
        super().__init__(names)
        if not 0 < full <= 1 or not 0 <= margin <= 1 or initial < 0:
            raise ValueError(
                f"full is {full}, margin {margin}, initial {initial}; expected full in (0, 1], margin in [0, "
                "1], initial at least 0"
            )
        self.full, self.margin, self.initial = full, margin, initial
        self._teacher: float | None = None
        self._student: float | None = None

    def _factor(self) -> float:
        if self._teacher is None or self._student is None:
            return self.initial
        ahead = self._teacher - self._student + self.margin
        return min(max(ahead / (self.full + self.margin), 0.0), 1.0)

    def _observe(self, facts: dict[str, float]) -> None:
        self._teacher = facts.get("teacher_accuracy", self._teacher)
        self._student = facts.get("student_accuracy", self._student)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher_accuracy": self._teacher, "student_accuracy": self._student}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._teacher, self._student = state["teacher_accuracy"], state["student_accuracy"]


class _Product(Guard):
    def __init__(self, *guards: Guard) -> None:
        super().__init__()
        self.guards = guards

    def factor(self, name: str) -> float:
        return math.prod(guard.factor(name) for guard in self.guards)

    def _factor(self) -> float:
        return math.prod(guard._factor() for guard in self.guards)

    def _observe(self, facts: dict[str, float]) -> None:
        for guard in self.guards:
            guard._observe(facts)

    def state_dict(self) -> dict[str, Any]:
        return {str(number): guard.state_dict() for number, guard in enumerate(self.guards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, guard in enumerate(self.guards):
            guard.load_state_dict(state[str(number)])
