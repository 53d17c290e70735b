"""Contrastive losses and pre-training in two processes, which are started once for all of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.objectives.contrastive_cases import CASES, batch, projector

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    words = [
        "pretrain", "--out", str(folder / "run"), "--method", "crosspoint", "--student",
        "tests.pretraining_toys:made", "--per-class", "3", "--num-points", "48", "--size", "16", "--rig",
        "simpleview", "--backbone", "simpleview_resnet", "--backbone-options", "layers=(1,1)",
        "stem_stride=2", "--epochs", "2", "--batch-size", "16", "--device", "cpu", "--no-tensorboard",
        "--no-progress", "--debug",
    ]  # fmt: skip
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            "-m", "tests.contrastive_worker", str(folder), *words,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def test_two_processes_equal_one_with_the_joined_batch(folder):
    """Parts of 5 and 3 shapes under DistributedDataParallel; points without a cell in both."""
    results = torch.load(folder / "results.pt", weights_only=True)
    for name, loss in CASES.items():
        network = projector()
        value = loss(network, *batch())
        value.backward()
        torch.testing.assert_close(results[name]["loss"], value.detach(), rtol=1e-5, atol=1e-5, msg=name)
        for mine, parameter in zip(results[name]["gradients"], network.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_heads_and_network_stay_equal_in_a_loop_of_ones_own(folder):
    assert torch.load(folder / "apart.pt", weights_only=True) == {"PicAtPoint": 0.0, "CrossPoint": 0.0}


def test_pretraining_in_two_processes(folder):
    """Layers of the head get no gradients, for which a wrapper for several processes would wait for ever; of
    16 shapes 8 are in each process, and all of them are candidates."""
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["losses_at_chance"]["intra"] == pytest.approx(math.log(31))
    assert results["last"]["epoch"] == 2
