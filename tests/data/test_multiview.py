"""Rendered views in a folder: found by name, in order, aligned with clouds, and missed by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
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


def test_classes_come_from_folders(tmp_path: Path) -> None:
    """Case 2: shapes of one name in every class, in both layouts."""
    for layout in ("{split}/{name}", "{name}/{split}"):
        root = tmp_path / layout[1:5]
        for number, name in enumerate(("box", "ball", "tube")):
            for split, count in (("train", 2), ("test", 1)):
                for shape in range(1, count + 1):
                    folder = root / layout.format(split=split, name=name)
                    draw(folder / f"model_{shape:04d}_001.png", 10 * number + shape)
        data = MultiViewImages(root, "train")
        assert data.class_names == ["ball", "box", "tube"] and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert data.shape_ids[:3] == [
            "train/ball/model_0001",
            "train/ball/model_0002",
            "train/box/model_0001",
        ]
        assert len(MultiViewImages(root, "test")) == 3
        torch.testing.assert_close(data[4][0][0, 1, 0, 0] * 255, torch.tensor(21.0))
        few = MultiViewImages(root, "train", shape_ids=["train/tube/model_0002", "train/ball/model_0002"])
        assert few.class_names == ["ball", "box", "tube"] and few.labels.tolist() == [2, 0]
        with pytest.raises(ValueError, match="several shapes named 'model_0001': train/ball"):
            MultiViewImages(root, "train", shape_ids=["model_0001"])
        with pytest.raises(FileNotFoundError, match="no images of 1 of 1 shapes: model_0001"):
            MultiViewImages(root, "train", shape_ids=["train/cone/model_0001"])


def test_contradictions_are_errors(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "box" / "box_0001_001.png", 1)
    draw(tmp_path / "train" / "ball" / "box_0002_001.png", 1)
    with pytest.raises(ValueError, match=r"ball/box_0002_001\.png lies in the folder of class 'ball'.*'box'"):
        MultiViewImages(tmp_path, "train")
    one = tmp_path / "one"
    for shape in ("box_0001", "ball_0001"):
        draw(one / "renderings" / "train" / f"{shape}_001.png", 1)
    with pytest.raises(ValueError, match="one folder, 'renderings', which would be the only class"):
        MultiViewImages(one, "train")
    assert MultiViewImages(one / "renderings", "train").class_names == ["ball", "box"]
    twice = tmp_path / "twice"
    draw(twice / "train" / "box" / "a_001.png", 1)
    draw(twice / "train" / "box" / "a_001.jpg", 1)
    with pytest.raises(ValueError, match="are both view 001 of train/box/a"):
        MultiViewImages(twice, "train")


NAMES = [
    "a5f3ball",
    "ball",
    "0042",
    "x_y-z.off",
    "chair 12",
    "größe_1",
    "a_v",
    "a_shaded",
    "b.obj",
    "_",
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_render_views_writes_are_read(tmp_path: Path, name: str) -> None:
    """Case 17: <name>_001.png, whatever the mesh's name is."""
    for view in (1, 2, 3):
        draw(tmp_path / "train" / "thing" / f"{name}_{view:03d}.png", view)
    data = MultiViewImages(tmp_path, "train", shape_ids=[f"train/thing/{name}"])
    assert data.shape_ids == [f"train/thing/{name}"] and data.num_views == 3


