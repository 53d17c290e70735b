"""An adapter in a package of its own, as docs/adapters.md tells to ship one: installed, found, used."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text()
NETWORK = """
import torch
from torch import nn

class MyNet(nn.Module):
    def __init__(self, num_classes=40):
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.classifier = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, num_classes),
        )
    def forward(self, points):
        return self.classifier(self.points(points).amax(-1))
"""


def snippet(language: str, start: str) -> str:
    """The code block of the page that begins so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which pip installed the page's adapter, from the page's own lines."""
    for needed in ("pip", "setuptools", "wheel"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"building a package needs {needed}: pip install {needed}")
    source, target = tmp_path_factory.mktemp("mynet"), tmp_path_factory.mktemp("site")
    (source / "mynet_pointcmt.py").write_text(snippet("python", "# mynet_pointcmt.py"))
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "mynet-pointcmt"\nversion = "1.0"\n'
        '[tool.setuptools]\npy-modules = ["mynet_pointcmt"]\n'
        + snippet("toml", "# pyproject.toml of your package")
        + 'forgotten = "mynet_pointcmt:forgotten"\n'
    )
    run(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--target", str(target), str(source),
    )  # fmt: skip
    return target


def run(*arguments: str, site: Path | None = None, cwd: Path = ROOT) -> str:
    paths = [str(ROOT), *([] if site is None else [str(site)])]
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_installed_adapter_is_listed_and_a_broken_one_is_named(site, tmp_path):
    listed = run("-m", "pointcmt", "adapters", site=site, cwd=tmp_path)
    assert re.search(r"\bmynet\b.*input of classifier\.3.*B3N", listed)
    assert "entry point 'forgotten' does not load" in listed
    assert "mynet" not in run("-m", "pointcmt", "adapters", cwd=tmp_path)


@pytest.mark.slow
def test_an_installed_adapter_proves_a_network_that_never_heard_of_it(site, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mynet.py").write_text(NETWORK)
    command = re.search(
        r"^pointcmt (adapters --check models\.mynet:MyNet --init) '(.*)'$", PAGE, re.MULTILINE
    )
    assert command is not None
    arguments = [*command[1].split(), command[2], "--num-points", "64", "--device", "cpu"]
    proved = run("-m", "pointcmt", *arguments, site=site, cwd=tmp_path)
    assert "proved   mynet: feature [4, 24] at the input of 'classifier.3', logits [4, 40]" in proved
    # without the package, the generic adapter steps in, with another feature
    plain = run("-m", "pointcmt", *arguments, "--layout", "B3N", cwd=tmp_path)
    assert "proved   generic: feature [4, 16] at the input of 'classifier.6'" in plain
