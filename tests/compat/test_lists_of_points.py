"""``pointops_cuda``, ``pointops2_cuda`` and ``pointops``, held to loops over points."""

from __future__ import annotations

import pytest
import torch

from pointcmt import ops
from pointcmt.compat import pointops, pointops2_cuda, pointops_cuda
from pointcmt.compat._furthest import furthest

OFFSET, NEW_OFFSET = torch.tensor([9, 20], dtype=torch.int32), torch.tensor([3, 8], dtype=torch.int32)


def rand(*shape, seed=0, **options):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.fixture
def points():
    return rand(20, 3)


@pytest.fixture
def queries():
    return rand(8, 3, seed=1)


def of(query):
    """The cloud of a query: its first point and the one after its last."""
    return (0, 9) if query < 3 else (9, 20)


def loop_furthest(cloud, m):
    """The kernel's loop, without a rule for the origin."""
    chosen, nearest = [0], [1e10] * len(cloud)
    while len(chosen) < m:
        last = cloud[chosen[-1]]
        nearest = [min(d, float((p - last).square().sum())) for d, p in zip(nearest, cloud, strict=True)]
        chosen.append(max(range(len(cloud)), key=lambda i: nearest[i]))
    return chosen


def test_furthest_points_near_the_origin_are_chosen_too():
    cloud = rand(1, 30, 3, seed=2) - 0.5
    cloud[:, 7] = 0.01  # within pointnet2_ops' rule
    cloud[:, 3:] *= 0.1
    assert furthest(cloud, 30)[0].tolist() == loop_furthest(cloud[0], 30)
    assert (
        7 in furthest(cloud, 30)[0].tolist() and 7 not in ops.furthest_point_sample(cloud, 30)[0, 1:].tolist()
    )


def test_sampling_in_both_forms(points):
    idx = torch.zeros(8, dtype=torch.int32)
    pointops_cuda.furthestsampling_cuda(2, 11, points, OFFSET, NEW_OFFSET, None, idx)
    expected = loop_furthest(points[:9], 3) + [9 + i for i in loop_furthest(points[9:], 5)]
    assert idx.tolist() == expected
    assert torch.equal(pointops.farthest_point_sampling(points, OFFSET, NEW_OFFSET), idx)
    batch = torch.zeros(2, 4, dtype=torch.int32)
    clouds = points.view(2, 10, 3)
    pointops_cuda.furthestsampling_cuda(2, 10, 4, clouds, torch.full((2, 10), 1e10), batch)
    assert batch.tolist() == [loop_furthest(cloud, 4) for cloud in clouds]


def test_nearest_neighbours_in_all_forms(points, queries):
    idx, squared = torch.zeros(8, 10, dtype=torch.int32), torch.zeros(8, 10)
    pointops_cuda.knnquery_cuda(8, 10, points, queries, OFFSET, NEW_OFFSET, idx, squared)
    theirs, distance = pointops.knn_query(10, points, OFFSET, queries, NEW_OFFSET)
    for q in range(8):
        start, end = of(q)
        apart = (points[start:end] - queries[q]).square().sum(-1)
        order = apart.argsort()
        n = min(10, end - start)  # the first cloud has nine points
        assert idx[q].tolist() == [start + i for i in order[:10].tolist()] + [start] * (10 - n)
        assert theirs[q].tolist() == idx[q, :n].tolist() + [-1] * (10 - n)
        torch.testing.assert_close(squared[q, :n], apart[order][:10])
        torch.testing.assert_close(distance[q, :n], apart[order][:10].sqrt())
    assert (squared[:3, 9] == 1e10).all()
    clouds, near, apart = points.view(2, 10, 3), torch.zeros(2, 4, 3, dtype=torch.int32), torch.zeros(2, 4, 3)
    for query in (pointops_cuda.knnquery_cuda, pointops_cuda.knnquery_heap_cuda):
        query(2, 10, 4, 3, clouds, queries.view(2, 4, 3), near, apart)
        expected = torch.cdist(queries.view(2, 4, 3), clouds).sort(-1)
        assert torch.equal(near.long(), expected.indices[..., :3])
        torch.testing.assert_close(apart.sqrt(), expected.values[..., :3])
    own, _ = pointops.knn_query(1, points, OFFSET)
    assert own[:, 0].tolist() == list(range(20))


