"""One of two processes of tests/test_contexts.py: a connector in a user's own DDP loop."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pointcmt import CrossModalTraining
from pointcmt.distributed import leave
from pointcmt.objectives import SoftmaxRegression
from tests.toys import BATCH, FEATURE, Student, Teacher, batch


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    teacher, student = Teacher(), Student(norm=False)
    torch.manual_seed(1 + rank)  # the connector starts otherwise on each
    objective = SoftmaxRegression(1.0, FEATURE, FEATURE)
    wrapped = DistributedDataParallel(student)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    own: dict[str, torch.Tensor] = {}
    averaged: dict[str, torch.Tensor] = {}
    with CrossModalTraining(teacher, wrapped, objectives=[objective]) as cmt:
        optimizer = torch.optim.Adam([*student.parameters(), *cmt.parameters()], lr=1e-2)
        for step in range(3):
            points, labels, views = (tensor[half] for tensor in batch(100 + step))
            loss = F.cross_entropy(wrapped(points), labels)
            taught = cmt.loss(views=views)
            if step == 0:
                named = dict(objective.named_parameters())
                alone = torch.autograd.grad(taught, list(named.values()), retain_graph=True)
                own = dict(zip(named, alone, strict=True))
            (loss + taught).backward()
            if step == 0:
                averaged = {name: p.grad.clone() for name, p in objective.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        state = {name: value.clone() for name, value in cmt.state_dict().items()}
    state |= {f"student.{name}": value for name, value in student.state_dict().items()}
    torch.save({"state": state, "own": own, "averaged": averaged}, Path(sys.argv[1]) / f"{rank}.pt")
    distributed.barrier()
    leave(0)


main()
