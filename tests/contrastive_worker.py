"""One of two processes of tests/objectives/test_contrastive.py: losses and gradients of a part of a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.objectives.contrastive_cases import CASES, batch, projector


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {}
    for name, loss in CASES.items():
        network = projector()
        wrapped = DistributedDataParallel(network)
        # parts of different sizes: 5 shapes and 3
        part = slice(0, 5) if rank == 0 else slice(5, 8)
        value = loss(wrapped, *(tensor[part] for tensor in batch()))
        value.backward()
        mean = value.detach().clone()
        distributed.all_reduce(mean)
        results[name] = {"loss": mean / 2, "gradients": [p.grad for p in network.parameters()]}
    if rank == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
