"""Normalisation, activation and maximum over edges: equal to PyTorch's own, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from pointcmt.ops._extension import has_cpu_kernels
from pointcmt.ops.edges import norm_act, norm_act_max, reference_norm_act, reference_norm_act_max

compiled = pytest.mark.skipif(not has_cpu_kernels(), reason="the CPU kernels are not compiled")
KINDS = ["dense", "gathered", "scaled"]  # rows; points[idx] + centres; these times factors
CASES = [(norm_act, reference_norm_act, kind) for kind in KINDS[:2]]
CASES += [(norm_act_max, reference_norm_act_max, kind) for kind in KINDS]


class Case:
    """Leaves of one comparison: rows of some kind, weights of both signs, running statistics."""

    def __init__(self, seed: int, channels: int, kind: str, dtype: torch.dtype, offset: float = 0.0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        batch, n, m, samples = 3, 11, 7, 5
        self.centres = self.idx = self.factors = None
        if kind != "dense":
            self.x = randn(batch, n, channels) + offset
            self.centres = randn(batch, m, channels)
            self.idx = torch.randint(0, n, (batch, m, samples), generator=generator)
            self.idx[..., 2:] = self.idx[..., :1]  # padded groups, as a ball query makes them
            if kind == "scaled":
                self.factors = randn(batch, m, samples, channels)
        else:
            self.x = randn(batch, m, samples, channels) + offset
        self.weight, self.bias = randn(channels), randn(channels)
        self.running_mean, self.running_var = randn(channels), randn(channels).square() + 0.1
        for leaf in self.leaves():
            leaf.requires_grad_()

    def leaves(self) -> list[torch.Tensor]:
        given = (self.x, self.centres, self.factors, self.weight, self.bias)
        return [leaf for leaf in given if leaf is not None]

    def to(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value.detach().to(device).requires_grad_(value.requires_grad))

    def run(self, op, training: bool, slope: float) -> tuple[torch.Tensor, ...]:
        mean, var = self.running_mean.clone(), self.running_var.clone()
        out = op(
            self.x,
            mean,
            var,
            self.weight,
            self.bias,
            training,
            momentum=0.3,
            eps=1e-4,
            slope=slope,
            centres=self.centres,
            idx=self.idx,
            **({} if self.factors is None else {"factors": self.factors}),
        )
        slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return out.detach(), mean, var, *torch.autograd.grad(out, self.leaves(), slopes)


@compiled
@pytest.mark.parametrize("channels", [8, 16, 24, 64])
@pytest.mark.parametrize(("op", "twin", "kind"), CASES)
def test_kernel_equals_twin(op, twin, channels: int, kind: str) -> None:
    for seed, (training, slope) in enumerate(itertools.product((True, False), (0.0, 0.2))):
        case = Case(seed + channels, channels, kind, torch.float64)
        for got, expected in zip(case.run(op, training, slope), case.run(twin, training, slope), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [8, 40, 64])
@pytest.mark.parametrize(("op", "twin", "kind"), CASES)
def test_cuda_equals_twin(cuda, op, twin, channels: int, kind: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        for seed, (training, slope) in enumerate(itertools.product((True, False), (0.0, 0.2))):
            case = Case(seed + channels, channels, kind, torch.float64)
            expected = case.run(twin, training, slope)
            case.to(cuda)
            got = case.run(op, training, slope)
            for one, two in zip(got, expected, strict=True):
                torch.testing.assert_close(one.cpu(), two)
            if deterministic:
                for one, two in zip(got, case.run(op, training, slope), strict=True):
                    assert torch.equal(one, two)
    finally:
        torch.use_deterministic_algorithms(False)


@compiled
@pytest.mark.parametrize(("op", "twin", "kind"), CASES)
def test_float32_far_from_zero(op, twin, kind: str) -> None:
    case = Case(5, 32, kind, torch.float32, offset=100.0)
    wide = Case(5, 32, kind, torch.float32, offset=100.0)
    for name in ("x", "centres", "factors", "weight", "bias", "running_mean", "running_var"):
        value = getattr(wide, name)
        if value is not None:
            setattr(wide, name, value.detach().double().requires_grad_(value.requires_grad))
    for got, expected in zip(case.run(op, True, 0.2), wide.run(twin, True, 0.2), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("op", "twin", "kind"), CASES)
def test_gradcheck(op, twin, kind: str) -> None:
    case = Case(9, 8, kind, torch.float64)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        *edges, weight, bias = values
        given = dict(zip(("centres", "factors"), edges, strict=False))
        return op(x, None, None, weight, bias, True, slope=0.2, idx=case.idx, **given)

    assert torch.autograd.gradcheck(call, case.leaves())


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    case = Case(10, 8, kind, torch.float32)
    edges, affine = (case.x, case.centres, case.idx), (case.weight, case.bias)
    for statistics in ((None, None), (case.running_mean, case.running_var)):
        rest = (*affine, *statistics, 1e-5, 0.2)
        if kind != "scaled":
            torch.library.opcheck(torch.ops.pointcmt.norm_act, (*edges, *rest))
        torch.library.opcheck(torch.ops.pointcmt.norm_act_max, (*edges, case.factors, *rest))


@compiled
def test_compile_and_threads() -> None:
    case = Case(11, 16, "gathered", torch.float32)

    def call(x: torch.Tensor) -> torch.Tensor:
        rest = (case.weight, case.bias, True)
        first = norm_act_max(x, None, None, *rest, centres=case.centres, idx=case.idx)
        return first + norm_act(x[:, :7], None, None, *rest)

    expected = call(case.x)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(case.x), expected)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(case.x)
        torch.set_num_threads(3)
        assert torch.equal(one, call(case.x))
    finally:
        torch.set_num_threads(before)


def test_odd_channels_and_half_precision_run_too() -> None:
    x, weight, bias = torch.randn(6, 5, 7), torch.randn(7), torch.randn(7)
    expected = reference_norm_act_max(x, None, None, weight, bias, True)
    assert torch.equal(norm_act_max(x, None, None, weight, bias, True), expected)
    half = norm_act(torch.randn(6, 16).bfloat16(), None, None, torch.ones(16), torch.zeros(16), True)
    assert half.dtype == torch.bfloat16


W = torch.ones(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm_act(torch.ones(1, 8), None, None, W, W, True), "more than one row"),
        (lambda: norm_act(torch.ones(2, 7), None, None, W, W, True), r"\[7\]"),
        (lambda: norm_act(torch.ones(2, 8), W, None, W, W, True), "together"),
        (lambda: norm_act(torch.ones(1, 2, 8), None, None, W, W, True, centres=W), "together"),
        (lambda: norm_act_max(torch.ones(4, 8), None, None, W, W, True, slope=2.0), "slope"),
        (
            lambda: norm_act_max(torch.ones(1, 4, 8), None, None, W, W, True, factors=torch.ones(1, 4, 8)),
            "factors",
        ),
        (lambda: norm_act_max(torch.ones(8), None, None, W, W, True), "rows"),
        (
            lambda: norm_act_max(
                torch.ones(1, 4, 8),
                None,
                None,
                W,
                W,
                True,
                centres=torch.ones(1, 3, 8),
                idx=torch.ones(1, 2, 5, dtype=torch.int64),
            ),
            r"\[B, M, S\]",
        ),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@compiled
def test_an_index_out_of_range_is_an_error() -> None:
    idx = torch.full((1, 2, 3), 4)
    with pytest.raises(IndexError, match="4 points"):
        norm_act_max(torch.ones(1, 4, 8), None, None, W, W, True, centres=torch.ones(1, 2, 8), idx=idx)
