"""Which compiled extensions public code imports: ``python -m tests.third_party.extensions DIR``.

DIR holds checkouts, one in each folder. An extension is what some checkout builds (``CUDAExtension``,
``CppExtension`` or ``load`` in its Python files), or one of those that are installed from elsewhere. The
result goes to benchmarks/results/third_party/extensions.json, from which docs/adapters.md is written.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pointcmt.compat import STAND_INS
from tests.third_party.table import IMPORTS, write

BUILDS = re.compile(r"""(?:CUDAExtension|CppExtension|\bload)\(\s*(?:name\s*=\s*)?["']([\w.]+)["']""")
# of packages that are installed by themselves, and names that are found by what surrounds them only
ELSEWHERE = ("pointnet2_ops", "knn_cuda", "torch_scatter", "torch_cluster", "MinkowskiEngine", "mamba_ssm")


def names_imported(source: str) -> Iterator[str]:
    """Modules, and what is taken out of them as ``module.name``, of a Python file of any age."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        yield from re.findall(r"^\s*(?:import|from)\s+([\w.]+)", source, re.MULTILINE)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def search(folder: Path) -> dict:
    """Each extension and how many codebases import it, most first."""
    built: set[str] = {*ELSEWHERE, *STAND_INS}
    users: dict[str, set[str]] = defaultdict(set)
    codebases = {path.name.rpartition("+")[2].lower() for path in folder.iterdir() if path.is_dir()}
    for path in sorted(folder.glob("*/**/*.py")):
        if not path.is_file():
            continue
        source = path.read_text(errors="replace")
        built.update(name for name in BUILDS.findall(source) if not name.endswith((".pth", ".npy")))
        codebase = path.relative_to(folder).parts[0].rpartition("+")[2].lower()
        for name in names_imported(source):
            users[name].add(codebase)
    counted = {}
    for name in built:
        who = [of for used, of in users.items() if used == name or used.startswith(f"{name}.")]
        count = len(set().union(*who))
        part_of_another = name not in STAND_INS and name.partition(".")[0] in STAND_INS
        if name in STAND_INS or (count and not part_of_another):
            counted[name] = {"codebases": count, "stand_in": name in STAND_INS}
    ordered = sorted(counted.items(), key=lambda item: (-item[1]["codebases"], item[0]))
    return {"codebases": len(codebases), "extensions": dict(ordered)}


if __name__ == "__main__":
    IMPORTS.parent.mkdir(parents=True, exist_ok=True)
    IMPORTS.write_text(json.dumps(search(Path(sys.argv[1])), indent=1) + "\n")
    write()
