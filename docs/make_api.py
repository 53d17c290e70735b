"""Writes docs/api.md: the index of the public API, from the first lines of its docstrings.

python docs/make_api.py
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
# what people import, part by part
MODULES = (
    "pointcmt",
    "pointcmt.types",
    "pointcmt.methods",
    "pointcmt.training",
    "pointcmt.objectives",
    "pointcmt.schedules",
    "pointcmt.heads",
    "pointcmt.teacher",
    "pointcmt.generator",
    "pointcmt.adapters",
    "pointcmt.compat",
    "pointcmt.students",
    "pointcmt.registration",
    "pointcmt.views",
    "pointcmt.data",
    "pointcmt.ops",
    "pointcmt.tasks",
)


def public_names(module: object) -> list[str]:
    """``__all__``, or the classes and functions that the module itself defines."""
    named = getattr(module, "__all__", None)
    if named is not None:
        return sorted(name for name in named if not name.startswith("__"))
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__  # type: ignore[attr-defined]
    )


def first_line(value: object) -> str:
    """The first line of a docstring; of a plain value what it is."""
    if not (inspect.isclass(value) or callable(value) or inspect.ismodule(value)):
        return f"a {type(value).__name__}"
    text = inspect.getdoc(value) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|").strip()


def page() -> str:
    """The whole page."""
    parts = [
        "# Index of the API",
        "Generated from the docstrings by `python docs/make_api.py`; `help(name)` has shapes, units, dtypes, "
        "errors and sources.",
    ]
    for path in MODULES:
        module = importlib.import_module(path)
        parts += [f"## `{path}`", first_line(module)]
        rows = [f"| `{name}` | {first_line(getattr(module, name))} |" for name in public_names(module)]
        parts.append("\n".join(["| name | what |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {page().count('| `')} names")
