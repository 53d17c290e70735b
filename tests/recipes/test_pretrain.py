"""pretrain, probe and few-shot through the command line, at the smallest size that is one."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.svm import SVC
from torch import nn

from pointcmt.adapters import register_adapter, unregister_adapter
from pointcmt.cli import main
from pointcmt.data.dataset import PointDataset, StoredViews
from pointcmt.data.registry import register_dataset, unregister_dataset
from pointcmt.methods import freeze_unused
from pointcmt.recipes import networks, pretrain, pretrain_pictures
from pointcmt.recipes.few_shot import episode
from pointcmt.recipes.networks import encode, find_weights, load_network, start_from
from pointcmt.recipes.pretrain_pictures import draw_features, draw_similarity
from pointcmt.recipes.probe import linear_svm
from pointcmt.recipes.run import read_metrics
from pointcmt.studies.report import write_report
from pointcmt.types import StudentState, TeacherOutput, Views
from pointcmt.views import pixels_of
from tests.pretraining_toys import LOCAL, Network, adapter

TOY = ["--student", "tests.pretraining_toys:made", "--adapter", "toy"]
DATA = ["--per-class", "3", "--test-per-class", "2", "--num-points", "48"]
CPU = ["--device", "cpu", "--no-tensorboard", "--no-progress"]
SMALL = [
    "--size", "16", "--rig", "simpleview", "--backbone", "simpleview_resnet", "--backbone-options",
    "layers=(1,1)", "stem_stride=2", "--epochs", "2", "--batch-size", "16",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def toy():
    register_adapter(adapter())
    yield
    unregister_adapter("toy")


def run(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    assert main([*words, "--debug"]) == 0, words


def read(folder: Path, name: str = "results.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pretrained")
    for method in pretrain.METHODS:
        run("pretrain", "--out", root / method, "--method", method, *TOY, *DATA, *CPU, *SMALL)
    return root


@pytest.mark.parametrize("method", pretrain.METHODS)
def test_a_run_saves_just_the_network_and_says_what_it_did(method, runs):
    folder = runs / method
    results = read(folder)
    assert results["last"]["epoch"] == 2 and results["method"] == method
    assert results["shapes"] == {"train": 43, "heldout": 5}
    assert "no label and no test shape" in results["best"]["chosen_by"]
    names = {"pic-at-point": {"local", "global"}, "mm-point": {"intra", "inter"}, "dense": {"pixels"}}
    terms = names.get(method, {"intra", "cross"})
    assert results["losses_at_chance"].keys() == (set() if method == "dense" else terms)
    records = read_metrics(folder)
    watched = {f"heldout_{name}" for name in ("retrieval", "alignment", "uniformity")}
    for record in records:
        assert {"loss", *terms, *({"heldout_pixels"} if method == "dense" else watched)} <= set(record)
        assert record["loss"] == pytest.approx(sum(record[term] for term in terms), rel=1e-5)
    assert ("heldout_cell" in records[0]) is (method == "pic-at-point")
    # anybody's load_state_dict takes it, and the head's layers are as they were made
    network = Network(num_classes=16)
    network.load_state_dict(load_file(folder / "network.safetensors"))
    assert results["not_trained"] == sum(
        p.numel() for part in (network.hidden, network.head) for p in part.parameters()
    )


def test_pictures_of_what_is_similar_are_in_the_report(runs):
    assert (runs / "pic-at-point" / "similarity.png").stat().st_size > 10_000
    assert not (runs / "crosspoint" / "similarity.png").exists()  # it has no local features
    page = write_report(runs).read_text()
    assert page.count("What pre-training finds similar") == 1
    assert f"{len(pretrain.METHODS)} runs" in page and "Comparison" not in page


def test_the_similarities_that_are_drawn():
    local = torch.nn.functional.normalize(
        torch.tensor([[[[1.0, 0], [0, 1], [1, 1]]], [[[0, 1.0], [1, 0], [-1, 0]]]]), dim=-1
    )
    cells = torch.eye(2).reshape(1, 1, 2, 1, 2).repeat(2, 1, 1, 1, 1)

    class Heads:
        def embed_cells(self, state, said):
            return local, cells

    centers = torch.tensor([[[2.0, 0, 0], [1, 0, 0], [0, 0, 0]], [[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
    state = StudentState(torch.zeros(2, 1), None, None, None, centers)
    said = TeacherOutput(torch.zeros(2, 1), views=Views(torch.zeros(2, 1, 1, 4, 4)))
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_pictures, "save_similarity", lambda *values: seen.update(enumerate(values)))
        draw_similarity(Heads(), state, said, ["a", "b"], "z", Path())
    assert seen[1] == [0, 2]  # the outermost points
    np.testing.assert_allclose(seen[2], [[1, 0, 0.5**0.5], [0, -1, 1]], atol=1e-6)
    np.testing.assert_allclose(seen[3], [[0, 1, -1], [-1, 0, -(0.5**0.5)]], atol=1e-6)
    np.testing.assert_allclose(seen[5], [[[[1, 0]]], [[[-1, 0]]]], atol=1e-6)


def test_features_are_laid_out(tmp_path):
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 6)
    features = draw.normal(size=(12, 5)) + 9 * labels[:, None]
    assert draw_features(features[:4], features[:4], labels[:4], ["a", "b"], tmp_path / "no.png") is None
    path = draw_features(features, features, labels, ["a", "b"], tmp_path / "yes.png")
    assert path is not None and path.stat().st_size > 5000


def test_the_last_network_is_the_one_that_is_saved(runs):
    folder = runs / "crosspoint"
    last, saved = load_file(folder / "last.safetensors"), load_file(folder / "network.safetensors")
    assert all(torch.equal(last[name], saved[name]) for name in last)


def test_no_label_and_no_test_shape_is_looked_at(runs, tmp_path, monkeypatch):
    asked = []
    whole = networks.clouds_of

    def scrambled(data, split, **more):
        asked.append(split)
        found = whole(data, split, **more)
        found.labels = np.roll(found.labels, 7)
        return found

    monkeypatch.setattr(pretrain, "clouds_of", scrambled)
    run("pretrain", "--out", tmp_path / "again", "--method", "pic-at-point", *TOY, *DATA, *CPU, *SMALL)
    assert asked == ["train"]
    ours = load_file(tmp_path / "again" / "network.safetensors")
    theirs = load_file(runs / "pic-at-point" / "network.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("method", ["pic-at-point", "mm-point"])
def test_a_stopped_run_goes_on_to_the_same_bits(method, runs, tmp_path):
    words = ["pretrain", "--out", tmp_path / "run", "--method", method, *TOY, *DATA, *CPU, *SMALL]
    assert main([*map(str, words), "--minutes", "1e-9"]) == 1
    assert not (tmp_path / "run" / "results.json").exists()
    run(*words, "--resume")
    ours = load_file(tmp_path / "run" / "network.safetensors")
    theirs = load_file(runs / method / "network.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keep = {"loss", "heldout_retrieval", "heldout_alignment"}
    mine, other = read_metrics(tmp_path / "run"), read_metrics(runs / method)
    assert [{k: r[k] for k in keep} for r in mine] == [{k: r[k] for k in keep} for r in other]


def test_real_pictures_teach_where_the_data_has_them(tmp_path):
    """Points learn the colour of their pixel in pictures that are stored, not made of the points."""

    @register_dataset("photographed", up="y")
    def photographed(split: str, num_points: int) -> PointDataset:
        generator = np.random.default_rng(0)
        points = generator.uniform(-0.5, 0.5, (8, num_points, 3)).astype(np.float32)
        labels = (points[..., 0] > 0).astype(np.int64)
        made = PointDataset(
            points, np.zeros(8), ["table"], [f"{split}/table/{k}" for k in range(8)], up="y",
            part_names=["left", "right"], point_labels=labels,
        )  # fmt: skip
        image = np.zeros((8, 1, 3, 32, 32), dtype=np.uint8)
        image[..., 16:] = 255
        view = np.tile(np.eye(4, dtype=np.float32), (8, 1, 1, 1))
        view[..., 2, 3] = 2.0
        projection = np.zeros((8, 1, 4, 4), dtype=np.float32)
        projection[..., 0, 0] = projection[..., 1, 1] = 3.0
        projection[..., 2, 2] = projection[..., 3, 2] = 1.0
        made.stored_views = StoredViews(image, view, projection)
        return made

    try:
        words = ["--dataset", "photographed", "--num-points", "40", "--holdout", "0", *CPU]
        words += [
            "--student",
            "pointnet2_scene",
            "--width",
            "0.05",
            "--student-options",
            "npoints=(16,8,4,2)",
        ]
        run("pretrain", "--out", tmp_path / "pre", "--method", "dense", *words, *SMALL, "--head-width", "8")
        results = read(tmp_path / "pre")
        assert results["views"] == "photographs" and results["views_per_step"] == 1
        records = read_metrics(tmp_path / "pre")
        assert records[-1]["loss"] < records[0]["loss"]
        # its network goes on as that of pointcmt segment, all of it
        more = ["--epochs", "1", "--batch-size", "4", "--inputs", "points"]
        run("segment", "--out", tmp_path / "seg", "--init", tmp_path / "pre", *words, *more)
        assert read(tmp_path / "seg")["initialised"] == len(
            load_file(tmp_path / "pre" / "network.safetensors")
        )
        words[1] = "synthetic"
        more = ["--per-class", "2", *SMALL, "--pictures", "stored"]
        assert main([str(word) for word in ["pretrain", "--out", tmp_path / "none", *words, *more]]) == 1
    finally:
        unregister_dataset("photographed")


def test_what_a_frozen_encoder_says_can_be_kept(tmp_path):
    """Three of six views a step for two epochs: as many passes as there are views, so they are kept."""
    losses = {}
    for kept in ("2", "0"):
        run(
            "pretrain", "--out", tmp_path / kept, *TOY, *DATA, *CPU, *SMALL, "--views-per-step", 3,
            "--cache-gb", kept, "--hidden-points", "skip",
        )  # fmt: skip
        losses[kept] = [record["loss"] for record in read_metrics(tmp_path / kept)]
    assert losses["2"] == pytest.approx(losses["0"], rel=1e-4)


@pytest.mark.parametrize(
    "ablation",
    [
        ["--local-weight", "0"],
        ["--global-weight", "0", "--no-pose", "--no-augment-points"],
        ["--method", "mm-point", "--views-per-step", "2", "--shared-head", "--image-levels", "0"],
        ["--method", "mm-point", "--train-images", "no", "--intra-weight", "0", "--image-levels", "1"],
        ["--method", "crosspoint", "--cross-weight", "0", "--holdout", "0"],
        ["--precision", "bf16", "--train-images", "yes", "--local-points", "9", "--head-width", "16"],
    ],
)
def test_ablations(ablation, tmp_path):
    once = [*SMALL[: SMALL.index("--epochs")], "--epochs", "1", "--batch-size", "16"]
    run("pretrain", "--out", tmp_path / "run", *TOY, *DATA, *CPU, *once, *ablation)
    results = read(tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[0]["loss"])
    if "--global-weight" in ablation:
        assert "heldout_cell" in results["last"] and "heldout_retrieval" not in results["last"]
    if "--holdout" in ablation:
        assert "train_retrieval" in results["last"]


# ---- stored pictures, and normals


@pytest.fixture(scope="module")
def meshes(tmp_path_factory) -> Path:
    """Boxes of many sizes, far from the origin."""
    root = tmp_path_factory.mktemp("meshes")
    draw = np.random.default_rng(0)
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    faces = ["0 1 3 2", "4 6 7 5", "0 4 5 1", "2 3 7 6", "0 2 6 4", "1 5 7 3"]
    for split, count in (("train", 6), ("test", 1)):
        for name in ("flat", "tall"):
            folder = root / name / split
            folder.mkdir(parents=True)
            for number in range(count):
                sides = draw.uniform(20, 60, 3) * ([1, 1, 0.2] if name == "flat" else [1, 1, 3])
                points = corners * sides + draw.uniform(-500, 500, 3)
                rows = [" ".join(f"{x:.4f}" for x in point) for point in points]
                text = ["OFF", "8 6 0", *rows, *(f"4 {face}" for face in faces)]
                (folder / f"{name}_{number:04d}.off").write_text("\n".join(text) + "\n")
    return root


@pytest.fixture(scope="module")
def rendered(meshes, tmp_path_factory) -> Path:
    pytest.importorskip("pyvista", reason="pyvista is not installed: pip install 'pointcmt[mesh]'")
    out = tmp_path_factory.mktemp("images")
    run("render-views", meshes, "--out", out, "--rig", "simpleview", "--size", 32)
    return out


STORED = ["--num-points", "48", "--up", "z", "--data-up", "z", "--holdout", "0.3", *TOY, *CPU, *SMALL]


def test_stored_pictures_show_the_points_where_their_cameras_say(meshes, rendered, tmp_path):
    options = pretrain.Pretrain(tmp_path, data=networks.DataOptions(str(meshes), num_points=48, data_up="z"))
    options.images.images, options.views.size = rendered, 32
    clouds = networks.clouds_of(options.data, "train")
    raw = functools.partial(dataclasses.replace(options.data, normalize=False).build, "train", None)
    stored = pretrain.source_of(options, clouds, options.views.spec("z"), 3, torch.device("cpu"), raw)
    rows, cameras = torch.tensor([5, 0, 9]), torch.tensor([[0, 3], [4, 1], [2, 5]])
    views = stored.take(rows, cameras)
    assert views.images.shape == (3, 2, 3, 32, 32) and views.view_matrix.shape == (3, 2, 4, 4)
    points = torch.from_numpy(clouds.points[rows])
    pixels, _ = pixels_of(points, views.view_matrix, views.projection_matrix)
    place = (pixels * 32).long().clamp(0, 31)
    for shape in range(3):
        for view in range(2):
            column, row = place[shape, view].unbind(-1)
            shown = views.images[shape, view, 0, row, column] < 0.99  # the ground is white
            assert shown.float().mean() > 0.9
    run("pretrain", "--data", meshes, "--images", rendered, "--out", tmp_path / "run", *STORED)
    assert read(tmp_path / "run")["views"] == {"images": "stored", "size": 16}


def test_stored_pictures_without_the_right_cameras(meshes, rendered, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(rendered, images)
    words = ["pretrain", "--data", str(meshes), "--images", str(images), *STORED]
    files = sorted((images / "train").rglob("*_cameras.json"))
    for file, other in zip(files, [*files[1:], files[0]], strict=True):
        shutil.copy(rendered / other.relative_to(images), file)
    assert main([*words, "--out", str(tmp_path / "a")]) == 1
    assert "are not of these clouds. Render the very meshes" in capsys.readouterr().err.replace("\n", " ")
    for file in files:
        file.unlink()
    assert main([*words, "--out", str(tmp_path / "b")]) == 1
    assert "render-views` writes it with the images" in capsys.readouterr().err.replace("\n", " ")
    run(*words, "--out", tmp_path / "c", "--method", "crosspoint")  # needs no cameras
    assert main([*words, "--out", str(tmp_path / "d"), "--hidden-points", "skip"]) == 1
    assert "which points a stored picture shows is not known" in capsys.readouterr().err.replace("\n", " ")


def test_with_normals(meshes, tmp_path, capsys):
    network = ["--student", "pointnet2", "--width", "0.125", "--student-options", "in_channels=6"]
    words = ["--data", meshes, "--num-points", "48", "--data-up", "z", *network, "--normals"]
    small = [*CPU, *SMALL[: SMALL.index("--epochs")], "--epochs", 1, "--up", "z", "--holdout", 0.3]
    run("pretrain", "--out", tmp_path / "run", *words, *small, "--batch-size", 8)
    assert load_file(tmp_path / "run" / "network.safetensors")["sa1.mlp_convs.0.weight"].shape[1] == 6
    run("probe", tmp_path / "run", *words, "--device", "cpu", "--c", 1, "--folds", 2)
    assert main(["pretrain", "--out", str(tmp_path / "no"), "--normals", *TOY, *DATA, *CPU]) == 1
    assert "data set 'synthetic' has no --normals" in capsys.readouterr().err.replace("\n", " ")


# ---- weights


def test_load_network_of_a_run_of_a_state_dict_and_at_random(runs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a file imports nothing"):  # it is data, and names a user's module
        monkeypatch.setattr("pointcmt.recipes.build.IMPORTED", [])
        load_network(runs / "crosspoint", networks.StudentOptions(), 3)
    named = networks.StudentOptions(student="tests.pretraining_toys:made")
    model, found, student = load_network(runs / "crosspoint", named, 3)
    assert isinstance(model, Network) and found.name == "toy" and not model.training
    assert student.student == "tests.pretraining_toys:made"
    own = Network(num_classes=3)
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}},
        tmp_path / "w.pth",
    )
    options = networks.StudentOptions(student="tests.pretraining_toys:made")
    loaded, _, _ = load_network(tmp_path / "w.pth", options, 3)
    assert torch.equal(loaded.head.weight, own.head.weight)
    points = torch.randn(2, 9, 3)
    features = encode(loaded, adapter(), points)
    torch.testing.assert_close(features.global_, own.points(points).amax(1))
    assert features.local.shape == (2, 9, LOCAL) and torch.equal(features.centers, points)
    with pytest.raises(ValueError, match=r"do not fit --student tests\.pretraining_toys:made"):
        load_network(tmp_path / "w.pth", options, 5)
    with pytest.raises(FileNotFoundError, match="pointcmt pretrain --out FOLDER"):
        find_weights(tmp_path)
    (tmp_path / "no.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_network(tmp_path / "no.pth", options, 3)


def test_starting_from_weights_takes_what_fits(runs):
    network = Network(num_classes=4)  # the run's has 16 classes
    head = network.head.weight.clone()
    taken, rest = start_from(network, runs / "crosspoint")
    assert rest == ["head.weight", "head.bias"] and len(taken) == 6
    saved = load_file(runs / "crosspoint" / "network.safetensors")
    assert torch.equal(network.points[0].weight, saved["points.0.weight"])
    assert torch.equal(network.head.weight, head)
    with pytest.raises(ValueError, match=r"nothing in .* has a name and shape of Linear"):
        start_from(nn.Linear(2, 2), runs / "crosspoint")


def test_a_student_starts_from_a_pre_trained_network(runs, tmp_path, capsys):
    new = ["train", "--out", tmp_path / "r", *TOY, *DATA, *CPU, "--method", "none", "--epochs", 1]
    new += ["--lr", 1e-9, "--weight-decay", 0]
    run(*new, "--init", runs / "crosspoint")
    assert "as they were made: none" in capsys.readouterr().out
    assert read(tmp_path / "r")["initialised"] == 8
    weights = load_file(tmp_path / "r" / "student.safetensors")
    saved = load_file(runs / "crosspoint" / "network.safetensors")
    torch.testing.assert_close(weights["points.0.weight"], saved["points.0.weight"], atol=1e-6, rtol=0)
    again = [str(part) for part in (*new, "--resume", "--init", runs / "pic-at-point")]
    assert main(again) == 1
    assert "init" in capsys.readouterr().err, "a resumed run cannot start from something else"


def test_the_head_can_have_a_rate_of_its_own(runs, tmp_path):
    new = ["train", *TOY, *DATA, *CPU, "--method", "none", "--epochs", 1, "--weight-decay", 0]
    new += ["--init", runs / "crosspoint", "--optimizer", "sgd"]
    run(*new, "--out", tmp_path / "a", "--lr", 1e-9, "--head-lr", 1e-2)
    run(*new, "--out", tmp_path / "b", "--lr", 1e-2, "--head-lr", 1e-9)
    saved = load_file(runs / "crosspoint" / "network.safetensors")
    moved = {}
    for name in ("a", "b"):
        weights = load_file(tmp_path / name / "student.safetensors")
        moved[name] = {key for key in saved if (weights[key] - saved[key]).abs().max() > 1e-6}
    parts = {name: {key.split(".")[0] for key in keys} for name, keys in moved.items()}
    assert parts == {"a": {"hidden", "head"}, "b": {"points"}}


def test_pictures_heads_can_have_a_rate_of_their_own(tmp_path, monkeypatch):
    groups = {}
    fit = pretrain.fit
    monkeypatch.setattr(
        pretrain, "fit", lambda *a, rates, **o: groups.update(rates) or fit(*a, rates=rates, **o)
    )
    once = ["--epochs", "1", "--image-lr", "5e-5"]
    run("pretrain", "--out", tmp_path / "run", *TOY, *DATA, *CPU, *SMALL, *once)
    assert set(groups.values()) == {5e-5} and len(groups) == 12  # two heads of two layers and a norm


def test_layers_without_a_part_in_the_features_are_set_aside():
    network = Network()
    unused = freeze_unused(network, torch.randn(2, 5, 3), adapter())
    assert {id(p) for p in unused} == {
        id(p) for part in (network.hidden, network.head) for p in part.parameters()
    }
    assert network.training and not network.head.weight.requires_grad
    assert network.points[0].weight.requires_grad and network.points[0].weight.grad is None


# ---- what features are worth


def test_probe_has_both_figures_the_protocol_and_random_weights_beside(runs, tmp_path, capsys):
    run("probe", runs / "crosspoint", *TOY, *DATA, "--json", tmp_path / "probe.json", "--device", "cpu")
    said = capsys.readouterr().out
    assert "protocol:" in said and "chosen there on the test set" in said
    result = read(tmp_path, "probe.json")
    rows = result["rows"]
    assert list(rows) == [str(runs / "crosspoint"), "random weights"]
    for row in rows.values():
        assert 0 <= row["oa"] <= 100 and row["c"] in (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
        assert row["fixed_c"] == 0.01 and row["feature_size"] == LOCAL
    assert result["protocol"]["points"] == 48 and result["protocol"]["train"] == 48
    run("probe", "--student", "pointnet2", "--width", 0.125, *DATA, "--device", "cpu", "--c", 0.1)


def test_the_svm_is_the_linear_one_and_c_is_chosen_on_training_shapes():
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    train = draw.normal(size=(36, 8)) + 2 * np.eye(3, 8)[labels]
    test = draw.normal(size=(36, 8)) + 2 * np.eye(3, 8)[labels]
    found = linear_svm(train, labels, test, labels, 3, (0.01, 1.0), 4, 0.3)
    expected = SVC(kernel="linear", C=0.3).fit(train, labels).score(test, labels)
    assert found["oa_fixed_c"] == pytest.approx(100 * expected)
    chosen = SVC(kernel="linear", C=found["c"]).fit(train, labels).score(test, labels)
    assert found["oa"] == pytest.approx(100 * chosen)
    with pytest.raises(ValueError, match="a class has a single training shape"):
        linear_svm(train[:13], labels[:13], test, labels, 3, (1.0,), 4, 0.3)


def test_few_shot_draws_the_same_runs_for_every_network(runs, tmp_path, capsys):
    for protocol in ("standard", "crosspoint"):
        run(
            "few-shot", runs / "crosspoint", *TOY, *DATA, "--ways", 3, 5, "--shots", 1, "--queries", 2,
            "--runs", 4, "--protocol", protocol, "--json", tmp_path / f"{protocol}.json", "--device", "cpu",
        )  # fmt: skip
    assert "from the training split" in capsys.readouterr().out
    for protocol in ("standard", "crosspoint"):
        result = read(tmp_path, f"{protocol}.json")
        assert list(result["rows"]) == [str(runs / "crosspoint"), "random weights"]
        for row in result["rows"].values():
            assert list(row) == ["3-way 1-shot", "5-way 1-shot"]
            assert len(row["3-way 1-shot"]["runs"]) == 4


def test_an_episode_classifies_other_shapes_than_it_learns_from():
    # each shape's feature is its own: nothing but a shape that was learned could be told
    labels = np.repeat(np.arange(4), 6)
    features = np.eye(24)
    assert episode(features, labels, features, labels, 4, 3, 3, 1.0, (0, 0), shared=True) < 100
    told = np.eye(4)[labels]
    assert episode(told, labels, told, labels, 4, 3, 3, 1.0, (0, 0)) == 100
    with pytest.raises(ValueError, match="needs 4 classes of at least 7 training shapes, and there are 0"):
        episode(told, labels, told, labels, 4, 6, 3, 1.0, (0, 0), shared=True)


# ---- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-levels", "2"], "crops and flips pictures, after which a point is in another cell"),
        (["--method", "crosspoint", "--image-levels", "3"], "has one change of its pictures"),
        (["--encoder", "x", "--pretrained"], "is a trained encoder already"),
        (["--batch-size", "1"], "use a larger --batch-size"),
        (["--views-per-step", "9"], "a rig with 6 cameras"),
        (["--encoder-weights", "nowhere.pth"], "there are no weights at"),
        (["--holdout", "1.5"], "expected a part of the training shapes"),
        (["--image-lr", "0"], "expected a positive learning rate"),
    ],
)
def test_errors_say_what_to_do(words, message, tmp_path, capsys):
    given = ["pretrain", "--out", str(tmp_path / "run"), *TOY, *DATA, *CPU, *SMALL, *words]
    assert main(given) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_batch_that_memory_does_not_hold(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(pretrain, "fit", full)
    assert main(["pretrain", "--out", str(tmp_path / "run"), *TOY, *DATA, *CPU, *SMALL]) == 1
    assert "16 shapes does not fit into memory (no room): use a smaller" in capsys.readouterr().err


class NoLocal(nn.Module):
    """Ends in a linear layer, and nobody says where its local features are."""

    def __init__(self, learns: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 8) if learns else nn.Identity()
        self.head = nn.Linear(8 if learns else 3, 4)

    def forward(self, points):
        return self.head(self.encoder(points).amax(1))


def test_a_network_without_local_features(tmp_path, capsys):
    words = [
        "pretrain",
        "--out",
        str(tmp_path / "run"),
        "--student",
        f"{__name__}:NoLocal",
        *DATA,
        *CPU,
        *SMALL,
    ]
    assert main(words) == 1
    assert "local needs local features" in capsys.readouterr().err
    assert main([*words, "--resume", "--local-weight", "0", "--student-options", "learns=False"]) == 1
    assert "another configuration" in capsys.readouterr().err
    with pytest.raises(ValueError, match="depends on none of its parameters"):
        freeze_unused(NoLocal(learns=False), torch.randn(2, 5, 3))


def test_held_out_shapes_are_drawn_without_labels():
    def made(labels):
        points = np.random.default_rng(0).normal(size=(20, 4, 3)).astype(np.float32)
        return PointDataset(points, labels, ["a", "b"], [f"s_{k}" for k in range(20)])

    one = pretrain.without_labels(made(np.zeros(20, dtype=np.int64)), 0.25, 3, 0)
    two = pretrain.without_labels(made(np.arange(20) % 2), 0.25, 3, 0)
    assert one[0].shape_ids == two[0].shape_ids and one[1].shape_ids == two[1].shape_ids
    assert (len(one[0]), len(one[1]), one[2]) == (15, 3, "heldout")
    train, shown, name = pretrain.without_labels(made(np.arange(20) % 2), 0, 6, 0)
    assert (len(train), len(shown), name) == (20, 6, "train")


def test_a_run_that_was_killed_before_its_results_has_them_all(runs, tmp_path):
    """It makes no step when it is resumed; what results say must not be what only a step knows."""
    shutil.copytree(runs / "pic-at-point", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    words = ["--method", "pic-at-point", *TOY, *DATA, *CPU, *SMALL]
    run("pretrain", "--out", tmp_path / "run", *words, "--resume")
    again, before = read(tmp_path / "run"), read(runs / "pic-at-point")
    assert again["losses_at_chance"].keys() == {"local", "global"}
    assert {**again, "seconds": 0} == {**before, "seconds": 0}
