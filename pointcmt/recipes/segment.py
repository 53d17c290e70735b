"""``pointcmt segment``: train a network that gives each point its class, evaluate it, use it on one's own
files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pointcmt.adapters import INPUT_LAYOUTS, Adapter, unwrap
from pointcmt.adapters.registry import CATEGORY_LAYOUTS, get_adapter, matching_adapter
from pointcmt.checkpoint import PathLike, check_configuration, load_module, read_config, save_module
from pointcmt.data import Augmentation, PointDataset, vote_scale
from pointcmt.data.contrastive import CloudAugmentation
from pointcmt.data.files import folded
from pointcmt.data.labelled import LabelledCloud, never_there, read_labelled, write_labelled
from pointcmt.pictures import label_colours, save_segmentation
from pointcmt.recipes.build import (
    StudentOptions,
    check_kind,
    check_named_by_file,
    make_student,
    segmenter_options,
)
from pointcmt.recipes.config import plain, read_json, restore, write_json
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    check_loop,
    count_parameters,
    fit,
    make_accelerator,
    seed_everything,
)
from pointcmt.recipes.labelled_batches import LabelledBatches
from pointcmt.recipes.networks import find_weights, start_from
from pointcmt.recipes.options import DataOptions, parse_assignments
from pointcmt.recipes.progress import console, say, show_table, warn
from pointcmt.recipes.run import RunFolder, find_checkpoint, held
from pointcmt.recipes.whole_clouds import Blocks, predict_cloud
from pointcmt.tasks.segmentation import Argmax, Measure, headline, parts_by_category, restricted, segmentation
from pointcmt.types import Batch

FIELDS = ("normals", "colors", "features")
"""What networks may see beside coordinates, in the order of ``Batch.inputs``."""

_SHOWN = 6  # clouds in the picture, and files of coloured clouds


@dataclass
class AugmentOptions:
    """What is done to clouds in training."""

    augment_scale: float = 1.25
    """Clouds are stretched along each axis by a factor between 1/this and this; 1: not."""
    augment_shift: float = 0.1
    """Clouds are moved by up to this along each axis."""
    augment_rotate: bool = False
    """Clouds are turned about the up axis by any angle."""
    augment_jitter: float = 0.0
    """Standard deviation of noise on the coordinates."""
    drop_color: float = 0.0
    """Part of the clouds whose colours are all 0."""


@dataclass
class Segment:
    """Give each point its class: train a network, evaluate one, or use it on files of your own."""

    out: Path | None = None
    """Run folder to write: the network is segmenter.safetensors in it. With --run, where results go."""
    run: Path | None = None
    """A finished run (or its .safetensors file) to evaluate, or to use with --predict, instead of
    training."""
    predict: tuple[Path, ...] = ()
    """Files whose points get labels: out/<name>.ply (coloured, with a property label) and <name>.json. What
    was begun and killed goes on where it was."""
    category: str | None = None
    """With --predict: the shape's category, for a network of parts."""
    student: StudentOptions = field(default_factory=lambda: StudentOptions(student="auto"))
    data: DataOptions = field(default_factory=lambda: DataOptions(num_points=2048))
    inputs: tuple[Literal["points", "normals", "colors", "features"], ...] = ()
    """What the network sees, beside points: normals, colors, features (of rooms: where in the room a point
    is); default: all that the data has."""
    init: Path | None = None
    """Start from the weights of a run of pretrain or segment, or of a file, wherever name and shape are
    equal."""
    argmax: Literal["category", "all"] = "category"
    """Parts: the highest score among the parts of the shape's category, or among all."""
    label_smoothing: float = 0.2
    """Of the cross-entropy."""
    votes: int = 1
    """Passes over clouds that are stretched by chance, whose probabilities are averaged, in the evaluation
    after training; 1: the clouds as they are. Of rooms, 1."""
    whole: bool = True
    """Evaluate rooms whole, every point by overlapping blocks; else by one crop of each."""
    rounds: int = 0
    """Thinned rooms are gone through at most so often, each time with another point of every voxel; what was
    not reached takes the mean of its voxel. 0: until every point was visited."""
    split: Literal["test", "heldout", "train"] = "test"
    """With --run: which clouds are evaluated."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(epochs=200, batch_size=16, weight_decay=1e-4)
    )
    machine: MachineOptions = field(default_factory=MachineOptions)
    resume: bool = False
    """Continue the run in --out."""


def segment(options: Segment) -> dict[str, Any]:
    """Run the command; see :class:`Segment`.

    Returns:
        Of training: the run's results. With ``run``: the figures, or a summary of each predicted file.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: with what to do.
    """
    if options.rounds < 0:
        raise ValueError(f"--rounds is {options.rounds}; expected 0 or more")
    if options.votes < 1:
        raise ValueError(f"--votes is {options.votes}; expected at least 1")
    if options.run is not None:
        if options.predict and options.out is None:
            folder = find_checkpoint(options.run, "segmenter").parent
            options = dataclasses.replace(options, out=folder / "predicted")
        with contextlib.nullcontext() if options.out is None else held(options.out):
            return predict_files(options) if options.predict else evaluate_run(options)
    if options.predict or options.out is None:
        raise ValueError(
            "--predict needs --run RUN, a finished run of pointcmt segment"
            if options.predict
            else "give --out FOLDER to train, or --run RUN to evaluate or use a finished run"
        )
    return train(options)


# ---- the network


def segmenter_adapter(
    network: nn.Module, options: StudentOptions, sample: Batch, fields: tuple[str, ...], num_classes: int
) -> Adapter:
    """How a network is called and what it puts out: its adapter's, else found by trying.

    Args:
        network: on the sample's device.
        options: name of the adapter, and layout, where they are given.
        sample: at least two clouds.
        fields: what the network sees beside coordinates.
        num_classes: K.

    Raises:
        ValueError: an adapter of a classifier, or no layout in which the network gives [B, N, K] or [B, K,
        N].
    """
    module = unwrap(network)
    found = get_adapter(options.adapter) if options.adapter else matching_adapter(module)
    if options.adapter and (found is None or found.per_point is None):
        raise ValueError(
            f"--adapter {options.adapter} is of a classifier of clouds: it has no per_point, the class "
            "scores of each point (docs/adapters.md)"
        )
    if found is not None and found.per_point is not None:
        return dataclasses.replace(found, input_layout=options.layout or found.input_layout)
    inputs = sample_inputs(sample, fields)
    count, said = inputs.shape[1], []
    if count == num_classes:
        raise ValueError(f"{count} points and as many classes: give another --num-points")
    was = network.training
    network.eval()
    layouts = (options.layout,) if options.layout else dict.fromkeys([*CATEGORY_LAYOUTS, *INPUT_LAYOUTS])
    try:
        for layout in layouts:
            tried = Adapter("own", lambda _: False, "", "output", input_layout=layout)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    output = tried.call(network, inputs.clone(), sample.category)
                shapes = [tuple(one.shape) for one in _tensors(output)]
                place, shape = next((k, s) for k, s in enumerate(shapes) if num_classes in s[1:])
            except Exception as error:
                said.append(f"{layout}: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
                continue
            if shape == (len(sample), count, num_classes):
                return dataclasses.replace(tried, per_point=_PerPoint(place, False))
            if shape == (len(sample), num_classes, count):
                return dataclasses.replace(tried, per_point=_PerPoint(place, True))
            said.append(f"{layout}: gives {list(shape)}")
    finally:
        network.train(was)
    raise ValueError(
        f"the network {options.student} gives no class scores [B, {count}, {num_classes}] or "
        f"[B, {num_classes}, {count}] for clouds {list(inputs.shape)} in any known layout. "
        + "; ".join(said)
        + ". Give --layout, or an --adapter with per_point (docs/adapters.md)"
    )


@dataclass(frozen=True)
class _PerPoint:
    """Class scores of each point: which tensor of an output, and whether its classes come before the
    points."""

    place: int
    classes_first: bool

    def __call__(self, output: Any) -> Tensor:
        scores = _tensors(output)[self.place]
        return scores.transpose(1, 2) if self.classes_first else scores


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, (tuple, list)) else []


def input_fields(data: PointDataset, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What of :data:`FIELDS` the network sees.

    Raises:
        ValueError: something is wanted that the data does not have.
    """
    batch = data.batch([0])
    there = [name for name in FIELDS if getattr(batch, name) is not None]
    if not wanted:
        return tuple(there)
    if missing := [name for name in wanted if name != "points" and name not in there]:
        raise ValueError(f"--inputs {', '.join(missing)}: the data has {', '.join(['points', *there])}")
    return tuple(name for name in FIELDS if name in wanted)


