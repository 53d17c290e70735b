"""What SECURITY.md says: data is not code, and opens nothing; the versions that this holds with."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pointcmt.data.clouds import read_cloud
from pointcmt.data.labelled import read_labelled
from pointcmt.views.mesh_files import read_mesh
from tests.lowest import lowest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*(ROOT / "pointcmt").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
# what would run code that a file holds, unless this keyword has this value
KEPT_SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN = re.compile(
    r"(c?[pP]ickle|dill|joblib|cloudpickle|marshal|shelve)\.(loads?|open|Unpickler)|pd\.read_pickle"
    r"|yaml\.(load|full_load|unsafe_load|load_all)|torch\.(jit|package|export)\.load|torch\.hub\.load"
)


def unsafe_calls(source: str) -> list[str]:
    """The calls in a module that unpickle, or could."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name in KEPT_SAFE and keywords.get(KEPT_SAFE[name][0]) is not KEPT_SAFE[name][1]:
            found.append(f"line {node.lineno}: {name} without {KEPT_SAFE[name][0]}={KEPT_SAFE[name][1]}")
        elif FORBIDDEN.fullmatch(name):
            found.append(f"line {node.lineno}: {name}")
    return found


def test_nothing_unpickles():
    assert len(SOURCES) > 100
    assert {str(path): found for path in SOURCES if (found := unsafe_calls(path.read_text()))} == {}
    bad = ["torch.load(f)", "np.load(f, allow_pickle=True)", "pickle.loads(b)", "yaml.load(t)"]
    good = ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(t)"]
    found = unsafe_calls("\n".join([*bad, *good]))
    assert [line.split(":")[0] for line in found] == ["line 1", "line 2", "line 3", "line 4"]


def _obj(folder: Path) -> Path:
    (folder / "skin.mtl").write_text("newmtl a\nmap_Kd skin.png\n")
    path = folder / "mesh.obj"
    path.write_text(
        "mtllib skin.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl a\nf 1/1 2/2 3/3\n"
    )
    return path


def _ply(folder: Path) -> Path:
    path = folder / "mesh.ply"
    names = "".join(f"property float {name}\n" for name in ("x", "y", "z", "s", "t"))
    path.write_text(
        f"ply\nformat ascii 1.0\ncomment TextureFile skin.png\nelement vertex 3\n{names}element face 1\n"
        "property list uchar int vertex_indices\nend_header\n0 0 0 0 0\n1 0 0 1 0\n0 1 0 0 1\n3 0 1 2\n"
    )
    return path


def _unlabelled(path: Path) -> object:
    return read_labelled(path, labelled=False)


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


@pytest.mark.parametrize(
    ("make", "read"),
    [(_obj, read_mesh), (_ply, read_mesh), (_obj, read_cloud), (_ply, read_cloud), (_ply, _unlabelled)],
)
def test_a_mesh_opens_no_file_that_it_names(make, read, tmp_path):
    global _opened
    Image.new("RGB", (4, 4)).save(tmp_path / "skin.png")
    path = make(tmp_path)
    read(path)  # imports open files too
    sys.addaudithook(_audit)  # a hook stays until the process ends
    _opened = []
    try:
        read(path)
        found = {Path(name).name for name in _opened if name.startswith(str(tmp_path))}
    finally:
        _opened = None
    assert found == {path.name}


def test_every_dependency_has_a_lower_bound():
    pins = lowest(ROOT / "pyproject.toml")
    assert len(pins) > 20 and all(re.match(r"[\w.-]+==\d+(\.\d+)*(;|$)", pin) for pin in pins)


def test_a_dependency_without_a_lower_bound_is_named(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\ndependencies = ["torch>=2.6", "numpy"]\n[project.optional-dependencies]\n')
    with pytest.raises(ValueError, match=r"'numpy' has no lower bound"):
        lowest(path)


def test_torch_is_one_whose_weights_only_holds():
    """Before 2.6 a file could get round it (CVE-2025-32434)."""
    assert "torch==2.6" in lowest(ROOT / "pyproject.toml")
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) >= 10
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"{file} has no {name}"
