"""The walls of the house: imports point one way, adapters stand alone, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each part, and the parts of the package it may import. From user to used: no circle can be written here.
LEAVES = {"types", "_version"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "_version": set(),
    "adapters": set(),
    "checkpoint": {"_version"},
    "locks": {"checkpoint"},
    "ops": set(),
    "heads": set(),
    "objectives": {"ops", "heads", "views"},
    "views": {"ops", "checkpoint"},
    "data": {"views", "checkpoint", "locks", "ops"},
    "students": {"ops"},
    "tasks": set(),
    "pictures": {"checkpoint"},
    "backbones": set(),
    "pretrained": set(),
    "teacher": {"backbones", "pretrained", "views", "checkpoint"},
    "registration": {"ops", "views", "checkpoint", "backbones", "data", "objectives", "types"},
    "generator": {"ops", "checkpoint"},
    "compat": {"ops"},
    "frozen": set(),
    "hooks": {"adapters", "frozen"},
    "distributed": set(),
    "schedules": set(),
    "training": {"schedules", "objectives", "adapters", "frozen", "hooks", "distributed", "ops", "views"},
    "methods": {"training", "objectives", "adapters", "generator", "schedules", "views"},
    "integrations": {"methods", "training", "objectives", "adapters"},
    "recipes": {
        "methods", "training", "teacher", "generator", "students", "views", "data", "pictures", "objectives",
        "adapters", "ops", "checkpoint", "locks", "compat", "schedules", "tasks", "registration",
    },
    "studies": {"recipes", "tasks", "data", "pictures", "checkpoint"},
    "cli": {"recipes", "studies", "data", "distributed"},
}  # fmt: skip


def parts() -> dict[str, list[Path]]:
    """Every part of the package with its source files."""
    found: dict[str, list[Path]] = {"adapters": sorted((ROOT / "adapters").rglob("*.py"))}
    for path in sorted((ROOT / "pointcmt").iterdir()):
        if path.is_dir() and any(path.glob("*.py")):
            found[path.name] = sorted(path.rglob("*.py"))
        elif path.suffix == ".py" and path.stem not in ("__init__", "__main__"):
            found[path.stem] = [path]
    return found


def imported_parts(path: Path) -> set[str]:
    """The parts of pointcmt that a file imports, wherever in the file it does so."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            piece = name.split(".")
            if piece[0] == "pointcmt" and len(piece) > 1:
                result.add(piece[1])
    return result


@pytest.mark.parametrize("part", sorted(parts()))
def test_imports_point_one_way(part):
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what the new part {part!r} may import"
    for path in parts()[part]:
        foreign = imported_parts(path) & set(parts()) - {part} - MAY_IMPORT[part] - LEAVES
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}, which {part!r} may not use"


def test_no_circle_is_allowed():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        free = {part for part, used in MAY_IMPORT.items() if part not in done and used <= done}
        assert free, f"a circle among {sorted(set(MAY_IMPORT) - done)}"
        done |= free


def test_adapters_import_only_the_standard_library_torch_and_their_registry():
    for path in parts()["adapters"]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | {"torch", "pointcmt"}, f"{path.name} imports {module}"


def test_importing_pointcmt_is_quiet_and_loads_no_heavy_optional_library():
    code = (
        "import sys, pointcmt; "
        "heavy = ('pyvista', 'matplotlib', 'lightning', 'sklearn', 'tensorboard', 'open3d'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