def sample_inputs(batch: Batch, fields: tuple[str, ...]) -> Tensor:
    """[B, N, 3 + …]: coordinates, and what of ``fields`` the network sees."""
    return batch.replace(**{name: None for name in FIELDS if name not in fields}).inputs()


# ---- training


def train(options: Segment) -> dict[str, Any]:
    """Train a network into a run folder and return its results."""
    check_loop(options.loop)
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(f"--label-smoothing is {options.label_smoothing}; expected a part in [0, 1)")
    if options.augment.augment_scale < 1 or not 0 <= options.augment.drop_color <= 1:
        raise ValueError(
            f"--augment-scale {options.augment.augment_scale}, --drop-color {options.augment.drop_color}: "
            "expected 1 or more, and a part in [0, 1]"
        )
    options = copy.deepcopy(options)
    accelerator = make_accelerator(options.machine)
    main, device = accelerator.is_main_process, accelerator.device
    splits = options.data.load()
    data = splits.train
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    batches: Any = LabelledBatches(data, options.loop.batch_size, device, options.loop.seed, **place)
    fields = input_fields(data, options.inputs)
    sample = data.batch(np.arange(min(4, len(data)))).to(device)
    channels = sample_inputs(sample, fields).shape[2]
    if options.student.student == "auto":
        options.student.student = "pointnet2_scene" if data.category is None else "pointnet2_part"
    options.student = segmenter_options(options.student, data, channels)
    check_kind(options.student.student, data.category is not None)
    inputs = {"data": splits.fingerprint()}
    seed_everything(options.loop.seed)
    network = make_student(options.student, len(data.part_names)).to(device)
    taken: list[str] = []
    if options.init is not None:
        inputs["init"] = hashlib.sha256(find_weights(options.init).read_bytes()).hexdigest()
        taken, fresh = start_from(network, options.init)
        say(f"{len(taken)} tensors start from {options.init}; as they were made: {len(fresh)}", main)
    adapter = segmenter_adapter(network, options.student, sample, fields, len(data.part_names))
    assert options.out is not None
    run = RunFolder.start(
        accelerator, options.out, options, command="segment", inputs=inputs, resume=options.resume
    )
    if (done := run.finished()) is not None:
        say(f"{run.path} is finished", main)
        return done
    if main:
        write_json(run.path / "shapes.json", {name: part.shape_ids for name, part in splits.parts().items()})
    if missing := never_there(_all_labels(data), data.part_names):
        warn(f"no training point is labelled {', '.join(missing)}: such points cannot be learned", main)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        assert adapter.per_point is not None
        return adapter.per_point(adapter.call(model, sample_inputs(batch, fields), batch.category))

    others = {name: part for name, part in splits.parts().items() if name in ("heldout", "test")}
    size = options.loop.batch_size
    tests = {name: LabelledBatches(part, size, device, **place) for name, part in others.items()}
    watch = "heldout" if splits.heldout is not None else "test"
    parts = list(data.class_names) if data.category is not None else None
    first = headline(parts is not None)
    task = segmentation(
        forward,
        {name: part.epoch for name, part in tests.items()},
        watch,
        f"{first} on the held-out part of the training set"
        if splits.heldout is not None
        else f"{first} on the test set: this selects on the test set and is optimistic",
        part_names=data.part_names,
        class_names=parts,
        argmax=options.argmax,
        label_smoothing=options.label_smoothing,
        prepare=augmented(options.augment, data.up or "z"),
    )
    save = saver(options, data, fields)
    outcome = fit(network, task, batches, save, options.loop, options.machine, accelerator, run)
    results: dict[str, Any] = {
        **outcome,
        "student": options.student.student,
        "adapter": adapter.name,
        "seed": options.loop.seed,
        "init": None if options.init is None else options.init.name,
        "initialised": len(taken),
        "parameters": count_parameters(network),
        "inputs": ["points", *fields],
        "labels": list(data.part_names),
        "clouds": {name: len(part) for name, part in splits.parts().items()},
    }
    if main:
        save(network, run.path / "segmenter.safetensors")
    used = Used(network.eval(), adapter, fields, _configuration(options, data, fields))
    results["test"] = evaluate_set(used, splits.test, options, device, run.path if main else None)
    if main:
        show_figures(results["test"], f"{run.path} on {len(splits.test)} test clouds")
    return run.finish(results)


