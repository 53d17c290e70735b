"""Rendered views in a folder: found by name, in order, aligned with clouds, and missed by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pointcmt.data import MultiViewImages

SHAPES = {"train": ["night_stand_0001", "bed_0002", "bed_0010"], "test": ["bed_0003"]}


def draw(path: Path, shade: int, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # red is off, so that grey differs from colour
    Image.new("RGB", (size, size), (0, shade, shade)).save(path)


def fill(root: Path, layout: str, views: int = 3) -> Path:
    """Images whose shade tells shape and view: 20 · shape + view."""
    for split, shapes in SHAPES.items():
        for number, shape in enumerate(shapes):
            for view in range(1, views + 1):
                folder = layout.format(split=split, name=shape.rpartition("_")[0])
                draw(root / folder / f"{shape}_{view:03d}.png", 20 * number + view)
    return root


@pytest.mark.parametrize("layout", ["{name}/{split}", "{split}/{name}", "{split}"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    data = MultiViewImages(fill(tmp_path, layout), "train")
    shapes = ["bed/bed_0002", "bed/bed_0010", "night_stand/night_stand_0001"]
    assert data.shape_ids == [f"train/{shape}" for shape in shapes]
    assert data.class_names == ["bed", "night_stand"] and data.num_classes == 2
    assert data.labels.tolist() == [0, 0, 1]
    views, label, index = data[1]
    assert views.shape == (3, 3, 12, 12) and (label, index) == (0, 1)
    assert views.dtype == torch.float32
    torch.testing.assert_close(views[:, 2, 0, 0] * 255, torch.tensor([41.0, 42.0, 43.0]))
    test = MultiViewImages(tmp_path, "test")
    assert test.shape_ids == ["test/bed/bed_0003"]
    assert test.class_names == ["bed", "night_stand"], "a class without test shapes keeps its number"


def test_aligned_with_clouds(tmp_path: Path) -> None:
    root = fill(tmp_path, "{name}/{split}")
    names = ["airplane", "bed", "night_stand"]
    ids = ["bed_0010", "night_stand_0001", "bed_0002"]
    data = MultiViewImages(root, "train", shape_ids=ids, class_names=names)
    assert [shape.rpartition("/")[2] for shape in data.shape_ids] == ids
    assert data.labels.tolist() == [1, 2, 1]
    again = MultiViewImages(root, "train", shape_ids=data.shape_ids, class_names=names)
    assert again.shape_ids == data.shape_ids
    torch.testing.assert_close(data[0][0][0, 1, 0, 0] * 255, torch.tensor(41.0))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shapes: bed_0099.*bed_0099_001\.png"):
        MultiViewImages(root, "train", shape_ids=["bed_0002", "bed_0099"])
    with pytest.raises(FileNotFoundError, match="bed_0003"):  # it is in the other split
        MultiViewImages(root, "train", shape_ids=["bed_0003"])
    with pytest.raises(ValueError, match="night_stand"):
        MultiViewImages(root, "train", class_names=["bed"])


def test_flat_folder_needs_to_be_told_the_shapes(tmp_path: Path) -> None:
    fill(tmp_path, "")
    assert MultiViewImages(tmp_path, "train", shape_ids=["bed_0003", "bed_0002"]).num_views == 3
    with pytest.raises(FileNotFoundError, match="shape_ids="):
        MultiViewImages(tmp_path, "train")


def test_channels_size_and_number(tmp_path: Path) -> None:
    fill(tmp_path, "{split}")
    data = MultiViewImages(tmp_path, "train", num_views=2, size=6, in_chans=1)
    views, _, _ = data[0]
    assert views.shape == (2, 1, 6, 6)
    assert 0 < views[0].mean() * 255 < 21, "grey is a mean of the channels"
    with pytest.raises(ValueError, match="in_chans is 4"):
        MultiViewImages(tmp_path, "train", in_chans=4)
    with pytest.raises(ValueError, match="num_views 0"):
        MultiViewImages(tmp_path, "train", num_views=0)


def test_missing_views_are_named(tmp_path: Path) -> None:
    fill(tmp_path, "{name}/{split}", views=4)
    (tmp_path / "bed" / "train" / "bed_0010_002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"bed_0010.*lacks view 002 of 4; it has 001, 003, 004"):
        MultiViewImages(tmp_path, "train")
    assert MultiViewImages(tmp_path, "train", num_views=1).num_views == 1
    with pytest.raises(FileNotFoundError, match="lacks views 005, 006 of 6"):
        MultiViewImages(tmp_path, "test", num_views=6)


def test_other_names_of_the_convention(tmp_path: Path) -> None:
    """The shaded renderings of MVCNN's second set, and JPEG."""
    for view in (1, 2):
        (tmp_path / "train").mkdir(exist_ok=True)
        image = Image.new("RGB", (8, 8), (100, 100, 100))
        image.save(tmp_path / "train" / f"bed_0002_shaded_v{view:03d}.jpg")
        image.save(tmp_path / "train" / f"bed_0004.off_shaded_v{view:03d}.jpg")
    data = MultiViewImages(tmp_path, "train")
    assert data.shape_ids == ["train/bed/bed_0002", "train/bed/bed_0004"] and data.num_views == 2


def test_bad_images(tmp_path: Path) -> None:
    fill(tmp_path, "{split}")
    draw(tmp_path / "train" / "bed_0002_002.png", 5, size=9)
    with pytest.raises(ValueError, match=r"bed_0002 differ in size.*size="):
        MultiViewImages(tmp_path, "train")[0]
    assert MultiViewImages(tmp_path, "train", size=8)[0][0].shape == (3, 3, 8, 8)
    path = tmp_path / "train" / "bed_0002_003.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OSError, match=r"bed_0002_003\.png cannot be read"):
        MultiViewImages(tmp_path, "train", size=8)[0]
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        MultiViewImages(tmp_path / "none", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images of the test split; tried <class>/test"):
        MultiViewImages(tmp_path / "empty", "test")