def test_ball_queries(points, queries):
    idx = torch.zeros(8, 4, dtype=torch.int32)
    pointops_cuda.ballquery_cuda(8, 0.4, 4, points, queries, OFFSET, NEW_OFFSET, idx)
    theirs, distance = pointops.ball_query(4, 0.6, 0.3, points, OFFSET, queries, NEW_OFFSET)
    random, apart = pointops.random_ball_query(4, 0.6, 0.3, points, OFFSET, queries, NEW_OFFSET)
    short = False
    for q in range(8):
        start, end = of(q)
        squares = {i: float((points[i] - queries[q]).square().sum()) for i in range(start, end)}
        hits = [i for i, d in squares.items() if d < 0.4**2][:4]
        assert idx[q].tolist() == (hits + [hits[0]] * 4)[:4] if hits else [0] * 4
        ring = sorted((d, i) for i, d in squares.items() if d <= 1e-5 or 0.3**2 <= d < 0.6**2)
        places = [int(len(ring) / 4 * k) for k in range(4)] if len(ring) > 4 else range(len(ring))
        expected = [ring[k][1] for k in places]
        short |= len(expected) < 4
        assert theirs[q].tolist() == expected + [-1] * (4 - len(expected))
        torch.testing.assert_close(
            distance[q, : len(expected)], torch.tensor([ring[k][0] for k in places]).sqrt()
        )
        drawn = [i for i in random[q].tolist() if i >= 0]
        assert len(drawn) == min(4, len(ring)) and set(drawn) <= {i for _, i in ring}
        torch.testing.assert_close(apart[q, : len(drawn)].square(), torch.tensor([squares[i] for i in drawn]))
    assert short
    batch = torch.zeros(2, 4, 3, dtype=torch.int32)
    clouds = points.view(2, 10, 3), queries.view(2, 4, 3)
    pointops_cuda.ballquery_cuda(2, 10, 4, 0.4, 3, clouds[1], clouds[0], batch)
    assert torch.equal(batch.long(), ops.ball_query(0.4, 3, *clouds))


def numbers(n, *shape, seed=3):
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def test_grouping_and_interpolation_of_lists(points, queries):
    feat, idx, weight = rand(20, 5, seed=4), numbers(20, 8, 3), rand(8, 3, seed=5)
    grouped, out = torch.zeros(8, 3, 5), torch.zeros(8, 5)
    pointops_cuda.grouping_forward_cuda(8, 3, 5, feat, idx, grouped)
    pointops_cuda.interpolation_forward_cuda(8, 5, 3, feat, idx, weight, out)
    for q in range(8):
        rows = [feat[int(i)] for i in idx[q]]
        torch.testing.assert_close(grouped[q], torch.stack(rows))
        torch.testing.assert_close(out[q], sum(w * row for w, row in zip(weight[q], rows, strict=True)))
    assert torch.equal(pointops.grouping2(feat, idx), grouped)
    leaf, upstream = feat.clone().requires_grad_(), rand(8, 3, 5, seed=6)
    leaf[idx.long()].backward(upstream)
    grad = torch.ones(20, 5)
    pointops_cuda.grouping_backward_cuda(8, 3, 5, upstream, idx, grad)
    torch.testing.assert_close(grad, leaf.grad + 1)
    leaf.grad = None
    (leaf[idx.long()] * weight[..., None]).sum(1).backward(upstream[:, 0])
    grad = torch.zeros(20, 5)
    pointops_cuda.interpolation_backward_cuda(8, 5, 3, upstream[:, 0].contiguous(), idx, weight, grad)
    torch.testing.assert_close(grad, leaf.grad)

    near, distance = pointops.knn_query(3, points, OFFSET, queries, NEW_OFFSET)
    close = 1 / (distance + 1e-8)
    expected = (feat[near.long()] * (close / close.sum(1, keepdim=True))[..., None]).sum(1)
    torch.testing.assert_close(pointops.interpolation(points, queries, feat, OFFSET, NEW_OFFSET), expected)


