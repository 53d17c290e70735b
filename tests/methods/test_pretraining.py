"""Pic@Point, MM-Point and CrossPoint on a small network: what they compute, train and leave behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pointcmt.heads import LocalHead, PoseEncoder, ProjectionHead
from pointcmt.methods import CrossPoint, MMPoint, PicAtPoint
from pointcmt.objectives import (
    CrossModalNTXent,
    GlobalInfoNCE,
    IntraModalNTXent,
    LocalInfoNCE,
    MultiViewInfoNCE,
    Sizes,
)
from pointcmt.types import StudentState, TeacherOutput
from pointcmt.views import ViewSpec, pixels_of
from pointcmt.views.augmentation import ViewAugmentation
from pointcmt.views.cells import cells_of, moved
from tests.pretraining_toys import (
    IMAGE,
    LOCAL,
    MAPS,
    NoMaps,
    adapter,
    cameras,
    clouds,
    images,
    network,
    views_of,
)
from tests.toys import hooks


def two(points: torch.Tensor) -> torch.Tensor:
    return torch.cat([points, points + 0.01 * torch.randn_like(points)])


def step(method, model, points, views):
    model(points if method.copies == 1 else two(points))
    return method.loss(views=views)


METHODS = {"pic-at-point": (PicAtPoint, 1), "mm-point": (MMPoint, 4), "crosspoint": (CrossPoint, 1)}


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_leaves_the_network_as_it_was(name):
    kind, count = METHODS[name]
    model, encoder = network(), images()
    keys, before = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    points = clouds(8)
    views = views_of(points, count)
    with kind(encoder, model, points=points[:2], adapter=adapter()) as pre:
        trained = list(pre.parameters())
        assert len({id(parameter) for parameter in trained}) == len(trained) > 0
        optimizer = torch.optim.Adam([*model.parameters(), *trained], 3e-3)
        history = []
        for _ in range(40):
            loss = step(pre, model, points, views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        chances = [objective.chance for objective in pre.objectives]
        assert history[0] == pytest.approx(sum(chances), rel=0.5)
        assert history[-1] < 0.7 * history[0]
        frozen = name == "pic-at-point"
        assert encoder.training is not frozen
        state = pre.state_dict()
        pre.load_state_dict(state)
    assert list(model.state_dict()) == keys
    assert hooks(model) == 0
    assert not torch.equal(model.points[0].weight, before["points.0.weight"])
    # a layer after the pooled feature has no part in it
    assert torch.equal(model.head.weight, before["head.weight"])


def test_pic_at_point_is_the_papers_sum():
    """Both terms written out with the context's own heads: cross-entropy over all cells, and over images."""
    torch.manual_seed(0)
    model, encoder, points = network(), images(), clouds(4)
    views = views_of(points)
    with PicAtPoint(encoder, model, points=points, adapter=adapter(), temperature=0.2) as pre:
        local, whole = pre.objectives
        model(points)
        loss = pre.loss(views=views)
        with torch.no_grad():  # such passes are not seen
            said = encoder(views.images, maps=True)
            features = model.points(points)
            z = F.normalize(local.point_head(features, views.view_matrix[:, 0]), dim=-1).flatten(0, 1)
            cells = F.normalize(local.map_head(said.maps[:, 0]), dim=1).flatten(2).mT.flatten(0, 1)
            cell = cells_of(pixels_of(points, views.view_matrix, views.projection_matrix)[0][:, 0], 4, 4)
            target = (torch.arange(4)[:, None] * 16 + cell).flatten()
            assert (cell >= 0).all()
            expected = F.cross_entropy(z @ cells.T / 0.2, target)
            assert pre.losses["local"] == pytest.approx(expected.item(), rel=1e-4)
            g = F.normalize(whole.point_head(features.amax(1)), dim=-1)
            q = F.normalize(whole.image_head(said.feature), dim=-1)
            both = expected + F.cross_entropy(g @ q.T / 0.2, torch.arange(4))
            torch.testing.assert_close(loss, both, rtol=1e-4, atol=1e-4)
            assert local.chance == pytest.approx(math.log(4 * 16))
            assert whole.chance == pytest.approx(math.log(4))


