"""Gather, group and interpolate: values, gradients, precisions; kernels equal to their twins."""

from __future__ import annotations

import pytest
import torch

from pointcmt.ops import (
    ball_query,
    gather_points,
    group_points,
    group_relative,
    query_and_group,
    three_interpolate,
)
from pointcmt.ops._extension import has_cpu_kernels
from pointcmt.ops.grouping import (
    reference_gather_points,
    reference_group_points,
    reference_group_relative,
    reference_three_interpolate,
)

compiled = pytest.mark.skipif(not has_cpu_kernels(), reason="the CPU kernels are not compiled")
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INDICES = [torch.int32, torch.int64]


def features_and_index(
    seed: int,
    shape: tuple[int, int, int],
    idx_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    index: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    idx = torch.randint(0, shape[2], (shape[0], *idx_shape), generator=generator)
    idx[:, :, ...] = torch.where(torch.rand(idx.shape, generator=generator) < 0.3, idx.flatten()[0], idx)
    return features, idx.to(index)  # one index comes up again and again, as padding does


def weights(seed: int, idx: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(idx.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_values() -> None:
    features = torch.arange(12.0).view(1, 2, 6)
    assert gather_points(features, torch.tensor([[5, 0, 0]])).tolist() == [[[5, 0, 0], [11, 6, 6]]]
    grouped = group_points(features, torch.tensor([[[1, 2], [3, 3], [0, 5]]]))
    assert grouped.tolist() == [[[[1, 2], [3, 3], [0, 5]], [[7, 8], [9, 9], [6, 11]]]]
    weight = torch.tensor([[[0.5, 0.25, 0.25]]])
    assert three_interpolate(features, torch.tensor([[[0, 2, 4]]]), weight).tolist() == [[[1.5], [7.5]]]


@compiled
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 16])
def test_kernels_equal_twins(channels: int, dtype: torch.dtype, index: torch.dtype) -> None:
    for seed, (n, idx_shape) in enumerate([(1, (1, 1)), (9, (5, 4)), (100, (33, 8))]):
        features, idx = features_and_index(50 + seed, (3, channels, n), idx_shape, dtype, index)
        assert torch.equal(group_points(features, idx), reference_group_points(features, idx))
        flat = idx.flatten(1)
        assert torch.equal(gather_points(features, flat), reference_gather_points(features, flat))
        three = idx.flatten(1)[:, : idx[0].numel() // 3 * 3].unflatten(1, (-1, 3))
        weight = weights(seed, three, torch.float64 if dtype == torch.float64 else torch.float32)
        expected = reference_three_interpolate(features, three, weight)
        assert torch.equal(three_interpolate(features, three, weight), expected)


@compiled
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 5, 8])
def test_gradients_equal_those_of_the_twins(channels: int, dtype: torch.dtype) -> None:
    features, idx = features_and_index(70, (2, channels, 40), (30, 6), dtype)
    three = idx[..., :3].contiguous()
    weight = weights(71, three, torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(dtype)  # the twin sums in half precision
    for op, twin, rest in (
        (group_points, reference_group_points, (idx,)),
        (gather_points, reference_gather_points, (idx[..., 0],)),
        (three_interpolate, reference_three_interpolate, (three, weight)),
    ):
        one, two = features.clone().requires_grad_(), features.clone().requires_grad_()
        got, expected = op(one, *rest), twin(two, *rest)
        slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(72)).to(dtype)
        got.backward(slope)
        expected.backward(slope)
        assert one.grad is not None and one.grad.dtype == dtype
        torch.testing.assert_close(one.grad, two.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reference", [False, True])
def test_gradcheck(reference: bool) -> None:
    features, idx = features_and_index(80, (2, 3, 7), (4, 3), torch.float64)
    features.requires_grad_()
    weight = weights(81, idx, torch.float64).requires_grad_()
    gather, group, interpolate = gather_points, group_points, three_interpolate
    if reference:
        gather, group, interpolate = (
            reference_gather_points,
            reference_group_points,
            reference_three_interpolate,
        )
    for call in (lambda f: gather(f, idx[..., 0]), lambda f: group(f, idx)):
        assert torch.autograd.gradcheck(call, (features,))
        assert torch.autograd.gradgradcheck(call, (features,))
    assert torch.autograd.gradcheck(lambda f, w: interpolate(f, idx, w), (features, weight))


def test_half_precision_gradients_are_summed_in_float32() -> None:
    features = torch.zeros(1, 1, 2, dtype=torch.float16, requires_grad=True)
    group_points(features, torch.zeros(1, 64, 64, dtype=torch.int64)).sum().backward()
    assert features.grad is not None and features.grad[0, 0].tolist() == [4096, 0]  # half stalls at 2048


def test_autocast_and_mixed_weights() -> None:
    features, idx = features_and_index(90, (2, 4, 20), (9, 3))
    weight = weights(91, idx)
    expected = three_interpolate(features, idx, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_points(features, idx), reference_group_points(features, idx))
        assert torch.equal(three_interpolate(features, idx, weight), expected)
        half = three_interpolate(features.bfloat16(), idx, weight.double())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)


