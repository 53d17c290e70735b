"""Several processes: what is private in torch and accelerate is there. tests/test_kill.py loses one."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from pointcmt.recipes import processes
from pointcmt.recipes.engine import MachineOptions, make_accelerator


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_private_in_torch_is_there(group):
    """Else: no time limit in training, and no name of a process that is lost."""
    other = dist.new_group()  # as of KeptEqual
    processes.set_timeout(7)
    for one in (dist.group.WORLD, other):
        assert one._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
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
