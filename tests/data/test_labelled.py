"""Sets with a label for each point: read in every layout, with the labels that belong to the coordinates."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pointcmt.data import DataOptions, read_labelled, subset
from pointcmt.data.contrastive import CloudAugmentation
from pointcmt.data.dataset import PointDataset
from pointcmt.data.depth_tables import DepthTables
from pointcmt.data.s3dis import CLASSES, S3DIS, S3DISBlocks
from pointcmt.data.scenes import draw, nearest
from pointcmt.data.shapenet_part import PART_NAMES, PARTS, ShapeNetPart
from pointcmt.types import Batch

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def octant(points: np.ndarray) -> np.ndarray:
    """A label that can be computed from where a point is."""
    return ((points > 0) * np.array([1, 2, 4])).sum(-1)


def cloud(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3))


def write_ply(path: Path, points: np.ndarray, labels: np.ndarray | None, colors: np.ndarray | None = None):
    head = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    columns = [points]
    if colors is not None:
        head += [f"property uchar {name}" for name in ("red", "green", "blue")]
        columns.append(colors)
    if labels is not None:
        head.append("property int label")
        columns.append(labels[:, None])
    rows = [" ".join(f"{value:.9g}" for value in row) for row in np.column_stack(columns)]
    path.write_text("\n".join([*head, "end_header", *rows]) + "\n")


# ---- files


@pytest.mark.parametrize("suffix", ["ply", "txt", "csv.txt", "npy", "npz"])
def test_every_format_gives_points_colours_and_labels(suffix, tmp_path):
    points = cloud(50).astype(np.float32)
    labels, colors = octant(points), np.random.default_rng(1).integers(0, 256, (50, 3))
    path = tmp_path / f"cloud.{suffix}"
    rows = np.column_stack([points, colors, labels])
    if suffix == "ply":
        write_ply(path, points, labels, colors)
    elif suffix.endswith("txt"):
        np.savetxt(path, rows, delimiter="," if "csv" in suffix else " ")
    elif suffix == "npy":
        np.save(path, rows)
    else:
        np.savez(path, points=points, labels=labels, colors=colors)
    found = read_labelled(path)
    np.testing.assert_allclose(found.points, points, atol=1e-6)
    np.testing.assert_array_equal(found.labels, octant(found.points))
    np.testing.assert_allclose(found.colors, colors / 255, atol=1e-6)
    assert found.normals is None


def test_normals_and_colours_are_told_apart(tmp_path):
    normals = cloud(20) / np.linalg.norm(cloud(20), axis=1, keepdims=True)
    np.save(tmp_path / "ten.npy", np.column_stack([cloud(20, 1), normals, cloud(20, 2) ** 2, np.arange(20)]))
    found = read_labelled(tmp_path / "ten.npy")
    np.testing.assert_allclose(found.normals, normals, atol=1e-6)
    np.testing.assert_allclose(found.colors, cloud(20, 2) ** 2, atol=1e-6)
    np.save(tmp_path / "six.npy", np.column_stack([cloud(20, 1), normals]))
    assert read_labelled(tmp_path / "six.npy", labelled=False).labels is None


def broken(what: str) -> np.ndarray:
    rows = np.column_stack([cloud(9), np.arange(9)])
    if what == "nan":
        rows[4, 1] = np.nan
    elif what == "half":
        rows[4, 3] = 2.5
    elif what == "columns":
        rows = np.column_stack([rows, rows[:, 0]])
    elif what == "none":
        rows = rows[:, :3]
    elif what == "empty":
        rows = rows[:0]
    return rows


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", "point 4 is .*nan.*expected finite"),
        ("half", "point 4 has the label 2.5; expected whole"),
        ("columns", "3, 4, 6, 7, 9 or 10 columns"),
        ("none", "has no labels; expected a last column"),
        ("empty", "holds no point"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(what, words, tmp_path):
    np.save(tmp_path / "bad.npy", broken(what))
    with pytest.raises(ValueError, match=words) as error:
        read_labelled(tmp_path / "bad.npy")
    assert "bad.npy" in str(error.value)


def test_labels_of_another_length(tmp_path):
    np.savez(tmp_path / "bad.npz", points=cloud(9), labels=np.arange(8))
    with pytest.raises(ValueError, match="9 points and 8 labels; expected one for each"):
        read_labelled(tmp_path / "bad.npz")


def test_a_label_without_a_name_is_an_error_of_any_set():
    labels = np.zeros((2, 5), dtype=np.int64)
    labels[1, 3] = 2

    def made(names):
        return PointDataset(
            np.zeros((2, 5, 3)), np.zeros(2), ["a"], ["s/a/0", "s/a/1"], part_names=names, point_labels=labels
        )

    with pytest.raises(ValueError, match=r"'s/a/1' \(row 1\): point 3 has the label 2, and there are 2"):
        made(["p", "q"])
    labels[1, 3] = -1  # a point without a label
    assert made(["p", "q"]).point_labels[1, 3] == -1


# ---- one's own folders


def own_folder(root: Path, names: list[str], count: int = 60) -> Path:
    (root / "labels.txt").write_text("\n".join(names))
    for split in ("train", "test"):
        for number, kind in enumerate(("cup", "fork")):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for shape in range(3):
                points = cloud(count, 10 * number + shape)
                labels = 2 * number + (points[:, 2] > 0)
                np.savetxt(folder / f"{shape}.txt", np.column_stack([points, labels]))
    return root


def test_own_shapes_with_parts(tmp_path):
    root = own_folder(tmp_path, ["cup/base", "cup/top", "fork/base", "fork/top"])
    options = DataOptions(str(root), num_points=40, data_up="z", holdout=0, normalize=False)
    assert options.named() == "labelled_folder"
    train = options.load().train
    assert (train.class_names, len(train), train.num_points) == (["cup", "fork"], 6, 40)
    expected = 2 * train.labels[:, None] + (train.points[..., 2] > 0)
    np.testing.assert_array_equal(train.point_labels, expected)
    np.testing.assert_array_equal(train.category, train.labels)
    short = DataOptions(str(root), num_points=100, data_up="z", normalize=False).build("train")
    assert (short.lengths == 60).all(), "of fewer points than asked for, some come again"
    np.testing.assert_array_equal(short.point_labels, 2 * short.labels[:, None] + (short.points[..., 2] > 0))


def test_own_rooms(tmp_path):
    root = own_folder(tmp_path, ["floor", "wall", "lamp", "door"], count=500)
    made = DataOptions(str(root), num_points=64, voxel=0.2).build("test")
    assert made.part_names == ["floor", "wall", "lamp", "door"] and len(made.rooms) == 6
    room = made.rooms[0]
    assert len(room.cloud.points) < len(room.whole().points) == 500, "thinned, and whole again"
    assert subset(made, [2, 1]).rooms == [made.rooms[2], made.rooms[1]]
    assert made.category is None and made.up == "z"


def test_wrong_names_of_parts(tmp_path):
    root = own_folder(tmp_path, ["cup/base", "cup/top", "fork/base"])
    with pytest.raises(ValueError, match=r"point \d+ has the label 3, and there are 3 names"):
        DataOptions(str(root), num_points=40).build("train")
    (root / "labels.txt").write_text("cup/base\ncup/top\nspoon/a\nspoon/b")
    with pytest.raises(ValueError, match="names parts of spoon, and the classes' folders are cup, fork"):
        DataOptions(str(root), num_points=40).build("train")
    (root / "labels.txt").write_text("cup/base\nfork/top\nfork/a\nfork/b")
    with pytest.raises(ValueError, match="has parts of fork; expected its own class's"):
        DataOptions(str(root), num_points=40).build("train")


# ---- the field's


def shapenet_text(root: Path) -> Path:
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text("Bag\t02773838\nMug\t03797390\n")
    normal = np.tile([0.0, 0.0, 1.0], (80, 1))
    for name, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        listed = []
        for synset, first in (("02773838", 4), ("03797390", 36)):
            (root / synset).mkdir(exist_ok=True)
            for number in numbers:
                points = cloud(80, number) * [1, 1, 0.5]
                part = first + (points[:, 0] > 0)
                np.savetxt(root / synset / f"s{number}.txt", np.column_stack([points, normal, part]))
                listed.append(f"shape_data/{synset}/s{number}")
        (root / "train_test_split" / f"shuffled_{name}_file_list.json").write_text(json.dumps(listed))
    return root


def test_shapenet_part_as_text(tmp_path):
    root = shapenet_text(tmp_path)
    options = DataOptions(str(root), num_points=64, holdout=0)
    assert options.named() == "shapenet_part"
    train = options.build("train")
    assert len(train) == 6 and train.up == "y" and len(train.part_names) == 50 == sum(PARTS)
    first = np.where(train.labels == 1, 4, 36)
    assert {PART_NAMES[k] for k in np.unique(train.point_labels)} == {"Bag/0", "Bag/1", "Mug/0", "Mug/1"}
    # the centre of the cloud moved by normalisation: parts are still on their sides of one plane
    for row in range(6):
        x, high = train.points[row, :, 0], train.point_labels[row] > first[row]
        assert x[high].min() > x[~high].max()
    assert ShapeNetPart(root, "test", 100, normals=True).normals.shape == (2, 100, 3)
    assert (ShapeNetPart(root, "test", 100).lengths == 80).all()
    file = root / "02773838" / "s0.txt"
    file.write_text(file.read_text().replace("5.000000000000000000e+00\n", "9.000000000000000000e+00\n"))
    with pytest.raises(ValueError, match="has the part 9, and those of Bag are 4 to 5"):
        ShapeNetPart(root, "train", 80)


def test_shapenet_part_as_h5(tmp_path):
    (tmp_path / "all_object_categories.txt").write_text("Airplane 02691156\n")
    for name, labels in (("train0", [0, 15]), ("val0", [2]), ("test0", [4, 4, 4])):
        with h5py.File(tmp_path / f"ply_data_{name}.h5", "w") as file:
            points = np.stack([cloud(30, k) for k in range(len(labels))]).astype(np.float32)
            start = np.cumsum([0, *PARTS])[labels][:, None]
            file["data"], file["label"] = points, np.array(labels, dtype=np.uint8)[:, None]
            file["pid"] = (start + (points[..., 0] > 0)).astype(np.uint8)
    options = DataOptions(str(tmp_path), num_points=20)
    assert options.named() == "shapenet_part"
    assert options.build("train").labels.tolist() == [0, 15, 2]
    test = options.build("test")
    assert set(np.unique(test.point_labels)) == {12, 13} and test.point_labels.shape == (3, 20)
    with pytest.raises(ValueError, match="ask for 1 to 30"):
        ShapeNetPart(tmp_path, "test", 31)


def s3dis_room(count: int, seed: int) -> np.ndarray:
    points = (cloud(count, seed) + 1) * [2, 3, 1.5]
    return np.column_stack([points, np.full((count, 3), 128.0), (points[:, 2] > 1.5).astype(float)])


def test_s3dis_by_rooms(tmp_path):
    for area, name in ((1, "office_1"), (2, "hallway_3"), (5, "office_7")):
        np.save(tmp_path / f"Area_{area}_{name}.npy", s3dis_room(3000, area).astype(np.float32))
    options = DataOptions(str(tmp_path), num_points=256, voxel=0.3)
    assert options.named() == "s3dis"
    train, test = options.build("train"), options.build("test")
    assert [room.name for room in train.rooms] == ["Area_1_office_1", "Area_2_hallway_3"]
    assert len(test) == 1 and test.part_names == list(CLASSES)
    assert len(test.rooms[0].cloud.points) < len(test.rooms[0].whole().points) == 3000
    batch = train.batch([0, 1])
    assert batch.inputs().shape == (2, 256, 9)
    # height is above the room's floor, whatever the crop: labels follow
    floors = torch.tensor([[float(room.low[2])] for room in train.rooms])
    assert torch.equal(batch.point_labels, (batch.points[..., 2] + floors > 1.5).long())
    assert float(batch.features.min()) >= 0 and float(batch.features.max()) <= 1
    with pytest.raises(FileNotFoundError, match="no test rooms where area 6"):
        S3DIS(tmp_path, "test", 16, test_area=6)
    bad = s3dis_room(50, 9)
    bad[7, 2] = np.nan
    np.save(tmp_path / "Area_3_storage_1.npy", bad)
    with pytest.raises(ValueError, match=r"Area_3_storage_1.npy: point 7 is .*nan"):
        S3DIS(tmp_path, "train", 16)
    bad[7, 2], bad[7, 6] = 0, 13
    np.save(tmp_path / "Area_3_storage_1.npy", bad)
    with pytest.raises(ValueError, match=r"Area_3_storage_1.*point \d+ has the label 13"):
        S3DIS(tmp_path, "train", 16, voxel=0)


def test_s3dis_as_it_is_published(tmp_path):
    for kind in ("chair_1", "wall_1", "stairs_1"):
        folder = tmp_path / "data" / "Area_1" / "office_1" / "Annotations"
        folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(folder / f"{kind}.txt", s3dis_room(40, len(kind))[:, :6])
    with pytest.raises(ValueError, match="give --data-cache FOLDER"):
        S3DIS(tmp_path / "data", "train", 16)
    for _ in range(2):
        made = S3DIS(tmp_path / "data", "train", 16, voxel=0, cache_dir=tmp_path / "cache")
    counts = np.bincount(made.rooms[0].cloud.labels, minlength=13)
    found = {CLASSES[k]: int(counts[k]) for k in np.flatnonzero(counts)}
    assert found == {"wall": 40, "chair": 40, "clutter": 40}
    # another copy of the data has the same names, and its own rooms, also when it is not the newest
    other = tmp_path / "other" / "Area_1" / "office_1" / "Annotations"
    other.mkdir(parents=True)
    np.savetxt(other / "chair_1.txt", s3dis_room(25, 7)[:, :6])
    for root, count in (("other", 25), ("data", 120), ("other", 25)):
        again = S3DIS(tmp_path / root, "train", 16, voxel=0, cache_dir=tmp_path / "cache")
        assert len(again.rooms[0].cloud.points) == count


def test_s3dis_in_blocks(tmp_path):
    (tmp_path / "all_files.txt").write_text("indoor3d_sem_seg_hdf5_data/ply_data_all_0.h5\n")
    (tmp_path / "room_filelist.txt").write_text("Area_1_office_1\nArea_5_office_1\nArea_5_office_1\n")
    data = np.random.default_rng(0).uniform(0, 1, (3, 32, 9)).astype(np.float32)
    with h5py.File(tmp_path / "ply_data_all_0.h5", "w") as file:
        file["data"], file["label"] = data, (data[..., 2] > 0.5).astype(np.uint8)
    options = DataOptions(str(tmp_path), num_points=16)
    assert options.named() == "s3dis_blocks"
    assert len(options.build("train")) == 1
    test = options.build("test")
    np.testing.assert_array_equal(test.point_labels, test.points[..., 2] > 0.5)
    np.testing.assert_array_equal(test.batch([0, 1]).inputs().numpy(), data[1:, :16])
    (tmp_path / "room_filelist.txt").write_text("Area_1_office_1\n")
    with pytest.raises(ValueError, match="names 1 blocks, and the files hold 3"):
        S3DISBlocks(tmp_path, "test", 16)


def test_real_tables_and_their_pictures():
    if not (DATA / "mosd_rgbd_segmentation" / "mosd_stride4.h5").is_file():
        pytest.skip(f"mosd_stride4.h5 is not in {DATA / 'mosd_rgbd_segmentation'}")
    train = DepthTables(DATA / "mosd_rgbd_segmentation", "train", 512)
    assert len(train) == 45 and set(np.unique(train.point_labels)) == {0, 1}
    batch = subset(train, [3, 40]).batch([0, 1])
    views = subset(train, [3, 40]).stored_views.take(batch.index, torch.zeros(2, 1).long(), batch.points)
    assert views.images.shape == (2, 1, 3, 240, 320) and bool(views.visible.all())
    # the camera puts each point on the pixel that gave it its colour
    grid = views.pixels[:, 0, :, None] * 2 - 1
    there = torch.nn.functional.grid_sample(views.images[:, 0], grid, align_corners=False)[..., 0].mT
    apart = (there - batch.colors).abs().mean()
    assert apart < 0.02 < (there.flip(1) - batch.colors).abs().mean() / 4


# ---- crops and transforms


def test_crops_are_the_nearest_points_with_their_labels(tmp_path):
    np.save(tmp_path / "Area_1_office_1.npy", s3dis_room(1000, 3).astype(np.float32))
    room = S3DIS(tmp_path, "train", 64, voxel=0).rooms[0]
    rows = nearest(room.cloud.points, room.cloud.points[5], 64)
    far = np.square(room.cloud.points - room.cloud.points[5]).sum(1)
    assert len(rows) == 64 and far[rows].max() <= np.delete(far, rows).min()
    one, again = (draw(room, 64, np.random.default_rng([1, 2])) for _ in range(2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    np.testing.assert_array_equal(one["point_labels"], one["points"][:, 2] + room.low[2] > 1.5)
    assert len(nearest(np.zeros((10, 3)), np.zeros(3), 4)) == 4, "ties"
    small = draw(room, 2000, np.random.default_rng(0))
    assert small["lengths"] == 1000 and len(small["points"]) == 2000


def test_labels_follow_dropped_points():
    points = torch.from_numpy(np.stack([cloud(40, k) for k in range(4)])).float()
    batch = Batch(points=points, point_labels=torch.from_numpy(octant(points.numpy())))
    change = CloudAugmentation(scale=(0.5, 2.0), jitter=0.0, dropout=0.875)
    changed = change.on(batch, torch.Generator().manual_seed(1))
    expected = change(points, torch.Generator().manual_seed(1))
    assert torch.equal(changed.points, expected)
    np.testing.assert_array_equal(changed.point_labels, octant(changed.points.numpy()))
    assert (changed.point_labels != batch.point_labels).any()
