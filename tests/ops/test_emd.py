"""emd: what its users rely on, held against the exact optimum."""

from __future__ import annotations

import warnings

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from pointcmt.ops import emd, emd_statistics, unit_cube
from pointcmt.ops._extension import compiled_ops
from pointcmt.ops.emd import DEFAULT_EPS, reference_emd

needs_kernel = pytest.mark.skipif(
    "emd" not in compiled_ops("cpu"), reason="pointcmt._C was not built; see `pointcmt doctor`"
)


def clouds(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, *shape, 3, generator=generator, dtype=torch.float64).to(dtype).unbind(0)
    return x, y


def optimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Exact mean distance [B], float64."""
    costs = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return torch.tensor([c[linear_sum_assignment(c)].mean() for c in costs], dtype=torch.float64)


def matched_distance(x: torch.Tensor, y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    return (x - y.gather(1, assignment[..., None].expand(-1, -1, 3))).norm(dim=-1).mean(1)


def is_permutation(assignment: torch.Tensor) -> bool:
    n = assignment.shape[1]
    return assignment.dtype == torch.int64 and bool((assignment.sort(1).values == torch.arange(n)).all())


@pytest.mark.parametrize("op", [emd, reference_emd])
@pytest.mark.parametrize("n", [1, 2, 9, 130])
def test_near_the_optimum(op, n):
    x, y = clouds(n, 4, n)
    distance, assignment = op(x, y)
    assert is_permutation(assignment)
    best = optimum(x, y)
    assert (distance.double() >= best * (1 - 1e-6)).all()
    assert (distance.double() <= best + DEFAULT_EPS).all()
    torch.testing.assert_close(distance, matched_distance(x, y, assignment))


def real_pairs(root, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    name = (root / "test_files.txt").read_text().split()[0].rsplit("/", 1)[-1]
    with h5py.File(root / name) as file:
        data = file["data"]
        chosen = np.random.default_rng(11).choice(len(data), 2 * count, replace=False)
        shapes = torch.from_numpy(np.stack([data[i] for i in chosen]))
    x, y = unit_cube(shapes).chunk(2)
    return x, y


@needs_kernel
def test_gap_on_modelnet40_at_the_default_setting(modelnet40_root):
    x, y = real_pairs(modelnet40_root, 12)
    distance, assignment = emd(x, y)
    best = optimum(x, y)
    assert is_permutation(assignment)
    assert (distance.double().mean() / best.mean() - 1).item() <= 0.002
    tight, _ = emd(x, y, eps=2e-4)
    assert (tight.double().mean() / best.mean() - 1).item() <= 0.0002


CLOUD_KINDS = ["random", "clusters", "duplicates", "collinear", "lattice", "identical", "far"]


def strange_cloud(kind: str, n: int, random: np.random.Generator) -> np.ndarray:
    if kind == "clusters":
        return random.integers(0, 4, (n, 1)) * 3.0 + 1e-4 * random.standard_normal((n, 3))
    if kind == "duplicates":
        return random.random((1 + n // 7, 3))[random.integers(0, 1 + n // 7, n)]
    if kind == "collinear":
        return random.random((n, 1)) * np.array([1.0, -2.0, 0.5])
    if kind == "lattice":
        return random.integers(0, 5, (n, 3)) / 8
    if kind == "identical":
        return np.full((n, 3), 0.7)
    if kind == "far":
        return random.random((n, 3)) + 300 * random.integers(0, 2)
    return random.random((n, 3))


@needs_kernel
@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 500),
    kinds=st.tuples(st.sampled_from(CLOUD_KINDS), st.sampled_from(CLOUD_KINDS)),
    exponent=st.sampled_from([-30, -3, 0, 4, 30]),
    double=st.booleans(),
    eps=st.sampled_from([DEFAULT_EPS, 0.0003, 0.05]),
    start=st.sampled_from(["cold", "random", "partial", "optimal"]),
    seed=st.integers(0, 2**31),
)
def test_hunt_for_wrong_assignments(n, kinds, exponent, double, eps, start, seed):
    random = np.random.default_rng(seed)
    pair = np.stack([strange_cloud(kind, n, random) for kind in kinds])
    scaled = torch.from_numpy(pair * 10.0**exponent)
    x, y = (scaled if double else scaled.float()).unsqueeze(1).unbind(0)
    initial = None if start == "cold" else torch.from_numpy(random.permutation(n))[None]
    if start == "partial":
        initial = torch.where(torch.from_numpy(random.random((1, n)) < 0.5), initial, -1)
    if start == "optimal":
        initial = emd(x, y, eps=1e-4)[1]
    distance, assignment = emd(x, y, eps=eps, initial=initial)
    assert is_permutation(assignment)
    x, y = x.double() / 10.0**exponent, y.double() / 10.0**exponent  # so that the check does not overflow
    distance = distance.double() / 10.0**exponent
    best = optimum(x, y)
    scale = torch.stack([x, y]).aminmax(dim=2)
    side = (scale.max - scale.min).amax()
    reach = torch.cat([x, y], 1).aminmax(dim=1)
    rounding = 1e-6 * (reach.max - reach.min).amax()
    assert best - rounding <= distance <= best + eps * side + rounding
    torch.testing.assert_close(distance, matched_distance(x, y, assignment), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", [emd, reference_emd])
@pytest.mark.parametrize("kind", CLOUD_KINDS)
def test_degenerate_clouds(op, kind):
    random = np.random.default_rng(4)
    x = torch.from_numpy(strange_cloud(kind, 40, random))[None].float()
    distance, assignment = op(x, x)
    assert is_permutation(assignment)
    span = x.amax() - x.amin()
    assert 0 <= distance.item() <= DEFAULT_EPS * max(span.item(), 1e-6)


@pytest.mark.parametrize("op", [emd, reference_emd])
def test_an_empty_batch(op):
    distance, assignment = op(torch.rand(0, 5, 3), torch.rand(0, 5, 3))
    assert distance.shape == (0,) and assignment.shape == (0, 5) and assignment.dtype == torch.int64


@pytest.mark.parametrize("op", [emd, reference_emd])
def test_gradients_by_finite_differences(op):
    # every difference runs the auction anew, and the twin takes its time
    x, y = clouds(6, 2, 5, dtype=torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    options = {"eps": 0.05} if op is reference_emd else {}
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, **options)[0], (x, y))
    if op is emd:
        assert torch.autograd.gradgradcheck(lambda a, b: op(a, b)[0], (x, y))


@pytest.mark.parametrize("op", [emd, reference_emd])
def test_coinciding_points_have_gradient_zero(op):
    x, _ = clouds(7, 2, 20)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    op(first, second)[0].sum().backward()
    assert first.grad is not None and torch.equal(first.grad, torch.zeros_like(x))
    assert second.grad is not None and torch.equal(second.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y = clouds(8, 2, 60, dtype=dtype)
    x.requires_grad_()
    distance, assignment = emd(x, y)
    assert distance.dtype == torch.float32
    expected, same = emd(x.detach().float(), y.float())
    assert torch.equal(distance, expected) and torch.equal(assignment, same)
    distance.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


def test_dtypes_are_promoted():
    x, y = clouds(9, 1, 10, dtype=torch.float64)
    assert emd(x, y.float())[0].dtype == torch.float64


def test_gradient_survives_any_scale():
    for exponent in (-35, 35):
        x, y = (c * 10.0**exponent for c in clouds(10, 1, 16))
        x.requires_grad_()
        distance, _ = emd(x, y)
        distance.sum().backward()
        assert distance.isfinite().all() and distance.item() > 0
        torch.testing.assert_close(x.grad.norm(dim=-1), torch.full((1, 16), 1 / 16))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("warm", [False, True])
def test_opcheck(dtype, warm):
    x, y = clouds(12, 2, 10, dtype=dtype)
    initial = torch.arange(10).expand(2, -1).contiguous() if warm else None
    args = (x.requires_grad_(), y.requires_grad_(), 0.01, 100, initial)
    torch.library.opcheck(torch.ops.pointcmt.emd.default, args)


@needs_kernel
def test_under_compile_autocast_and_deterministic_mode():
    x, y = clouds(13, 2, 50)
    plain = x.clone().requires_grad_()
    emd(plain, y)[0].sum().backward()

    compiled = torch.compile(lambda a, b: emd(a, b)[0].sum(), fullgraph=True, backend="aot_eager")
    traced = x.clone().requires_grad_()
    compiled(traced, y).backward()
    torch.testing.assert_close(traced.grad, plain.grad)

    torch.use_deterministic_algorithms(True)
    try:
        cast = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            distance, _ = emd(cast, y)
        distance.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(cast.grad, plain.grad)


def test_the_twin_is_one_operator_of_a_compiled_graph():
    x, y = clouds(13, 2, 20)
    plain = x.clone().requires_grad_()
    reference_emd(plain, y)[0].sum().backward()
    compiled = torch.compile(lambda a, b: reference_emd(a, b)[0].sum(), fullgraph=True, backend="aot_eager")
    traced = x.clone().requires_grad_()
    compiled(traced, y).backward()
    torch.testing.assert_close(traced.grad, plain.grad)


@needs_kernel
def test_same_result_on_any_number_of_threads():
    x, y = clouds(14, 6, 80)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = emd(x, y)
        torch.set_num_threads(2)
        two = emd(x, y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("op", [emd, reference_emd])
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.05, 0.5])
def test_warm_start_is_never_worse_than_what_it_was_given(op, noise):
    n = 90 if op is emd else 30
    x, _ = clouds(15, 3, n)
    y = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    identity = torch.arange(n).expand(3, -1)
    best = optimum(x, y)
    for initial in (identity, emd(x, y)[1], identity.roll(n // 2, 1), torch.full((3, n), -1)):
        distance, assignment = op(x, y, initial=initial)
        assert is_permutation(assignment)
        if (initial >= 0).all():
            assert (distance <= matched_distance(x, y, initial) * (1 + 1e-6)).all()
        side = (torch.cat([x, y], 1).amax(1) - torch.cat([x, y], 1).amin(1)).amax()
        assert (distance.double() <= best + DEFAULT_EPS * side).all()


@needs_kernel
def test_warm_start_saves_bids():
    x, _ = clouds(16, 4, 500)
    y = x + 0.003 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    identity = torch.arange(500).expand(4, -1)
    cold = emd_statistics(x, y)[2].bids.sum()
    warm = emd_statistics(x, y, initial=identity)[2].bids.sum()
    assert warm < cold / 4
    unrelated = clouds(17, 4, 500)[0]
    cold = emd_statistics(x, unrelated)[2].bids.sum()
    poor = emd_statistics(x, unrelated, initial=identity)[2].bids.sum()
    assert poor < cold * 1.5, "a poor start must not cost much more than none"


@needs_kernel
def test_the_bound_is_met_with_a_permutation_and_a_warning():
    from pointcmt.ops import emd as face
    from pointcmt.ops.emd import _warn_bound_met

    x, y = clouds(18, 2, 64)
    for rounds in (0, 1, 2):
        _, assignment, statistics = emd_statistics(x, y, max_rounds=rounds)
        assert is_permutation(assignment)
        assert (statistics.bound_met == 1).all() and (statistics.rounds == rounds).all()
        if rounds == 0:
            assert (statistics.completed == 64).all()
    _warn_bound_met.cache_clear()
    with pytest.warns(RuntimeWarning, match="max_rounds=1"):
        face(x, y, max_rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        face(x, y, max_rounds=1)  # once per process
        face(x, y)


def test_the_twin_meets_its_bound_too():
    x, y = clouds(19, 2, 40)
    for rounds in (0, 1, 3):
        _, assignment = reference_emd(x, y, max_rounds=rounds)
        assert is_permutation(assignment)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", [emd, reference_emd])
def test_values_that_are_not_finite_are_an_error(op, bad):
    x, _ = clouds(20, 2, 8)
    broken = x.clone()
    broken[1, 3, 2] = bad
    for pair in ((broken, x), (x, broken)):
        with pytest.raises(ValueError, match="finite"):
            op(*pair)


@pytest.mark.parametrize("op", [emd, reference_emd])
def test_wrong_starts_are_an_error(op):
    x, y = clouds(21, 1, 4)
    for row in ([0, 1, 2, 4], [0, 1, 1, 2], [0, 1, -2, 3]):
        with pytest.raises(ValueError, match="permutation"):
            op(x, y, initial=torch.tensor([row]))


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.rand(2, 5, 3), torch.rand(2, 6, 3), {}, "equally many"),
        (torch.rand(2, 5, 3), torch.rand(3, 5, 3), {}, "batch size"),
        (torch.rand(2, 3, 5), torch.rand(2, 3, 5), {}, r"\[B, N, 3\]"),
        (torch.rand(5, 3), torch.rand(5, 3), {}, r"\[B, N"),
        (torch.zeros(1, 5, 3).long(), torch.zeros(1, 5, 3).long(), {}, "floating"),
        (torch.rand(2, 0, 3), torch.rand(2, 0, 3), {}, "at least one point"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"eps": 0.0}, "eps"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"eps": float("nan")}, "eps"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"max_rounds": -1}, "max_rounds"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"initial": torch.arange(5)}, "initial"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"initial": torch.rand(1, 5)}, "initial"),
    ],
)
def test_misuse_is_explained(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        emd(x, y, **options)
