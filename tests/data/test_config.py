"""DataConfig: what the command line and run folders say of the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tyro

from pointcmt.data import DataConfig, ModelNet40, ModelNet40Hard, SyntheticShapes


def test_synthetic_by_default() -> None:
    config = DataConfig(num_points=32, per_class=3, test_per_class=2, num_classes=4, seed=5)
    train, test = config.build("train"), config.build("test")
    assert isinstance(train, SyntheticShapes)
    assert (len(train), len(test), train.num_points) == (12, 8, 32)
    assert (
        train.fingerprint() == SyntheticShapes("train", 32, num_classes=4, per_class=3, seed=5).fingerprint()
    )


def test_from_the_command_line() -> None:
    arguments = ["--name", "scanobjectnn", "--root", "x/y", "--variant", "obj-only", "--per-class", "20"]
    arguments[5] = "obj_only"
    config = tyro.cli(DataConfig, args=arguments)
    assert config == DataConfig(name="scanobjectnn", root=Path("x/y"), variant="obj_only", per_class=20)


def test_every_field_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(DataConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Points per cloud" in text and "Variant of" in text


def test_root_is_asked_for(tmp_path: Path) -> None:
    for name in ("modelnet40", "modelnet40hard", "scanobjectnn"):
        with pytest.raises(ValueError, match=f"'{name}' needs a root"):
            DataConfig(name=name).build("train")  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            DataConfig(name=name, root=tmp_path).build("train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dense_points"):
        DataConfig(name="modelnet40hard", root=tmp_path, dense_points=10).build("train")


def test_real_data(modelnet40_root: Path) -> None:
    config = DataConfig(
        name="modelnet40", root=modelnet40_root, num_points=64, test_per_class=2, dense_points=128
    )
    data = config.build("test")
    assert isinstance(data, ModelNet40) and len(data) == 80 and data.view_points.shape == (80, 128, 3)
    hard = DataConfig(name="modelnet40hard", root=modelnet40_root, num_points=64, test_per_class=1).build(
        "test"
    )
    assert isinstance(hard, ModelNet40Hard) and len(hard) == 40