def test_non_contiguous_and_empty_inputs() -> None:
    features, idx = features_and_index(100, (2, 6, 30), (5, 4))
    strided, swapped = features.transpose(1, 2).contiguous().transpose(1, 2), idx.transpose(1, 2)
    assert torch.equal(group_points(strided, swapped), reference_group_points(features, swapped.contiguous()))
    leaf = strided.detach().requires_grad_()
    group_points(leaf, swapped).permute(0, 3, 2, 1).sum().backward()
    counts = torch.stack([torch.bincount(i.flatten(), minlength=30) for i in idx])
    assert leaf.grad is not None and torch.equal(leaf.grad, counts[:, None].expand(-1, 6, -1).float())
    assert group_points(features[:0], idx[:0]).shape == (0, 6, 5, 4)
    assert group_points(features[:, :0], idx).shape == (2, 0, 5, 4)
    assert gather_points(features, idx[:, :0, 0]).shape == (2, 6, 0)
    assert three_interpolate(features, idx[:, :0, :3], torch.zeros(2, 0, 3)).shape == (2, 6, 0)
    empty = features.clone().requires_grad_()
    gather_points(empty, idx[:, :0, 0]).sum().backward()
    assert empty.grad is not None and empty.grad.abs().max() == 0


def relative_case(
    dtype: torch.dtype, channels: int | None, index: torch.dtype = torch.int64
) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(7)
    xyz, new_xyz = (torch.randn(2, n, 3, generator=random).to(dtype) for n in (9, 4))
    idx = torch.randint(0, 9, (2, 4, 5), generator=random, dtype=index)
    features = None if channels is None else torch.randn(2, channels, 9, generator=random).to(dtype)
    return xyz, new_xyz, idx, features


@pytest.mark.parametrize("channels", [None, 0, 1, 6])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", INDICES)
def test_group_relative_is_its_parts(dtype: torch.dtype, channels: int | None, index: torch.dtype) -> None:
    xyz, new_xyz, idx, features = relative_case(dtype, channels, index)
    leaves = [leaf.requires_grad_() for leaf in (xyz, new_xyz, features) if leaf is not None]
    relative = group_points(xyz.mT, idx) - new_xyz.mT[..., None]
    expected = relative if features is None else torch.cat([relative, group_points(features, idx)], 1)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    slopes = torch.autograd.grad(expected, leaves, slope)
    for op in (group_relative, reference_group_relative):
        got = op(xyz, new_xyz, idx, features)
        assert torch.equal(got, expected)
        rtol = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5)
        for one, two in zip(torch.autograd.grad(got, leaves, slope), slopes, strict=True):
            torch.testing.assert_close(one, two, rtol=rtol, atol=rtol)


def test_group_relative_gradcheck() -> None:
    xyz, new_xyz, idx, features = relative_case(torch.float64, 2)
    leaves = (xyz.requires_grad_(), new_xyz.requires_grad_(), features.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, c, f: group_relative(x, c, idx, f), leaves, nondet_tol=1e-10)
    assert torch.autograd.gradgradcheck(
        lambda x, c, f: group_relative(x, c, idx, f).square(), leaves, nondet_tol=1e-10
    )
    fixed = [leaf.detach() for leaf in leaves[:2]]  # then the coordinates' gradients are not computed
    assert torch.autograd.gradgradcheck(
        lambda f: group_relative(*fixed, idx, f).square(), leaves[2:], nondet_tol=1e-10
    )