def test_wrappers_of_batches_are_pointnet2s():
    feat, idx, weight = rand(2, 5, 10, seed=7), numbers(10, 2, 6, 3), rand(2, 6, 3, seed=8)
    first = idx[..., 0].contiguous()
    out = torch.zeros(2, 5, 6)
    pointops_cuda.gathering_forward_cuda(2, 5, 10, 6, feat, first, out)
    assert torch.equal(out, ops.gather_points(feat, first))
    grouped = torch.zeros(2, 5, 6, 3)
    pointops_cuda.grouping_forward_cuda(2, 5, 10, 6, 3, feat, idx, grouped)
    assert torch.equal(grouped, ops.group_points(feat, idx))
    whole = torch.zeros(2, 5, 6, 3, dtype=torch.int64)
    pointops_cuda.grouping_int_forward_cuda(2, 5, 10, 6, 3, (feat * 100).long(), idx, whole)
    assert torch.equal(whole, (grouped * 100).long())
    pointops_cuda.interpolation_forward_cuda(2, 5, 10, 6, feat, idx, weight, out)
    assert torch.equal(out, ops.three_interpolate(feat, idx, weight))
    leaf = feat.clone().requires_grad_()
    for face, args, wrapper, sizes in (
        (ops.gather_points, (first,), pointops_cuda.gathering_backward_cuda, (2, 5, 10, 6)),
        (ops.group_points, (idx,), pointops_cuda.grouping_backward_cuda, (2, 5, 10, 6, 3)),
        (ops.three_interpolate, (idx, weight), pointops_cuda.interpolation_backward_cuda, (2, 5, 6, 10)),
    ):
        result = face(leaf, *args)
        (expected,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
        grad = torch.zeros(2, 5, 10)
        wrapper(*sizes, torch.ones_like(result), *args, grad)
        torch.testing.assert_close(grad, expected)
    xyz, squared, near = rand(2, 10, 3), torch.zeros(2, 6, 3), torch.zeros(2, 6, 3, dtype=torch.int32)
    pointops_cuda.nearestneighbor_cuda(2, 6, 10, rand(2, 6, 3, seed=9), xyz, squared, near)
    assert torch.equal(near.long(), ops.three_nn(rand(2, 6, 3, seed=9), xyz)[1])


def test_attention_over_neighbours():
    x, y, idx = rand(6, 4, seed=10), rand(6, 4, seed=11), numbers(6, 6, 3)
    position, weight = rand(6, 3, 4, seed=12), rand(6, 3, 2, seed=13)
    difference, sums = torch.zeros(6, 3, 4), torch.zeros(6, 4)
    pointops_cuda.subtraction_forward_cuda(6, 3, 4, x, y, idx, difference)
    pointops_cuda.aggregation_forward_cuda(6, 3, 4, 2, x, position, weight, idx, sums)
    for i in range(6):
        for c in range(4):
            total = 0.0
            for s in range(3):
                j = int(idx[i, s])
                assert difference[i, s, c] == x[i, c] - y[j, c]
                total += float((x[j, c] + position[i, s, c]) * weight[i, s, c % 2])
            assert float(sums[i, c]) == pytest.approx(total, rel=1e-5)
    assert torch.equal(pointops.subtraction(x, y, idx), difference)
    assert torch.equal(pointops.aggregation(x, position, weight, idx), sums)

    leaves = [t.clone().requires_grad_() for t in (x, y)]
    (leaves[0][:, None] - leaves[1][idx.long()]).backward(difference)
    grads = torch.zeros(6, 4), torch.zeros(6, 4)
    pointops_cuda.subtraction_backward_cuda(6, 3, 4, idx, difference, *grads)
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, leaf.grad)
    leaves = [t.clone().requires_grad_() for t in (x, position, weight)]
    repeated = torch.cat([leaves[2]] * 2, -1)  # channel c has weight c mod 2
    ((leaves[0][idx.long()] + leaves[1]) * repeated).sum(1).backward(sums)
    grads = [torch.zeros_like(t) for t in (x, position, weight)]
    pointops_cuda.aggregation_backward_cuda(6, 3, 4, 2, x, position, weight, idx, sums, *grads)
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, leaf.grad)


# --- attention over pairs --------------------------------------------------------------------------------

