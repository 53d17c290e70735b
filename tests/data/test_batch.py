"""Transforms of a Batch: what belongs to a point follows it, whatever is done to the cloud."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pointcmt.data import Augmentation, PointDataset, augment, corrupt, sample, shuffle, subset, vote_scale
from pointcmt.types import Batch

OWN = (40, 25, 7, 1)


def clouds(lengths: bool = False) -> Batch:
    """Points on cylinders about z, whose labels, colours and features are computed from where they are."""
    generator = torch.Generator().manual_seed(3)
    angle = torch.rand(4, 40, generator=generator) * 6.28
    height = torch.rand(4, 40, generator=generator) * 2 - 1
    normals = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], -1)
    points = torch.stack([0.5 * angle.cos(), 0.5 * angle.sin(), height], -1)
    own = torch.tensor(OWN)
    if lengths:  # padding repeats the cloud's own points
        order = torch.arange(40) % own.unsqueeze(1)
        points, normals = (x.gather(1, order.unsqueeze(-1).expand_as(x)) for x in (points, normals))
    return Batch(
        points=points,
        normals=normals,
        colors=(points + 1) / 2,
        features=points[..., :2] * points[..., 2:],
        point_labels=label(points),
        labels=torch.arange(4),
        lengths=own if lengths else None,
    )


def label(points: torch.Tensor) -> torch.Tensor:
    """Octant: the sign of each coordinate, which no stretch along the axes changes."""
    return ((points > 0) * torch.tensor([1, 2, 4])).sum(-1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


TRANSFORMS: dict[str, Callable[[Batch], Batch]] = {
    "augment": lambda batch: Augmentation(translation=0)(batch, seeded()),
    "shuffle": lambda batch: shuffle(batch, seeded()),
    "fewer": lambda batch: sample(batch, 13, seeded()),
    "more": lambda batch: sample(batch, 90, seeded()),
    "vote": lambda batch: vote_scale(batch, seeded()),
    "dropout": lambda batch: corrupt(batch, "dropout", 0.5, seeded()),
    "fewer by dropout": lambda batch: corrupt(batch, "dropout", 0.7, seeded(), keep_count=False),
    "scale": lambda batch: corrupt(batch, "scale", 1.5, seeded()),
}


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_labels_stay_with_their_points(name: str, lengths: bool) -> None:
    batch = clouds(lengths)
    changed = TRANSFORMS[name](batch)
    assert torch.equal(changed.point_labels, label(changed.points))
    assert torch.equal(label(changed.colors * 2 - 1), changed.point_labels)
    signs = (changed.points[..., :2] * changed.points[..., 2:]).sign()
    assert torch.equal(changed.features.sign(), signs)
    assert torch.equal(changed.labels, batch.labels)
    # the cylinder's normal is along its radius in the stretched frame: (x/a², y/b², 0)
    assert not changed.normals[..., 2].any()
    torch.testing.assert_close(changed.normals.norm(dim=-1), torch.ones_like(changed.normals[..., 0]))
    if lengths:
        for cloud, own in enumerate(changed.lengths.tolist()):
            assert 1 <= own <= OWN[cloud]
            few = {tuple(point) for point in changed.points[cloud, :own].tolist()}
            assert len(few) == own, "own points are all different"
            assert {tuple(point) for point in changed.points[cloud].tolist()} == few, "padding repeats them"
    else:
        assert changed.lengths is None


@pytest.mark.parametrize("kind", ["rotation", "rotation_up"])
@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_normals_turn_with_the_cloud(kind: str, up: str) -> None:
    batch = clouds()
    changed = corrupt(batch, kind, 120.0, seeded(), up=up)  # type: ignore[arg-type]
    along = (batch.points * batch.normals).sum(-1)
    torch.testing.assert_close((changed.points * changed.normals).sum(-1), along, atol=1e-5, rtol=0)
    assert not torch.allclose(changed.points, batch.points, atol=1e-2)
    if kind == "rotation_up":
        axis = "xyz".index(up)
        torch.testing.assert_close(changed.points[..., axis], batch.points[..., axis], atol=1e-6, rtol=0)
    for name in ("point_labels", "colors", "features"):
        assert torch.equal(getattr(changed, name), getattr(batch, name)), "they are the points' own"


@pytest.mark.parametrize("change", [augment, vote_scale, shuffle, lambda x, g: corrupt(x, "jitter", 0.1, g)])
def test_a_tensor_comes_out_as_the_batch_does(change: Callable) -> None:
    batch = clouds()
    flat = torch.cat([batch.points, batch.normals], -1)
    expected = change(batch.replace(features=None, colors=None), seeded())
    torch.testing.assert_close(
        change(flat, seeded()), torch.cat([expected.points, expected.normals], -1), rtol=0, atol=0
    )
    torch.testing.assert_close(change(batch.points, seeded()), expected.points, rtol=0, atol=0)


def test_wrong_batches_are_explained() -> None:
    with pytest.raises(ValueError, match="no points to change"):
        augment(Batch(labels=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"6 columns.*normals="):
        augment(Batch(points=torch.zeros(2, 4, 6)))
    with pytest.raises(ValueError, match="up is 'w'"):
        corrupt(clouds(), "rotation_up", 10, up="w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count is 0"):
        sample(clouds(), 0)


def test_a_set_gives_batches_with_all_that_it_has() -> None:
    batch = clouds(lengths=True)
    fields = {
        name: getattr(batch, name).numpy()
        for name in ("normals", "colors", "features", "point_labels", "lengths")
    }
    data = PointDataset(
        batch.points.numpy(), [3, 2, 1, 0], list("abcd"), list("wxyz"), up="y",
        part_names=list("01234567"), **fields,
    )  # fmt: skip
    part = subset(data, [3, 1])
    assert part.up == "y" and part.part_names == data.part_names
    got = part.batch(torch.tensor([1]))
    assert got.labels.tolist() == [2] and got.index.tolist() == [1] and got.lengths.tolist() == [25]
    for name in fields:
        assert torch.equal(getattr(got, name), getattr(batch, name)[1:2]), name
    assert torch.equal(got.points, batch.points[1:2])
    assert got.inputs().shape == (1, 40, 3 + 3 + 3 + 2)
    six = PointDataset(torch.cat([batch.points, batch.normals], -1).numpy(), [0] * 4, ["a"], list("wxyz"))
    assert torch.equal(six.batch([2]).normals, batch.normals[2:3])
    prints = {data.fingerprint()}
    for change in ({"up": "z"}, {"colors": None}, {"part_names": []}):
        arguments = {"up": "y", "part_names": list("01234567"), **fields, **change}
        prints.add(
            PointDataset(
                batch.points.numpy(), [3, 2, 1, 0], list("abcd"), list("wxyz"), **arguments
            ).fingerprint()
        )
    assert len(prints) == 4, "the fingerprint is of all that a set holds, and of its axis"
    with pytest.raises(ValueError, match=r"colors have shape \[4, 39, 3\]; expected \[4, 40, …\]"):
        PointDataset(batch.points.numpy(), [0] * 4, ["a"], list("wxyz"), colors=fields["colors"][:, :39])
    with pytest.raises(TypeError, match="no field 'colours'"):
        PointDataset(batch.points.numpy(), [0] * 4, ["a"], list("wxyz"), colours=fields["colors"])
