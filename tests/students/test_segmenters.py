"""What a user of the networks for parts and scenes relies on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pointcmt import students
from pointcmt.adapters import find_adapter, verify_adapter
from pointcmt.adapters.proof import observe
from pointcmt.students import _blocks as blocks

PUBLIC = json.loads((Path(__file__).parent / "public_segmentation_names.json").read_text())
# of each: the network, channels of its points, its adapter, and what makes it small
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int, str, dict]] = {
    "pointnet2-part-ssg-3": (students.pointnet2_part, 3, "students-pointnet2part", {"npoints": (32, 8)}),
    "pointnet2-part-msg-6": (
        lambda k, **options: students.pointnet2_part(k, "msg", in_channels=6, **options),
        6,
        "students-pointnet2part",
        {"npoints": (32, 8)},
    ),
    "pointnet2-scene-ssg": (
        students.pointnet2_scene, 9, "students-pointnet2scene", {"npoints": (32, 16, 8, 4), "scale": 4.0}
    ),
    "pointnet2-scene-msg": (
        lambda k, **options: students.pointnet2_scene(k, "msg", **options),
        9,
        "students-pointnet2scene",
        {"npoints": (32, 16, 8, 4), "scale": 4.0},
    ),
    "dgcnn-part": (students.dgcnn_part, 3, "students-dgcnnpart", {"k": 8}),
    "dgcnn-scene": (students.dgcnn_scene, 9, "students-dgcnnscene", {"k": 8}),
    "pointnext-part": (
        lambda k, **options: students.pointnext_part(k, in_channels=7, **options),
        7,
        "students-pointnextseg",
        {},
    ),
    "pointnext-scene": (students.pointnext_scene, 7, "students-pointnextseg", {"scale": 4.0}),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def name(request) -> str:
    return request.param


@pytest.fixture
def small(name) -> blocks.Segmenter:
    torch.manual_seed(7)
    build, _, _, options = NETWORKS[name]
    return build(6, width=0.125, dropout=0.0, **options)


@pytest.fixture
def points(name) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 260, NETWORKS[name][1], generator=generator) * 2 - 1


def category_of(network: blocks.Segmenter) -> Tensor | None:
    return torch.tensor([0, 3, 5]) if network.categories else None


def test_names_shapes_and_parameter_counts_are_those_of_the_public_class(name):
    network = NETWORKS[name][0](50 if "part" in name else 13)
    own = {
        key: list(value.shape)
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert own == PUBLIC[name]["state"]
    assert sum(p.numel() for p in network.parameters()) == PUBLIC[name]["parameters"]


def test_logits_and_a_gradient_for_every_parameter(small, points):
    logits = small(points, category_of(small))
    assert logits.shape == (3, 260, 6) and logits.isfinite().all()
    nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(3 * 260) % 6).backward()
    assert not [key for key, p in small.named_parameters() if p.grad is None]
    assert logits.std(1).min() > 0, "points cannot be told apart"


def test_the_adapter_is_ours_and_taps_a_feature_for_each_point(small, name, points):
    adapter = find_adapter(small)
    assert adapter.name == NETWORKS[name][2]
    small.eval()
    report = verify_adapter(small, points)
    assert report.local_shape[:2] == (3, 260) and not report.unchecked
    category = category_of(small)
    seen = observe(small, adapter, lambda: adapter.call(small, points, category))
    found = small.encode(points, category)
    assert torch.equal(seen.local[0], found.local) and torch.equal(seen.local[1], points[..., :3])
    assert torch.equal(seen.feature, found.global_)
    assert torch.equal(adapter.per_point(seen.output), small.score(found.local))


def test_the_category_counts_and_may_be_unknown(small, points):
    small.eval()
    if not small.categories:
        assert torch.equal(small(points), small(points, torch.tensor([1, 2, 3]))), "scenes have none"
        return
    one, other = small(points, torch.tensor([0, 0, 0])), small(points, torch.tensor([1, 1, 1]))
    assert (one - other).abs().max() > 1e-5
    assert small(points).isfinite().all()
    with pytest.raises(ValueError, match="categories from 0 to 16; expected 0 to 15"):
        small(points, torch.tensor([0, 1, 16]))
    with pytest.raises(ValueError, match=r"expected int64 \[3\]"):
        small(points, torch.tensor([0, 1]))


def test_the_batch_and_the_order_of_points_do_not_matter(small, name, points):
    small.eval().double()
    points, category = points.double(), category_of(small)
    once = small(points, category)
    alone = small(points[1:2], None if category is None else category[1:2])
    torch.testing.assert_close(alone, once[1:2], rtol=1e-8, atol=1e-8)
    if not name.startswith("dgcnn"):
        return  # sampling begins at point 0, and balls are cut off by index
    order = torch.randperm(260, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(small(points[:, order], category), once[:, order], rtol=1e-8, atol=1e-8)


def test_wrong_points_are_explained(small, points):
    with pytest.raises(ValueError, match=r"\[B, N, \d\].*; transpose"):
        small(points.transpose(1, 2))
    with pytest.raises(ValueError, match=r"at least \d+ points per cloud"):
        small(points[:, :0])


def test_interpolation_is_exact_at_the_centres_and_in_between():
    far = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [9, 9, 9], [8, 8, 8]]])
    features = torch.tensor([[[1.0], [3.0], [100.0], [100.0]]])
    near = torch.tensor([[[0.0, 0, 0], [0.5, 0, 0]]])
    found = blocks.interpolate(near, far, features, squared=True)
    assert found[0, 0, 0] == pytest.approx(1.0, abs=1e-4)
    apart = torch.tensor([0.25, 0.25, (7.5**2 + 2 * 8**2)])  # by hand: 1/d² of the three nearest
    weights = 1 / apart
    expected = (weights * torch.tensor([1.0, 3.0, 100.0])).sum() / weights.sum()
    assert found[0, 1, 0] == pytest.approx(float(expected), abs=1e-4)
    single = blocks.interpolate(near, far[:, :1], features[:, :1], squared=False)
    assert torch.equal(single, torch.ones(1, 2, 1))