@pytest.mark.parametrize("channels", [3, 8, 20])
@pytest.mark.parametrize(("n", "groups"), [(5, 2), (40, 7), (64, 64), (203, 50)])
def test_eight_channels_at_a_time_are_each_by_itself(channels: int, n: int, groups: int) -> None:
    features, idx = features_and_index(n, (2, channels, n), (groups, 9))
    leaf = features.clone().requires_grad_()
    out = group_points(leaf, idx)
    assert torch.equal(out, reference_group_points(features, idx))
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(n))
    (got,) = torch.autograd.grad(out, leaf, slope)
    expected = torch.zeros(2, channels, n, dtype=torch.float64)
    expected.scatter_add_(2, idx.flatten(1)[:, None].expand(-1, channels, -1), slope.flatten(2).double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for c in range(channels):  # a channel by itself, in the same order, bit by bit
        one = features[:, c : c + 1].clone().requires_grad_()
        (alone,) = torch.autograd.grad(group_points(one, idx), one, slope[:, c : c + 1].contiguous())
        assert torch.equal(alone, got[:, c : c + 1])


def test_query_and_group_promotes_and_reports() -> None:
    xyz, new_xyz, idx, features = relative_case(torch.float32, 6)
    got = query_and_group(0.8, 5, xyz, new_xyz, features.half())
    assert got.dtype == torch.float32 and got.shape == (2, 9, 4, 5)
    assert torch.equal(
        got, group_relative(xyz, new_xyz, ball_query(0.8, 5, xyz, new_xyz), features.half().float())
    )
    for arguments in ((xyz, new_xyz[:, :3], idx, features), (xyz, new_xyz, idx, features[:, :, :5])):
        with pytest.raises(ValueError, match="agree in N and in M"):
            group_relative(*arguments)
    with pytest.raises(ValueError, match="transpose"):
        group_relative(xyz.mT, xyz.mT, idx)
    with pytest.raises(IndexError, match="9"):
        group_relative(xyz, new_xyz, idx + 5, features)


FEATURES, INDEX = torch.zeros(2, 3, 5), torch.zeros(2, 4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_points(FEATURES.long(), INDEX), "floating"),
        (lambda: group_points(FEATURES[0], INDEX), r"\[B, C, N\]"),
        (lambda: group_points(FEATURES, INDEX[0]), r"\[B, M, S\]"),
        (lambda: group_points(FEATURES, INDEX.float()), "int32 or int64"),
        (lambda: group_points(FEATURES, INDEX[:1]), "batch size"),
        (lambda: gather_points(FEATURES, INDEX), r"\[B, M\]"),
        (lambda: three_interpolate(FEATURES, INDEX[..., :2], torch.zeros(2, 4, 2)), r"\[B, n, 3\]"),
        (lambda: three_interpolate(FEATURES, INDEX, torch.zeros(2, 3, 3)), r"\[B, n, 3\]"),
        (lambda: three_interpolate(FEATURES, INDEX, INDEX), "floating"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1])
def test_an_index_out_of_range_is_an_error(wrong: int, index: torch.dtype) -> None:
    idx = INDEX.to(index).clone()
    idx[1, 2, 1] = wrong
    for op in (group_points, reference_group_points):
        with pytest.raises(IndexError, match=str(wrong)):
            op(FEATURES, idx)
    with pytest.raises(IndexError, match=str(wrong)):
        gather_points(FEATURES, idx.flatten(1))
    with pytest.raises(IndexError, match=str(wrong)):
        three_interpolate(FEATURES, idx, torch.zeros(2, 4, 3))


