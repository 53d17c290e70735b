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

from benchmarks.exhaust import KINDS, case, judge
from pointcmt.ops import emd, emd_statistics, unit_cube
from pointcmt.ops._extension import compiled_ops
from pointcmt.ops.emd import DEFAULT_TOLERANCE, reference_emd

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
    distance, assignment, bound = op(x, y, return_certificate=True)
    assert is_permutation(assignment)
    best = optimum(x, y)
    assert (distance.double() >= best * (1 - 1e-6)).all()
    assert (bound.double() <= best).all()
    assert (distance - bound <= DEFAULT_TOLERANCE * distance).all()
    assert bound.dtype == distance.dtype and not bound.requires_grad
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
    tight, _ = emd(x, y, tolerance=0.001)
    assert (tight.double().mean() / best.mean() - 1).item() <= 0.0002


@needs_kernel
def test_hard_clouds_against_the_optimum():
    """The first cases of ``make exhaust``: all kinds, several sizes, units and tolerances of each."""
    for number in range(600):
        assert judge(case(number))[0] == [], f"python -m benchmarks.exhaust --case {number}"


def test_the_twin_on_hard_clouds():
    def twin(x, y, tolerance, max_rounds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(emd.__globals__, "use_compiled", lambda *_, **__: False)
            return emd_statistics(x, y, tolerance, max_rounds)

    for number in range(3 * len(KINDS)):
        assert judge(case(number, largest=40), twin)[0] == [], f"case {number}"


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_work_on_hard_clouds(kind):
    # ordinary clouds of this size take some 20 rounds
    x, y = (torch.from_numpy(c)[None].float() for c in KINDS[kind](np.random.default_rng(1), 700))
    _, _, statistics = emd_statistics(x, y)
    assert statistics.rounds <= 100 and not statistics.bound_met.any()


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(0, 2**40),
    largest=st.integers(1, 300),
)
def test_hunt_for_wrong_assignments(number, largest):
    assert judge(case(number, largest))[0] == []


@needs_kernel
def test_far_clusters_of_a_thousand_sides_and_a_cloud_of_the_same_points():
    random = np.random.default_rng(0)
    for kind in ("common outlier", "far clusters, equal", "same cloud, shuffled"):
        x, y = (torch.from_numpy(c)[None].float() for c in KINDS[kind](random, 512))
        distance, _, bound = emd(x, y, return_certificate=True)
        best = optimum(x, y)
        assert bound.double() <= best and distance.double() <= best * 1.0051 + 1e-12


@needs_kernel
def test_a_shuffled_cloud_costs_two_rounds_and_one_that_float32_cannot_tell_from_it_is_matched_in_float64():
    x, y = (torch.from_numpy(c)[None] for c in KINDS["same cloud, shuffled"](np.random.default_rng(0), 1024))
    distance, _, statistics = emd_statistics(x.float(), y.float())
    assert distance.item() == 0 and statistics.rounds <= 2
    near = y + 1e-12 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    distance, _, bound = emd(x, near, return_certificate=True)
    best = optimum(x, near)
    assert 0 < 0.994 * best < bound < best * (1 + 1e-12) and best * (1 - 1e-12) < distance < 1.0051 * best


@pytest.mark.parametrize("op", [emd, reference_emd])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cloud_and_itself(op, kind):
    x = torch.from_numpy(KINDS[kind](np.random.default_rng(4), 40)[0])[None].float()
    distance, assignment, bound = op(x, x, return_certificate=True)
    assert is_permutation(assignment)
    assert distance.item() == bound.item() == 0


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
    options = {"tolerance": 0.05} if op is reference_emd else {}
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
def test_opcheck(dtype):
    x, y = clouds(12, 2, 10, dtype=dtype)
    args = (x.requires_grad_(), y.requires_grad_(), 0.01, 100)
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


@needs_kernel
def test_the_bound_is_met_with_a_permutation_and_a_warning():
    from pointcmt.ops import emd as face
    from pointcmt.ops.emd import _warn_bound_met

    x, y = clouds(18, 2, 64)
    for rounds in (0, 1, 2):
        distance, assignment, statistics = emd_statistics(x, y, max_rounds=rounds)
        assert is_permutation(assignment)
        assert (statistics.bound_met == 1).all() and (statistics.bound <= distance).all()
        assert ((rounds <= statistics.rounds) & (statistics.rounds <= rounds + 3)).all()
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


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.rand(2, 5, 3), torch.rand(2, 6, 3), {}, "equally many"),
        (torch.rand(2, 5, 3), torch.rand(3, 5, 3), {}, "batch size"),
        (torch.rand(2, 3, 5), torch.rand(2, 3, 5), {}, r"\[B, N, 3\]"),
        (torch.rand(5, 3), torch.rand(5, 3), {}, r"\[B, N"),
        (torch.zeros(1, 5, 3).long(), torch.zeros(1, 5, 3).long(), {}, "floating"),
        (torch.rand(2, 0, 3), torch.rand(2, 0, 3), {}, "at least one point"),
        (
            torch.rand(1, 1, 3).expand(1, 2**24 + 1, 3),
            torch.rand(1, 1, 3).expand(1, 2**24 + 1, 3),
            {},
            "most",
        ),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"tolerance": 0.0}, "tolerance"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"tolerance": 1.5}, "tolerance"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"tolerance": float("nan")}, "tolerance"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3), {"max_rounds": -1}, "max_rounds"),
        (torch.rand(1, 5, 3), torch.rand(1, 5, 3, device="meta"), {}, "device|is on"),
    ],
)
def test_misuse_is_explained(x, y, options, message):
    for op in (emd, reference_emd):
        with pytest.raises(ValueError, match=message):
            op(x, y, **options)


@needs_kernel
def test_the_operator_checks_its_arguments_itself():
    x, y = clouds(22, 1, 4)
    for arguments in (
        (x, y[:, :3], 0.01, 9),
        (x[0], y[0], 0.01, 9),
        (x, y.double(), 0.01, 9),
        (x, y, 0.0, 9),
    ):
        with pytest.raises(ValueError, match="emd"):
            torch.ops.pointcmt.emd(*arguments)
    with pytest.raises(ValueError, match="max_rounds"):
        torch.ops.pointcmt.emd(x, y, 0.01, -1)
    # a product of sizes beyond 2^63 is no bound at all
    assert not emd_statistics(x, y, max_rounds=2**62)[2].bound_met.any()
