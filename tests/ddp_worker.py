"""One of two processes of tests/test_wrappers.py: gradients of half a batch under DDP and accelerate."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pointcmt.distributed import leave
from pointcmt.methods import PointCMT
from tests.toys import BATCH, DeepHead, Generator, Student, Teacher, batch, deep_head_adapter, hooks


def build(deep: bool):
    torch.manual_seed(200)
    teacher = Teacher()
    torch.manual_seed(201)
    generator = Generator()
    torch.manual_seed(202)
    return teacher, generator, DeepHead(dropout=0.0) if deep else Student(norm=False)


def run(wrap, backward, give_wrapper: bool, deep: bool = False) -> dict[str, torch.Tensor]:
    teacher, generator, student = build(deep)
    wrapped = wrap(student)
    half = slice(distributed.get_rank() * BATCH // 2, (distributed.get_rank() + 1) * BATCH // 2)
    points, labels, views = (tensor[half] for tensor in batch(320))
    given, adapter = wrapped if give_wrapper else student, deep_head_adapter() if deep else None
    with PointCMT(teacher, given, generator=generator, adapter=adapter) as cmt:
        loss = F.cross_entropy(wrapped(points), labels) + cmt.loss(views=views)
        backward(loss)
        assert cmt.report is not None
    assert hooks(student) == 0
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def main() -> None:
    accelerator = Accelerator(cpu=True)
    results = {
        "ddp": run(DistributedDataParallel, torch.Tensor.backward, give_wrapper=True),
        "ddp_unused": run(
            lambda student: DistributedDataParallel(student, find_unused_parameters=True),
            torch.Tensor.backward,
            give_wrapper=False,
        ),
        "ddp_deep": run(DistributedDataParallel, torch.Tensor.backward, give_wrapper=True, deep=True),
        "accelerate": run(accelerator.prepare_model, accelerator.backward, give_wrapper=True),
    }
    if distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "gradients.pt")
    distributed.barrier()
    leave(0)


main()
