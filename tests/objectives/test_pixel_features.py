"""Each point learns the image features at its pixels: targets by hand, and what does not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointcmt.methods import DenseDistillation, PicAtPoint, PointCMT
from pointcmt.objectives import ClassifierEnhancement, FeatureEnhancement, PixelFeatures, Sizes
from pointcmt.objectives.pixel_features import sampled_at
from pointcmt.students import dgcnn_part, pointnet2_part, pointnet2_scene, pointnext_part
from pointcmt.teacher import ImageTeacher
from pointcmt.types import StudentState, TeacherOutput
from pointcmt.views import ViewSpec


def test_maps_are_read_between_cells():
    maps = torch.arange(12.0).view(1, 1, 1, 3, 4)  # value 4·row + column
    pixels = torch.tensor([[0.125, 1 / 6], [0.25, 1 / 6], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])[None, None]
    found = sampled_at(maps, pixels)
    assert found.shape == (1, 1, 5, 1)
    assert found.flatten().tolist() == pytest.approx([0, 0.5, 5.5, 0, 11], abs=1e-5)


def clouds(count: int = 2, points: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(count, points, 3, generator=generator), dim=-1) * 0.9


def pictured(points: Tensor, maps: Tensor | None = None) -> TeacherOutput:
    """Pictures of the points, and maps [B, V, 2, 8, 8] of where a cell is, unless given."""
    views = ViewSpec(rig="simpleview", size=32, splat=1.5).project(points, cameras=True)
    if maps is None:
        row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        maps = torch.stack([column, row]).expand(*views.images.shape[:2], 2, 8, 8)
    return TeacherOutput(torch.zeros(len(points), 4), None, None, maps, views)


def state(local: Tensor, centers: Tensor, copies: int = 1) -> StudentState:
    return StudentState(local.new_zeros(len(local), 3), None, None, local, centers, copies)


def objective(**options) -> PixelFeatures:
    torch.manual_seed(0)
    made = PixelFeatures(hidden=16, **options)
    made.bind(sizes=Sizes(local=5, maps=2))
    return made


def test_a_target_is_the_mean_over_the_views_that_see_the_point():
    points = clouds()
    taught = pictured(points)
    target, seen = objective().targets(points, taught)
    pixels, visible = taught.views.pixels, taught.views.visible
    expected = torch.zeros(*points.shape[:2], 2)
    for shape in range(2):
        for point in range(64):
            places = [pixels[shape, v, point] for v in range(6) if visible[shape, v, point]]
            assert bool(seen[shape, point]) == bool(places)
            for place in places:  # cell (u·8 − ½, v·8 − ½), no further than the outermost centres
                expected[shape, point] += (place * 8 - 0.5).clamp(0, 7) / len(places)
    known = expected[seen]
    expected = (expected - known.mean(0)) / known.std(0)
    torch.testing.assert_close(target[seen], expected[seen], rtol=1e-3, atol=1e-3)


def test_a_point_that_knows_its_place_learns_it_and_one_that_does_not_cannot():
    points = clouds(4)
    taught = pictured(points)
    targets, _ = objective().targets(points, taught)
    losses = {}
    for name, local in (
        ("knows", torch.cat([targets, points], -1)),
        ("does not", torch.randn(4, 64, 5, generator=torch.Generator().manual_seed(1))),
    ):
        made = objective()
        optimizer = torch.optim.Adam(made.parameters(), 0.02)
        for _ in range(80):
            optimizer.zero_grad()
            loss = made(state(local, points), taught)
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
        found = float(made.found(state(local, points), taught).detach())
        assert found == pytest.approx(100 * (1 - losses[name]), abs=8)
    assert losses["knows"] < 0.1 < 0.4 < losses["does not"]


def test_points_that_no_view_sees_do_not_count():
    points = clouds()
    taught = pictured(points)
    hidden = taught._replace(views=taught.views._replace(visible=torch.zeros_like(taught.views.visible)))
    local = torch.randn(2, 64, 5, requires_grad=True)
    loss = objective()(state(local, points), hidden)
    assert loss == 0
    loss.backward()
    assert float(local.grad.abs().sum()) == 0
    counted = objective(hidden_points="count")(state(local, points), hidden)
    assert counted > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelFeatures(hidden_points="maybe"), "'count' or 'skip'"),
        (lambda: PixelFeatures(local_points=0), "expected at least 1"),
        (lambda: PixelFeatures().bind(sizes=Sizes(local=5)), "the image encoder's feature maps"),
        (lambda: objective().bind(sizes=Sizes(local=6, maps=2)), "use new objectives for another network"),
        (
            lambda: objective()(state(torch.zeros(4, 3, 5), torch.zeros(4, 3, 3), 2), pictured(clouds())),
            "one copy of each cloud, and the pass was of 2",
        ),
        (
            lambda: objective()(
                state(torch.zeros(2, 3, 5), torch.zeros(2, 3, 3)),
                (taught := pictured(clouds()))._replace(views=taught.views._replace(view_matrix=None)),
            ),
            "lack a view or a projection matrix",
        ),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- on networks for parts and scenes


def encoder() -> ImageTeacher:
    torch.manual_seed(1)
    return ImageTeacher(
        None, "simpleview_resnet", in_chans=1, feature_dim=16,
        backbone_options={"width": 0.125, "layers": (1, 1), "stem_stride": 2},
        view_spec=ViewSpec(rig="simpleview", size=32, splat=1.5),
    )  # fmt: skip


NETWORKS = {
    "pointnet2_part": lambda: pointnet2_part(6, width=0.05, npoints=(16, 8)),
    "pointnet2_scene": lambda: pointnet2_scene(6, width=0.05, npoints=(16, 8, 4, 2), in_channels=3),
    "dgcnn_part": lambda: dgcnn_part(6, width=0.05, k=8),
    "pointnext_part": lambda: pointnext_part(6, width=0.25),
}


@pytest.mark.parametrize("method", [DenseDistillation, PicAtPoint])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_point_of_a_network_is_taught_and_nothing_remains(method, name):
    torch.manual_seed(2)
    network, images, points = NETWORKS[name](), encoder(), clouds(3)
    keys = list(network.state_dict())
    with method(images, network, points=points, hidden=16) as pre:
        assert pre.report.local_shape[:2] == (3, 64), "one local feature for each point"
        optimizer = torch.optim.Adam([*network.parameters(), *pre.parameters()], 0.01)
        found = []
        for _ in range(6):
            optimizer.zero_grad()
            network(points)
            loss = pre.loss(views=images.project(points, cameras=True))
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    assert found[-1] < found[0]
    assert list(network.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_pointcmt_on_parts_where_there_is_a_global_feature_else_a_clear_error():
    torch.manual_seed(3)
    network, points = pointnet2_part(6, width=0.05, npoints=(16, 8)), clouds(3)
    width = network.encode(points).global_.shape[1]
    teacher = ImageTeacher(
        4, "simpleview_resnet", in_chans=1, feature_dim=width,
        backbone_options={"width": 0.125, "layers": (1, 1), "stem_stride": 2}, view_spec=ViewSpec(size=32),
    )  # fmt: skip
    from pointcmt.generator import PointGenerator

    generator = PointGenerator(width, 32)
    with PointCMT(teacher, network, generator=generator, objectives=[FeatureEnhancement(30.0)]) as cmt:
        network(points, torch.tensor([0, 1, 2]))
        loss = cmt.loss(views=teacher.project(points))
        loss.backward()
    assert loss > 0 and network.sa1.mlp_convs[0].weight.grad.abs().sum() > 0
    with (
        PointCMT(teacher, network, generator=generator, objectives=[ClassifierEnhancement(0.3)]) as cmt,
        pytest.raises(ValueError, match=r"needs the student's classifier.*give the adapter classify"),
    ):
        network(points)
        cmt.loss(views=teacher.project(points))
