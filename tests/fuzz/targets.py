"""What is fuzzed: for every reader its seeds, how it is called, and what must hold of what it gives back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointcmt.checkpoint import save_module
from pointcmt.data.array_cache import cached_array
from pointcmt.data.clouds import SUFFIXES, read_cloud
from pointcmt.data.feature_cache import FeatureCache
from pointcmt.data.folder import PointFolder
from pointcmt.data.modelnet40 import ModelNet40
from pointcmt.data.multiview import MultiViewImages
from pointcmt.generator import PointGenerator
from pointcmt.recipes import register
from pointcmt.recipes.build import StudentOptions, find_factory, make_student, split_weights
from pointcmt.recipes.config import plain
from pointcmt.recipes.networks import load_network, weights_of
from pointcmt.recipes.options import parse_assignments
from pointcmt.recipes.run import RunFolder, read_metrics, results_beside
from pointcmt.studies.configuration import read_study
from pointcmt.teacher import ImageTeacher
from pointcmt.types import TeacherOutput
from pointcmt.views.mesh_files import MESH_SUFFIXES, read_mesh

SEEDS = Path(__file__).parent / "seeds"


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: as the report calls it.
        make: writes the whole files into a folder.
        read: reads them, the changed one given; AssertionError where what it gives cannot be.
        lines: the file is one line of a command line, which a refusal names in place of the file.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]
    lines: bool = False


def _copy(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(SEEDS / name, folder, dirs_exist_ok=True)


def _sound(points: np.ndarray, most: float = 1e30) -> None:
    assert points.ndim >= 2 and points.shape[-1] in (3, 6), points.shape
    assert np.isfinite(points).all() and np.abs(points).max(initial=0) <= most


def _set(made: Any) -> None:
    _sound(made.points)
    assert made.labels.dtype == np.int64 and ((made.labels >= 0) & (made.labels < made.num_classes)).all()
    assert len(made) == len(made.shape_ids) == len(set(made.shape_ids)) and len(set(made.class_names)) > 0


def _modelnet(folder: Path, _: Path) -> None:
    for split in ("train", "test"):
        _set(ModelNet40(folder, split, num_points=8))


def _point_folder(folder: Path, _: Path) -> None:
    for split in ("train", "test"):
        _set(PointFolder(folder, split, num_points=8))


def _mesh(_: Path, changed: Path) -> None:
    vertices, faces = read_mesh(changed)
    assert vertices.dtype == np.float64 and vertices.shape[1] == faces.shape[1] == 3
    assert np.isfinite(vertices).all() and (not len(faces) or 0 <= faces.min() <= faces.max() < len(vertices))


def _cloud(_: Path, changed: Path) -> None:
    cloud = read_cloud(changed)
    _sound(cloud.points)
    assert cloud.normals is None or cloud.normals.shape == cloud.points.shape


def _register(_: Path, changed: Path) -> None:
    points = register.read_cloud(changed).points
    _sound(points[np.isfinite(points).all(1)])  # the others are left out, and their number is said


def _register_seeds(folder: Path) -> None:
    for name in ("cloud", "mesh"):
        for path in (SEEDS / name).iterdir():
            if path.suffix in register.SUFFIXES:
                shutil.copy(path, folder / path.name)


def _images(folder: Path, changed: Path) -> None:
    images = MultiViewImages(folder, "train", size=8, in_chans=3)
    views = images.views(0) if changed.suffix == ".json" else images[0][0]
    if isinstance(views, Tensor):
        assert views.shape[1:] == (3, 8, 8) and 0 <= views.min() <= views.max() <= 1
    else:
        assert views.view_matrix is not None and views.view_matrix.isfinite().all()


def _finite(module: torch.nn.Module) -> None:
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def _generator_seed(folder: Path) -> None:
    PointGenerator(8, 16).save(folder / "generator.safetensors")


def _generator(_: Path, changed: Path) -> None:
    _finite(PointGenerator.load(changed))
    results_beside(changed)


def _teacher_seed(folder: Path) -> None:
    torch.manual_seed(0)
    teacher = ImageTeacher(3, backbone="test_resnet", in_chans=1, feature_dim=8)
    teacher.save(folder / "teacher.safetensors")


def _teacher(_: Path, changed: Path) -> None:
    _finite(ImageTeacher.load(changed))


_STUDENT = StudentOptions(student="pointnet2", width=0.125, feature_dim=16)


def _student_seed(folder: Path) -> None:
    torch.manual_seed(0)
    network = make_student(_STUDENT, 3)
    config = {"student": plain(_STUDENT), "num_classes": 3}
    save_module(folder / "student.safetensors", network, "student", config, {"classes": ["a", "b", "c"]})
    torch.save({"state_dict": network.state_dict()}, folder / "weights.pth")


def _student(_: Path, changed: Path) -> None:
    if changed.suffix == ".pth":
        assert all(bool(value.isfinite().all()) for value in weights_of(changed).values())
    else:
        _finite(load_network(changed, _STUDENT, 3)[0])


def _fill(rows: Tensor) -> Any:
    yield rows, TeacherOutput(rows[:, None] + torch.arange(4.0), rows[:, None] + torch.arange(3.0))


def _cache_seed(folder: Path) -> None:
    FeatureCache.build(folder / "cache.safetensors", "teacher", "data", {"size": 8}, 6, _fill)
    cached_array(folder, "clouds", [], lambda: np.arange(12.0).reshape(4, 3))


def _cache(folder: Path, changed: Path) -> None:
    if changed.suffix == ".npz":
        array = cached_array(folder, "clouds", [], lambda: np.arange(12.0).reshape(4, 3))
        assert (
            array.dtype == np.float64
            and array.shape == (4, 3)
            and (array == np.arange(12).reshape(4, 3)).all()
        )
        return
    cache = FeatureCache.open(
        changed, teacher_fingerprint="teacher", data_fingerprint="data", views={"size": 8}
    )
    feature = cache[torch.arange(6)]
    assert torch.equal(feature, torch.arange(6)[:, None] + torch.arange(4.0))


def _run_seed(folder: Path) -> None:
    run = RunFolder.open(folder, {"loop": {"epochs": 3, "lr": 0.1}}, command="train", inputs={"data": "abc"})
    run.save_state({"epoch": 1, "model": {"weight": torch.ones(3)}, "best": None, "metrics": {"loss": 0.5}})
    for epoch in (1, 2):
        run.log({"epoch": epoch, "loss": 0.5})
    run.finish({"classes": ["a", "b"], "last": {"oa": 0.5}})


def _run(folder: Path, changed: Path) -> None:
    run = RunFolder.open(
        folder, {"loop": {"epochs": 3, "lr": 0.1}}, command="train", inputs={"data": "abc"}, resume=True
    )
    run.load_state()
    run.finished()
    read_metrics(folder)
    run.forget_metrics_after(1)


def _study(_: Path, changed: Path) -> None:
    for name, cell in ((cell.name, cell) for cell in read_study(changed).cells()):
        assert "/" not in name and cell.seed >= 0


def _strings(_: Path, changed: Path) -> None:
    text = changed.read_bytes().decode("utf-8", "replace").strip().splitlines()
    line = text[0] if text else ""
    if "=" in line:
        weights = (
            split_weights([line]) if line[:1] in "sn" else parse_assignments([line], "--student-options")
        )
        assert weights
    else:
        assert callable(find_factory(line))


def _line_files(folder: Path) -> None:
    for number, line in enumerate((SEEDS / "strings/strings.txt").read_text().splitlines()):
        (folder / f"{number}.txt").write_text(line)


TARGETS = (
    Target("HDF5 sets and their lists", _copy("modelnet_hdf5"), _modelnet),
    Target(f"meshes ({', '.join(MESH_SUFFIXES)})", _copy("mesh"), _mesh),
    Target(f"clouds ({', '.join(SUFFIXES)})", _copy("cloud"), _cloud),
    Target("folders of clouds", _copy("folder"), _point_folder),
    Target("csv lists of clouds", _copy("list"), _point_folder),
    Target("images and their cameras", _copy("images"), _images),
    Target("clouds of register", _register_seeds, _register),
    Target("teachers (safetensors)", _teacher_seed, _teacher),
    Target(
        "generators (safetensors)",
        lambda folder: PointGenerator(8, 16).save(folder / "g.safetensors"),
        _generator,
    ),
    Target("networks (safetensors, state_dict)", _student_seed, _student),
    Target("caches of features and arrays", _cache_seed, _cache),
    Target("run folders", _run_seed, _run),
    Target("studies (YAML)", _copy("study"), _study),
    Target("factories, options, weights", _line_files, _strings, lines=True),
)
