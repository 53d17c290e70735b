"""pointcmt segment through the command line, at the smallest size that is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pointcmt.cli import main
from pointcmt.data import LabelledCloud, read_labelled
from pointcmt.data.labelled import write_labelled
from pointcmt.recipes.labelled_batches import LabelledBatches
from pointcmt.recipes.segment import load_segmenter
from pointcmt.recipes.whole_clouds import Blocks, predict_cloud
from pointcmt.types import Batch

CPU = ["--device", "cpu", "--no-tensorboard", "--no-progress"]
SMALL = [
    "--epochs", "2", "--batch-size", "4", "--width", "0.05", "--student-options", "npoints=(16,8)",
]  # fmt: skip
ROOM = ["--epochs", "2", "--batch-size", "2", "--width", "0.05", "--student-options", "npoints=(16,8,4,2)"]


def run(*arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    assert main([*words, "--debug"]) == 0, words
    return 0


def read(folder: Path, name: str = "results.json") -> dict:
    return json.loads((folder / name).read_text())


def parts_folder(root: Path) -> Path:
    """Cups and forks whose parts are above and below the middle."""
    root.mkdir()
    (root / "labels.txt").write_text("cup/base\ncup/top\nfork/base\nfork/top\n")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for number, kind in enumerate(("cup", "fork")):
            (root / split / kind).mkdir(parents=True)
            for shape in range(count):
                points = generator.uniform(-1, 1, (80, 3)) * [1, 1, 1 + number]
                labels = 2 * number + (points[:, 2] > 0)
                np.save(root / split / kind / f"{shape}.npy", np.column_stack([points, labels]))
    return root


def rooms_folder(root: Path, points: int = 600) -> Path:
    """Rooms with a floor, and what stands on it."""
    root.mkdir()
    (root / "labels.txt").write_text("floor\nthings\nnothing\n")
    for split, count in (("train", 3), ("test", 2)):
        (root / split / "area").mkdir(parents=True)
        for room in range(count):
            write_labelled(root / split / "area" / f"{room}.ply", room_of(points, len(split) + room))
    return root


def room_of(points: int, seed: int) -> LabelledCloud:
    generator = np.random.default_rng(seed)
    xyz = generator.uniform(0, 1, (points, 3)).astype(np.float32) * [4, 3, 1]
    xyz[: points // 2, 2] = 0
    labels = (xyz[:, 2] > 0).astype(np.int64)
    colors = np.where(labels[:, None] > 0, [0.9, 0.1, 0.1], [0.1, 0.1, 0.9]).astype(np.float32)
    return LabelledCloud(xyz.astype(np.float32), labels, colors)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    data = ["--data", parts_folder(root / "data"), "--data-up", "z", "--num-points", "48"]
    run("segment", "--out", root / "run", *data, *SMALL, *CPU)
    return root


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rooms")
    data = ["--data", rooms_folder(root / "data"), "--num-points", "64", "--voxel", "0.2"]
    run("segment", "--out", root / "run", *data, *ROOM, *CPU, "--holdout", "0")
    return root


# ---- training


def test_a_run_of_parts_says_what_it_did(parts):
    results = read(parts / "run")
    assert results["student"] == "pointnet2_part" and results["adapter"] == "students-pointnet2part"
    assert results["labels"] == ["cup/base", "cup/top", "fork/base", "fork/top"]
    assert "instance_miou on the held-out part" in results["best"]["chosen_by"]
    test = results["test"]
    assert test["argmax"] == "category" and set(test["with_argmax_all"]) == {"instance_miou", "class_miou"}
    assert test["instance_miou"] >= test["with_argmax_all"]["instance_miou"]
    assert {"iou/cup", "iou/fork"} <= set(test)
    assert (parts / "run" / "segmentation.png").stat().st_size > 5000
    coloured = sorted((parts / "run" / "coloured").glob("*.ply"))
    found = read_labelled(coloured[0])
    assert len(coloured) == 4 and len(found.points) == 48 and found.colors.std() > 0


def test_a_run_of_rooms_measures_every_point(rooms):
    results = read(rooms / "run")
    assert results["student"] == "pointnet2_scene" and results["inputs"] == ["points", "colors", "features"]
    test = results["test"]
    assert test["whole_rooms"] is True and {"miou", "macc", "oa", "iou/floor"} <= set(test)
    found = read_labelled(next((rooms / "run" / "coloured").glob("*.ply")))
    assert len(found.points) == 600, "all points of the file, not those that were left after thinning"


@pytest.mark.parametrize("kind", ["parts", "rooms"])
def test_a_killed_run_goes_on_to_the_same_bits(kind, parts, rooms, tmp_path, monkeypatch):
    before = {"parts": parts, "rooms": rooms}[kind]
    words = ["segment", "--out", tmp_path / "run", "--data", before / "data", *CPU]
    words += (
        ["--data-up", "z", "--num-points", "48", *SMALL]
        if kind == "parts"
        else ["--num-points", "64", "--voxel", "0.2", *ROOM, "--holdout", "0"]
    )
    steps = [0]
    plain = torch.optim.AdamW.step

    def step(self, *arguments):
        steps[0] += 1
        if steps[0] == (4 if kind == "parts" else 2):  # in the middle of the second epoch
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert main([str(word) for word in words]) == 130
    assert not (tmp_path / "run" / "results.json").exists() and (tmp_path / "run" / "state.pt").exists()
    run(*words, "--resume")
    ours, theirs = (load_file(root / "run" / "segmenter.safetensors") for root in (tmp_path, before))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read(tmp_path / "run")["test"] == read(before / "run")["test"]


def test_fine_tuning_takes_over_what_fits(parts, tmp_path):
    data = ["--data", parts / "data", "--data-up", "z", "--num-points", "48", *SMALL, *CPU]
    run("segment", "--out", tmp_path / "run", *data, "--init", parts / "run")
    own = load_file(parts / "run" / "segmenter.safetensors")
    assert read(tmp_path / "run")["initialised"] == len(own)


class Own(nn.Module):
    """A network of somebody's own: channels first, and scores beside something else."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, num_classes, 1)
        )

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        if points.shape[1] != 3:
            raise RuntimeError("expected channels first")
        return self.layers(points), points.mean(2)