N, M, H, D, STEPS = 5, 11, 2, 3, 4


def pairs():
    """Queries in ascending order, so that offsets can say them; keys; relative positions."""
    first = numbers(N, M, seed=20).sort().values
    offsets = torch.tensor([int((first < i).sum()) for i in range(N + 1)], dtype=torch.int32)
    return first, offsets, numbers(N, M, seed=21), numbers(STEPS, M, 3, seed=22)


def tensors():
    q, k = rand(N, H, D, seed=23), rand(N, H, D, seed=24)
    attn, table_q, table_k = rand(M, H, seed=25), rand(STEPS, H, D, 3, seed=26), rand(STEPS, H, D, 3, seed=27)
    return q, k, attn, table_q, table_k


def encoding(table, step, head):
    return sum(table[int(step[axis]), head, :, axis] for axis in range(3))


def looped(value, shape, index0, index1, rel_idx, add_to_query):
    """Σ over pairs of ``value(pair, head, query, key, step)``, by pair or by query."""
    rows = [[None] * H for _ in range(shape)]
    for pair in range(M):
        for head in range(H):
            row = int(index0[pair]) if add_to_query else pair
            got = value(pair, head, int(index0[pair]), int(index1[pair]), rel_idx[pair])
            rows[row][head] = got if rows[row][head] is None else rows[row][head] + got
    zero = torch.zeros(D) if add_to_query else torch.zeros(())
    return torch.stack([torch.stack([zero if v is None else v for v in row]) for row in rows])


