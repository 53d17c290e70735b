"""Normalisation, activation and maximum over edges: equal to PyTorch's own, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from pointcmt.ops._extension import has_cpu_kernels
from pointcmt.ops.edges import norm_act_max, reference_norm_act_max

compiled = pytest.mark.skipif(not has_cpu_kernels(), reason="the CPU kernels are not compiled")
KINDS = ["dense", "gathered"]  # rows; points[idx] + centres


class Case:
    """Leaves of one comparison: rows of some kind, weights of both signs, running statistics."""

    def __init__(self, seed: int, channels: int, kind: str, dtype: torch.dtype, offset: float = 0.0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        batch, n, m, samples = 3, 11, 7, 5
        self.centres = self.idx = None
        if kind != "dense":
            self.x = randn(batch, n, channels) + offset
            self.centres = randn(batch, m, channels)
            self.idx = torch.randint(0, n, (batch, m, samples), generator=generator)
            self.idx[..., 2:] = self.idx[..., :1]  # padded groups, as a ball query makes them
        else:
            self.x = randn(batch, m, samples, channels) + offset
        self.weight, self.bias = randn(channels), randn(channels)
        self.running_mean, self.running_var = randn(channels), randn(channels).square() + 0.1
        for leaf in self.leaves():
            leaf.requires_grad_()

    def leaves(self) -> list[torch.Tensor]:
        given = (self.x, self.centres, self.weight, self.bias)
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
        )
        slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return out.detach(), mean, var, *torch.autograd.grad(out, self.leaves(), slopes)


@compiled
@pytest.mark.parametrize("channels", [8, 16, 24, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_twin(channels: int, kind: str) -> None:
    for seed, (training, slope) in enumerate(itertools.product((True, False), (0.0, 0.2))):
        case = Case(seed + channels, channels, kind, torch.float64)
        for got, expected in zip(
            case.run(norm_act_max, training, slope),
            case.run(reference_norm_act_max, training, slope),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [8, 40, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_twin(cuda, channels: int, kind: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        for seed, (training, slope) in enumerate(itertools.product((True, False), (0.0, 0.2))):
            case = Case(seed + channels, channels, kind, torch.float64)
            expected = case.run(reference_norm_act_max, training, slope)
            case.to(cuda)
            got = case.run(norm_act_max, training, slope)
            for one, two in zip(got, expected, strict=True):
                torch.testing.assert_close(one.cpu(), two)
            if deterministic:
                for one, two in zip(got, case.run(norm_act_max, training, slope), strict=True):
                    assert torch.equal(one, two)
    finally:
        torch.use_deterministic_algorithms(False)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_float32_far_from_zero(kind: str) -> None:
    case = Case(5, 32, kind, torch.float32, offset=100.0)
    wide = Case(5, 32, kind, torch.float32, offset=100.0)
    for name in ("x", "centres", "weight", "bias", "running_mean", "running_var"):
        value = getattr(wide, name)
        if value is not None:
            setattr(wide, name, value.detach().double().requires_grad_(value.requires_grad))
    for got, expected in zip(
        case.run(norm_act_max, True, 0.2), wide.run(reference_norm_act_max, True, 0.2), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    case = Case(9, 8, kind, torch.float64)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        *centres, weight, bias = values
        given = {"centres": centres[0], "idx": case.idx} if centres else {}
        return norm_act_max(x, None, None, weight, bias, True, slope=0.2, **given)

    assert torch.autograd.gradcheck(call, case.leaves())


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    case = Case(10, 8, kind, torch.float32)
    edges, affine = (case.x, case.centres, case.idx), (case.weight, case.bias)
    for statistics in ((None, None), (case.running_mean, case.running_var)):
        rest = (*affine, *statistics, 1e-5, 0.2)
        torch.library.opcheck(torch.ops.pointcmt.norm_act_max, (*edges, *rest))


@compiled
def test_compile_and_threads() -> None:
    case = Case(11, 16, "gathered", torch.float32)

    def call(x: torch.Tensor) -> torch.Tensor:
        rest = (case.weight, case.bias, True)
        first = norm_act_max(x, None, None, *rest, centres=case.centres, idx=case.idx)
        return first + norm_act_max(x[:, :7, None], None, None, *rest)

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
    half = norm_act_max(torch.randn(6, 5, 16).bfloat16(), None, None, torch.ones(16), torch.zeros(16), True)
    assert half.dtype == torch.bfloat16


W = torch.ones(8)
DENSE = {"x": torch.ones(2, 4, 8), "running_mean": None, "running_var": None, "weight": W, "bias": W}
EDGES = DENSE | {"centres": torch.ones(2, 3, 8), "idx": torch.ones(2, 3, 5, dtype=torch.int64)}
LONG, DOUBLE, META = torch.ones(9), W.double(), W.to("meta")
WRONG = [
    (DENSE | {"x": torch.ones(1, 1, 8)}, "more than one row"),
    (DENSE | {"x": torch.ones(2, 4, 7)}, r"weight must be \[7\]"),
    (DENSE | {"x": W}, "floating rows"),
    (DENSE | {"x": torch.ones(2, 4, 8, dtype=torch.int64)}, "floating rows"),
    (DENSE | {"slope": 2.0}, "slope"),
    (DENSE | {"running_mean": W}, "running_mean and running_var come together"),
    (DENSE | {"centres": W}, "centres and idx come together"),
    (EDGES | {"centres": torch.ones(2, 2, 8)}, r"\[B, M, S\]"),
    (EDGES | {"centres": torch.ones(2, 3, 8).double()}, "centres must be of x's dtype"),
    (EDGES | {"centres": torch.ones(2, 3, 8, device="meta")}, "centres and idx must be on x's device"),
    (EDGES | {"idx": torch.ones(1, 3, 5, dtype=torch.int64)}, r"\[B, M, S\]"),
    (EDGES | {"idx": torch.ones(2, 3, 5)}, "int32 or int64"),
    *[(DENSE | {"weight": bad}, "weight must be") for bad in (LONG, DOUBLE, META)],
    *[(DENSE | {"bias": bad}, "bias must be") for bad in (LONG, DOUBLE, META)],
    *[
        (DENSE | {"running_mean": W, "running_var": bad}, "running_var must be")
        for bad in (W[:4], LONG, DOUBLE, META)
    ],
    *[(DENSE | {"running_mean": bad, "running_var": W}, "running_mean must be") for bad in (W[:4], LONG)],
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_errors(arguments: dict, message: str, training: bool) -> None:
    if message.startswith("more than one"):
        training = True
    with pytest.raises(ValueError, match=message):
        norm_act_max(**arguments, training=training)


@pytest.mark.parametrize("index", [-1, 4])
@pytest.mark.parametrize("op", [pytest.param(norm_act_max, marks=compiled), reference_norm_act_max])
def test_an_index_out_of_range_is_an_error(op, index: int) -> None:
    """In the middle of a batch too, where it would name a point of the neighbouring cloud."""
    idx = EDGES["idx"].clone()
    idx[int(index < 0), 0, 0] = index
    with pytest.raises(IndexError, match="4 points"):
        op(**EDGES | {"idx": idx}, training=True)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_out_of_range_is_an_error_where_the_twin_serves(index: int) -> None:
    idx = torch.full((2, 3, 5), index)
    given = {"x": torch.ones(2, 4, 7), "centres": torch.ones(2, 3, 7), "weight": W[:7], "bias": W[:7]}
    with pytest.raises(IndexError, match="4 points"):
        norm_act_max(**EDGES | given | {"idx": idx}, training=False)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_the_raw_operators_check_their_arguments(kind: str) -> None:
    """They are public names too: what autograd passes to the backward operator anybody can."""
    case = Case(12, 8, kind, torch.float32)
    rows = (case.x.detach(), case.centres, case.idx)
    affine = (case.weight.detach(), case.bias.detach())
    forward, backward = torch.ops.pointcmt.norm_act_max, torch.ops.pointcmt.norm_act_max_backward
    with torch.no_grad():
        out, *saved = forward(*rows, *affine, None, None, 1e-5, 0.2)
        backward(out, *rows, *affine, *saved, 1e-5, 0.2, True)
        for short in (W[:4], LONG, DOUBLE):
            with pytest.raises(ValueError, match="variance must be"):
                forward(*rows, *affine, W, short, 1e-5, 0.2)
            with pytest.raises(ValueError, match="variance must be"):
                backward(out, *rows, *affine, *saved[:-1], short, 1e-5, 0.2, True)
        for position, name in enumerate(("chosen", "which", "total")[: 2 + (kind == "gathered")]):
            for bad in (saved[position][:1], saved[position].double()):
                given = [*saved[:position], bad, *saved[position + 1 :]]
                with pytest.raises(ValueError, match=f"{name} must be"):
                    backward(out, *rows, *affine, *given, 1e-5, 0.2, True)
        with pytest.raises(ValueError, match="grad must be"):
            backward(out[:1], *rows, *affine, *saved, 1e-5, 0.2, True)
        for wrong in (-1, 5):
            which = torch.full_like(saved[1], wrong)
            with pytest.raises(IndexError, match="5 samples"):
                backward(out, *rows, *affine, saved[0], which, *saved[2:], 1e-5, 0.2, True)
