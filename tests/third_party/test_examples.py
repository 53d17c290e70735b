"""The examples: each diff applies to the real checkout and compiles; both loops run."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pointcmt import ImageTeacher, PointGenerator
from pointcmt.views import ViewSpec
from tests.third_party.catalogue import CASES, commit_of

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MARKERS = {case.codebase: case.marker for case in CASES}
DIFFS = {
    "yanx27": MARKERS["yanx27/Pointnet_Pointnet2_pytorch"],
    "antao97": MARKERS["antao97/dgcnn.pytorch"],
    "pointmlp": MARKERS["ma-xu/pointMLP-pytorch"],
    "rscnn": MARKERS["Yochengliu/Relation-Shape-CNN"],
    "openpoints": "cfgs/modelnet40ply2048/pointnext-s.yaml",
}


PRETRAIN = ("yanx27", "antao97", "openpoints")


def target_of(diff: Path) -> str:
    return next(
        line.removeprefix("+++ b/") for line in diff.read_text().splitlines() if line.startswith("+++ b/")
    )


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_is_a_few_lines_and_uses_the_public_face(name):
    added = [
        line[1:]
        for line in (EXAMPLES / name / "pointcmt.diff").read_text().splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    assert len(added) <= 12
    text = "\n".join(added)
    assert "from pointcmt import ImageTeacher, PointCMT" in text and "cmt.loss(views=" in text
    for line in added:  # what they import must exist
        if line.strip().startswith(("from pointcmt", "import pointcmt")):
            exec(compile(ast.parse(line.strip()), name, "exec"), {})
    assert f"examples/{name}/pointcmt.diff" in (EXAMPLES / name / "README.md").read_text()


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_diff_that_pre_trains_is_a_few_lines_and_uses_the_public_face(name):
    diff = (EXAMPLES / name / "pretrain.diff").read_text()
    added = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) <= 20
    text = "\n".join(added)
    assert "from pointcmt import ImageTeacher, PicAtPoint" in text and "pre.loss(views=" in text
    assert f"examples/{name}/pretrain.diff" in (EXAMPLES / name / "README.md").read_text()


@pytest.fixture(autouse=True)
def no_stand_ins():
    from pointcmt import compat

    yield
    compat.uninstall()


@pytest.mark.parametrize(
    ("name", "file", "call"),
    [(name, "pointcmt.diff", "cmt.loss(") for name in DIFFS]
    + [(name, "pretrain.diff", "pre.loss(") for name in PRETRAIN],
)
def test_a_diff_applies_to_the_real_checkout(name, file, call, repos, tmp_path):
    marker = DIFFS[name]
    checkouts = [folder for folder in [repos, *sorted(repos.iterdir())] if (folder / marker).exists()]
    if not checkouts:
        pytest.skip(f"no checkout in {repos} holds {marker}")
    diff = EXAMPLES / name / file
    copy = tmp_path / target_of(diff)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkouts[0] / target_of(diff), copy)
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    done = subprocess.run(["git", "apply", "-v", str(diff)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr} (checked at {commit_of(checkouts[0])})"
    source = copy.read_text()
    assert call in source
    compile(source, str(copy), "exec")


def load(script: str):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trained(tmp_path):
    """A small teacher and generator on disk, as the commands leave them (weights as they begin)."""
    torch.manual_seed(0)
    teacher, generator = tmp_path / "teacher.safetensors", tmp_path / "generator.safetensors"
    spec = ViewSpec(size=16)
    ImageTeacher(16, "simpleview_resnet", in_chans=1, feature_dim=128, view_spec=spec).save(teacher)
    PointGenerator(128, num_points=32).save(generator)
    return [
        "--teacher", str(teacher), "--generator", str(generator), "--epochs", "1", "--per-class", "2",
        "--num-points", "32",
    ]  # fmt: skip


def test_the_accelerate_loop_runs(trained, capsys):
    accuracy = load("accelerate_loop.py").main(trained)
    assert 0 <= accuracy <= 1
    assert "feature_enhancement" in capsys.readouterr().out


@pytest.mark.slow
def test_the_accelerate_loop_runs_in_two_processes(trained):
    """By the command of its docstring."""
    script = EXAMPLES / "accelerate_loop.py"
    assert (
        "ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 examples/accelerate_loop.py" in script.read_text()
    )
    trained[trained.index("--per-class") + 1] = "4"  # a batch for each process
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), *trained],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )
    aborted = "terminate called without an active exception" in done.stderr  # see pointcmt.distributed.leave
    assert done.returncode == 0 or aborted, done.stderr[-4000:]
    lines = done.stdout.splitlines()  # of two that train alone, each would print
    assert sum("feature_enhancement" in line for line in lines) == 1
    assert sum(line.startswith("accuracy") for line in lines) == 1


def test_the_lightning_loop_runs(trained, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="needs Lightning: pip install lightning")
    monkeypatch.chdir(tmp_path)
    metrics = load("lightning_loop.py").main(trained)
    assert {"accuracy", "pointcmt/feature_enhancement", "pointcmt/classifier_enhancement"} <= set(metrics)
    assert metrics["pointcmt/feature_enhancement"] > 0
