"""DataOptions and the registry: one configuration, and a data set that is added by one file."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tyro

from pointcmt.data import (
    DataOptions,
    ModelNet40,
    ModelNet40Hard,
    PointDataset,
    SyntheticShapes,
    datasets,
    register_dataset,
)
from pointcmt.data.registry import unregister_dataset

OWN = """
import numpy as np
from pointcmt.data import PointDataset, register_dataset


@register_dataset("spirals", matches=lambda folder: (folder / "spirals.npz").is_file(), up="x")
def spirals(root, split, num_points):
    with np.load(root / "spirals.npz") as file:
        points, labels = file[f"{split}_points"][:, :num_points], file[f"{split}_labels"]
    ids = [f"{split}/{label}/{row}" for row, label in enumerate(labels)]
    return PointDataset(points, labels, ["left", "right"], ids)
"""


def test_a_data_set_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered in a module of one's own, recognised by --data, drawn and held out like the others."""
    (tmp_path / "own_spirals.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    turn = np.linspace(0, 9, 64) + rng.random((2, 20, 1))
    spirals = (
        np.stack([2 * np.linspace(0, 1, 64) ** 3 * np.ones_like(turn) - 0.7, np.cos(turn), np.sin(turn)], -1)
        * 0.7
    )
    labels = np.arange(20) % 2
    arrays = {
        "train_points": spirals[0],
        "test_points": spirals[1],
        "train_labels": labels,
        "test_labels": labels,
    }
    np.savez(tmp_path / "spirals.npz", **arrays)
    try:
        __import__("own_spirals")
        options = DataOptions(data=str(tmp_path), num_points=32, per_class=6, holdout=0.2, test_per_class=3)
        assert options.named() == "spirals"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            splits = options.load()
        assert {name: len(part) for name, part in splits.parts().items()} == {
            "train": 10, "heldout": 2, "test": 6,
        }  # fmt: skip
        assert splits.train.num_points == 32 and {part.up for part in splits.parts().values()} == {"x"}
        assert not set(splits.train.shape_ids) & set(splits.heldout.shape_ids)
        with pytest.raises(ValueError, match="'spirals' has no --view-points"):
            DataOptions(data=str(tmp_path), view_points=64).load()
    finally:
        unregister_dataset("spirals")
        sys.modules.pop("own_spirals", None)
    with pytest.raises(ValueError, match=r"no data set 'spirals'; known: auto, .*folder, .*modelnet40"):
        DataOptions(dataset="spirals").load()


def test_names_are_unique_and_listed() -> None:
    assert {"synthetic", "modelnet40", "modelnet40hard", "scanobjectnn", "folder"} <= datasets().keys()
    with pytest.raises(ValueError, match="'synthetic' is there already"):
        register_dataset("synthetic")(lambda split: None)
    with pytest.raises(ValueError, match="'auto'"):
        register_dataset("auto")(lambda split: None)


def test_synthetic_by_default() -> None:
    options = DataOptions(num_points=32, per_class=4, test_per_class=2, data_seed=5, holdout=0.25)
    splits = options.load()
    assert isinstance(splits.test, SyntheticShapes)
    assert {name: len(part) for name, part in splits.parts().items()} == {
        "train": 48, "heldout": 16, "test": 32,
    }  # fmt: skip
    assert splits.test.up == "z"
    assert splits.test.fingerprint() == SyntheticShapes("test", 32, per_class=2, seed=5).fingerprint()


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "x/y", "--dataset", "scanobjectnn", "--variant", "obj_only", "--per-class", "20"]
    arguments += ["--normalize", "True", "--data-up", "y", "--skip-broken"]
    assert tyro.cli(DataOptions, args=arguments) == DataOptions(
        "x/y", "scanobjectnn", "obj_only", per_class=20, normalize=True, data_up="y", skip_broken=True
    )
    with pytest.raises(SystemExit):
        tyro.cli(DataOptions, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(DataOptions):
        assert f"--{field.name.replace('_', '-')}" in text


def test_root_is_asked_for_and_recognised(tmp_path: Path) -> None:
    for name in ("modelnet40", "modelnet40hard", "scanobjectnn", "folder"):
        with pytest.raises(ValueError, match=f"'{name}' needs a root.*--data FOLDER"):
            DataOptions(dataset=name).load()
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            DataOptions(str(tmp_path), name).load()
    with pytest.raises(FileNotFoundError, match=r"holds nothing, and no known data set(.|\n)*ply_data_train"):
        DataOptions(str(tmp_path)).load()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        DataOptions(str(tmp_path / "none")).load()
    with pytest.raises(ValueError, match="'modelnet40hard' has no --view-points"):
        DataOptions(str(tmp_path), "modelnet40hard", view_points=10).load()
    (tmp_path / "main_split").mkdir()
    (tmp_path / "train_files.txt").touch()
    with pytest.raises(ValueError, match="--dataset modelnet40 or scanobjectnn"):
        DataOptions(str(tmp_path)).load()


def boxes(scale: float = 1.0, offset: float = 0.0, up: str | None = "z") -> type:
    """A builder of stools (a seat on legs), z up, whatever axis is recorded."""

    def build(split: str, num_points: int) -> PointDataset:
        rng = np.random.default_rng([len(split)])
        points = rng.random((24, num_points, 3)) * [1, 1, 0.1] + [-0.5, -0.5, 0.4]
        points[:, ::8, 2] = rng.random((24, (num_points + 7) // 8)) - 0.5
        points *= 1.2
        ids = [f"{split}/a/{row}" for row in range(24)]
        labels = np.arange(24) % 3
        return PointDataset(points * scale + offset, labels, list("abc"), ids, up=up)  # type: ignore[arg-type]

    return build  # type: ignore[return-value]


@pytest.fixture
def register():
    made = []

    def one(build) -> DataOptions:
        register_dataset(f"made{len(made)}")(build)
        made.append(f"made{len(made)}")
        return DataOptions(dataset=made[-1], num_points=64, holdout=0)

    yield one
    for name in made:
        unregister_dataset(name)


def test_units_are_measured_and_mended(register) -> None:
    """Case 10: millimetres, off centre."""
    for build in (boxes(scale=1000.0), boxes(offset=4.0), boxes(scale=0.01)):
        options = register(build)
        with pytest.warns(UserWarning, match=r"not in the unit sphere.*--normalize True"):
            options.load()
        options.normalize = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            splits = options.load()
        for part in splits.parts().values():
            for points in (part.points, part.view_points):
                np.testing.assert_allclose(np.linalg.norm(points, axis=2).max(1), 1, atol=1e-5)


def test_the_axis_is_recorded_guessed_or_contradicted(register) -> None:
    right = register(boxes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert right.load().train.up == "z"
    wrong = register(boxes(up="y"))
    with pytest.warns(UserWarning, match=r"y is recorded.*it were z.*--data-up z"):
        assert wrong.load().train.up == "y", "it warns, and does as the data set says"
    wrong.data_up = "z"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = wrong.load()
    assert mended.train.up == "z" and mended.fingerprint() == right.load().fingerprint()
    with pytest.warns(UserWarning, match=r"does not record which axis points up; taken: z"):
        splits = register(boxes(up=None)).load()
    assert {part.up for part in splits.parts().values()} == {"z"}


def test_broken_numbers_are_named_before_training(register) -> None:
    """Case 16: the shape and its point, in any reader."""

    values = [np.nan, np.inf, -np.inf, 1e31, 3e7]

    def build(split: str, num_points: int) -> PointDataset:
        made = boxes()(split, num_points)
        made.points[3, 17, 1] = values[0]
        return PointDataset(made.points, made.labels, made.class_names, made.shape_ids)

    options = register(build)
    while values:
        with pytest.raises(ValueError, match=r"shape 'test/a/3' \(row 3\): point 17 is .*expected"):
            options.load()
        del values[0]


def test_real_data(modelnet40_root: Path) -> None:
    options = DataOptions(str(modelnet40_root), num_points=64, test_per_class=2, view_points=128)
    data = options.part("test")
    assert isinstance(data, ModelNet40) and len(data) == 80 and data.view_points.shape == (80, 128, 3)
    assert data.up == "z" and options.settle(data) == []
    hard = DataOptions(str(modelnet40_root), "modelnet40hard", num_points=64, test_per_class=1).part("test")
    assert isinstance(hard, ModelNet40Hard) and len(hard) == 40 and hard.up == "z"
