"""One of two processes of tests/test_pretraining_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pointcmt.cli import main as command_line
from tests.objectives.contrastive_cases import CASES, batch, projector


def losses(folder: Path) -> None:
    """Losses and gradients of a part of a batch: 5 shapes of 8 here, 3 there."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {}
    for name, loss in CASES.items():
        network = projector()
        wrapped = DistributedDataParallel(network)
        part = slice(0, 5) if rank == 0 else slice(5, 8)
        value = loss(wrapped, *(tensor[part] for tensor in batch()))
        value.backward()
        mean = value.detach().clone()
        distributed.all_reduce(mean)
        results[name] = {"loss": mean / 2, "gradients": [p.grad for p in network.parameters()]}
    if rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    losses(Path(sys.argv[1]))
    raise SystemExit(command_line(sys.argv[2:]))  # leaves the processes
