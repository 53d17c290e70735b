"""``install(cuda_on_cpu=True)`` lets CUDA-only code run without a GPU, and comes off again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pointcmt import compat

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is redirected")


@pytest.fixture
def redirected():
    compat.install("emd", cuda_on_cpu=True)
    yield
    compat.uninstall()


class HardCoded(torch.autograd.Function):
    """Asks for CUDA in both directions."""

    @staticmethod
    def forward(ctx, x):
        return x + torch.cuda.FloatTensor(*x.shape).zero_()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones(grad.shape, device="cuda") * grad


def test_every_way_of_asking_gives_a_cpu_tensor(redirected):
    tensors = [
        torch.arange(3, device="cuda"),
        torch.arange(3, device=torch.device("cuda:1")),
        torch.randn(3, device="cuda"),
        torch.zeros_like(torch.ones(3), device="cuda"),
        torch.zeros(2).cuda(),
        torch.zeros(2).cuda(non_blocking=True),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to(torch.device("cuda"), non_blocking=True),
        torch.zeros(2).to("cuda", torch.float64),
        torch.zeros(2).new_ones(2, device="cuda"),
        torch.cuda.FloatTensor([1.5]),
        next(nn.Linear(2, 2).cuda().parameters()),
        next(nn.Linear(2, 2).to("cuda").parameters()),
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert tensors[8].dtype == torch.float64 and tensors[10].tolist() == [1.5]
    assert torch.cuda.IntTensor(2, 3).dtype == torch.int32
    assert torch.zeros(2).type(torch.cuda.HalfTensor).dtype == torch.float16
    assert torch.zeros(2).type("torch.cuda.LongTensor").dtype == torch.int64
    assert torch.zeros(2).type() == "torch.FloatTensor"
    x = torch.ones(4, requires_grad=True)
    HardCoded.apply(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]
    assert not torch.cuda.is_available()


def test_nothing_of_it_remains():
    def seen():
        return torch.zeros, torch.cuda.FloatTensor, torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type

    before = seen()
    compat.install("emd", cuda_on_cpu=True)
    compat.install("emd", cuda_on_cpu=True)
    assert not set(seen()) & set(before)
    compat.uninstall("emd")  # of one name only
    assert not set(seen()) & set(before)
    compat.uninstall()
    assert seen() == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    compat.install("emd")
    assert seen() == before
    compat.uninstall()