def _all_labels(data: PointDataset) -> np.ndarray:
    """Labels that occur in a set, in its whole rooms where it has any."""
    if data.rooms is not None:
        return np.concatenate([np.unique(room.cloud.labels) for room in data.rooms])
    assert data.point_labels is not None
    return np.unique(data.point_labels)


def augmented(options: AugmentOptions, up: Any) -> Callable[[Batch], Batch]:
    """What a training step does to its batch; every label stays with its point."""
    stretch = Augmentation.of(options.augment_scale, options.augment_shift)
    turn = CloudAugmentation(rotate=up if options.augment_rotate else None, jitter=options.augment_jitter)

    def change(batch: Batch) -> Batch:
        batch = stretch(turn.on(batch))
        if options.drop_color and batch.colors is not None:
            kept = torch.rand(len(batch), 1, 1, device=batch.colors.device) >= options.drop_color
            batch = batch.replace(colors=batch.colors * kept)
        return batch

    return change


def _configuration(options: Segment, data: PointDataset, fields: tuple[str, ...]) -> dict[str, Any]:
    """What a network's file says, so that it can be built and used again from it alone."""
    return {
        "student": plain(options.student),
        "num_classes": len(data.part_names),
        "labels": list(data.part_names),
        "classes": list(data.class_names) if data.category is not None else None,
        "fields": list(fields),
        "num_points": data.num_points,
        "rooms": data.rooms is not None,
        "voxel": _voxel(options.data) if data.rooms is not None else 0.0,
        "up": data.up or "z",
        "normalize": options.data.normalize is not False,
        "argmax": options.argmax,
    }