def test_pic_at_points_ablations():
    points = clouds(3)

    def names(**options):
        pre = PicAtPoint(images(), network(), points=points, adapter=adapter(), **options)
        return [objective.name for objective in pre.objectives]

    assert names() == ["local", "global"]
    assert names(local_weight=0) == ["global"]
    assert names(global_weight=0) == ["local"]
    with PicAtPoint(images(), network(), points=points, adapter=adapter(), pose=False) as pre:
        assert not any(isinstance(module, PoseEncoder) for module in pre.objectives.modules())
    # without local features the global term alone is still there for anybody's network
    with PicAtPoint(images(), network(), points=points, adapter=adapter(False), local_weight=0) as pre:
        pre.student(points)
        assert pre.loss(views=views_of(points, with_cameras=False)) > 0
    # the fourth row: normals beside the coordinates
    six = torch.cat([points, F.normalize(points, dim=-1)], -1)
    model = network(6)
    with PicAtPoint(images(), model, points=six, adapter=adapter()) as pre:
        model(six)
        assert torch.isfinite(pre.loss(views=views_of(points)))


def test_the_pose_matters_to_the_local_head_and_turning_both_changes_only_the_code():
    head = LocalHead(LOCAL).eval()
    local, (view, projection) = torch.randn(2, 5, LOCAL), cameras(2, 2)
    assert not torch.allclose(head(local, view[:, 0]), head(local, view[:, 1]))
    assert head(local, view[:, 0]).shape == (2, 5, 512)
    points = clouds(2)
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).repeat(2, 1, 1)
    turned = moved(views_of(points, 2), turn)
    pixels, _ = pixels_of(points @ turn.mT, turned.view_matrix, projection)
    torch.testing.assert_close(pixels, views_of(points, 2).pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_projects_images_can_have_a_rate_of_its_own(name):
    kind, _ = METHODS[name]
    for trained in (False, True):
        encoder = images()
        pre = kind(encoder, network(), points=clouds(2), adapter=adapter(), train_images=trained)
        assert {id(p) for p in pre.parameters("images")} <= {id(p) for p in pre.parameters()}  # no heads yet
        with pre:
            sides = {side: list(map(id, pre.parameters(side))) for side in ("points", "images", "both")}
            assert sorted(sides["points"] + sides["images"]) == sorted(sides["both"])
            assert not set(sides["points"]) & set(sides["images"])
            theirs = {
                id(p) for o in pre.objectives for n, p in o.named_parameters() if "image" in n or "map" in n
            }
            theirs |= {id(p) for p in encoder.parameters()} if trained else set()
            assert set(sides["images"]) == theirs and theirs and sides["points"]


@pytest.mark.parametrize("name", METHODS)
def test_it_makes_as_many_views_as_it_takes_in_a_step(name):
    kind, count = METHODS[name]
    encoder, points = images(), clouds(3)
    pre = kind(encoder, network(), points=points, adapter=adapter())
    with pytest.raises(ValueError, match=r"Images\) does not say how its images are made.*view_spec="):
        pre.project(points)
    encoder.view_spec = ViewSpec("simpleview", size=16)
    torch.manual_seed(0)
    drawn = pre.project(points)
    assert drawn.images.shape == (3, count, 1, 16, 16)
    everything = encoder.view_spec.project(points, cameras=True)
    for shape in range(3):  # each is one of the rig's, and others are drawn for others
        rows = [
            int((everything.view_matrix[shape] - one).abs().amax((1, 2)).argmin())
            for one in drawn.view_matrix[shape]
        ]
        assert len(set(rows)) == count
        torch.testing.assert_close(drawn.images[shape], everything.images[shape, rows])


def test_hidden_points_can_be_skipped():
    torch.manual_seed(0)
    model, points = network(), clouds(4)
    views = views_of(points)
    visible = torch.rand(views.visible.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    values = {}
    for hidden in ("count", "skip"):
        torch.manual_seed(1)
        with PicAtPoint(
            images(), model, points=points, adapter=adapter(), hidden_points=hidden, global_weight=0
        ) as pre:
            for what, seen in (("all", torch.ones_like(visible)), ("half", visible)):
                model(points)
                values[hidden, what] = pre.loss(views=views._replace(visible=seen)).item()
    assert values["count", "all"] == values["count", "half"] == values["skip", "all"]
    assert values["skip", "half"] != values["skip", "all"]


def test_some_of_the_local_features_in_each_step():
    model, points = network(), clouds(4)
    views = views_of(points)
    with PicAtPoint(
        images(), model, points=points, adapter=adapter(), local_points=5, global_weight=0
    ) as pre:
        seen = []
        pre.objectives[0].point_head.first.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        for _ in range(2):
            model(points)
            assert torch.isfinite(pre.loss(views=views))
    assert [tuple(rows.shape) for rows in seen] == [(4, 5, LOCAL)] * 2
    assert not torch.equal(*seen)  # others at every step
    with pytest.raises(ValueError, match="local_points is 0"):
        LocalInfoNCE(local_points=0)


def test_mm_point_compares_the_first_copy_with_the_first_half_of_the_views():
    objective = MultiViewInfoNCE(views=4)
    objective.bind(sizes=Sizes(global_=LOCAL, image=IMAGE))
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for side, heads in (("point", objective.point_heads), ("image", objective.image_heads)):
        for view, head in enumerate(heads):
            head.register_forward_hook(
                lambda _m, args, _o, side=side, view=view: seen.update({(side, view): args[0]})
            )
    first, second = torch.randn(2, 5, LOCAL).unbind()
    per_view = torch.randn(5, 4, IMAGE)
    pooled = torch.cat([first, second])
    state = StudentState(pooled, None, None, copies=2, global_=pooled)
    teacher = TeacherOutput(per_view.amax(1), per_view=per_view)
    total = objective(state, teacher)
    for view, copy in enumerate((first, first, second, second)):
        assert torch.equal(seen["point", view], copy)
        assert torch.equal(seen["image", view], per_view[:, view])
    assert [head.out_features for head in objective.point_heads] == [512, 320, 192, 128]
    assert objective.chance == pytest.approx(8 * math.log(5))
    mean = MultiViewInfoNCE(views=4, reduction="mean")
    mean.bind(sizes=Sizes(global_=LOCAL, image=IMAGE))
    mean.load_state_dict(objective.state_dict())
    torch.testing.assert_close(8 * mean(state, teacher), total)


def test_mm_points_ablations():
    points = clouds(4)
    model = network()
    with MMPoint(
        images(), model, points=points, adapter=adapter(), views=2, shared_head=True, train_images=False
    ) as pre:
        assert len(pre.objectives[1].point_heads) == 1
        before = sum(parameter.numel() for parameter in pre.parameters())
        model(two(points))
        assert pre.loss(views=views_of(points, 2)) > 0
        model(two(points))
        with pytest.raises(ValueError, match="1 views per shape; expected 2"):
            pre.loss(views=views_of(points, 1))
    with MMPoint(images(), model, points=points, adapter=adapter(), views=2) as pre:
        assert sum(parameter.numel() for parameter in pre.parameters()) > before
    changed = []

    def record(image):
        changed.append(image.shape)
        return image

    with MMPoint(
        images(), model, points=points, adapter=adapter(), augment=ViewAugmentation([record]), intra_weight=0
    ) as pre:
        model(two(points))
        pre.loss(views=views_of(points, 4))
    assert len(changed) == 16


def test_crosspoint_takes_the_mean_of_both_raw_projections():
    peer = pytest.importorskip("lightly.loss", reason="lightly is a peer of the tests; pip install lightly")
    torch.manual_seed(0)
    model, encoder, points = network(), images(), clouds(5)
    both, views = two(points), views_of(points)
    with CrossPoint(encoder, model, points=points, adapter=adapter()) as pre:
        intra, cross = pre.objectives
        model(both)
        loss = pre.loss(views=views)
        with torch.no_grad():  # such passes are not seen
            z = intra.point_head(model.points(both).amax(1))
            image = cross.image_head(encoder(views.images).feature)
        nt_xent = peer.NTXentLoss(temperature=0.1)
        expected = nt_xent(z[:5], z[5:]) + nt_xent((z[:5] + z[5:]) / 2, image)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        # one head for both terms, trained once
        assert isinstance(intra.point_head.head, ProjectionHead)
        assert cross.point_head is None and pre.objectives[0].chance == pytest.approx(math.log(9))
    alone = CrossPoint(encoder, model, points=points, adapter=adapter(), intra_weight=0)
    with alone as pre:
        model(both)
        assert pre.loss(views=views) > 0


# ---- bad input


def test_a_network_without_local_features_is_told_what_to_do():
    with (
        pytest.raises(ValueError, match=r"local needs local features.*local=Tap.*leave the local term out"),
        PicAtPoint(images(), network(), points=clouds(2), adapter=adapter(False)),
    ):
        pass


def test_an_encoder_without_maps():
    encoder = NoMaps()
    encoder.map_channels = None
    with (
        pytest.raises(ValueError, match="size of the image encoder's feature maps is not known"),
        PicAtPoint(encoder, network(), points=clouds(2), adapter=adapter()),
    ):
        pass
    encoder.map_channels = MAPS
    model, points = network(), clouds(3)
    with PicAtPoint(encoder, model, points=points, adapter=adapter()) as pre:
        model(points)
        with pytest.raises(ValueError, match=r"cannot give maps, which local.* use an ImageTeacher"):
            pre.loss(views=views_of(points))


def test_views_without_cameras():
    model, points = network(), clouds(3)
    with PicAtPoint(images(), model, points=points, adapter=adapter()) as pre:
        model(points)
        with pytest.raises(ValueError, match=r"needs the views' cameras.*cameras=True"):
            pre.loss(views=views_of(points, with_cameras=False))
        model(points)
        with pytest.raises(ValueError, match=r"needs the views' cameras.*cameras=True"):
            pre.loss(views=views_of(points).images)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_has_no_negatives(name):
    kind, count = METHODS[name]
    model, points = network(), clouds(1)
    with kind(images(), model, points=clouds(2), adapter=adapter()) as pre:
        model.train()
        model(points if pre.copies == 1 else two(points))
        with pytest.raises(ValueError, match=r"batch of 1 shape\(s\) has no negatives.*at least 2 shapes"):
            pre.loss(views=views_of(points, count))


@pytest.mark.parametrize("name", METHODS)
def test_without_sample_points_the_heads_have_no_size(name):
    kind, _ = METHODS[name]
    with (
        pytest.raises(ValueError, match=r"is not known, and a projection head is made by it.*points="),
        kind(images(), network(), points=None, adapter=adapter()),
    ):
        pass


def test_no_loss_at_all_and_wrong_options():
    args = (images(), network())
    with pytest.raises(ValueError, match="has no loss"):
        PicAtPoint(*args, points=None, local_weight=0, global_weight=0)
    with pytest.raises(ValueError, match="has no loss"):
        MMPoint(*args, points=None, intra_weight=0, inter_weight=0)
    with pytest.raises(ValueError, match="has no loss"):
        CrossPoint(*args, points=None, intra_weight=0, cross_weight=0)
    with pytest.raises(ValueError, match="expected 'count' or 'skip'"):
        LocalInfoNCE(hidden_points="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 sizes in out_features for 2 views"):
        MultiViewInfoNCE(views=2, out_features=[1, 2, 3])
    state = StudentState(torch.randn(4, LOCAL), None, None, copies=1, global_=torch.randn(4, LOCAL))
    for objective in (IntraModalNTXent(), CrossModalNTXent(), GlobalInfoNCE()):
        objective.bind(sizes=Sizes(global_=LOCAL, image=IMAGE))
    intra = IntraModalNTXent()
    intra.bind(sizes=Sizes(global_=LOCAL, image=IMAGE))
    with pytest.raises(ValueError, match=r"copies=2.*torch\.cat"):
        intra(state, TeacherOutput(torch.randn(4, IMAGE)))
    with pytest.raises(ValueError, match="made for features of 24, and is given 25"):
        intra.bind(sizes=Sizes(global_=LOCAL + 1, image=IMAGE))
