"""check-data: what would go wrong is found, named, drawn, and told by the exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pointcmt.cli import main
from pointcmt.data import SyntheticShapes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of standing things, clean."""
    for split in ("train", "test"):
        made = SyntheticShapes(split, 200, num_classes=3, per_class=4)  # type: ignore[arg-type]
        for points, label, name in zip(made.points, made.labels, made.shape_ids, strict=True):
            path = tmp_path / "own" / split / made.class_names[label] / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, points)
    return tmp_path / "own"


def check(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    out = root.parent / "page"
    code = main(["check-data", str(root), "--out", str(out), "--num-points", "128", *more])
    return code, " ".join(capsys.readouterr().out.split())


def test_a_clean_set(root: Path, capsys) -> None:
    code, said = check(root, capsys, "--data-up", "z")
    assert code == 0 and "nothing wrong was found" in said
    assert "data set: folder" in said and "recorded: z" in said and "points per shape: 128" in said
    page = (root.parent / "page" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "chair" in page


def test_what_would_go_wrong(root: Path, capsys) -> None:
    (root / "test" / "chair" / "copy.npy").write_bytes(
        (root / "train" / "chair" / "chair_train_0000.npy").read_bytes()
    )
    shuffled = np.load(root / "train" / "chair" / "chair_train_0001.npy")[::-1]
    np.save(root / "test" / "chair" / "turned.npy", shuffled)
    (root / "train" / "chair" / "bad.npy").write_bytes(b"junk")
    np.savetxt(root / "train" / "stool" / "far.xyz", [[0, 0, 0], [1, np.inf, 0]])
    np.save(root / "train" / "stool" / "point.npy", np.ones((5, 3)))
    np.save(root / "train" / "stool" / "flat.npy", np.random.default_rng(0).random((50, 3)) * [1, 1, 0])
    (root / "train" / "[b]<i>").mkdir()
    np.save(root / "train" / "[b]<i>" / "a.npy", np.random.default_rng(0).random((50, 3)))
    code, said = check(root, capsys)
    assert code == 1 and "something would go wrong" in said
    for words in (
        "2 test shapes are training shapes too",
        "train/chair/chair_train_0001 = test/chair/turned",
        "bad.npy cannot be read",
        "far.xyz: point 1 is [1.0, inf, 0.0]",
        "1 shape (train/stool/point): all points in one place",
        "1 shape (train/stool/flat): flat",
        "class '[b]<i>' has no test shape",
        "no up axis is recorded",
    ):
        assert words in said, words
    page = (root.parent / "page" / "index.html").read_text(encoding="utf-8")
    assert "[b]&lt;i&gt;" in page and "<i>" not in page


def test_units_and_axis(root: Path, capsys) -> None:
    code, said = check(root, capsys, "--data-up", "y")
    assert (
        code == 1 and "y is recorded as the axis that points up, and the shapes look as if it were z" in said
    )
    for path in root.rglob("*.npy"):
        np.save(path, np.load(path) * 1000 + 5000)
    code, said = check(root, capsys, "--data-up", "z", "--normalize", "False")
    assert code == 1 and "not in the unit sphere" in said and "nearly blank in most views" in said
    assert check(root, capsys, "--data-up", "z")[0] == 0


def test_images_and_a_folder_that_is_no_data(root: Path, tmp_path: Path, capsys) -> None:
    for split in ("train", "test"):
        for number, shade in enumerate((255, 0)):
            path = tmp_path / "images" / split / "a" / f"a_{number:04d}_001.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = np.full((32, 32), 255, np.uint8)
            image[8:20, 8:20] = shade
            Image.fromarray(image).save(path)
    code, said = check(root, capsys, "--data-up", "z", "--images", str(tmp_path / "images"))
    assert code == 1 and "images of 1 shape (test/a/a_0000): nearly blank" in said
    code, said = check(tmp_path / "none", capsys)
    assert code == 1 and "no such folder" in said