def _voxel(data: DataOptions) -> float:
    if data.voxel is not None:
        return data.voxel
    default = inspect.signature(data.entry().build).parameters.get("voxel")
    return float(default.default) if default is not None else 0.0


def saver(
    options: Segment, data: PointDataset, fields: tuple[str, ...]
) -> Callable[[nn.Module, Path], object]:
    """Writes a network so that it can be built again, evaluated and used, from its file."""
    config = _configuration(options, data, fields)
    about = {
        "command": "segment",
        "config": plain({"data": options.data}),
        "labels": list(data.part_names),
        "seed": options.loop.seed,
    }
    return lambda model, path: save_module(path, model, "segmenter", config, about)


# ---- using a network


@dataclass
class Used:
    """A network in eval mode, how it is called, and what its file says."""

    network: nn.Module
    adapter: Adapter
    fields: tuple[str, ...]
    config: dict[str, Any]

    @property
    def parts(self) -> list[list[int]] | None:
        """Parts of each category; None of scenes."""
        classes = self.config["classes"]
        return None if classes is None else parts_by_category(self.config["labels"], classes)

    def blocks(self, rounds: int) -> Blocks:
        """How clouds are cut for this network."""
        config = self.config
        sizes = config["num_points"], config["rooms"], config["voxel"], config["up"], config["normalize"]
        return Blocks(*sizes, rounds)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Class scores [B, N, K] of a batch."""
        assert self.adapter.per_point is not None
        output = self.adapter.call(self.network, sample_inputs(batch, self.fields), batch.category)
        return self.adapter.per_point(output).float()

    def label(self, scores: Tensor, category: Tensor | None, argmax: Argmax) -> Tensor:
        """The label of each point [B, N]."""
        if self.parts is not None and category is not None and argmax == "category":
            scores = restricted(scores, category, self.parts)
        return scores.argmax(-1)


def load_segmenter(path: Path, options: StudentOptions | None = None) -> Used:
    """The network of a run of ``pointcmt segment``, from its folder or file alone.

    Args:
        path: run folder or ``segmenter.safetensors``.
        options: ``student="module:factory"`` of one's own network, which a file may not name by itself.

    Raises:
        FileNotFoundError, ValueError: nothing there, or a file that does not fit or names code that the user
            did not.
    """
    file = find_checkpoint(path, "segmenter")
    config = read_config(file, "segmenter")
    own: StudentOptions = restore(StudentOptions(), config.get("student") or {}, f"{file}: student")
    named = options is not None and ":" in options.student
    if named:
        assert options is not None
        own.student = options.student

    def check(_: dict[str, Any], where: PathLike) -> None:
        if not named:
            check_named_by_file(own.student, file)
        check_configuration(parse_assignments(own.student_options, f"{file}: student_options"), where)
        check_configuration({"student": (own.width, own.feature_dim, config["num_classes"])}, where)

    def build(**_: Any) -> nn.Module:
        return make_student(own, config["num_classes"])

    build.__name__ = own.student
    network = load_module(file, "segmenter", build, check)
    fields = tuple(config["fields"])
    count = max(32, min(256, config["num_points"]))
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.rand(2, count, 3, generator=generator) for name in ("points", *fields)}
    category = None if config["classes"] is None else torch.zeros(2, dtype=torch.int64)
    adapter = segmenter_adapter(network, own, Batch(**made, category=category), fields, config["num_classes"])
    return Used(network, adapter, fields, config)


def evaluate_set(
    used: Used, data: PointDataset, options: Segment, device: torch.device, folder: Path | None
) -> dict[str, Any]:
    """Figures of all points of a set; pictures and coloured clouds of some go into ``folder``.

    Rooms are evaluated whole, every point of the file, unless ``options.whole`` is false.
    """
    used.network.to(device).eval()
    classes = list(data.class_names) if used.parts is not None else None
    conventions: tuple[Argmax, ...] = ("category", "all") if classes is not None else ("category",)
    measures = {argmax: Measure(data.part_names, classes, argmax) for argmax in conventions}
    shown: list[tuple[str, LabelledCloud, np.ndarray]] = []
    whole = data.rooms is not None and options.whole
    clouds = (
        _whole_rooms(used, data, options.rounds, device) if whole else _clouds(used, data, options, device)
    )
    for batch, scores, names in clouds:
        assert batch.points is not None and batch.point_labels is not None
        for measure in measures.values():
            measure.add(scores, batch.point_labels, batch.category, batch.index, batch.lengths)
        if len(shown) < _SHOWN and folder is not None:
            predicted = used.label(scores, batch.category, options.argmax).cpu().numpy()
            for k, name in enumerate(names[: _SHOWN - len(shown)]):
                cloud = LabelledCloud(batch.points[k].cpu().numpy(), batch.point_labels[k].cpu().numpy())
                shown.append((name, cloud, predicted[k]))
    if shown and folder is not None:
        draw(shown, len(data.part_names), folder, data.up or "z")
    figures = {argmax: measure.figures() for argmax, measure in measures.items()}
    result: dict[str, Any] = {**figures[options.argmax]}
    if classes is not None:
        result["argmax"] = options.argmax
        other: Argmax = "all" if options.argmax == "category" else "category"
        result[f"with_argmax_{other}"] = {
            name: value for name, value in figures[other].items() if "/" not in name
        }
    return {**result, "votes": options.votes, "clouds": len(data), "whole_rooms": whole}


def _clouds(
    used: Used, data: PointDataset, options: Segment, device: torch.device
) -> Iterator[tuple[Batch, Tensor, list[str]]]:
    torch.manual_seed(options.loop.seed)  # of the votes
    for batch in LabelledBatches(data, options.loop.batch_size, device).epoch():
        if options.votes == 1:
            scores = used.scores(batch)
        else:
            passes = [used.scores(vote_scale(batch)).softmax(-1) for _ in range(options.votes)]
            scores = torch.stack(passes).mean(0).log()
        assert batch.index is not None
        yield batch, scores, [data.shape_ids[row] for row in batch.index.tolist()]


def _whole_rooms(
    used: Used, data: PointDataset, rounds: int, device: torch.device
) -> Iterator[tuple[Batch, Tensor, list[str]]]:
    assert data.rooms is not None
    for name, room in zip(data.shape_ids, data.rooms, strict=True):
        cloud = room.whole()
        with CloudProgress(name, len(cloud.points)) as tell:
            logits, _ = predict_cloud(
                used.scores, cloud, len(data.part_names), used.blocks(rounds), device=device,
                fields=used.fields, progress=tell,
            )  # fmt: skip
        labels = torch.from_numpy(cloud.labels)[None] if cloud.labels is not None else None
        batch = Batch(points=torch.from_numpy(cloud.points)[None], point_labels=labels)
        yield batch, torch.from_numpy(logits)[None], [name]


class CloudProgress:
    """A bar of how many points of a cloud were visited, on a terminal; a line at each tenth elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.tenth = name, total, 0
        self.bar: Progress | None = None

    def __enter__(self) -> Callable[[int], None]:
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total)
        return self.tell

    def tell(self, visited: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=visited)
        elif 10 * visited // self.total > self.tenth and self.total > 100_000:
            self.tenth = 10 * visited // self.total
            say(f"{self.name}: {visited} of {self.total} points")

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def draw(shown: list[tuple[str, LabelledCloud, np.ndarray]], classes: int, folder: Path, up: str) -> None:
    """``segmentation.png`` and ``coloured/<name>.ply``: points in the colours of what was predicted."""
    colours = label_colours(classes)
    drawn = []
    for name, cloud, predicted in shown:
        file = folder / "coloured" / f"{name.replace('/', '-')}.ply"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_labelled(file, cloud._replace(colors=colours[predicted], labels=predicted))
        # a picture needs no more
        some = np.random.default_rng(0).permutation(len(cloud.points))[:4096]
        assert cloud.labels is not None
        points = cloud.points[some] - cloud.points[some].mean(0)
        drawn.append((points, cloud.labels[some], predicted[some], name.split("/")[-2 if "/" in name else 0]))
    points, labels, predicted_labels, names = zip(*drawn, strict=True)
    save_segmentation(points, labels, predicted_labels, names, classes, folder / "segmentation.png", up)