def own(num_classes: int) -> Own:
    return Own(num_classes)


def test_a_network_of_ones_own(parts, tmp_path):
    data = ["--data", parts / "data", "--data-up", "z", "--num-points", "48", "--epochs", "1", *CPU]
    name = "tests.recipes.test_segment:own"
    run(
        "segment",
        "--out",
        tmp_path / "run",
        *data,
        "--student",
        name,
        "--import",
        "tests.recipes.test_segment",
    )
    assert read(tmp_path / "run")["adapter"] == "own"
    with pytest.raises(ValueError, match="code of a module that you did not name"):
        import pointcmt.recipes.build as build

        build.IMPORTED.remove("tests.recipes.test_segment")
        load_segmenter(tmp_path / "run")


def test_the_report_shows_both(parts, rooms, tmp_path):
    for source, name in ((parts, "parts"), (rooms, "rooms")):
        shutil.copytree(source / "run", tmp_path / name)
    run("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "instance mIoU %" in page and "mAcc %" in page and "rooms: floor" in page
    assert page.count("labels above, predictions below") == 4, "caption and alternative text of two pictures"


def test_a_batch_is_of_the_epoch_and_the_seed_alone(rooms):
    from pointcmt.data import DataOptions

    data = DataOptions(str(rooms / "data"), num_points=64, voxel=0.2).build("train")
    one, again = (list(LabelledBatches(data, 2, "cpu", 3).epoch(5)) for _ in range(2))
    other = list(LabelledBatches(data, 2, "cpu", 3).epoch(6))
    assert torch.equal(one[0].points, again[0].points) and not torch.equal(one[0].points, other[0].points)
    for batch in one:
        # of a floor at height 0, whatever the crop
        assert torch.equal(batch.point_labels, (batch.points[..., 2] > 0).long())
    fixed = list(LabelledBatches(data, 2, "cpu").epoch(5))
    assert torch.equal(fixed[0].points, data.batch([0, 1]).points) and len(fixed) == 2


# ---- evaluation


def test_evaluation_is_that_of_the_run_and_votes_are_near_it(parts, tmp_path):
    run("segment", "--run", parts / "run", "--out", tmp_path / "eval", *CPU)
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())
    assert figures == read(parts / "run")["test"]
    run(
        "segment",
        "--run",
        parts / "run" / "segmenter.safetensors",
        "--votes",
        "3",
        "--out",
        tmp_path / "v",
        *CPU,
    )
    voted = json.loads((tmp_path / "v" / "figures.json").read_text())
    assert voted["votes"] == 3 and abs(voted["instance_miou"] - figures["instance_miou"]) < 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predict", "x.ply"], "--predict needs --run RUN"),
        ([], "give --out FOLDER to train, or --run RUN"),
        (["--run", "nowhere"], "no segmenter at nowhere"),
        (
            ["--run", "RUN", "--predict", "x.ply", "--category", "spoon"],
            "expected the shape's, one of cup, fork",
        ),
        (["--out", "OUT", "--per-class", "2", "--test-per-class", "1"], "the data has no labels of points"),
        (["--out", "OUT", "--data", "DATA", "--student", "pointnet2_scene"], "pointnet2_scene is for scenes"),
        (["--out", "OUT", "--data", "DATA", "--inputs", "colors"], "--inputs colors: the data has points"),
        (["--out", "OUT", "--data", "DATA", "--student", "pointnet2"], "gives no class scores"),
        (["--out", "OUT", "--data", "DATA", "--adapter", "dgcnn"], "of a classifier of clouds"),
    ],
)
def test_what_is_wrong_is_said(words, message, parts, tmp_path, capsys):
    places = {"RUN": parts / "run", "OUT": tmp_path / "out", "DATA": parts / "data"}
    given = [str(places.get(word, word)) for word in words]
    more = [] if "--run" in words else ["--num-points", "48", "--data-up", "z"]
    assert main(["segment", *given, *more, *CPU]) == 1
    assert message in capsys.readouterr().err


