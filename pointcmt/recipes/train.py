"""Stage III: a student, plain or with an image teacher looking over its shoulder."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pointcmt.adapters import INPUT_LAYOUTS, Adapter, find_adapter
from pointcmt.checkpoint import read_about, save_module, seen_before
from pointcmt.data import Augmentation, FeatureCache, PointDataset
from pointcmt.data.unlabelled import apart_from, loose_clouds, without_labels
from pointcmt.methods import PointCMT, unused_parameters
from pointcmt.objectives import ClassifierEnhancement, Objective
from pointcmt.recipes.batches import Batch, Batches, WithUnlabelled, batches_of
from pointcmt.recipes.build import StudentOptions, adapter_of, make_objectives, make_student, split_weights
from pointcmt.recipes.config import plain, read_json, write_json
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    check_loop,
    count_parameters,
    fit,
    make_accelerator,
    seed_everything,
)
from pointcmt.recipes.features import Draws, draws_of, features_of
from pointcmt.recipes.networks import find_weights, start_from
from pointcmt.recipes.options import DataOptions, Splits, load_generator, load_teacher, parse_assignments
from pointcmt.recipes.progress import say, warn
from pointcmt.recipes.run import RunFolder
from pointcmt.schedules import Guard, HeldOutAdvantage, ScheduleLength
from pointcmt.tasks import predict
from pointcmt.tasks.classification import classification
from pointcmt.tasks.metrics import overall_accuracy


@dataclass
class MethodOptions:
    """How the teacher teaches."""

    method: Literal["none", "pointcmt"] = "pointcmt"
    """none trains the student alone; pointcmt adds feature enhancement (FE), classifier enhancement (CE) and
    --objectives."""
    fe_weight: float = 30.0
    """Weight of FE; 0 leaves it out. Paper: 30, for a strong teacher and a long schedule."""
    ce_weight: float = 0.3
    """Weight of CE, a sum over the batch; 0 leaves it out. Paper: 0.3 at batches of 32."""
    objectives: tuple[str, ...] = ()
    """Further objectives as NAME=WEIGHT, or with their arguments NAME=WEIGHT,temperature=2: soft_labels, nst,
    srrl, feature_l2, or one that --import brings."""
    unlabelled_objectives: tuple[str, ...] = ("soft_labels=1",)
    """Objectives of the clouds without labels, where there are any (--unlabelled, --labels-per-class), as
    --objectives; also feature_enhancement and classifier_enhancement."""
    unlabelled_ratio: float = 1.0
    """Clouds without labels to each labelled one in a step; 0 leaves them out."""
    unlabelled_ramp: float = 0.0
    """Part of the run in which the weights of --unlabelled-objectives rise from nearly none to the whole."""
    fe_distance: Literal["emd", "chamfer", "sinkhorn", "sliced_wasserstein"] = "emd"
    """Distance of FE."""
    fe_until: float = 1.0
    """Part of the run after which FE is off."""
    ce_until: float = 1.0
    """Part of the run after which CE is off."""
    ce_ramp: float = 0.0
    """Part of the run in which CE's weight rises from nearly none to the whole: with --fe-until, CE comes in
    as FE goes."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Weights of all objectives over their part of the run: constant, or falling to zero."""

    draws: int = 0
    """Augmented copies of each training shape. With them the teacher sees what the student sees: the student
    is given one of them, by chance, and taught by the teacher's feature of that very copy. 0: every augmented
    cloud is taught by the feature of the shape as it is, as in the paper."""
    guard: Literal["auto", "schedule", "heldout", "none"] = "auto"
    """What scales the weights, so that a teacher does no harm. schedule: FE and CE by the square root of
    this run's part of the paper's 300 000 steps. heldout: all by how far the teacher is ahead of the student
    on the held-out shapes, down to 0 where it is 5 points behind; needs --holdout. auto: both."""

    def name(self) -> str:
        """What this method is called in tables."""
        if self.method == "none":
            return "none"
        parts = [name for name, weight in (("fe", self.fe_weight), ("ce", self.ce_weight)) if weight]
        parts += [pair.partition("=")[0] for pair in self.objectives]
        return "pointcmt" if parts == ["fe", "ce"] else "+".join(parts)

    def needs_generator(self) -> bool:
        """Whether FE has a weight, on labelled clouds or on others."""
        others = split_weights(self.unlabelled_objectives, "--unlabelled-objectives")
        on_others = bool(self.unlabelled_ratio and others.get("feature_enhancement"))
        return self.method != "none" and bool(self.fe_weight or on_others)


