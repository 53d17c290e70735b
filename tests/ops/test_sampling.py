"""Furthest point sampling: pointnet2_ops' meaning, and the kernel equal to its twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pointcmt.ops import furthest_point_sample, voxel_subsample
from pointcmt.ops._extension import has_cpu_kernels
from pointcmt.ops.sampling import (
    reference_furthest_point_sample,
    reference_voxel_subsample,
    tie_order,
)
from tests.ops.clouds import hard_clouds, large_clouds, modelnet_clouds

compiled = pytest.mark.skipif(not has_cpu_kernels(), reason="the CPU kernels are not compiled")


def tree_reduction(cloud: torch.Tensor, npoint: int) -> list[int]:
    """pointnet2_ops' kernel, thread by thread: its S threads, their stride, the halving of pairs."""
    n = len(cloud)
    threads = 1
    while threads * 2 <= n and threads < 512:
        threads *= 2
    points = cloud.double().tolist()  # exact for the grids that it is used on
    nearest = [1e10] * n
    chosen = [0]
    for _ in range(1, npoint):
        x, y, z = points[chosen[-1]]
        best, where = [-1.0] * threads, [0] * threads
        for k, (px, py, pz) in enumerate(points):
            if px * px + py * py + pz * pz <= 1e-3:
                continue
            nearest[k] = min(nearest[k], (px - x) ** 2 + (py - y) ** 2 + (pz - z) ** 2)
            if nearest[k] > best[k % threads]:
                best[k % threads], where[k % threads] = nearest[k], k
        half = threads // 2
        while half:
            for t in range(half):
                if best[t + half] > best[t]:
                    best[t], where[t] = best[t + half], where[t + half]
            half //= 2
        chosen.append(where[0])
    return chosen


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 100, 511, 512, 700])
def test_ties_fall_as_in_the_tree_reduction_of_pointnet2_ops(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    cloud = (
        torch.randint(-2, 3, (1, n, 3), generator=generator).float() / 2
    )  # zeros included: they are skipped
    npoint = min(n, 24)
    expected = tree_reduction(cloud[0], npoint)
    assert furthest_point_sample(cloud, npoint)[0].tolist() == expected
    assert reference_furthest_point_sample(cloud, npoint)[0].tolist() == expected


def test_tie_order_is_a_permutation_that_starts_with_point_zero() -> None:
    for n in (1, 2, 5, 64, 513, 1500):
        order = tie_order(n)
        assert order[0] == 0
        assert sorted(order.tolist()) == list(range(n))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 257, 1024])
def test_kernel_equals_twin(n: int, dtype: torch.dtype) -> None:
    for name, cloud in hard_clouds(1000 + n, 3, n, dtype).items():
        npoint = min(n, 64)
        expected = reference_furthest_point_sample(cloud, npoint)
        assert torch.equal(torch.ops.pointcmt.furthest_point_sample(cloud, npoint), expected), name


@compiled
def test_kernel_equals_twin_on_modelnet40(modelnet40_root: Path) -> None:
    clouds = modelnet_clouds(modelnet40_root, 6, seed=3)
    expected = reference_furthest_point_sample(clouds, 256)
    assert torch.equal(furthest_point_sample(clouds, 256), expected)


def test_chooses_the_furthest_point_each_time() -> None:
    cloud = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chosen = furthest_point_sample(cloud, 50)
    distance = torch.cdist(cloud, cloud.gather(1, chosen[..., None].expand(-1, -1, 3)))
    usable = cloud.square().sum(-1) > 1e-3
    for i in range(1, 50):
        gap = distance[:, :, :i].amin(-1).masked_fill(~usable, -1)
        reached = gap.gather(1, chosen[:, i : i + 1])[:, 0]
        torch.testing.assert_close(reached, gap.amax(1))


