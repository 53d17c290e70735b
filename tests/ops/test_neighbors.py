"""Ball query, k nearest neighbours and three nearest: kernels equal to twins, twins to their meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pointcmt.ops import ball_query, knn, three_nn
from pointcmt.ops._extension import has_cpu_kernels
from pointcmt.ops.neighbors import reference_ball_query, reference_knn, reference_three_nn
from tests.ops.clouds import hard_clouds, large_clouds, modelnet_clouds

compiled = pytest.mark.skipif(not has_cpu_kernels(), reason="the CPU kernels are not compiled")
DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------ ball query


def test_ball_query_lists_first_hits_in_index_order_and_pads_with_the_first() -> None:
    xyz = torch.tensor([[[0.0, 0, 0], [9, 9, 9], [0.5, 0, 0], [1, 0, 0], [0.1, 0, 0]]])
    centres = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-20, 0, 0]]])
    hits = ball_query(1.0, 4, xyz, centres)  # a point at exactly the radius is outside
    assert hits.tolist() == [[[0, 2, 4, 0], [2, 3, 4, 2], [0, 0, 0, 0]]]
    assert ball_query(1.0, 2, xyz, centres).tolist() == [[[0, 2], [2, 3], [0, 0]]]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (16, 17), (100, 30), (1024, 65)])
def test_ball_query_kernel_equals_twin(n: int, m: int, dtype: torch.dtype) -> None:
    for name, cloud in hard_clouds(10 * n + m, 2, n, dtype).items():
        centres = cloud[:, torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(m))]
        for radius, nsample in ((0.5, 1), (0.7, 32), (1e-4, 5), (1e3, 9)):
            expected = reference_ball_query(radius, nsample, cloud, centres)
            assert torch.equal(torch.ops.pointcmt.ball_query(radius, nsample, cloud, centres), expected), name


@compiled
def test_ball_query_kernel_equals_twin_on_modelnet40(modelnet40_root: Path) -> None:
    clouds = modelnet_clouds(modelnet40_root, 4, seed=11)
    for radius, nsample in ((0.1, 16), (0.2, 32), (0.4, 64)):  # the radii of PointNet++
        expected = reference_ball_query(radius, nsample, clouds, clouds[:, :300])
        assert torch.equal(ball_query(radius, nsample, clouds, clouds[:, :300]), expected)


# ------------------------------------------------------------------------------------------- knn


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (24, 3), (65, 20), (300, 1), (1024, 20), (400, 250)])
def test_knn_kernel_equals_twin_in_space(n: int, k: int, dtype: torch.dtype) -> None:
    for name, cloud in hard_clouds(20 * n + k, 2, n, dtype).items():
        queries = cloud[:, : 1 + n // 3]
        distance, idx = torch.ops.pointcmt.knn(queries, cloud, k)
        expected_distance, expected_idx = reference_knn(queries, cloud, k)
        assert torch.equal(idx, expected_idx), name
        assert torch.equal(distance, expected_distance), name


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 4, 5, 6, 8, 9, 31, 64, 128])
def test_knn_kernel_equals_twin_in_feature_space(dims: int, dtype: torch.dtype) -> None:
    random = randn(2, 150, dims, seed=dims, dtype=dtype)
    for name, points in {
        "random": random,
        "ties": random.round(),
        "duplicates": random[:, torch.randint(0, 30, (150,), generator=torch.Generator().manual_seed(dims))],
        "far from the origin": random + 1000,
        "one far outlier": torch.cat([random[:, 1:], random[:, :1] * 1e6], 1),
        "huge": random * 1e18,
        "tiny": random * 1e-20,
    }.items():
        for k in (1, 20, 60):
            distance, idx = torch.ops.pointcmt.knn(points[:, :41], points, k)
            expected_distance, expected_idx = reference_knn(points[:, :41], points, k)
            assert torch.equal(idx, expected_idx), (name, k)
            assert torch.equal(distance, expected_distance), (name, k)


@compiled
def test_knn_kernel_equals_twin_on_modelnet40(modelnet40_root: Path) -> None:
    clouds = modelnet_clouds(modelnet40_root, 3, seed=12)
    for k in (1, 20, 40):
        for got, expected in zip(knn(clouds, clouds, k), reference_knn(clouds, clouds, k), strict=True):
            assert torch.equal(got, expected)


def test_knn_agrees_with_the_distance_matrix() -> None:
    queries, points = (
        randn(2, 40, 16, seed=1, dtype=torch.float64),
        randn(2, 90, 16, seed=2, dtype=torch.float64),
    )
    distance, idx = knn(queries, points, 10)
    expected = torch.cdist(queries, points).square().topk(10, largest=False)
    torch.testing.assert_close(distance, expected.values)
    assert torch.equal(idx, expected.indices)


def test_knn_nan_counts_as_infinitely_far() -> None:
    points = randn(1, 50, 3, seed=3)
    points[0, 7] = float("nan")
    distance, idx = knn(points, points, 50)
    assert (idx[0, :7, -1] == 7).all() and torch.isinf(distance[0, :7, -1]).all()
    assert torch.equal(idx[0, 7], torch.arange(50))  # all of them infinite: by index
    wide = randn(1, 50, 40, seed=3)
    wide[0, 7, 3] = float("nan")
    for got, expected in zip(knn(wide, wide, 5), reference_knn(wide, wide, 5), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op", [knn, reference_knn])
def test_knn_distances_are_differentiable(op) -> None:
    queries = randn(2, 5, 4, seed=4, dtype=torch.float64).requires_grad_()
    points = randn(2, 9, 4, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: op(q, p, 3)[0], (queries, points))
    shared = points.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: op(p, p, 4)[0], (shared,))


# -------------------------------------------------------------------------------------- three_nn


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (9, 2), (17, 3), (200, 40), (33, 512)])
def test_three_nn_kernel_equals_twin(n: int, m: int, dtype: torch.dtype) -> None:
    for name, cloud in hard_clouds(30 * n + m, 2, n + m, dtype).items():
        unknown, known = cloud[:, :n], cloud[:, n:]
        (distance, idx), (expected, expected_idx) = (
            three_nn(unknown, known),
            reference_three_nn(unknown, known),
        )
        assert torch.equal(idx, expected_idx), name
        torch.testing.assert_close(distance, expected)  # libraries differ in the last bit of a root


def test_three_nn_is_the_head_of_knn_and_gives_distances() -> None:
    unknown, known = randn(2, 30, 3, seed=6), randn(2, 20, 3, seed=7)
    distance, idx = three_nn(unknown, known)
    squared, nearest = knn(unknown, known, 3)
    assert torch.equal(idx, nearest)
    torch.testing.assert_close(distance, squared.sqrt())


def test_three_nn_with_fewer_than_three_known_points() -> None:
    distance, idx = three_nn(torch.zeros(1, 1, 3), torch.tensor([[[3.0, 0, 0], [1, 0, 0]]]))
    assert distance.tolist() == [[[1.0, 3.0, float("inf")]]]
    assert idx.tolist() == [[[1, 0, 0]]]


# ---------------------------------------------------------------------- large clouds, through a tree


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_clouds_equal_the_twin(dtype: torch.dtype) -> None:
    """Among all points for the twin, through a tree for the kernels: the same bits, in the same order."""
    for name, cloud in large_clouds(31, 2309, dtype).items():
        pick = torch.randint(0, 2309, (150,), generator=torch.Generator().manual_seed(1))
        queries = torch.cat([cloud[:, pick], cloud[:, pick[:20]] + 0.01, cloud[:, pick[:3]] * 1e4], 1)
        for k in (1, 16, 70):
            got, expected = knn(queries, cloud, k), reference_knn(queries, cloud, k)
            assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0]), (name, k)
        distance, idx = three_nn(queries, cloud)
        expected_distance, expected_idx = reference_three_nn(queries, cloud)
        assert torch.equal(idx, expected_idx), name
        torch.testing.assert_close(distance, expected_distance)
        for radius, nsample in ((0.02, 3), (0.3, 1), (0.3, 40), (5.0, 300)):
            expected_hits = reference_ball_query(radius, nsample, cloud, queries)
            assert torch.equal(ball_query(radius, nsample, cloud, queries), expected_hits), (name, radius)


@compiled
def test_the_points_of_a_large_cloud_are_searched_among_themselves() -> None:
    cloud = large_clouds(32, 2050)["uneven"]
    for got, expected in zip(knn(cloud, cloud, 16), reference_knn(cloud, cloud, 16), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(ball_query(0.05, 16, cloud, cloud), reference_ball_query(0.05, 16, cloud, cloud))


@compiled
def test_large_clouds_with_what_is_not_finite() -> None:
    cloud = randn(1, 2100, 3, seed=33)
    cloud[0, 5], cloud[0, 900, 1], cloud[0, 1700, 2] = float("nan"), float("inf"), -float("inf")
    vast = cloud.clone()
    vast[0, 40] = 3e19  # finite, with a squared distance that is not
    for points in (cloud, vast):
        queries = points[:, :1000]
        for k in (1, 16):
            for got, expected in zip(knn(queries, points, k), reference_knn(queries, points, k), strict=True):
                assert torch.equal(got, expected)
        assert torch.equal(three_nn(queries, points)[1], reference_three_nn(queries, points)[1])
        for radius in (0.3, 1e30):  # squared: infinite
            expected = reference_ball_query(radius, 9, points, queries)
            assert torch.equal(ball_query(radius, 9, points, queries), expected)


# ---------------------------------------------------------------------- clouds of different sizes


@pytest.mark.parametrize("dims", [3, 20])
def test_knn_with_lengths_is_knn_of_each_cloud(dims: int) -> None:
    points, queries = randn(4, 2200, dims, seed=34), randn(4, 130, dims, seed=35)
    lengths = torch.tensor([2200, 2100, 9, 1])
    distance, idx = knn(queries, points, 12, lengths)
    twin_distance, twin_idx = reference_knn(queries, points, 12, lengths)
    assert torch.equal(distance, twin_distance) and torch.equal(idx, twin_idx)
    for b, length in enumerate(lengths.tolist()):
        k = min(12, length)
        one, where = knn(queries[b : b + 1], points[b : b + 1, :length], k)
        assert torch.equal(distance[b, :, :k], one[0]) and torch.equal(idx[b, :, :k], where[0])
        assert torch.isinf(distance[b, :, k:]).all() and (idx[b, :, k:] == 0).all()


@pytest.mark.parametrize("op", [knn, reference_knn])
def test_places_beyond_a_cloud_have_no_gradient(op) -> None:
    queries = randn(2, 3, 3, seed=36, dtype=torch.float64).requires_grad_()
    points = randn(2, 6, 3, seed=37, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([6, 2])

    def near(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        distance, _ = op(q, p, 4, lengths)
        return torch.where(torch.isinf(distance), 0, distance)

    assert torch.autograd.gradcheck(near, (queries, points))
    slopes = torch.autograd.grad(op(queries, points, 4, lengths)[0].sum(), (queries, points))
    assert all(slope.isfinite().all() for slope in slopes)
    assert (slopes[1][1, 2:] == 0).all()


def test_ball_query_and_three_nn_with_lengths() -> None:
    cloud, queries = randn(4, 2200, 3, seed=38), randn(4, 130, 3, seed=39)
    lengths = torch.tensor([2200, 2100, 40, 2])
    hits = ball_query(0.4, 8, cloud, queries, lengths)
    distance, idx = three_nn(queries, cloud, lengths)
    assert torch.equal(hits, reference_ball_query(0.4, 8, cloud, queries, lengths))
    assert torch.equal(idx, reference_three_nn(queries, cloud, lengths)[1])
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(hits[b], ball_query(0.4, 8, cloud[b : b + 1, :length], queries[b : b + 1])[0])
        assert torch.equal(distance[b], three_nn(queries[b : b + 1], cloud[b : b + 1, :length])[0][0])


# ------------------------------------------------------------------------------------ all of them


def test_half_precision_is_compared_in_float32() -> None:
    cloud = randn(2, 40, 3, seed=8).bfloat16()
    assert torch.equal(ball_query(0.5, 4, cloud, cloud), ball_query(0.5, 4, cloud.float(), cloud.float()))
    distance, idx = knn(cloud, cloud, 4)
    assert distance.dtype == torch.float32
    assert torch.equal(idx, knn(cloud.float(), cloud.float(), 4)[1])
    assert torch.equal(three_nn(cloud, cloud)[1], three_nn(cloud.float(), cloud.float())[1])


def test_mixed_precision_goes_to_the_wider_one() -> None:
    cloud = randn(1, 20, 3, seed=9)
    assert knn(cloud.half(), cloud.double(), 2)[0].dtype == torch.float64


def test_non_contiguous_and_empty_inputs() -> None:
    planes = randn(2, 3, 50, seed=10)
    cloud, copy = planes.transpose(1, 2), planes.transpose(1, 2).contiguous()
    assert torch.equal(ball_query(0.6, 5, cloud, cloud), ball_query(0.6, 5, copy, copy))
    assert torch.equal(knn(cloud, cloud, 5)[1], knn(copy, copy, 5)[1])
    assert torch.equal(three_nn(cloud, cloud)[1], three_nn(copy, copy)[1])
    none, some = torch.zeros(0, 4, 3), torch.zeros(2, 4, 3)
    assert ball_query(1, 3, none, none).shape == (0, 4, 3)
    assert knn(none, none, 2)[0].shape == (0, 4, 2)
    assert three_nn(none, none)[1].shape == (0, 4, 3)
    assert ball_query(1, 3, some, some[:, :0]).shape == (2, 0, 3)
    assert knn(some[:, :0], some, 2)[1].shape == (2, 0, 2)
    assert three_nn(some[:, :0], some)[0].shape == (2, 0, 3)


A = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ball_query(0.0, 3, A, A), "radius"),
        (lambda: ball_query(float("nan"), 3, A, A), "radius"),
        (lambda: ball_query(1.0, 0, A, A), "nsample"),
        (lambda: ball_query(1.0, 3, A[:, :0], A), "at least one point"),
        (lambda: ball_query(1.0, 3, A, A[:1]), "batch size"),
        (lambda: ball_query(1.0, 3, torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)), "transpose"),
        (lambda: knn(A, A, 6), "k=6"),
        (lambda: knn(A, A, 0), "k=0"),
        (lambda: knn(A, torch.zeros(2, 5, 4), 1), "last dimension"),
        (lambda: knn(A[..., :0], A[..., :0], 1), "without coordinates"),
        (lambda: knn(A.long(), A, 1), "floating"),
        (lambda: three_nn(A, A[:, :0]), "at least one point"),
        (lambda: three_nn(A[0], A), r"\[B, N, D\]"),
        (lambda: knn(A, A, 1, torch.tensor([5])), "one entry for each of 2 clouds"),
        (lambda: knn(A, A, 1, torch.tensor([5, 6])), "from 1 to the number of points, 5, got 6"),
        (lambda: ball_query(1.0, 3, A, A, torch.tensor([0, 5])), "got 0"),
        (lambda: three_nn(A, A, torch.tensor([5.0, 5.0])), "int64"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@compiled
def test_opcheck() -> None:
    cloud = randn(2, 30, 3, seed=13)
    torch.library.opcheck(torch.ops.pointcmt.ball_query, (0.5, 4, cloud, cloud[:, :7]))
    torch.library.opcheck(torch.ops.pointcmt.three_nn, (cloud, cloud[:, :7]))
    lengths = torch.tensor([7, 30])
    torch.library.opcheck(torch.ops.pointcmt.ball_query, (0.5, 4, cloud, cloud[:, :7], lengths))
    torch.library.opcheck(torch.ops.pointcmt.three_nn, (cloud[:, :7], cloud, lengths))
    torch.library.opcheck(
        torch.ops.pointcmt.knn, (cloud.clone().requires_grad_(), cloud[:, :7], 4, torch.tensor([7, 3]))
    )
    for dims in (3, 20):
        queries, points = randn(2, 6, dims, seed=14), randn(2, 9, dims, seed=15)
        torch.library.opcheck(torch.ops.pointcmt.knn, (queries, points, 4))
        torch.library.opcheck(torch.ops.pointcmt.knn, (queries.requires_grad_(), points.requires_grad_(), 4))


def test_compile_and_autocast() -> None:
    cloud = randn(2, 40, 3, seed=16)

    def search(xyz: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ball_query(0.5, 4, xyz, xyz), *knn(xyz, xyz, 5), *three_nn(xyz, xyz)

    whole = torch.compile(search, fullgraph=True, backend="aot_eager")
    for got, expected in zip(whole(cloud), search(cloud), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, expected in zip(search(cloud), whole(cloud), strict=True):
            torch.testing.assert_close(got, expected)


@compiled
def test_result_does_not_depend_on_the_number_of_threads() -> None:
    cloud, features = randn(3, 200, 3, seed=17), randn(3, 200, 32, seed=18)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                (ball_query(0.5, 8, cloud, cloud), *knn(features, features, 9), *three_nn(cloud, cloud))
            )
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.cuda
def test_cuda_equals_twin(cuda: torch.device) -> None:
    for n, m in ((1, 1), (2, 3), (33, 17), (1000, 130), (1024, 512)):
        for name, cloud in hard_clouds(40 * n + m, 2, n).items():
            for points in (cloud, cloud.double()):
                pick = torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(m))
                queries = points[:, pick]
                there, queries_there = points.to(cuda), queries.to(cuda)
                for radius, nsample in ((0.5, 1), (0.7, 32), (1e3, 70)):
                    expected = reference_ball_query(radius, nsample, points, queries)
                    assert torch.equal(ball_query(radius, nsample, there, queries_there).cpu(), expected), (
                        name
                    )
                for k in {1, min(n, 3), min(n, 20), min(n, 40), min(n, 100), min(n, 300)}:
                    got = knn(queries_there, there, k)
                    for one, two in zip(got, reference_knn(queries, points, k), strict=True):
                        assert torch.equal(one.cpu(), two), (name, n, k)
                distance, idx = three_nn(queries_there, there)
                expected_distance, expected_idx = reference_three_nn(queries, points)
                assert torch.equal(idx.cpu(), expected_idx), name
                torch.testing.assert_close(distance.cpu(), expected_distance)


@pytest.mark.cuda
@pytest.mark.parametrize("dims", [1, 2, 5, 8, 9, 31, 64, 128, 200])
def test_cuda_knn_equals_twin_in_feature_space(cuda: torch.device, dims: int) -> None:
    random = randn(2, 300, dims, seed=dims)
    for name, points in {"random": random, "ties": random.round(), "huge": random * 1e18}.items():
        for k in (1, 20, 64, 65, 200):
            got = knn(points[:, :77].to(cuda), points.to(cuda), k)
            for one, two in zip(got, reference_knn(points[:, :77], points, k), strict=True):
                assert torch.equal(one.cpu(), two), (name, k)


@pytest.mark.cuda
def test_cuda_gradients_and_empty_inputs(cuda: torch.device) -> None:
    queries = randn(2, 5, 4, seed=4, dtype=torch.float64).to(cuda).requires_grad_()
    points = randn(2, 9, 4, seed=5, dtype=torch.float64).to(cuda).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: knn(q, p, 3)[0], (queries, points), nondet_tol=1e-10)
    none = torch.zeros(0, 4, 3, device=cuda)
    assert ball_query(1, 3, none, none).shape == (0, 4, 3)
    assert knn(none, none, 2)[0].shape == (0, 4, 2)
    assert three_nn(none, none)[1].shape == (0, 4, 3)