@dataclass
class Train:
    """Stage III: train a student, plain or with PointCMT."""

    out: Path
    """Run folder to write; the student is student.safetensors in it."""
    student: StudentOptions = field(default_factory=StudentOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    teacher: Path | None = None
    """The teacher: its run folder or its .safetensors file. Needed by --method pointcmt."""
    generator: Path | None = None
    """The generator: its run folder or its .safetensors file. Needed by FE."""
    data: DataOptions = field(default_factory=DataOptions)
    images: Path | None = None
    """Folder of images, for a teacher that was trained on images."""
    features: Path | None = None
    """Folder of the cached features; default: features/ beside the teacher. Built where absent."""
    unlabelled: Path | None = None
    """Clouds without labels, which the teacher's images teach too: the folder of a data set, of which the
    training shapes are taken and no label is read, or any folder with clouds in it or below it."""
    label_smoothing: float = 0.2
    """Of the cross-entropy."""
    augment_scale: float = 1.5
    """Clouds are stretched along each axis by a factor between 1/this and this; 1: not."""
    augment_shift: float = 0.2
    """Clouds are moved by up to this along each axis."""
    init: Path | None = None
    """Start from the weights of a run of pretrain or train, or of a file, wherever name and shape are equal:
    fine-tuning."""
    head_lr: float | None = None
    """Peak learning rate of the student's head, the layers behind the encoder's feature, which a pre-trained
    network has new; default: --lr, as everything else."""
    loop: LoopOptions = field(default_factory=lambda: LoopOptions(epochs=200))
    machine: MachineOptions = field(default_factory=MachineOptions)
    resume: bool = False
    """Continue the run in --out."""


def check(options: Train) -> None:
    """Raise a ValueError for options that make no sense, or cannot go together."""
    check_options(options)
    method = options.method
    if options.unlabelled is not None and (method.method == "none" or not method.unlabelled_ratio):
        raise ValueError(
            "--unlabelled gives clouds that a teacher's images teach, and "
            + ("--method none has no teacher" if method.method == "none" else "--unlabelled-ratio is 0")
            + ": leave it out, or give --method pointcmt, --teacher and a ratio such as 1"
        )
    if options.unlabelled is not None and options.data.labels_per_class is not None:
        raise ValueError(
            "--unlabelled and --labels-per-class both say where clouds without labels come from: give one "
            "(--per-class takes few labelled shapes and nothing of the others)"
        )
    if method.method == "none":
        return
    if options.teacher is None:
        raise ValueError(
            "--method pointcmt needs --teacher: the run folder of `pointcmt train-teacher`. "
            "--method none trains the student alone"
        )
    if method.needs_generator() and options.generator is None:
        raise ValueError(
            "FE needs --generator: the run folder of `pointcmt train-generator`. --fe-weight 0 leaves FE out"
        )
    if method.draws and options.images is not None:
        raise ValueError(
            "--draws needs views that are projected from the points, and this teacher has --images, which "
            "show the shapes as they are: use --draws 0"
        )
    has_unlabelled = options.unlabelled is not None or options.data.labels_per_class is not None
    if method.draws and method.unlabelled_ratio and has_unlabelled:
        raise ValueError(
            "--draws makes copies of labelled shapes alone: use --draws 0 with clouds that have no labels, "
            "or --unlabelled-ratio 0"
        )
    if options.unlabelled is not None and options.images is not None:
        raise ValueError(
            "--unlabelled gives clouds of which --images has no pictures: use a teacher whose views are "
            "projected from the points, or --labels-per-class"
        )


def check_options(options: Train) -> None:
    """Raise a ValueError for a value that makes no sense, whatever the teacher is."""
    check_loop(options.loop)
    if options.head_lr is not None and not options.head_lr > 0:
        raise ValueError(f"--head-lr is {options.head_lr}; expected a positive learning rate")
    Augmentation.of(options.augment_scale, options.augment_shift)  # checks them
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(f"--label-smoothing is {options.label_smoothing}; expected a part in [0, 1)")
    parse_assignments(options.student.student_options, "--student-options")
    if options.student.layout not in (None, *INPUT_LAYOUTS):
        raise ValueError(f"--layout {options.student.layout}: expected one of {', '.join(INPUT_LAYOUTS)}")
    method = options.method
    make_objectives(0, 0, method.objectives)
    others = make_objectives(0, 0, method.unlabelled_objectives, option="--unlabelled-objectives")
    if wrong := [objective.name for objective in others if objective.needs_labels]:
        raise ValueError(
            f"--unlabelled-objectives {wrong[0]} needs labels, which clouds without labels have none of: "
            "give it in --objectives, which are of the labelled clouds"
        )
    if not 0 <= method.ce_ramp <= 1:
        raise ValueError(f"--ce-ramp is {method.ce_ramp}; expected a part of the run in [0, 1]")
    if method.unlabelled_ratio < 0 or not 0 <= method.unlabelled_ramp <= 1:
        raise ValueError(
            f"--unlabelled-ratio is {method.unlabelled_ratio} and --unlabelled-ramp {method.unlabelled_ramp}"
            "; expected 0 or more, and a part of the run in [0, 1]"
        )
    if method.method == "none":
        return
    weights = [method.fe_weight, method.ce_weight, *split_weights(method.objectives).values()]
    if min([0.0, *(objective.weight for objective in others)]) < 0:
        raise ValueError(f"--unlabelled-objectives {' '.join(method.unlabelled_objectives)}: weights below 0")
    if not any(weights):
        raise ValueError(
            "--method pointcmt with --fe-weight 0 and --ce-weight 0 and no --objectives is no method: "
            "give a weight, or --method none"
        )
    if min(weights) < 0:
        raise ValueError(f"the weights of the objectives are {weights}; expected 0 or more")
    if method.draws < 0:
        raise ValueError(f"--draws is {method.draws}; expected 0 or more")
    for name in ("fe_until", "ce_until"):
        if not 0 < getattr(method, name) <= 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(method, name)}; expected a part of the run in (0, 1]"
            )