# ---- every point of a cloud


def centred(batch: Batch) -> Tensor:
    """Scores [B, N, 2] that depend on the block: how high a point is, and how far from the block's mean."""
    assert batch.points is not None
    return torch.stack([batch.points[..., 2], batch.points[..., 0]], -1)


def test_every_point_is_visited_and_logits_are_averaged():
    cloud = room_of(3000, 1)
    batches: list[int] = []

    def forward(batch: Batch) -> Tensor:
        batches.append(len(batch))
        return centred(batch)

    for voxel in (0.0, 0.3):
        batches.clear()
        visited: list[int] = []
        logits, filled = predict_cloud(
            forward, cloud, 2, Blocks(256, True, voxel), batch_size=2, progress=visited.append
        )
        assert filled == 0 and visited[-1] == 3000 and visited == sorted(visited)
        # height is above the room's floor in every block, so its mean is exact
        np.testing.assert_allclose(logits[:, 0], cloud.points[:, 2], atol=1e-5)
        assert np.isfinite(logits).all() and sum(batches) * 256 < 8 * 3000, "blocks overlap a few times"
    whole, _ = predict_cloud(centred, cloud, 2, Blocks(4000, True))
    np.testing.assert_allclose(whole[:, 1], cloud.points[:, 0] - cloud.points[:, 0].mean(), atol=1e-4)


