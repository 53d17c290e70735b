"""Several processes: one that is lost is named; and what is private in torch and accelerate is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from pointcmt.recipes import processes
from pointcmt.recipes.engine import MachineOptions, make_accelerator

SCRIPT = """
import os, sys, time
import torch
from torch import nn
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_engine import Config, Small, clouds
from pointcmt.recipes.batches import batches_of
from pointcmt.recipes.engine import LoopOptions, MachineOptions, fit, make_accelerator
from pointcmt.recipes.run import RunFolder
from pointcmt.tasks import Figure, Task

machine = MachineOptions(device="cpu", tensorboard=False, progress=False, timeout=4)
loop = LoopOptions(epochs=3, batch_size=8)
accelerator = make_accelerator(machine)
run = RunFolder.start(accelerator, Path(sys.argv[2]), Config(loop), command="train")
training, _ = batches_of({"train": clouds()}, 8, 0, accelerator)

def step(model, batch, done):
    if done > 0.4 and accelerator.process_index == 1:
        os._exit(3) if sys.argv[3] == "dies" else time.sleep(300)
    return {"loss": nn.functional.cross_entropy(model(batch.inputs), batch.labels)}

task = Task(step, lambda model: {"x": 0.0}, Figure("x", "highest", ""))
fit(Small(), task, training, lambda model, path: None, loop, machine, accelerator, run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "stops answering"])
def test_a_process_that_is_lost_ends_the_others_with_its_name(how, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(tmp_path / "r"), how]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        _, said = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 1
    assert "RuntimeError: rank 1 of 2 processes died or does not answer (this is rank 0)" in said
    assert "--resume" in said
    state = torch.load(tmp_path / "r/state.pt", weights_only=True)
    assert state["epoch"] == 1  # the checkpoint is whole


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_private_in_torch_is_there(group):
    """Else: no time limit in training, and no name of a process that is lost."""
    processes.set_timeout(7)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=7)
    processes.default_store().set("a", "b")
    assert processes.default_store().get("a") == b"b"


def test_what_is_private_in_accelerate_is_there():
    """Else: a second recipe of one process keeps the first one's precision."""
    assert make_accelerator(MachineOptions(device="cpu", precision="bf16")).mixed_precision == "bf16"
    processes.forget_accelerator()
    assert make_accelerator(MachineOptions(device="cpu")).mixed_precision == "no"


def test_one_process_waits_for_nobody():
    with pytest.raises(RuntimeError, match=r"^gloo timed out$"), processes.answering(1.0):
        raise RuntimeError("gloo timed out")