def factor(decay: str, done: float, until: float = 1.0) -> float:
    """Factor of an objective's weight when the part ``done`` of the run is over."""
    if done >= until:
        return 0.0
    if decay == "linear":
        return 1 - done / until
    if decay == "cosine":
        return 0.5 * (1 + float(np.cos(np.pi * done / until)))
    return 1.0


def ramp(until: float, done: float) -> float:
    """Factor of the weights on clouds without labels when the part ``done`` of the run is over: the rise
    exp(-5 (1 - x)²) of Laine and Aila, "Temporal ensembling for semi-supervised learning", ICLR 2017."""
    return 1.0 if done >= until else float(np.exp(-5 * (1 - done / until) ** 2))


def clouds_without_labels(options: Train, splits: Splits[PointDataset], show: bool) -> PointDataset | None:
    """The clouds without labels of this run, none of which is a held-out or a test shape."""
    if options.method.method == "none" or not options.method.unlabelled_ratio:
        return None
    if options.unlabelled is None:
        return splits.unlabelled
    data, root = options.data, options.unlabelled
    asked = replace(data, data=str(root), dataset="auto", per_class=None)
    try:
        asked.entry()
    except FileNotFoundError:
        made = loose_clouds(
            root, data.num_points, data.view_points, seed=data.data_seed,
            normalize=data.normalize is not False, cache_dir=data.data_cache,
        )  # fmt: skip
    else:
        made = asked.build("train")
    made.up = made.up or splits.train.up
    kept, known = apart_from(without_labels(made), [splits.test, *filter(None, [splits.heldout])])
    if known:
        warn(f"{known} of the clouds in {root} are held-out or test shapes of this run: left out", show)
    return kept