def test_points_near_the_origin_count_as_padding() -> None:
    cloud = torch.zeros(1, 10, 3)
    cloud[0, 3] = torch.tensor([1.0, 0, 0])
    cloud[0, 5] = torch.tensor([0, 2.0, 0])
    cloud[0, 7] = torch.tensor([0, 0, 0.03])  # squared norm 9e-4
    assert furthest_point_sample(cloud, 3).tolist() == [[0, 5, 3]]
    assert furthest_point_sample(torch.zeros(1, 6, 3), 4).tolist() == [[0, 0, 0, 0]]


def test_half_precision_is_compared_in_float32() -> None:
    cloud = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(6)).half()
    assert torch.equal(furthest_point_sample(cloud, 20), furthest_point_sample(cloud.float(), 20))


def test_non_contiguous_and_empty_batches() -> None:
    cloud = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(7))
    expected = furthest_point_sample(cloud.transpose(1, 2).contiguous(), 10)
    assert torch.equal(furthest_point_sample(cloud.transpose(1, 2), 10), expected)
    assert furthest_point_sample(torch.zeros(0, 5, 3), 2).shape == (0, 2)


def test_nan_gives_indices_in_range() -> None:
    cloud = torch.full((1, 20, 3), float("nan"))
    chosen = furthest_point_sample(cloud, 20)
    assert chosen.min() >= 0 and chosen.max() < 20


