"""Networks by name: those of this package, and any that a user registers.

::

    @register_student("mynet")
    def mynet(num_classes: int, feature_dim: int = 256) -> nn.Module: ...

Then ``pointcmt train --import mymodule --student mynet`` trains it, its file may be evaluated
(``pointcmt evaluate --import mymodule RUN``), and a study may name it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])
_registered: dict[str, Callable[..., nn.Module]] = {}


def register_student(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a class or function known as a student.

    It is called with ``num_classes`` where it takes that, with ``feature_dim`` where it takes that and one is
    asked for, and with ``--student-options``.

    Raises:
        ValueError: a name that is taken, or is not made of letters, digits, ``_``, ``.`` and ``-``.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"student name {name!r}; expected letters, digits, '_', '.' and '-'")

    def register(factory: Factory) -> Factory:
        before = list_students().get(name)
        # a module that is imported again, by another name or in a notebook, registers the same once more
        if before is not None and before.__qualname__ != factory.__qualname__:
            raise ValueError(
                f"there is a student {name!r} already ({before.__module__}.{before.__qualname__}); give this "
                "one another name"
            )
        _registered[name] = factory
        return factory

    return register


def list_students() -> dict[str, Callable[..., nn.Module]]:
    """Every student by its name: the factories that ``pointcmt.students`` exports, and registered ones."""
    from pointcmt import students

    own = {
        name: value
        for name in students.__all__
        if inspect.isfunction(value := getattr(students, name))
        and "num_classes" in inspect.signature(value).parameters
    }
    return own | _registered