def train(options: Train) -> dict[str, Any]:
    """Train a student into a run folder and return its results.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: with what to do.
    """
    check(options)
    options = copy.deepcopy(options)
    accelerator = make_accelerator(options.machine)
    main = accelerator.is_main_process
    splits = options.data.load()
    inputs = {"data": splits.fingerprint()}
    splits = replace(splits, unlabelled=clouds_without_labels(options, splits, main))
    if splits.unlabelled is not None:
        inputs["unlabelled"] = splits.unlabelled.fingerprint()
    teacher = generator = None
    if options.method.method != "none":
        assert options.teacher is not None
        teacher, teacher_file = load_teacher(options.teacher, splits.train.class_names)
        inputs["teacher"] = teacher.fingerprint()
        if options.method.needs_generator() and options.generator is not None:
            generator, _ = load_generator(options.generator, teacher.feature_dim)
            inputs["generator"] = generator.fingerprint()

    seed_everything(options.loop.seed)
    if teacher is not None and options.student.feature_dim is None:
        options.student.feature_dim = teacher.feature_dim
    student = make_student(options.student, splits.train.num_classes).to(accelerator.device)
    taken: list[str] = []
    if options.init is not None:
        inputs["init"] = hashlib.sha256(find_weights(options.init).read_bytes()).hexdigest()
        taken, fresh = start_from(student, options.init)
        rest = ", ".join(fresh) or "none"
        say(f"{len(taken)} tensors start from {options.init}; as they were made: {rest}", main)
    sample = torch.from_numpy(splits.train.points[: min(4, len(splits.train))]).to(accelerator.device)
    adapter = adapter_of(student, options.student, sample)
    if adapter.input_layout != find_adapter(student, options.student.adapter).input_layout:
        options.student.layout = adapter.input_layout
    rates = {}
    if options.head_lr is not None:
        rates = dict.fromkeys(unused_parameters(student, adapter.arrange(sample), adapter), options.head_lr)
    run = RunFolder.start(
        accelerator, options.out, options, command="train", inputs=inputs, resume=options.resume
    )
    if (done := run.finished()) is not None:
        say(f"{run.path} is finished", main)
        return done
    if main:
        write_json(run.path / "shapes.json", {name: part.shape_ids for name, part in splits.every().items()})

    change = Augmentation.of(options.augment_scale, options.augment_shift)

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        return adapter.logits(model(adapter.arrange(batch.inputs)))

    training, tests = batches_of(splits.parts(), options.loop.batch_size, options.loop.seed, accelerator)
    task = classification(
        logits,
        {name: part.epoch for name, part in tests.items()},
        *splits.best_by(),
        label_smoothing=options.label_smoothing,
    )
    plain_step = task.step

    def augmented_step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        return plain_step(model, batch._replace(inputs=change(batch.inputs)), done)

    task.step = augmented_step
    save = saver(options, splits.train)
    cmt = observe = seen = None
    with contextlib.ExitStack() as stack:
        if teacher is not None:
            method = options.method
            built = features_of(
                splits, teacher, teacher_file, accelerator, options.features, options.images,
                workers=options.machine.workers, without=("test",),
            )  # fmt: skip
            caches = {name: cache for name, (_, cache) in built.items()}
            features = caches["train"][torch.arange(len(splits.train))].to(accelerator.device)
            objectives = make_objectives(
                method.fe_weight, method.ce_weight, method.objectives, method.fe_distance
            )
            others: list[Objective] = []
            if splits.unlabelled is not None:
                further = caches["unlabelled"][torch.arange(len(splits.unlabelled))]
                # rows as WithUnlabelled counts them
                features = torch.cat([features, further.to(accelerator.device)])
                training = WithUnlabelled(training, splits.unlabelled, method.unlabelled_ratio)
                seen = seen_by_teacher(splits.unlabelled, teacher_file)
                if seen:
                    say(
                        f"the teacher was trained on {len(seen)} of the {len(splits.unlabelled)} clouds "
                        "without labels: it knows their labels, and the student does not",
                        main,
                    )
                others = make_objectives(0, 0, method.unlabelled_objectives, option="--unlabelled-objectives")
            for objective in (*objectives, *others):
                if isinstance(objective, ClassifierEnhancement):
                    # a sum over the batch, of which each process has a part, and gradients are averaged
                    objective.weight *= accelerator.num_processes
            guard = None
            if method.guard != "none":
                steps = options.loop.epochs * (len(training) // options.loop.accumulate)
                guard = make_guard(method.guard, steps, caches, splits, teacher_file, main)
            cmt = stack.enter_context(
                PointCMT(
                    teacher.to(accelerator.device),
                    student,
                    generator=generator,
                    adapter=adapter,
                    objectives=objectives,
                    guard=guard,
                    points=adapter.arrange(sample),
                    unlabelled=others,
                )
            )
            if guard is not None and splits.heldout is not None:

                def observe(metrics: dict[str, float]) -> None:
                    guard.observe(student_accuracy=metrics["heldout_oa"] / 100)

            draws = None
            if method.draws:
                draws = draws_of(
                    method.draws, change, splits.train, teacher, teacher_file, accelerator, options.features
                )
            take = clouds_and_features(change, features, draws)
            task.step = taught_step(plain_step, take, cmt, method)
        outcome = fit(
            student, task, training, save, options.loop, options.machine, accelerator, run,
            extras=cmt, rates=rates, observe=observe,
        )  # fmt: skip

    results: dict[str, Any] = {
        **outcome,
        "method": options.method.name() + (" and unlabelled clouds" if splits.unlabelled is not None else ""),
        "student": options.student.student,
        "adapter": adapter.name,
        "seed": options.loop.seed,
        "initialised": len(taken),
        "parameters": count_parameters(student),
        "classes": list(splits.train.class_names),
        "shapes": {name: len(part) for name, part in splits.every().items()},
        "milliseconds_per_cloud": milliseconds_per_cloud(student, adapter, sample),
    }
    if splits.unlabelled is not None:
        results["labels_that_only_the_teacher_saw"] = None if seen is None else len(seen)
    if teacher is not None:
        verdict = compare_with_teacher(
            lambda batch: logits(student, batch), tests, caches, splits, teacher_file
        )
        results["teacher_check"] = verdict
        (warn if verdict["weaker"] or verdict["heldout"] is None else say)(verdict["verdict"], main)
    if main:
        save(student, run.path / "student.safetensors")
    return run.finish(results)


def make_guard(
    kind: str,
    steps: int,
    caches: dict[str, FeatureCache],
    splits: Splits[PointDataset],
    teacher_file: Path,
    show: bool,
) -> Guard | None:
    """The guard for a run of so many steps; says so where the teacher's accuracy on held-out shapes cannot
    be known, and leaves that part out."""
    guard: Guard | None = None
    if kind in ("auto", "schedule"):
        guard = ScheduleLength(max(1, steps), names=["feature_enhancement", "classifier_enhancement"])
    if kind not in ("auto", "heldout"):
        return guard
    reason = why_not_comparable(splits, teacher_file)
    if reason is not None or splits.heldout is None:
        warn(f"--guard {kind} cannot compare teacher and student on held-out shapes: {reason}", show)
        return guard
    accuracy = teacher_accuracy(caches["heldout"], splits.heldout)
    say(f"the teacher is right on {100 * accuracy:.1f} % of the {len(splits.heldout)} held-out shapes", show)
    advantage = HeldOutAdvantage()
    advantage.observe(teacher_accuracy=accuracy)
    return advantage if guard is None else guard * advantage


def teacher_accuracy(cache: FeatureCache, data: PointDataset) -> float:
    """Part of the shapes, in [0, 1], that the teacher classifies rightly."""
    return overall_accuracy(taught_logits(cache, len(data)).argmax(1), data.labels) / 100


def taught_logits(cache: FeatureCache, count: int) -> np.ndarray:
    """The teacher's class scores [n, K] of the first n shapes."""
    logits = cache.output(torch.arange(count)).logits
    assert logits is not None, "a teacher of classes has a classifier"
    return logits.numpy()


def seen_by_teacher(shapes: PointDataset, teacher_file: Path) -> list[str] | None:
    """Which of the shapes the teacher was trained on, with their labels; None where nothing says it."""
    digest, listed = read_about(teacher_file).get("trained_on"), teacher_file.parent / "shapes.json"
    if isinstance(digest, str):
        return seen_before(shapes.shape_ids, digest)
    if listed.exists():
        return sorted(set(read_json(listed)["train"]) & set(shapes.shape_ids))
    return None


def why_not_comparable(splits: Splits[PointDataset], teacher_file: Path) -> str | None:
    """Why teacher and student cannot be compared on the held-out shapes; None where they can."""
    if splits.heldout is None:
        return "--holdout is 0, so nothing is held out"
    seen = seen_by_teacher(splits.heldout, teacher_file)
    if seen is None:
        listed = teacher_file.parent / "shapes.json"
        return f"neither {teacher_file} nor {listed} says what the teacher was trained on"
    if seen:
        return (
            f"the teacher was trained on {len(seen)} of the {len(splits.heldout)} shapes held out here; "
            f"train it "
            "with the same --holdout and --data-seed"
        )
    return None


Take = Callable[[Batch], tuple[Tensor, Tensor]]


def clouds_and_features(change: Augmentation, features: Tensor, draws: Draws | None) -> Take:
    """What a training step is made of: batch → augmented points [B, N, 3], the teacher's features [B, D]."""
    if draws is not None:
        return lambda batch: draws.take(batch.inputs, batch.index)
    return lambda batch: (change(batch.inputs), features[batch.index])


def taught_step(plain_step: Any, take: Take, cmt: PointCMT, method: MethodOptions) -> Any:
    """A training step whose loss has the objectives' in it, their weights following the schedule."""
    until = {"feature_enhancement": method.fe_until, "classifier_enhancement": method.ce_until}
    objectives: list[Any] = [*cmt.objectives, *cmt.unlabelled]
    ramps = {"classifier_enhancement": method.ce_ramp}
    rises = [ramps.get(objective.name, 0.0) for objective in objectives[: len(cmt.objectives)]]
    rises += [method.unlabelled_ramp] * len(cmt.unlabelled)
    weights = [objective.weight for objective in objectives]

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        for objective, weight, rise in zip(objectives, weights, rises, strict=True):
            falls = factor(method.decay, done, until.get(objective.name, 1.0))
            objective.weight = weight * falls * ramp(rise, done)
        points, image_features = take(batch)
        task_loss = plain_step(model, batch._replace(inputs=points), done)["loss"]
        taught = cmt.loss(image_features=image_features, labels=batch.labels)
        each = cmt.loss_tensors  # not .losses, which waits for the device
        if cmt.guard is not None:
            # what the held-out shapes say; the length of the schedule acts on FE and CE alone
            each["guard"] = torch.tensor(cmt.guard.factor("any"))
        return {"loss": task_loss + taught, "task": task_loss, **each}

    return step


def saver(options: Train, data: PointDataset) -> Callable[[nn.Module, Path], object]:
    """Writes a student so that it can be built again, and evaluated, from its file."""
    config = {
        "student": plain(options.student),
        "num_classes": data.num_classes,
        "classes": list(data.class_names),
        "num_points": options.data.num_points,
    }
    about = {
        "command": "train",
        "config": plain({"data": options.data}),
        "classes": list(data.class_names),
        "student": options.student.student,
        "method": options.method.name(),
        "teacher": None if options.teacher is None else options.teacher.stem,
        "seed": options.loop.seed,
    }
    return lambda model, path: save_module(path, model, "student", config, about)


@torch.no_grad()
def milliseconds_per_cloud(model: nn.Module, adapter: Adapter, points: Tensor, repeats: int = 7) -> float:
    """Median inference time per cloud of a batch of clouds [B, N, 3], in milliseconds, on their device."""
    was = model.training
    model.eval()
    inputs = adapter.arrange(points)
    times = []
    for _ in range(repeats + 2):
        if points.is_cuda:
            torch.cuda.synchronize(points.device)
        began = time.perf_counter()
        model(inputs)
        if points.is_cuda:
            torch.cuda.synchronize(points.device)
        times.append(time.perf_counter() - began)
    model.train(was)
    return round(1000 * float(np.median(times[2:])) / len(points), 3)  # the first ones warm up


def compare_with_teacher(
    student: Callable[[Batch], Tensor],
    tests: dict[str, Batches],
    caches: dict[str, FeatureCache],
    splits: Splits[PointDataset],
    teacher_file: Path,
) -> dict[str, Any]:
    """Who is right on the shapes that neither was trained on.

    Returns:
        ``heldout`` (number of shapes, or None where there are none to judge by), ``teacher_oa``,
        ``student_oa``, ``weaker`` (the teacher is right less often than the student, beyond chance) and
        ``verdict``, a sentence.
    """
    unknown = {"heldout": None, "teacher_oa": None, "student_oa": None, "weaker": False}
    reason = why_not_comparable(splits, teacher_file)
    if reason is not None:
        return {
            **unknown,
            "verdict": f"Whether the teacher knows more than the student was not measured: {reason}.",
        }
    logits, labels = predict(student, tests["heldout"].epoch())
    taught = taught_logits(caches["heldout"], len(labels))
    return who_is_right(taught.argmax(1) == labels, logits.argmax(1) == labels)


def who_is_right(teacher: np.ndarray, student: np.ndarray) -> dict[str, Any]:
    """What :func:`compare_with_teacher` returns of shapes that both have judged.

    Args:
        teacher, student: bool [n], whether each is right on each shape.
    """
    theirs, ours = (100 * float(right.mean()) for right in (teacher, student))
    only_student = int((student & ~teacher).sum())
    only_teacher = int((teacher & ~student).sum())
    # McNemar: only the shapes on which they differ say who is better
    apart = abs(only_student - only_teacher) > 1.96 * (only_student + only_teacher) ** 0.5
    verdict = (
        f"On the {len(teacher)} held-out shapes the teacher is right on {theirs:.1f} %, the student on "
        f"{ours:.1f} % (a difference {'beyond' if apart else 'within'} chance at this number of shapes)"
    )
    weaker = theirs < ours and apart
    if weaker:
        verdict += (
            ": the teacher is weaker than its student, and may hurt more than help. Train a better teacher "
            "(more views or points, longer), lower --fe-weight and --ce-weight, end them early (--fe-until, "
            "--ce-until), or compare with --method none"
        )
    return {
        "heldout": len(teacher),
        "teacher_oa": theirs,
        "student_oa": ours,
        "only_teacher_right": only_teacher,
        "only_student_right": only_student,
        "beyond_chance": bool(apart),
        "weaker": bool(weaker),
        "verdict": verdict + ".",
    }
