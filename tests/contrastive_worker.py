"""One of two processes of tests/test_pretraining_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pointcmt.cli import main as command_line
from pointcmt.distributed import leave
from pointcmt.methods import CrossPoint, PicAtPoint, freeze_unused
from tests.objectives.contrastive_cases import CASES, batch, projector
from tests.pretraining_toys import adapter, clouds, images, network, views_of


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


def own_loop(folder: Path) -> None:
    """Three steps of somebody's own loop: largest difference of anything trained between the processes."""
    apart = {}
    rank = distributed.get_rank()
    for kind in (PicAtPoint, CrossPoint):
        model = network()
        points = clouds(4, seed=rank)
        freeze_unused(model, points, adapter())
        wrapped = DistributedDataParallel(model)
        with kind(images(), wrapped, points=points, adapter=adapter()) as pre:
            optimizer = torch.optim.Adam([*model.parameters(), *pre.parameters()], 1e-3)
            for _ in range(3):
                wrapped(torch.cat([points] * pre.copies))
                loss = pre.loss(views=views_of(points))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            worst = 0.0
            for parameter in (*model.parameters(), *pre.parameters()):
                other = parameter.detach().clone()
                distributed.broadcast(other, 0)
                worst = max(worst, float((other - parameter.detach()).abs().max()))
        apart[kind.__name__] = worst
    if rank == 1:
        torch.save(apart, folder / "apart.pt")


if __name__ == "__main__":
    losses(Path(sys.argv[1]))
    own_loop(Path(sys.argv[1]))
    leave(command_line(sys.argv[2:]))
