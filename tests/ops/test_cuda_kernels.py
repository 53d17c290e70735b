"""The CUDA kernels and the code that launches them, without a GPU: every block and thread runs on the CPU.

For as long as this module runs, the operators' CPU kernels are replaced by the CUDA ones, so that the tests
of the CPU kernels, gathered here, put the same questions to them: through the same Python, against the same
twins. What this cannot show is what only hardware has: its memory model, its limits and its speed. For that
there are the tests marked ``cuda``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pointcmt import students
from pointcmt.ops import (
    ball_query,
    emd,
    emd_statistics,
    furthest_point_sample,
    gather_points,
    group_points,
    group_relative,
    knn,
    three_interpolate,
)
from pointcmt.ops._extension import COMPILED_OPS, has_cpu_kernels
from pointcmt.ops.emd import DEFAULT_TOLERANCE
from pointcmt.ops.grouping import (
    reference_gather_points,
    reference_group_points,
    reference_three_interpolate,
)
from pointcmt.ops.neighbors import reference_ball_query, reference_knn, reference_three_nn
from pointcmt.ops.sampling import reference_furthest_point_sample
from tests.ops.clouds import hard_clouds, modelnet_clouds
from tests.ops.test_edges import (  # noqa: F401
    test_float32_far_from_zero,
    test_kernel_equals_twin,
)
from tests.ops.test_grouping import (  # noqa: F401
    test_deterministic_mode_gives_the_same_bits_each_time,
    test_group_relative_gradcheck,
    test_group_relative_is_its_parts,
)
from tests.ops.test_neighbors import (  # noqa: F401
    test_ball_query_and_three_nn_with_lengths,
    test_knn_with_lengths_is_knn_of_each_cloud,
)
from tests.ops.test_sampling import (  # noqa: F401
    test_voxel_kernel_equals_twin,
    test_with_lengths_each_row_is_that_of_its_cloud,
)

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="the operators are not compiled")


@pytest.fixture(scope="module", autouse=True)
def cuda_kernels_instead(cuda_on_cpu) -> Iterator[None]:
    library = torch.library.Library("pointcmt", "IMPL")
    for name in sorted(COMPILED_OPS):  # a new operator needs a CUDA kernel
        library.impl(name, getattr(cuda_on_cpu, name).default, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


SCATTERING = (
    "test_kernel_equals_twin",
    "test_float32_far_from_zero",
    "test_group_relative",
    "test_gathering",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where sums are scattered, kernels have two ways: atomics, and sorted lists."""
    both = metafunc.function.__name__.startswith(SCATTERING)
    metafunc.parametrize(
        "deterministic",
        [False, True] if both else [False],
        ids=["atomics", "deterministic"] if both else ["-"],
        indirect=True,
    )


def test_the_kernels_are_replaced() -> None:
    idx = torch.tensor([[[0, 5]]])
    with pytest.raises(RuntimeError, match="device-side assertion"):
        group_points(torch.zeros(1, 2, 5), idx)


# n below, at and above what a thread holds, a warp searches and shared memory keeps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 5, 33, 130, 300])
def test_neighbours_and_samples(n: int, dtype: torch.dtype) -> None:
    ops = torch.ops.pointcmt
    for name, cloud in hard_clouds(n, 2, n, dtype).items():
        queries = cloud[:, : min(n, 21)]
        for radius, nsample in ((0.5, 1), (0.7, 32), (1e-4, 5), (1e3, 9)):
            expected = reference_ball_query(radius, nsample, cloud, queries)
            assert torch.equal(ops.ball_query(radius, nsample, cloud, queries), expected), name
        for k in {min(n, k) for k in (1, 20, 33, 64, 100)}:
            for got, expected in zip(
                ops.knn(queries, cloud, k), reference_knn(queries, cloud, k), strict=True
            ):
                assert torch.equal(got, expected), (name, k)
        (distance, idx), (expected, nearest) = (
            ops.three_nn(queries, cloud),
            reference_three_nn(queries, cloud),
        )
        assert torch.equal(idx, nearest), name
        torch.testing.assert_close(distance, expected)
        npoint = min(n, 40)
        sampled = reference_furthest_point_sample(cloud, npoint)
        assert torch.equal(ops.furthest_point_sample(cloud, npoint), sampled), name


@pytest.mark.parametrize("dims", [1, 4, 5, 31, 64])
def test_neighbours_in_feature_space(dims: int) -> None:
    points = torch.randn(2, 70, dims, generator=torch.Generator().manual_seed(dims))
    points[:, 40:] = points[:, :30].round()
    points[0, 7, 0] = float("nan")
    for k in (1, 20, 50):
        for got, expected in zip(
            knn(points[:, :35], points, k), reference_knn(points[:, :35], points, k), strict=True
        ):
            assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1)), k


@pytest.mark.parametrize("n", [600, 5000, 9000])  # four or eight points per thread, or none; cached or not
def test_sampling_of_large_clouds(n: int) -> None:
    cloud = torch.randint(-9, 10, (1, n, 3), generator=torch.Generator().manual_seed(n)).float() / 8
    assert torch.equal(furthest_point_sample(cloud, 9), reference_furthest_point_sample(cloud, 9))


