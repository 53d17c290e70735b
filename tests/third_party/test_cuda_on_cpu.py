"""The patch that lets CUDA-only code run on a CPU: it redirects what such code does, and comes off again."""

from __future__ import annotations

import torch
from torch import nn

from tests.third_party.cuda_on_cpu import cuda_on_cpu


class HardCoded(torch.autograd.Function):
    """Asks for CUDA in both directions."""

    @staticmethod
    def forward(ctx, x):
        return x + torch.cuda.FloatTensor(*x.shape).zero_()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones(grad.shape, device="cuda") * grad


def test_every_way_of_asking_gives_a_cpu_tensor():
    with cuda_on_cpu(active=True):
        tensors = [
            torch.arange(3, device="cuda"),
            torch.arange(3, device=torch.device("cuda:1")),
            torch.zeros(2).cuda(),
            torch.zeros(2).to("cuda"),
            torch.zeros(2).to(torch.device("cuda"), non_blocking=True),
            torch.zeros(2).new_ones(2, device="cuda"),
            torch.cuda.IntTensor(2, 3).zero_(),
            torch.cuda.FloatTensor([1.5]),
            next(nn.Linear(2, 2).cuda().parameters()),
        ]
        x = torch.ones(4, requires_grad=True)
        HardCoded.apply(x).sum().backward()
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert tensors[6].dtype == torch.int32 and tensors[7].tolist() == [1.5]
    assert x.grad.tolist() == [1, 1, 1, 1]


def test_nothing_of_it_remains():
    before = torch.zeros, torch.arange, torch.cuda.FloatTensor
    try:
        with cuda_on_cpu(active=True):
            assert torch.zeros is not before[0]
            raise KeyError
    except KeyError:
        pass
    assert (torch.zeros, torch.arange, torch.cuda.FloatTensor) == before
    with cuda_on_cpu(active=False):
        assert torch.zeros is before[0]