def show_figures(figures: dict[str, Any], title: str) -> None:
    """Print the figures, and those of each class."""
    lines = [
        [name.partition("/")[2], f"{value:.1f}"] for name, value in figures.items() if name.startswith("iou/")
    ]
    show_table(("class", "IoU %"), lines, title)
    words = {
        "instance_miou": "instance mIoU",
        "class_miou": "class mIoU",
        "miou": "mIoU",
        "macc": "mAcc",
        "oa": "OA",
    }
    text = "   ".join(f"{words[name]} {figures[name]:.2f} %" for name in words if name in figures)
    if "argmax" in figures:
        text += f"   (argmax over {'the category' if figures['argmax'] == 'category' else 'all parts'})"
    say(f"{text}   {figures['votes']} pass(es)")


def evaluate_run(options: Segment) -> dict[str, Any]:
    """Figures of a finished run's network, on its own data or on other."""
    assert options.run is not None
    used = load_segmenter(options.run, options.student)
    file = find_checkpoint(options.run, "segmenter")
    data = options.data
    if data.data == "synthetic":
        about = read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else None
        if about is None:
            raise ValueError(f"{file} lies in no run folder: say on what to evaluate with --data FOLDER")
        data = restore(DataOptions(), about["config"]["data"], f"{file}: data")
    part = data.part(options.split)
    if part is None:
        raise ValueError(f"--split {options.split}: the run has no such clouds (it has --holdout 0)")
    if list(part.part_names) != used.config["labels"]:
        raise ValueError(
            f"the network knows the labels {', '.join(used.config['labels'][:4])} …, the data has "
            f"{', '.join(part.part_names[:4])} …: give data of the same labels"
        )
    device = make_accelerator(options.machine).device
    figures = evaluate_set(used, part, options, device, options.out)
    show_figures(figures, f"{options.run} on {len(part)} {options.split} clouds")
    if options.out is not None:
        write_json(options.out / "figures.json", figures)
    return figures