def test_depths_of_pixels(tmp_path: Path) -> None:
    """Case 3: 16 bits over 65535, never white; what has no known range is refused by name."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "deep_001.png")
    Image.fromarray(ramp).save(folder / "tiff_001.tif")
    for channels in (1, 3):
        for row in (0, 1):
            views = MultiViewImages(tmp_path, "train", in_chans=channels)[row][0]
            assert views.shape == (1, channels, 8, 8)
            expected = torch.from_numpy(ramp / 65535).float()
            torch.testing.assert_close(views[0], expected.expand(channels, -1, -1))
    small = MultiViewImages(tmp_path, "train", in_chans=1, size=4)[0][0]
    assert small.shape == (1, 1, 4, 4)
    torch.testing.assert_close(small.mean(), torch.tensor(0.5), atol=1e-3, rtol=0)
    for mode, words in (("I", "32-bit integers"), ("F", "floats")):
        path = folder / f"{mode}_001.tif"
        Image.fromarray(ramp.astype(np.int32 if mode == "I" else np.float32), mode=mode).save(path)
        with pytest.raises(ValueError, match=rf"{mode}_001\.tif has pixels of {words}"):
            MultiViewImages(tmp_path, "train", shape_ids=[f"train/a/{mode}"])[0]


def test_images_that_do_not_use_their_range_are_said(tmp_path: Path) -> None:
    """Case 3's kind: depths in millimetres, nearly black; also with a value for what was not measured."""
    depths = np.linspace(500, 4000, 64).reshape(8, 8).astype(np.uint16)
    for name, first in (("plain", 500), ("holes", 0), ("far", 65535)):
        folder = tmp_path / name / "train" / "a"
        folder.mkdir(parents=True)
        own = depths.copy()
        own[0, 0] = first
        Image.fromarray(own).save(folder / "x_001.png")
        words = (
            r"largest value of 1 images .* is 4000 of 65535, .* nearly black; .* --white 4000 \(white= here\)"
        )
        with pytest.warns(UserWarning, match=words):
            MultiViewImages(tmp_path / name, "train", in_chans=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            views = MultiViewImages(tmp_path / name, "train", in_chans=1, white=4000)[0][0][0, 0]
        torch.testing.assert_close(views, torch.from_numpy(own / 4000).float().clamp(max=1))
        with pytest.warns(UserWarning, match=r"of the pixels .* are above 1000, .* larger --white"):
            MultiViewImages(tmp_path / name, "train", white=1000, size=4)
    for value, words in (
        (9, "largest value of 3 images .* is 14 of 255"),
        (0, "all of 3 images .* of one colour"),
    ):
        folder = tmp_path / f"of {value}" / "test" / "a"
        folder.mkdir(parents=True)
        for view in range(3):
            image = np.full((4, 4), value, np.uint8)
            image[0, 0] += value // 9 * 5
            Image.fromarray(image).save(folder / f"x_00{view}.png")
        with pytest.warns(UserWarning, match=words):
            MultiViewImages(tmp_path / f"of {value}", "test")
    with pytest.raises(ValueError, match="white is 70000; expected 1 to 65535"):
        MultiViewImages(tmp_path / "plain", "train", white=70000)


def test_transparent_pixels_are_seen_on_white(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255  # black above, and below nothing
    Image.fromarray(pixels, "RGBA").save(folder / "x_001.png")
    Image.fromarray(pixels[..., [0, 3]], "LA").save(folder / "y_001.png")
    for row in (0, 1):
        image = MultiViewImages(tmp_path, "train")[row][0][0]
        assert not image[:, :2].any() and (image[:, 2:] == 1).all()


def test_images_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "train" / "a" / "x_001.png", 3, size=64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"x_001\.png cannot be read as an image"):
        MultiViewImages(tmp_path, "train")[0]


def test_what_operating_systems_leave_behind(tmp_path: Path) -> None:
    fill(tmp_path, "{split}/{name}")
    before = MultiViewImages(tmp_path, "train").shape_ids
    for name in ("train/bed/._bed_0002_001.png", "__MACOSX/train/bed/a_001.png", "train/.x/a_001.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"junk")
    assert MultiViewImages(tmp_path, "train").shape_ids == before


def test_public_conventions() -> None:
    """Views of real ModelNet40 in the two namings that are about."""
    root = Path(__file__).resolve().parents[3] / "shared" / "data" / "modelnet40_views_sample"
    if not root.is_dir():
        pytest.skip(f"the sample of public views is not at {root}")
    for name, shapes, views in (
        ("loop", ["airplane_0001", "bed_0001"], 12),
        ("neighbor", ["airplane_0001"], 22),
    ):
        data = MultiViewImages(root / name, "train")
        assert data.shape_ids == [f"train/{shape[:-5]}/{shape}" for shape in shapes]
        assert data.num_views == views
        assert 0.1 < float(data[0][0].mean()) < 1