def test_points_that_no_round_reaches_take_their_voxels_mean():
    points = np.concatenate([np.full((200, 3), 0.5), np.random.default_rng(0).uniform(0, 3, (300, 3))])
    cloud = LabelledCloud(points.astype(np.float32))
    _, filled = predict_cloud(centred, cloud, 2, Blocks(64, True, 0.5))
    assert filled == 0
    logits, filled = predict_cloud(centred, cloud, 2, Blocks(64, True, 0.5, rounds=64))
    assert 100 < filled < 200, "one voxel has 200 points and more"
    low = cloud.points[:, 2].min()
    np.testing.assert_allclose(logits[:200, 0], 0.5 - low, atol=0.5)
    assert np.isfinite(logits).all()


def test_shapes_are_seen_whole_whatever_their_number_of_points():
    cloud = LabelledCloud(np.random.default_rng(1).uniform(0, 1, (1000, 3)).astype(np.float32))
    extents = []

    def forward(batch: Batch) -> Tensor:
        extents.append(batch.points.amax(1) - batch.points.amin(1))
        assert torch.equal(batch.category, torch.full((len(batch.points),), 3))
        return centred(batch)

    logits, _ = predict_cloud(forward, cloud, 2, Blocks(128, False), batch_size=3, category=3)
    assert logits.shape == (1000, 2) and torch.cat(extents).min() > 0.9, "each block spans the shape"


def test_a_killed_prediction_goes_on_to_the_same_bits(tmp_path):
    cloud = room_of(2000, 2)
    expected, _ = predict_cloud(centred, cloud, 2, Blocks(128, True, 0.3))
    calls = [0]

    def dies(batch: Batch) -> Tensor:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return centred(batch)

    keep = {"partial": tmp_path / "p.npz", "key": "a", "every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        predict_cloud(dies, cloud, 2, Blocks(128, True, 0.3), **keep)
    assert (tmp_path / "p.npz").exists()
    first = calls[0]
    again, _ = predict_cloud(dies, cloud, 2, Blocks(128, True, 0.3), **keep)
    assert np.array_equal(again, expected) and not (tmp_path / "p.npz").exists()
    total = calls[0]
    calls[0] = 9  # from the beginning
    predict_cloud(dies, cloud, 2, Blocks(128, True, 0.3))
    assert total - first < calls[0] - 9, "what was done was not done again"


def test_ones_own_file(rooms, tmp_path):
    cloud = room_of(500, 9)
    write_labelled(tmp_path / "mine.ply", cloud._replace(labels=None))
    write_labelled(tmp_path / "known.ply", cloud)
    run("segment", "--run", rooms / "run", "--predict", tmp_path / "mine.ply", tmp_path / "known.ply",
        "--out", tmp_path / "out", *CPU)  # fmt: skip
    found, known = read_labelled(tmp_path / "out" / "mine.ply"), read(tmp_path / "out", "known.json")
    np.testing.assert_array_equal(found.points, cloud.points)
    summary = read(tmp_path / "out", "mine.json")
    assert sum(summary["labels"].values()) == 500 == summary["points"] and "figures" not in summary
    assert known["figures"]["oa"] == pytest.approx(100 * (found.labels == cloud.labels).mean())
    assert not list((tmp_path / "out").glob(".*partial*"))


def test_a_cloud_without_what_the_network_saw(rooms, tmp_path, capsys):
    np.save(tmp_path / "bare.npy", room_of(300, 3).points)
    words = ["segment", "--run", rooms / "run", "--predict", tmp_path / "bare.npy", *CPU]
    assert main([str(word) for word in words]) == 1
    assert "trained with colors, and the cloud has none" in capsys.readouterr().err


def test_parts_of_ones_own_file(parts, tmp_path):
    points = np.random.default_rng(5).uniform(-1, 1, (200, 3))
    np.savetxt(tmp_path / "cup.txt", points)
    run("segment", "--run", parts / "run", "--predict", tmp_path / "cup.txt", "--category", "cup",
        "--out", tmp_path, *CPU)  # fmt: skip
    assert set(read(tmp_path, "cup.json")["labels"]) <= {"cup/base", "cup/top"}
    assert read_labelled(tmp_path / "cup.ply").labels.max() <= 1