def cases():
    first, offsets, second, rel = pairs()
    q, k, attn, table_q, table_k = tensors()
    p = pointops2_cuda
    out_m, out_n = torch.zeros(M, H), torch.zeros(N, H, D)
    sizes, wide = (N, M, H, H * D), (N, M, H, D)
    dots = lambda a, i, table, s, h: (a[i, h] * encoding(table, s, h)).sum()  # noqa: E731
    yield "step 1", (q, k), out_m, lambda q, k: looped(
        lambda m, h, i, j, s: (q[i, h] * k[j, h]).sum(), M, first, second, rel, False
    ), [
        (lambda o: p.attention_step1_forward_cuda(*sizes, q, k, first, second, o),
         lambda g, to: p.attention_step1_backward_cuda(*sizes, g, first, second, q, k, *to)),
        (lambda o: p.attention_step1_forward_cuda_v2(*sizes, 9, q, k, offsets, second, o),
         lambda g, to: p.attention_step1_backward_cuda_v2(*sizes, 9, g, offsets, second, q, k, *to)),
    ]  # fmt: skip
    yield "step 2", (attn, k), out_n, lambda a, v: looped(
        lambda m, h, i, j, s: a[m, h] * v[j, h], N, first, second, rel, True
    ), [
        (lambda o: p.attention_step2_forward_cuda(*sizes, attn, k, first, second, o),
         lambda g, to: p.attention_step2_backward_cuda(*sizes, g, first, second, attn, k, *to)),
        (lambda o: p.attention_step2_forward_cuda_v2(*sizes, 9, attn, k, offsets, second, o),
         lambda g, to: p.attention_step2_backward_cuda_v2(*sizes, 9, g, offsets, second, attn, k, *to)),
    ]  # fmt: skip
    yield "positions", (q, table_q), out_m, lambda q, t: looped(
        lambda m, h, i, j, s: dots(q, i, t, s, h), M, first, second, rel, False
    ), [
        (lambda o: p.dot_prod_with_idx_forward_cuda(*wide, q, first, table_q, rel, o),
         lambda g, to: p.dot_prod_with_idx_backward_cuda(*wide, g, q, first, table_q, rel, *to)),
    ]  # fmt: skip
    yield "positions of both", (q, k, table_q, table_k), out_m, lambda q, k, tq, tk: looped(
        lambda m, h, i, j, s: dots(q, i, tq, s, h) + dots(k, j, tk, s, h), M, first, second, rel, False
    ), [
        (lambda o: p.dot_prod_with_idx_forward_cuda_v2(
            *wide, 9, 9, q, first, k, second, table_q, table_k, rel, None, None, o),
         lambda g, to: p.dot_prod_with_idx_backward_cuda_v2(
            *wide, 9, 9, g, q, first, k, second, table_q, table_k, rel, None, None, *to)),
        (lambda o: p.dot_prod_with_idx_forward_cuda_v3(
            *wide, 9, q, offsets, k, second, table_q, table_k, rel, o),
         lambda g, to: p.dot_prod_with_idx_backward_cuda_v3(
            *wide, 9, g, q, offsets, k, second, table_q, table_k, rel, *to)),
    ]  # fmt: skip
    yield "placed values", (attn, k, table_q), out_n, lambda a, v, t: looped(
        lambda m, h, i, j, s: a[m, h] * (v[j, h] + encoding(t, s, h)), N, first, second, rel, True
    ), [
        (lambda o: p.attention_step2_with_rel_pos_value_forward_cuda(
            *wide, attn, k, first, second, table_q, rel, o),
         lambda g, to: p.attention_step2_with_rel_pos_value_backward_cuda(
            *wide, g, first, second, attn, k, table_q, rel, *to)),
        (lambda o: p.attention_step2_with_rel_pos_value_forward_cuda_v2(
            *wide, 9, attn, k, offsets, second, table_q, rel, o),
         lambda g, to: p.attention_step2_with_rel_pos_value_backward_cuda_v2(
            *wide, 9, g, offsets, second, attn, k, table_q, rel, *to)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_attention_over_pairs(case):
    _, inputs, out, twin, versions = case
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = twin(*leaves)
    upstream = rand(*expected.shape, seed=28)
    expected.backward(upstream)
    for forward, backward in versions:
        result, grads = torch.zeros_like(out), [torch.zeros_like(t) for t in inputs]
        forward(result)
        torch.testing.assert_close(result, expected.detach())
        backward(upstream, grads)
        for grad, leaf in zip(grads, leaves, strict=True):
            torch.testing.assert_close(grad, leaf.grad)


def test_pointcepts_attention_steps():
    first, _, second, _ = pairs()
    query, key, weight = rand(N, H, D), rand(N, H, D, seed=1), rand(D, seed=2).requires_grad_()
    relation = pointops.attention_relation_step(query, key, weight, first, second)
    expected = torch.stack([(query[i] * key[j] * weight).sum(-1) for i, j in zip(first, second, strict=True)])
    torch.testing.assert_close(relation, expected)
    relation.sum().backward()
    assert not weight.grad.any()
    fused = pointops.attention_fusion_step(relation.detach(), key, first, second)
    torch.testing.assert_close(
        fused,
        looped(lambda m, h, i, j, s: relation.detach()[m, h] * key[j, h], N, first, second, first, True),
    )


def test_groups_and_offsets(points, queries):
    feat = rand(20, 5, seed=30).requires_grad_()
    grouped, idx = pointops.knn_query_and_group(
        feat, points, OFFSET, queries, NEW_OFFSET, nsample=10, with_xyz=True
    )
    assert grouped.shape == (8, 10, 8) and (grouped[:3, 9] == 0).all() and (idx[:3, 9] == -1).all()
    torch.testing.assert_close(grouped[5, 2], torch.cat([points[idx[5, 2]] - queries[5], feat[idx[5, 2]]]))
    grouped.sum().backward()
    assert feat.grad.any()
    ball, inside = pointops.ball_query_and_group(
        feat, points, OFFSET, queries, NEW_OFFSET, max_radio=0.5, nsample=4
    )
    assert ball.shape == (8, 4, 5) and (ball[inside < 0] == 0).all()
    near, _ = pointops.knn_query(9, points, OFFSET, queries, NEW_OFFSET)
    both, dilated = pointops.query_and_group(3, points, queries, feat, None, OFFSET, NEW_OFFSET, dilation=3)
    assert both.shape == (8, 3, 8)
    assert dilated[0].tolist() == near[0, [0, 4, 8]].tolist()
    batch = pointops.offset2batch(OFFSET)
    assert batch.tolist() == [0] * 9 + [1] * 11
    assert torch.equal(pointops.batch2offset(batch), OFFSET)
    with pytest.raises(ValueError, match="nsample and offset"):
        pointops.knn_query_and_group(feat, points)
