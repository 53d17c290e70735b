"""The stand-in for pointnet2_ops against what its CUDA sources do, written out as plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pointcmt.compat.pointnet2_ops import _ext, pointnet2_modules, pointnet2_utils


def clouds(batch, n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, n, 3, generator=generator, dtype=dtype) * 2 - 1


def loop_furthest(points, npoint):
    """One cloud, as the kernel: starts at 0, skips points within sqrt(1e-3) of the origin."""
    n = len(points)
    nearest, chosen = [1e10] * n, [0]
    for _ in range(npoint - 1):
        last = points[chosen[-1]]
        best, best_index = -1.0, 0
        for i, point in enumerate(points):
            if sum(c * c for c in point) <= 1e-3:
                continue
            nearest[i] = min(nearest[i], sum((a - b) ** 2 for a, b in zip(point, last, strict=True)))
            if nearest[i] > best:
                best, best_index = nearest[i], i
        chosen.append(best_index)
    return chosen


def loop_ball(points, centre, radius, nsample):
    hits = [
        i
        for i, p in enumerate(points)
        if sum((a - b) ** 2 for a, b in zip(p, centre, strict=True)) < radius**2
    ]
    if not hits:
        return [0] * nsample
    return (hits[:nsample] + [hits[0]] * nsample)[:nsample]


def test_furthest_point_sample():
    xyz = clouds(2, 40, seed=0)
    xyz[:, 7] = 0.01  # within sqrt(1e-3) of the origin: never chosen
    idx = pointnet2_utils.furthest_point_sample(xyz, 39)
    assert idx.dtype == torch.int32 and idx.shape == (2, 39)
    assert idx.tolist() == [loop_furthest(cloud, 39) for cloud in xyz.tolist()]
    assert 7 not in idx
    assert torch.equal(_ext.furthest_point_sampling(xyz, 39), idx)


def test_more_points_than_there_are_are_repeated():
    """Case 21: npoint > N goes on as the kernel does where all distances are zero."""
    xyz = clouds(2, 40, seed=3)
    xyz[1, 0] = 0.01  # of threads 0, 1, …, 31 the first has points 0, which counts as padding, and 32
    few = pointnet2_utils.furthest_point_sample(xyz, 40)
    idx = pointnet2_utils.furthest_point_sample(xyz, 45)
    assert idx.dtype == torch.int32 and torch.equal(idx[:, :40], few)
    assert idx[0].tolist() == loop_furthest(xyz[0].tolist(), 45) and idx[0, 40:].tolist() == [0] * 5
    assert idx[1, 40:].tolist() == [32] * 5
    assert torch.equal(_ext.furthest_point_sampling(xyz, 45), idx)
    padding = pointnet2_utils.furthest_point_sample(torch.zeros(1, 3, 3), 5)
    assert padding.tolist() == [[0] * 5]
    module = pointnet2_modules.PointnetSAModule(npoint=45, radius=0.4, nsample=8, mlp=[0, 8])
    assert module(xyz.float(), None)[1].shape == (2, 8, 45)


def test_ball_query():
    xyz = clouds(2, 50, seed=1)
    centres = torch.cat([xyz[:, :6], torch.full((2, 1, 3), 9.0, dtype=xyz.dtype)], 1)
    idx = pointnet2_utils.ball_query(0.6, 8, xyz, centres)
    assert idx.dtype == torch.int32
    expected = [
        [loop_ball(cloud, centre, 0.6, 8) for centre in row]
        for cloud, row in zip(xyz.tolist(), centres.tolist(), strict=True)
    ]
    assert idx.tolist() == expected
    assert torch.equal(_ext.ball_query(centres, xyz, 0.6, 8), idx)  # the extension takes the queries first


def test_three_nn_gives_distances_and_the_extension_gives_squares():
    unknown, known = clouds(2, 9, seed=2), clouds(2, 14, seed=3)
    distance, idx = pointnet2_utils.three_nn(unknown, known)
    assert idx.dtype == torch.int32 and not distance.requires_grad
    for b in range(2):
        for i, point in enumerate(unknown[b].tolist()):
            every = sorted((math.dist(point, other), j) for j, other in enumerate(known[b].tolist()))
            assert idx[b, i].tolist() == [j for _, j in every[:3]]
            assert distance[b, i].tolist() == pytest.approx([d for d, _ in every[:3]])
    squared, idx2 = _ext.three_nn(unknown, known)
    torch.testing.assert_close(squared, distance.square())
    assert torch.equal(idx, idx2)


def test_gather_and_group_and_their_gradients():
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    idx = torch.randint(0, 11, (2, 4, 3), generator=generator, dtype=torch.int32)
    grouped = pointnet2_utils.grouping_operation(features, idx)
    gathered = pointnet2_utils.gather_operation(features, idx[..., 0].contiguous())
    for b in range(2):
        for m in range(4):
            assert torch.equal(gathered[b, :, m], features[b, :, idx[b, m, 0]])
            for s in range(3):
                assert torch.equal(grouped[b, :, m, s], features[b, :, idx[b, m, s]])
    assert torch.autograd.gradcheck(lambda f: pointnet2_utils.grouping_operation(f, idx), features)
    upstream = torch.randn(grouped.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(grouped, features, upstream)
    torch.testing.assert_close(_ext.group_points_grad(upstream, idx, 11), grad)
    (grad,) = torch.autograd.grad(gathered, features, upstream[..., 0])
    torch.testing.assert_close(
        _ext.gather_points_grad(upstream[..., 0].contiguous(), idx[..., 0].contiguous(), 11), grad
    )


def test_three_interpolate_gives_its_weights_a_gradient_of_zero():
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    idx = torch.randint(0, 6, (2, 7, 3), generator=generator, dtype=torch.int32)
    out = pointnet2_utils.three_interpolate(features, idx, weight)
    expected = torch.stack(
        [
            torch.stack([(features[b][:, idx[b, i].long()] * weight[b, i]).sum(1) for i in range(7)], 1)
            for b in range(2)
        ]
    )
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(upstream)
    assert weight.grad is not None and not weight.grad.any()
    (direct,) = torch.autograd.grad(expected, features, upstream)
    torch.testing.assert_close(features.grad, direct)
    torch.testing.assert_close(_ext.three_interpolate_grad(upstream, idx, weight.detach(), 6), direct)


def test_query_and_group_and_group_all():
    xyz, features = clouds(2, 30, seed=6), clouds(2, 30, seed=7).transpose(1, 2).contiguous()
    centres = xyz[:, :5]
    group = pointnet2_utils.QueryAndGroup(0.7, 4)
    grouped = group(xyz, centres, features)
    assert grouped.shape == (2, 6, 5, 4)
    idx = pointnet2_utils.ball_query(0.7, 4, xyz, centres).long()
    for b, m, s in [(0, 0, 0), (1, 3, 2), (1, 4, 3)]:
        torch.testing.assert_close(grouped[b, :3, m, s], xyz[b, idx[b, m, s]] - centres[b, m])
        torch.testing.assert_close(grouped[b, 3:, m, s], features[b, :, idx[b, m, s]])
    assert pointnet2_utils.QueryAndGroup(0.7, 4, use_xyz=False)(xyz, centres, features).shape == (2, 3, 5, 4)
    assert pointnet2_utils.QueryAndGroup(0.7, 4)(xyz, centres).shape == (2, 3, 5, 4)
    with pytest.raises(ValueError, match="use_xyz=True"):
        pointnet2_utils.QueryAndGroup(0.7, 4, use_xyz=False)(xyz, centres)
    everything = pointnet2_utils.GroupAll()(xyz, None, features)
    assert torch.equal(everything, torch.cat([xyz.transpose(1, 2), features], 1).unsqueeze(2))
    assert torch.equal(pointnet2_utils.GroupAll(use_xyz=False)(xyz, None, features), features.unsqueeze(2))
    assert torch.equal(pointnet2_utils.GroupAll(use_xyz=False)(xyz, None), xyz.transpose(1, 2).unsqueeze(2))


def test_set_abstraction_has_the_originals_parameters_and_shapes():
    module = pointnet2_modules.PointnetSAModuleMSG(
        npoint=8, radii=[0.3, 0.6], nsamples=[4, 8], mlps=[[2, 16, 32], [2, 16, 24]], use_xyz=True
    )
    expected = {}
    for scale, widths in enumerate([(5, 16, 32), (5, 16, 24)]):
        for layer, (a, b) in enumerate(itertools.pairwise(widths)):
            expected[f"mlps.{scale}.{3 * layer}.weight"] = (b, a, 1, 1)
            expected[f"mlps.{scale}.{3 * layer + 1}.weight"] = (b,)
            expected[f"mlps.{scale}.{3 * layer + 1}.bias"] = (b,)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
    xyz = clouds(2, 40, seed=8, dtype=torch.float32)
    features = xyz.transpose(1, 2)[:, :2].contiguous().requires_grad_()
    centres, out = module(xyz, features)
    assert centres.shape == (2, 8, 3) and out.shape == (2, 56, 8)
    assert torch.equal(centres[0, 0], xyz[0, 0])
    out.sum().backward()
    assert features.grad.abs().sum() > 0

    whole = pointnet2_modules.PointnetSAModule(mlp=[56, 64])
    centres, out = whole(centres, out.detach())
    assert centres is None and out.shape == (2, 64, 1)


def test_feature_propagation_carries_features_by_inverse_distance():
    module = pointnet2_modules.PointnetFPModule(mlp=[5 + 2, 16]).double()
    module.mlp = torch.nn.Identity()
    fine, coarse = clouds(1, 12, seed=9), clouds(1, 6, seed=10)
    own, carried = clouds(1, 12, seed=11).transpose(1, 2)[:, :2], torch.randn(1, 5, 6, dtype=torch.float64)
    out = module(fine, coarse, own, carried)
    assert out.shape == (1, 7, 12) and torch.equal(out[:, 5:], own)
    near = sorted((math.dist(fine[0, 4].tolist(), p), j) for j, p in enumerate(coarse[0].tolist()))[:3]
    weights = [1 / (d + 1e-8) for d, _ in near]
    expected = sum(w * carried[0, :, j] for w, (_, j) in zip(weights, near, strict=True)) / sum(weights)
    torch.testing.assert_close(out[0, :5, 4], expected)
    alone = module(fine, None, None, carried[:, :, :1])
    assert torch.equal(alone, carried[:, :, :1].expand(-1, -1, 12))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("FurthestPointSampling", (clouds(1, 9, 0), 4)),
        ("BallQuery", (0.5, 3, clouds(1, 9, 0), clouds(1, 2, 1))),
        ("ThreeNN", (clouds(1, 9, 0), clouds(1, 5, 1))),
    ],
)
def test_autograd_functions_are_there_by_name(function, arguments):
    lower = {
        "FurthestPointSampling": "furthest_point_sample",
        "BallQuery": "ball_query",
        "ThreeNN": "three_nn",
    }
    a = getattr(pointnet2_utils, function).apply(*arguments)
    b = getattr(pointnet2_utils, lower[function])(*arguments)
    torch.testing.assert_close(a, b)