def predict_files(options: Segment) -> dict[str, Any]:
    """Labels of every point of files: coloured clouds, and a summary of each.

    Returns:
        File name → ``points``, ``labels`` (name → points), ``filled`` and, where the file has labels,
        figures.
    """
    assert options.run is not None and options.out is not None
    used = load_segmenter(options.run, options.student)
    file, out = find_checkpoint(options.run, "segmenter"), options.out
    stems = [folded(path.stem) for path in options.predict]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(
            f"--predict: several files are called {', '.join(twice)}, capitals apart, and would be written "
            "over each other; predict them one by one"
        )
    classes = used.config["classes"]
    if classes is not None and options.category not in classes:
        raise ValueError(
            f"--category is {options.category}; expected the shape's, one of {', '.join(classes)}"
        )
    category = None if classes is None else classes.index(options.category)
    device = make_accelerator(options.machine).device
    used.network.to(device)
    weights = hashlib.sha256(file.read_bytes()).hexdigest()
    summaries: dict[str, Any] = {}
    for path in options.predict:
        cloud = read_labelled(path, labelled=False)
        names = used.config["labels"]
        rooms = used.config["rooms"]
        with CloudProgress(path.name, len(cloud.points)) as tell:
            logits, filled = predict_cloud(
                used.scores, cloud, len(names), used.blocks(options.rounds),
                device=device, batch_size=1 if rooms else options.loop.batch_size, fields=used.fields,
                category=category, partial=out / f".{path.stem}.partial.npz", key=weights, progress=tell,
            )  # fmt: skip
        scores = torch.from_numpy(logits)[None]
        kind = None if category is None else torch.tensor([category])
        predicted = used.label(scores, kind, options.argmax)[0].numpy()
        write_labelled(
            out / f"{path.stem}.ply",
            cloud._replace(colors=label_colours(len(names))[predicted], labels=predicted),
        )
        counts = np.bincount(predicted, minlength=len(names))
        summary: dict[str, Any] = {
            "points": len(predicted),
            "labels": {name: int(count) for name, count in zip(names, counts, strict=True) if count},
            "filled": filled,
        }
        if cloud.labels is not None and cloud.labels.max(initial=-1) < len(names):
            measure = Measure(names, classes, options.argmax)
            measure.add(scores, torch.from_numpy(cloud.labels)[None], kind, torch.zeros(1, dtype=torch.int64))
            summary["figures"] = measure.figures()
        write_json(out / f"{path.stem}.json", summary)
        summaries[path.name] = summary
        most = itertools.islice(sorted(summary["labels"].items(), key=lambda item: -item[1]), 4)
        say(
            f"{out / path.stem}.ply: {len(predicted)} points; "
            + ", ".join(f"{name} {count / len(predicted):.0%}" for name, count in most)
        )
    return summaries