@compiled
def test_opcheck() -> None:
    ops = torch.ops.pointcmt
    features, idx = features_and_index(110, (2, 3, 8), (5, 3))
    weight = weights(111, idx)
    leaf, leaf_weight = features.clone().requires_grad_(), weight.clone().requires_grad_()
    flat = idx.flatten(1)
    torch.library.opcheck(ops.gather_points, (leaf, flat))
    torch.library.opcheck(ops.gather_points_backward, (torch.randn(2, 3, 15, requires_grad=True), flat, 8))
    torch.library.opcheck(ops.group_points, (leaf, idx.int()))
    torch.library.opcheck(ops.group_points_backward, (torch.randn(2, 3, 5, 3, requires_grad=True), idx, 8))
    xyz, new_xyz, around, more = relative_case(torch.float32, 4)
    torch.library.opcheck(ops.group_relative, (xyz.requires_grad_(), new_xyz, around, more.requires_grad_()))
    torch.library.opcheck(ops.group_relative, (xyz, new_xyz, around.int(), None))
    for coordinates in (True, False):
        slope = torch.randn(2, 7, 4, 5, requires_grad=True)
        torch.library.opcheck(ops.group_relative_backward, (slope, around, 9, coordinates))
    torch.library.opcheck(ops.three_interpolate, (leaf, idx, leaf_weight))
    torch.library.opcheck(ops.three_interpolate_backward, (torch.randn(2, 3, 5), idx, weight, 8))
    torch.library.opcheck(ops.three_interpolate_weight_backward, (torch.randn(2, 3, 5), features, idx))


def test_compile() -> None:
    features, idx = features_and_index(120, (2, 3, 8), (5, 3))
    weight = weights(121, idx)

    def chain(f: torch.Tensor) -> torch.Tensor:
        picked = gather_points(f, idx[..., 0]) + three_interpolate(f, idx, weight)
        return picked + group_points(f, idx).amax(-1)

    whole = torch.compile(chain, fullgraph=True, backend="aot_eager")
    one, two = features.clone().requires_grad_(), features.clone().requires_grad_()
    torch.testing.assert_close(whole(one), chain(two))
    whole(one).square().sum().backward()
    chain(two).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_deterministic_mode_gives_the_same_bits_each_time() -> None:
    features, idx = features_and_index(130, (2, 5, 16), (200, 8))
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            leaf = features.clone().requires_grad_()
            group_points(leaf, idx).sin().sum().backward()
            results.append(leaf.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[0], results[1])


@pytest.mark.cuda
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_equals_cpu(
    cuda: torch.device, dtype: torch.dtype, index: torch.dtype, deterministic: bool
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        for seed, (channels, n, idx_shape) in enumerate(
            [(1, 1, (1, 1)), (7, 33, (50, 3)), (64, 512, (128, 33))]
        ):
            features, idx = features_and_index(140 + seed, (3, channels, n), idx_shape, dtype, index)
            three = idx.flatten(1)[:, : idx[0].numel() // 3 * 3].unflatten(1, (-1, 3))
            weight = weights(seed, three, torch.float64 if dtype == torch.float64 else torch.float32)
            for op, rest in (
                (group_points, (idx,)),
                (gather_points, (idx[..., 0],)),
                (three_interpolate, (three, weight)),
            ):
                here, there = features.clone().requires_grad_(), features.to(cuda).requires_grad_()
                expected = op(here, *rest)
                got = op(there, *(t.to(cuda) for t in rest))
                assert torch.equal(got.cpu(), expected)
                slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
                expected.backward(slope)
                got.backward(slope.to(cuda))
                assert here.grad is not None and there.grad is not None
                # half precision: atomics round at every addition
                loose = {torch.float16: 5e-2, torch.bfloat16: 5e-1}.get(dtype, 1e-4)
                torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=loose, atol=loose)
                if deterministic:
                    again = features.to(cuda).requires_grad_()
                    op(again, *(t.to(cuda) for t in rest)).backward(slope.to(cuda))
                    assert torch.equal(again.grad, there.grad)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
def test_cuda_gradcheck_and_empty_inputs(cuda: torch.device) -> None:
    features, idx = features_and_index(150, (2, 3, 7), (4, 3), torch.float64)
    weight = weights(151, idx, torch.float64).to(cuda).requires_grad_()
    features, idx = features.to(cuda).requires_grad_(), idx.to(cuda)
    assert torch.autograd.gradcheck(lambda f: group_points(f, idx), (features,), nondet_tol=1e-10)
    assert torch.autograd.gradcheck(
        lambda f, w: three_interpolate(f, idx, w), (features, weight), nondet_tol=1e-10
    )
    assert group_points(features[:0], idx[:0]).shape == (0, 3, 4, 3)
    assert gather_points(features, idx[:, :0, 0]).shape == (2, 3, 0)
    assert three_interpolate(features[:, :0], idx, weight).shape == (2, 0, 4)
