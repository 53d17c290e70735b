"""What the pages promise of themselves: names that exist, links that lead somewhere, a current index."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from pointcmt import CrossModalTraining, ImageTeacher
from pointcmt.hooks import StudentCapture
from pointcmt.objectives import FeatureL2
from pointcmt.views import ViewSpec
from tests.toys import FEATURE, Student, batch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def resolve(path: str) -> object:
    """The object that a dotted path names."""
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_ways_through_the_code_name_functions_that_exist():
    named = re.findall(
        r"`(pointcmt\.[\w.]+)`", (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    )
    assert len(named) >= 8
    for path in named:
        resolve(path)


def test_each_function_of_the_first_way_is_called_once_in_a_step(monkeypatch):
    calls: dict[str, int] = {}

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    teacher = ImageTeacher(
        5,
        "simpleview_resnet",
        in_chans=1,
        feature_dim=FEATURE,
        backbone_options={"width": 0.0625, "layers": [1]},
        view_spec=ViewSpec(size=16),
    )
    student, (points, _, _) = Student(), batch(0)
    for owner, name in (
        (StudentCapture, "_complete"),
        (ImageTeacher, "project"),
        (ImageTeacher, "forward"),
        (FeatureL2, "forward"),
        (CrossModalTraining, "loss"),
    ):
        count(owner, name)
    with CrossModalTraining(teacher, student, objectives=[FeatureL2(1.0)], points=points[:2]) as cmt:
        calls.clear()
        student(points)
        cmt.loss(views=teacher.project(points)).backward()
    # two are called forward: the teacher and the objective
    assert calls == {"_complete": 1, "project": 1, "forward": 2, "loss": 1}


def test_the_index_of_the_api_is_current():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/make_api.py"


def test_the_readme_is_for_a_newcomer():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130, "the rest belongs into docs/"


def test_the_loss_that_the_page_shows_is_a_loss():
    """docs/extending.md's example, run as it stands."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = next(part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "class Cosine" in part)
    scope: dict[str, object] = {}
    exec(code, scope)
    student, (points, _, views) = Student(), batch(1)
    teacher = importlib.import_module("tests.toys").Teacher()
    with CrossModalTraining(teacher, student, objectives=[scope["Cosine"](2.0)]) as cmt:
        student(points)
        loss = cmt.loss(views=views)
        loss.backward()
        assert torch.isfinite(loss) and 0 <= cmt.losses["cosine"] <= 2