def test_lengths_where_distances_are_sorted() -> None:
    points, lengths = torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(5)), torch.tensor([90, 4])
    for k in (40, 70):  # a list in registers; sorting
        for got, expected in zip(
            knn(points[:, :9], points, k, lengths),
            reference_knn(points[:, :9], points, k, lengths),
            strict=True,
        ):
            assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="device-side assertion"):
        torch.ops.pointcmt.ball_query(0.1, 2, points, points, torch.tensor([91, 4]))


def test_on_modelnet40(modelnet40_root: Path) -> None:
    clouds = modelnet_clouds(modelnet40_root, 1, seed=3)[:, :512]
    sampled = furthest_point_sample(clouds, 32)
    assert torch.equal(sampled, reference_furthest_point_sample(clouds, 32))
    centres = clouds[:, sampled[0]]
    expected = reference_ball_query(0.2, 32, clouds, centres)
    assert torch.equal(ball_query(0.2, 32, clouds, centres), expected)
    for got, wanted in zip(knn(centres, clouds, 20), reference_knn(centres, clouds, 20), strict=True):
        assert torch.equal(got, wanted)


# a little shared memory, more, and all there is: where the arrays of a pair are
@pytest.mark.parametrize("shared", [1 << 10, 8 << 10, 227 << 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_emd_in_every_place(cuda_on_cpu, shared: int, dtype: torch.dtype) -> None:
    x, y = torch.rand(2, 3, 200, 3, generator=torch.Generator().manual_seed(shared), dtype=dtype)
    cuda_on_cpu.shared_memory_per_block(shared + 4096)
    try:
        distance, assignment, statistics = emd_statistics(x, y)
    finally:
        cuda_on_cpu.shared_memory_per_block(227 << 10)
    costs = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    best = [cost[linear_sum_assignment(cost)].mean() for cost in costs.numpy()]
    matched = costs.gather(2, assignment[..., None])[..., 0].mean(1)
    assert torch.equal(assignment.sort(1).values, torch.arange(200).expand(3, -1))
    torch.testing.assert_close(distance.double(), matched, rtol=1e-5, atol=0)
    assert (statistics.bound <= torch.tensor(best)).all()
    assert (distance - statistics.bound <= DEFAULT_TOLERANCE * distance).all()
    assert not statistics.bound_met.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_gathering_and_scattering(cuda_on_cpu, dtype: torch.dtype, index: torch.dtype) -> None:
    random = torch.Generator().manual_seed(4)
    for channels, n, m, s in ((1, 1, 1, 1), (7, 33, 20, 3), (5, 40, 90, 9)):
        features = torch.randn(3, channels, n, generator=random).to(dtype).requires_grad_()
        idx = torch.randint(0, n, (3, m, s), generator=random, dtype=index)
        weight = torch.rand(3, m, 3, generator=random).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        three = torch.randint(0, n, (3, m, 3), generator=random, dtype=index)
        weight.requires_grad_()
        for op, twin, leaves, rest in (
            (group_points, reference_group_points, [features], (idx,)),
            (gather_points, reference_gather_points, [features], (idx[..., 0],)),
            (
                lambda f, w, i=three: three_interpolate(f, i, w),
                lambda f, w, i=three: reference_three_interpolate(f, i, w),
                [features, weight],
                (),
            ),
        ):
            got, expected = op(*leaves, *rest), twin(*leaves, *rest)
            assert torch.equal(got, expected)
            slope = torch.randn(got.shape, generator=random).to(dtype)
            close = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(dtype, 1e-4)  # the twin rounds each sum
            for one, two in zip(
                torch.autograd.grad(got, leaves, slope),
                torch.autograd.grad(expected, leaves, slope),
                strict=True,
            ):
                torch.testing.assert_close(one, two, rtol=close, atol=close)


STUDENTS = {
    "pointnet2": {"npoints": (16, 4), "nsamples": (8, 4), "width": 0.125},
    "dgcnn": {"k": 6, "width": 0.125},
    "rscnn": {"npoints": (16, 4), "nsamples": (8, 4), "width": 0.125},
    "pointmlp": {"variant": "elite", "k": 6, "width": 0.25},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_training_step_of_a_student(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    student = getattr(students, name)(5, feature_dim=16, dropout=0.0, **STUDENTS[name]).double().train()
    clouds = torch.randn(2, 48, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 4

    def step() -> list[torch.Tensor]:
        student.zero_grad()
        logits = student(clouds)
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
        return [logits.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]

    kernels = step()
    for module in ("edges", "grouping", "neighbors", "sampling"):
        monkeypatch.setattr(f"pointcmt.ops.{module}.use_compiled", lambda *_, **__: False)
    for got, expected in zip(kernels, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_nothing_at_all() -> None:
    none, some, idx = torch.zeros(0, 5, 3), torch.zeros(2, 5, 3), torch.zeros(2, 0, 3, dtype=torch.int64)
    assert ball_query(1, 3, none, none).shape == (0, 5, 3)
    assert knn(some[:, :0], some, 2)[0].shape == (2, 0, 2)
    assert emd(none, none)[0].shape == (0,)
    assert group_points(some.mT, idx).shape == (2, 3, 0, 3)
    assert group_relative(some, some[:, :0], idx, some.mT).shape == (2, 6, 0, 3)
