"""The CUDA EMD against the exact optimum, the CPU kernel and its own contract."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pointcmt.ops import check_deferred, emd, emd_statistics
from pointcmt.ops._extension import compiled_ops
from pointcmt.ops.emd import DEFAULT_TOLERANCE

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def kernel(cuda: torch.device) -> torch.device:
    if "emd" not in compiled_ops("cuda"):
        pytest.skip("pointcmt._C was built without its CUDA kernels")
    return cuda


def clouds(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.rand(2, *shape, 3, generator=torch.Generator().manual_seed(seed)).cuda().unbind(0)
    return x, y


def optimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    costs = torch.cdist(x.double().cpu(), y.double().cpu(), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.tensor([c[linear_sum_assignment(c)].mean() for c in costs.numpy()], dtype=torch.float64)


def check(x: torch.Tensor, y: torch.Tensor, distance: torch.Tensor, assignment: torch.Tensor) -> None:
    n = x.shape[1]
    assert assignment.dtype == torch.int64
    assert torch.equal(assignment.sort(1).values.cpu(), torch.arange(n).expand(len(x), -1))
    matched = (x - y.gather(1, assignment[..., None].expand(-1, -1, 3))).norm(dim=-1).mean(1)
    torch.testing.assert_close(distance, matched, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 31, 64, 65, 500, 1024, 2048])
def test_near_the_optimum(n):
    x, y = clouds(n, 3, n)
    distance, assignment = emd(x, y)
    check(x, y, distance, assignment)
    assert (distance.double().cpu() <= optimum(x, y) / (1 - DEFAULT_TOLERANCE)).all()


@pytest.mark.parametrize("n", [4096, 5000, 8192, 20_000])
def test_every_place_for_the_arrays(n):
    # all in shared memory, the points bid for alone, and nothing of it
    x, y = clouds(n, 2, n)
    distance, assignment, statistics = emd_statistics(x, y, tolerance=0.01)
    check(x, y, distance, assignment)
    assert not statistics.bound_met.any() and (distance - statistics.bound <= 0.01 * distance).all()
    expected, _ = emd(x.cpu(), y.cpu(), tolerance=0.01)
    torch.testing.assert_close(distance.cpu(), expected, rtol=0.01, atol=0)


def test_float64_and_half_precision():
    x, y = clouds(1, 2, 100)
    distance, assignment = emd(x.double(), y.double())
    assert distance.dtype == torch.float64
    check(x.double(), y.double(), distance, assignment)
    for dtype in (torch.float16, torch.bfloat16):
        assert emd(x.to(dtype), y.to(dtype))[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["identical", "duplicates", "collinear", "huge", "tiny"])
def test_degenerate_clouds(kind):
    x, y = clouds(2, 2, 300)
    if kind == "identical":
        x, y = torch.full_like(x, 0.4), torch.full_like(y, 0.4)
    elif kind == "duplicates":
        x, y = (x * 3).round(), (y * 3).round()
    elif kind == "collinear":
        x, y = x[..., :1].repeat(1, 1, 3), y[..., :1].repeat(1, 1, 3)
    unit = {"huge": 1e30, "tiny": 1e-30}.get(kind, 1.0)
    distance, assignment, statistics = emd_statistics(x * unit, y * unit)
    assert not statistics.bound_met.any()
    check(x, y, distance.double().div(unit).float(), assignment)
    assert (distance.double().cpu() / unit <= optimum(x, y) / (1 - DEFAULT_TOLERANCE) + 1e-6).all()


def test_same_result_every_time():
    x, y = clouds(3, 8, 1024)
    first = emd_statistics(x, y)
    for _ in range(5):
        again = emd_statistics(x, y)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert torch.equal(first[2].rounds, again[2].rounds)


def test_no_synchronisation_with_the_host():
    x, y = clouds(4, 4, 256)
    x.requires_grad_()
    emd(x, y)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        emd(x, y)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_a_cuda_graph():
    x, y = clouds(5, 4, 256)
    emd(x, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        distance, assignment = emd(x, y)
    other, _ = clouds(6, 4, 256)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    check(x, y, distance, assignment)


def test_gradients_match_the_cpu():
    x, y = clouds(7, 3, 200)
    grads = []
    for device in ("cuda", "cpu"):
        a, b = x.double().to(device).requires_grad_(), y.double().to(device).requires_grad_()
        emd(a, b, tolerance=1e-4)[0].sum().backward()
        assert a.grad is not None and b.grad is not None
        grads.append((a.grad.cpu(), b.grad.cpu()))
    same = (grads[0][0] - grads[1][0]).abs().amax(-1) < 1e-9
    assert same.double().mean() > 0.98, "nearly all matches are those of the optimum"
    a, b = clouds(8, 2, 8)
    torch.use_deterministic_algorithms(True)
    try:
        a, b = a.double().requires_grad_(), b.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda u, v: emd(u, v)[0], (a, b))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_nan_in_their_pair_alone(bad):
    x, y = clouds(9, 3, 128)
    y[1, 5, 0] = bad
    distance, assignment = emd(x, y)
    assert distance.isnan().tolist() == [False, True, False]
    assert torch.equal(assignment.sort(1).values.cpu(), torch.arange(128).expand(3, -1))
    with pytest.raises(ValueError, match="in 1 pairs"):  # heard of later
        check_deferred()


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_the_bound_ends_in_a_permutation(rounds):
    x, y = clouds(10, 3, 700)
    for a in (x, torch.full_like(x, 0.5)):
        distance, assignment, statistics = emd_statistics(a, y, max_rounds=rounds)
        check(a, y, distance, assignment)
        assert (statistics.bound_met == 1).all()


def test_under_compile():
    x, y = clouds(12, 2, 128)
    compiled = torch.compile(lambda a, b: emd(a, b)[0].sum(), fullgraph=True)
    torch.testing.assert_close(compiled(x, y), emd(x, y)[0].sum())


def test_opcheck():
    x, y = clouds(13, 2, 16)
    torch.library.opcheck(torch.ops.pointcmt.emd.default, (x.requires_grad_(), y.requires_grad_(), 0.01, 100))