@pytest.mark.parametrize(
    ("cloud", "npoint", "message"),
    [
        (torch.zeros(2, 5, 3), 6, "npoint"),
        (torch.zeros(2, 5, 3), 0, "npoint"),
        (torch.zeros(2, 0, 3), 1, "npoint"),
        (torch.zeros(2, 3, 5), 1, "transpose"),
        (torch.zeros(5, 3), 1, r"\[B, N, D\]"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), 1, "floating"),
    ],
)
def test_errors(cloud: torch.Tensor, npoint: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        furthest_point_sample(cloud, npoint)


@compiled
def test_opcheck_and_compile() -> None:
    cloud = torch.randn(2, 33, 3, generator=torch.Generator().manual_seed(8))
    torch.library.opcheck(torch.ops.pointcmt.furthest_point_sample, (cloud, 5))
    torch.library.opcheck(torch.ops.pointcmt.furthest_point_sample, (cloud, 5, torch.tensor([33, 4])))
    whole = torch.compile(furthest_point_sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(cloud, 5), furthest_point_sample(cloud, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(furthest_point_sample(cloud, 5), whole(cloud, 5))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_clouds_equal_the_twin(dtype: torch.dtype) -> None:
    """Through a tree: the same choices, also where many points are equally far."""
    for name, cloud in large_clouds(40, 3001, dtype).items():
        expected = reference_furthest_point_sample(cloud, 200)
        assert torch.equal(torch.ops.pointcmt.furthest_point_sample(cloud, 200), expected), name
    few = torch.zeros(1, 2500, 3, dtype=dtype)
    few[:, ::400] = torch.randn(7, 3, generator=torch.Generator().manual_seed(41), dtype=dtype)
    assert torch.equal(furthest_point_sample(few, 40), reference_furthest_point_sample(few, 40))
    none = torch.zeros(1, 2500, 3, dtype=dtype)
    assert (furthest_point_sample(none, 40) == 0).all()


def test_with_lengths_each_row_is_that_of_its_cloud() -> None:
    clouds = torch.randn(4, 2600, 3, generator=torch.Generator().manual_seed(42))
    lengths = torch.tensor([2600, 2100, 70, 3])
    chosen = furthest_point_sample(clouds, 60, lengths)
    assert torch.equal(chosen, reference_furthest_point_sample(clouds, 60, lengths))
    for b, length in enumerate(lengths.tolist()):
        npoint = min(length, 60)
        assert torch.equal(chosen[b, :npoint], furthest_point_sample(clouds[b : b + 1, :length], npoint)[0])
    assert chosen[3, 3:].unique().numel() == 1  # all three are chosen: one of them again and again


# ------------------------------------------------------------------------------------------ voxels


def test_voxels_keep_their_first_point_and_the_way_back() -> None:
    points = torch.tensor([[0.0, 0, 0], [0.9, 0.1, 0], [-0.1, 0, 0], [1.0, 0, 0], [0.2, 0.2, 0.9]])
    kept, inverse = voxel_subsample(points, 1.0)
    assert kept.tolist() == [0, 2, 3]
    assert inverse.tolist() == [0, 0, 1, 2, 0]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_voxel_kernel_equals_twin(dtype: torch.dtype) -> None:
    for name, cloud in large_clouds(43, 3001, dtype).items():
        for size in (1e-3, 0.1, 0.25, 7.0):
            got, expected = voxel_subsample(cloud[0], size), reference_voxel_subsample(cloud[0], size)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), (name, size)
            kept, inverse = got
            assert torch.equal(inverse[kept], torch.arange(len(kept)))
            cells = (cloud[0] / torch.tensor(size, dtype=dtype)).floor()
            assert torch.equal(cells[kept][inverse], cells)
            assert len(cells.unique(dim=0)) == len(kept)


@pytest.mark.parametrize("op", [voxel_subsample, reference_voxel_subsample])
def test_voxels_without_points_and_out_of_range(op) -> None:
    kept, inverse = op(torch.zeros(0, 3), 0.1)
    assert kept.shape == inverse.shape == (0,)
    for bad in (float("nan"), float("inf"), 1e38):
        with pytest.raises(ValueError, match="finite and within"):
            op(torch.tensor([[0.0, bad, 0.0]]), 1e-3)


@pytest.mark.parametrize(
    ("points", "size", "message"),
    [
        (torch.zeros(1, 5, 3), 0.1, "one cloud"),
        (torch.zeros(5, 2), 0.1, "one cloud"),
        (torch.zeros(5, 3, dtype=torch.int64), 0.1, "floating"),
        (torch.zeros(5, 3), 0.0, "size"),
        (torch.zeros(5, 3), float("inf"), "size"),
        (torch.zeros(5, 3), float("nan"), "size"),
    ],
)
def test_voxel_errors(points: torch.Tensor, size: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voxel_subsample(points, size)


@compiled
def test_voxel_opcheck_and_compile() -> None:
    cloud = torch.randn(50, 3, generator=torch.Generator().manual_seed(44))
    torch.library.opcheck(torch.ops.pointcmt.voxel_subsample, (cloud, 0.5))
    whole = torch.compile(lambda p: voxel_subsample(p, 0.5)[1], fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # torch 2.6 asks for it
        assert torch.equal(whole(cloud), voxel_subsample(cloud, 0.5)[1])


@pytest.mark.cuda
def test_cuda_voxels_and_lengths(cuda: torch.device) -> None:
    for cloud in large_clouds(45, 2000).values():
        for got, expected in zip(
            voxel_subsample(cloud[0].to(cuda), 0.1), reference_voxel_subsample(cloud[0], 0.1), strict=True
        ):
            assert torch.equal(got.cpu(), expected)
    clouds, lengths = (
        torch.randn(3, 900, 3, generator=torch.Generator().manual_seed(46)),
        torch.tensor([900, 30, 1]),
    )
    got = furthest_point_sample(clouds.to(cuda), 40, lengths.to(cuda))
    assert torch.equal(got.cpu(), reference_furthest_point_sample(clouds, 40, lengths))


@pytest.mark.cuda
def test_cuda_equals_twin(cuda: torch.device) -> None:
    for n in (1, 2, 33, 512, 1000, 1024, 2048, 5000):
        for name, cloud in hard_clouds(2000 + n, 3, n).items():
            npoint = min(n, 64)
            expected = reference_furthest_point_sample(cloud, npoint)
            assert torch.equal(furthest_point_sample(cloud.to(cuda), npoint).cpu(), expected), (name, n)
            wide = cloud.double()
            expected = reference_furthest_point_sample(wide, npoint)
            assert torch.equal(furthest_point_sample(wide.to(cuda), npoint).cpu(), expected), (name, n)
    assert furthest_point_sample(torch.zeros(0, 5, 3, device=cuda), 2).shape == (0, 2)
