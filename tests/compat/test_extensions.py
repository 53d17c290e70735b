"""The other stand-ins: distances of clouds, RS-CNN's and OpenPoints' extensions, KNN_CUDA, torch_scatter."""

from __future__ import annotations

import pytest
import torch

from pointcmt import ops
from pointcmt.compat import chamfer, emd, emd_cuda, knn_cuda, pointnet2_batch_cuda, torch_scatter
from pointcmt.compat.rscnn_ext import pointnet2 as rscnn


def clouds(batch, n, seed, dtype=torch.float32):
    return torch.rand(batch, n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- emd ------------------------------------------------------------------------------------------


def test_emd_returns_squared_distances_per_point_and_an_int32_permutation():
    x, y = clouds(3, 100, 0), clouds(3, 100, 1)
    dist, assignment = emd.emdModule()(x, y, 0.005, 50)
    assert dist.shape == (3, 100) and dist.dtype == torch.float32
    assert assignment.shape == (3, 100) and assignment.dtype == torch.int32
    assert torch.equal(assignment.sort(1).values, torch.arange(100, dtype=torch.int32).expand(3, -1))
    matched = torch.stack([y[b, assignment[b].long()] for b in range(3)])
    torch.testing.assert_close(dist, (x - matched).square().sum(-1))
    # what MSN and PointCMT make of it is the mean distance
    optimum, _ = ops.emd(x, y, tolerance=1e-5)
    mean = torch.sqrt(dist).mean(1)
    assert (mean >= optimum * (1 - 2e-5)).all() and (mean <= optimum * 1.0051).all()


def test_emd_finds_a_permutation_it_is_given():
    x = clouds(1, 64, 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    dist, assignment = emd.emdModule()(x, x[:, order], 0.002, 10000)
    assert dist.max() == 0
    assert torch.equal(order[assignment[0].long()], torch.arange(64))


def test_emd_gradient_goes_to_the_first_cloud_only():
    x, y = clouds(2, 20, 4).requires_grad_(), clouds(2, 20, 5).requires_grad_()
    dist, assignment = emd.emdModule()(x, y, 0.005, 100)
    upstream = torch.rand(dist.shape, generator=torch.Generator().manual_seed(6))
    dist.backward(upstream)
    matched = torch.stack([y[b, assignment[b].long()] for b in range(2)]).detach()
    torch.testing.assert_close(x.grad, 2 * upstream[..., None] * (x.detach() - matched))
    assert y.grad is not None and not y.grad.any()


def test_emd_compiled_interface_fills_its_arguments():
    x, y = clouds(2, 30, 7), clouds(2, 30, 8)
    dist, assignment, inverse = (
        torch.zeros(2, 30),
        torch.full((2, 30), -1).int(),
        torch.full((2, 30), -1).int(),
    )
    scratch = [torch.zeros(2, 30) for _ in range(9)]
    price, *rest = scratch
    bid, bid_increments, max_increments, unass_idx, unass_cnt, unass_cnt_sum, cnt_tmp, max_idx = rest
    assert emd.forward(
        x, y, dist, assignment, price, inverse, bid, bid_increments, max_increments, unass_idx, unass_cnt,
        unass_cnt_sum, cnt_tmp, max_idx, 0.005, 50,
    ) == 1  # fmt: skip
    expected = emd.emdModule()(x, y, 0.005, 50)
    torch.testing.assert_close(dist, expected[0])
    assert torch.equal(assignment, expected[1])
    for b in range(2):
        assert torch.equal(inverse[b, assignment[b].long()], torch.arange(30, dtype=torch.int32))
    grad = torch.zeros(2, 30, 3)
    assert emd.backward(x, y, grad, torch.ones(2, 30), assignment) == 1
    leaf = x.clone().requires_grad_()
    emd.emdFunction.apply(leaf, y, 0.005, 50)[0].sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_emd_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"\[B, N, 3\].*\[1, 4, 3\] and \[1, 5, 3\]"):
        emd.emdModule()(clouds(1, 4, 0), clouds(1, 5, 0), 0.005, 50)
    with pytest.raises(ValueError, match="iters must be at least 1"):
        emd.emdModule()(clouds(1, 4, 0), clouds(1, 4, 0), 0.005, 0)


# --- extensions that write in place ---------------------------------------------------------------


def loop_rscnn_ball(points, centre, fill, radius, nsample):
    """RS-CNN's kernel: hits in index order, without points at the centre; the rest is the centre's own
    index.
    """
    squares = [sum((a - b) ** 2 for a, b in zip(p, centre, strict=True)) for p in points]
    hits = [i for i, d in enumerate(squares) if 0 < d < radius**2][:nsample]
    return hits + [fill] * (nsample - len(hits))


@pytest.mark.parametrize("at_once", [1 << 24, 1])  # all clouds together, and one by one
def test_rscnn_ball_query_leaves_the_centre_out(monkeypatch, at_once):
    monkeypatch.setattr(rscnn, "_DISTANCES_AT_ONCE", at_once)
    xyz = clouds(2, 30, 9, torch.float64)
    xyz[:, 20] = xyz[:, 2]  # a duplicate of a centre is left out too
    centre_idx = torch.tensor([[0, 2, 7], [5, 2, 29]], dtype=torch.int32)
    centres = torch.stack([xyz[b, centre_idx[b].long()] for b in range(2)])
    idx = torch.zeros(2, 3, 40, dtype=torch.int32)  # more than there are points
    rscnn.ball_query_wrapper(2, 30, 3, 0.5, 40, centres, xyz, centre_idx, idx)
    expected = [
        [
            loop_rscnn_ball(xyz[b].tolist(), centres[b, j].tolist(), int(centre_idx[b, j]), 0.5, 40)
            for j in range(3)
        ]
        for b in range(2)
    ]
    assert idx.tolist() == expected
    short = torch.zeros(2, 3, 4, dtype=torch.int32)
    rscnn.ball_query_wrapper(2, 30, 3, 0.5, 4, centres, xyz, centre_idx, short)
    assert short.tolist() == [[row[:4] for row in cloud] for cloud in expected]


def test_openpoints_ball_query_is_pointnet2s():
    xyz = clouds(2, 30, 10)
    idx = torch.zeros(2, 4, 6, dtype=torch.int32)
    pointnet2_batch_cuda.ball_query_wrapper(2, 30, 4, 0.4, 6, xyz[:, :4].contiguous(), xyz, idx)
    assert torch.equal(idx.long(), ops.ball_query(0.4, 6, xyz, xyz[:, :4]))


@pytest.mark.parametrize("extension", [rscnn, pointnet2_batch_cuda])
def test_wrappers_write_into_their_last_argument(extension):
    xyz, generator = clouds(2, 30, 11), torch.Generator().manual_seed(12)
    chosen = torch.full((2, 8), -1, dtype=torch.int32)
    assert extension.furthest_point_sampling_wrapper(2, 30, 8, xyz, torch.full((2, 30), 1e10), chosen) == 1
    assert torch.equal(chosen.long(), ops.furthest_point_sample(xyz, 8))

    features = torch.rand(2, 5, 30, generator=generator)
    gathered = torch.empty(2, 5, 8)
    extension.gather_points_wrapper(2, 5, 30, 8, features, chosen, gathered)
    assert torch.equal(gathered, ops.gather_points(features, chosen))

    near = ops.knn(xyz[:, :8], xyz, 3)[1].int()
    grouped = torch.empty(2, 5, 8, 3)
    extension.group_points_wrapper(2, 5, 30, 8, 3, features, near, grouped)
    assert torch.equal(grouped, ops.group_points(features, near))

    squared, idx = torch.empty(2, 30, 3), torch.empty(2, 30, 3, dtype=torch.int32)
    extension.three_nn_wrapper(2, 30, 8, xyz, xyz[:, :8].contiguous(), squared, idx)
    distance, expected = ops.three_nn(xyz, xyz[:, :8])
    assert torch.equal(idx.long(), expected)
    assert torch.equal(squared.sqrt(), distance)  # callers take the root; it must come out as it went in

    weight, out = torch.rand(2, 30, 3, generator=generator), torch.empty(2, 5, 30)
    extension.three_interpolate_wrapper(2, 5, 8, 30, features[..., :8].contiguous(), idx, weight, out)
    torch.testing.assert_close(out, ops.three_interpolate(features[..., :8].contiguous(), idx, weight))


@pytest.mark.parametrize("extension", [rscnn, pointnet2_batch_cuda])
def test_gradient_wrappers_add_what_autograd_gives(extension):
    generator = torch.Generator().manual_seed(13)
    features = torch.rand(2, 5, 11, generator=generator, requires_grad=True)
    idx = torch.randint(0, 11, (2, 7, 3), generator=generator, dtype=torch.int32)
    weight = torch.rand(2, 7, 3, generator=generator)
    first = idx[..., 0].contiguous()
    cases = [
        (ops.gather_points(features, first), extension.gather_points_grad_wrapper, (2, 5, 11, 7), (first,)),
        (ops.group_points(features, idx), extension.group_points_grad_wrapper, (2, 5, 11, 7, 3), (idx,)),
        (
            ops.three_interpolate(features, idx, weight),
            extension.three_interpolate_grad_wrapper,
            (2, 5, 7, 11),
            (idx, weight),
        ),
    ]
    for out, wrapper, sizes, rest in cases:
        upstream = torch.rand(out.shape, generator=generator)
        (expected,) = torch.autograd.grad(out, features, upstream)
        grad = torch.ones(2, 5, 11)
        assert wrapper(*sizes, upstream, *rest, grad) == 1
        torch.testing.assert_close(grad, expected + 1)


def test_knn_cuda_in_both_layouts():
    ref, query = clouds(2, 20, 14), clouds(2, 6, 15)
    distance, idx = knn_cuda.KNN(k=4, transpose_mode=True)(ref, query)
    expected = torch.cdist(query.double(), ref.double()).sort(-1)
    assert torch.equal(idx, expected.indices[..., :4]) and idx.dtype == torch.int64
    torch.testing.assert_close(distance, expected.values[..., :4].float())
    other, idx2 = knn_cuda.KNN(k=4)(ref.transpose(1, 2), query.transpose(1, 2))
    assert torch.equal(other.transpose(1, 2), distance) and torch.equal(idx2.transpose(1, 2), idx)
    one, idx3 = knn_cuda.knn(ref[0].T, query[0].T, 4)
    assert torch.equal(one, distance[0].T) and torch.equal(idx3, idx[0].T)


def test_densepoint_calls_the_same_name_with_fewer_arguments():
    xyz = clouds(2, 30, 16)
    idx = torch.zeros(2, 4, 6, dtype=torch.int32)
    assert rscnn.ball_query_wrapper(2, 30, 4, 0.4, 6, xyz[:, :4].contiguous(), xyz, idx) == 1
    assert torch.equal(idx.long(), ops.ball_query(0.4, 6, xyz, xyz[:, :4]))


def test_only_some_extensions_leave_out_points_near_the_origin():
    xyz = clouds(1, 40, 17) * 0.2
    xyz[:, 5] = 0.001
    chosen = torch.zeros(1, 40, dtype=torch.int32)
    rscnn.furthest_point_sampling_wrapper(1, 40, 40, xyz, None, chosen)
    assert 5 not in chosen[0, 1:].tolist()
    pointnet2_batch_cuda.furthest_point_sampling_wrapper(1, 40, 40, xyz, None, chosen)
    assert sorted(chosen[0].tolist()) == list(range(40))


# --- Chamfer distance and the soft earth mover's distance ------------------------------------------


def test_chamfer_is_the_squared_distance_to_the_nearest_with_gradients_to_both():
    x, y = clouds(2, 20, 18), clouds(2, 15, 19)
    y[:, 7] = y[:, 3]  # of two equally near the first
    dist1, dist2, idx1, idx2 = chamfer.forward(x, y)
    squared = (x[:, :, None] - y[:, None]).square().sum(-1)
    torch.testing.assert_close(dist1, squared.amin(2))
    torch.testing.assert_close(dist2, squared.amin(1))
    assert torch.equal(idx1.long(), squared.argmin(2)) and idx1.dtype == idx2.dtype == torch.int32
    assert torch.equal(idx2.long(), squared.argmin(1)) and not (idx1 == 7).any()

    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    up1, up2 = clouds(2, 20, 20)[..., 0], clouds(2, 15, 21)[..., 0]
    near1 = b.gather(1, idx1.long()[..., None].expand(-1, -1, 3))
    near2 = a.gather(1, idx2.long()[..., None].expand(-1, -1, 3))
    (((a - near1).square().sum(-1) * up1).sum() + ((b - near2).square().sum(-1) * up2).sum()).backward()
    for grad, leaf in zip(chamfer.backward(x, y, idx1, idx2, up1, up2), (a, b), strict=True):
        torch.testing.assert_close(grad, leaf.grad)
    c, d = x.clone().requires_grad_(), y.clone().requires_grad_()
    one, two = chamfer.ChamferDistance()(c, d)
    ((one * up1).sum() + (two * up2).sum()).backward()
    torch.testing.assert_close(c.grad, a.grad)
    torch.testing.assert_close(d.grad, b.grad)


def test_soft_emd_has_the_cost_of_the_best_matching_and_its_gradient():
    x, y = clouds(2, 16, 22), clouds(2, 16, 23)
    match = emd_cuda.approxmatch_forward(x, y)
    assert torch.equal(match.sum(1), torch.ones(2, 16)) and torch.equal(match.sum(2), torch.ones(2, 16))
    cost = emd_cuda.matchcost_forward(x, y, match)
    goal = match.argmax(1)
    expected = (x - y.gather(1, goal[..., None].expand(-1, -1, 3))).square().sum((1, 2))
    torch.testing.assert_close(cost, expected)
    soft = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(24))
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    up = torch.tensor([1.0, 3.0])
    emd_cuda.matchcost_forward(a, b, soft).backward(up)
    for grad, leaf in zip(emd_cuda.matchcost_backward(up, x, y, soft), (a, b), strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[2, 16, 3\] and \[2, 5, 3\]"):
        emd_cuda.approxmatch_forward(x, y[:, :5])


# --- torch_scatter --------------------------------------------------------------------------------


def loop_scatter(src, index, size, reduce):
    rows = [[v for v, i in zip(src, index.tolist(), strict=True) if i == place] for place in range(size)]
    empty = torch.full_like(src[0], 1.0 if reduce == "mul" else 0.0)
    of = {
        "sum": lambda r: sum(r), "mean": lambda r: sum(r) / len(r),
        "mul": lambda r: torch.stack(r).prod(0), "max": lambda r: torch.stack(r).amax(0),
        "min": lambda r: torch.stack(r).amin(0),
    }[reduce]  # fmt: skip
    return torch.stack([of(row) if row else empty for row in rows])


@pytest.mark.parametrize("reduce", ["sum", "mean", "mul", "max", "min"])
def test_scatter_reduces_as_a_loop_with_its_gradient(reduce):
    generator = torch.Generator().manual_seed(25)
    src = torch.rand(12, 3, generator=generator, requires_grad=True)
    index = torch.tensor([0, 2, 2, 5, 0, 2, 5, 5, 0, 0, 2, 5])  # 1, 3 and 4 are empty, 6 only by dim_size
    got = torch_scatter.scatter(src, index, dim=0, dim_size=7, reduce=reduce)
    twin = src.detach().clone().requires_grad_()
    expected = loop_scatter(twin, index, 7, reduce)
    torch.testing.assert_close(got, expected)
    upstream = torch.rand(got.shape, generator=generator)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(src.grad, twin.grad)
    flipped = torch_scatter.scatter(src.detach().T.contiguous(), index, reduce=reduce)  # the last dimension
    torch.testing.assert_close(flipped, expected.detach()[:6].T)
    ends = torch.tensor([0, 4, 4, 12])
    runs = torch_scatter.segment_csr(src.detach(), ends, reduce=reduce)
    torch.testing.assert_close(runs, loop_scatter(src.detach(), torch.tensor([0] * 4 + [2] * 8), 3, reduce))
    assert torch.equal(torch_scatter.gather_csr(runs, ends), runs[[0] * 4 + [2] * 8])


def test_scatter_says_where_the_largest_is_and_gives_it_the_whole_gradient():
    src = torch.tensor([1.0, 3.0, 3.0, 2.0], requires_grad=True)
    value, where = torch_scatter.scatter_max(src, torch.tensor([0, 0, 0, 2]))
    assert value.tolist() == [3, 0, 2] and where.tolist() == [1, 4, 3]
    value.sum().backward()
    assert src.grad.tolist() == [0, 1, 0, 1]
    onto = torch.tensor([5.0, 0.0, 0.0])
    torch_scatter.scatter_max(src.detach(), torch.tensor([0, 0, 0, 2]), out=onto)
    assert onto.tolist() == [5, 0, 2]
    with pytest.raises(ValueError, match="reduce is 'median'; expected sum"):
        torch_scatter.scatter(src, torch.zeros(4, dtype=torch.int64), reduce="median")


def test_scatter_softmax_and_deviation_are_those_of_each_group():
    generator = torch.Generator().manual_seed(26)
    src, index = torch.randn(9, generator=generator) * 30, torch.tensor([0, 1, 1, 0, 3, 3, 3, 1, 0])
    soft, log = torch_scatter.scatter_softmax(src, index), torch_scatter.scatter_log_softmax(src, index)
    total, spread = torch_scatter.scatter_logsumexp(src, index), torch_scatter.scatter_std(src, index)
    for group in (0, 1, 3):
        mine = src[index == group]
        torch.testing.assert_close(soft[index == group], mine.softmax(0))
        torch.testing.assert_close(log[index == group], mine.log_softmax(0))
        torch.testing.assert_close(total[group], mine.logsumexp(0))
        torch.testing.assert_close(spread[group], mine.std())
