"""Pre-training of a network by pictures, without labels: Pic@Point, MM-Point, CrossPoint, dense."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.adapters.registry import Adapter, find_adapter
from pointcmt.checkpoint import save_module
from pointcmt.data import MultiViewImages, PointDataset, subset
from pointcmt.data.contrastive import CloudAugmentation
from pointcmt.methods import CrossPoint, DenseDistillation, MMPoint, PicAtPoint, freeze_unused
from pointcmt.objectives import LocalInfoNCE, PixelFeatures
from pointcmt.recipes.batches import Batch, Batches
from pointcmt.recipes.build import StudentOptions, make_student, segmenter_options
from pointcmt.recipes.config import plain, write_json
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    count_parameters,
    fit,
    make_accelerator,
    seed_everything,
)
from pointcmt.recipes.networks import clouds_of, encode, frozen_features
from pointcmt.recipes.options import DataOptions, ViewOptions, matching_images, parse_assignments
from pointcmt.recipes.pretrain_pictures import SHAPES, VIEWS, draw_features, draw_similarity
from pointcmt.recipes.progress import console, say, warn
from pointcmt.recipes.run import RunFolder, find_checkpoint
from pointcmt.tasks import Figure, Task
from pointcmt.teacher import ImageTeacher
from pointcmt.training import CrossModalTraining
from pointcmt.types import StudentState, TeacherOutput, Views
from pointcmt.views import ViewSpec, pixels_of
from pointcmt.views.augmentation import ViewAugmentation, crosspoint_level, view_levels
from pointcmt.views.cells import moved
from pointcmt.views.sampling import draw_cameras, project_chosen

METHODS = ("pic-at-point", "mm-point", "crosspoint", "dense")
_CHANCE = "chance_"  # before the name of a loss: what it is for one who guesses


@dataclass
class ContrastOptions:
    """Which method, and its ablations."""

    method: Literal["pic-at-point", "mm-point", "crosspoint", "dense"] = "pic-at-point"
    """pic-at-point: each point finds its cell in a picture, each cloud its picture. mm-point: two augmented
    copies of each cloud and several pictures at once. crosspoint: two copies and one picture. dense: each
    point learns the picture's features at its pixels; for networks with a feature for each point."""
    temperature: float = 0.1
    """Of all terms."""
    local_weight: float = 1.0
    """pic-at-point: points and cells; 0 leaves it out."""
    global_weight: float = 1.0
    """pic-at-point: clouds and pictures; 0 leaves it out."""
    intra_weight: float = 1.0
    """mm-point, crosspoint: the two copies; 0 leaves it out."""
    cross_weight: float = 1.0
    """mm-point, crosspoint: copies and pictures; 0 leaves it out."""
    pose: bool = True
    """pic-at-point: the head for points is told where the camera is."""
    hidden_points: Literal["auto", "count", "skip"] = "auto"
    """pic-at-point, dense: points that the cloud's own surface hides count, or are skipped; auto: count for
    pic-at-point, as in the paper, and skip for dense, where it is known which those are."""
    local_points: int | None = 64
    """pic-at-point, dense: at most so many local features of each cloud in a step, drawn by chance, which
    leaves the loss its mean; None: all, as in the paper, which is dear where a network has one per point."""
    head_width: int = 512
    """pic-at-point: width of the heads and of the common spaces."""
    views_per_step: int | None = None
    """Pictures of each shape in a step; default: 1, and 4 for mm-point and dense, as far as there are."""
    shared_head: bool = False
    """mm-point: one pair of heads for all pictures."""
    image_levels: int | None = None
    """mm-point: levels of change of the pictures from weak to strong (up to 4), spread over them; 0: none.
    crosspoint: its own change, or 0: none. Default: 4, and 1."""
    pictures: Literal["auto", "stored", "projected"] = "auto"
    """Real pictures that the data set itself has, with their cameras; or pictures of the points; auto: real
    ones where there are."""
    augment_points: bool = True
    """Turn the clouds about the up axis (pic-at-point, dense), or all of CrossPoint's changes (mm-point,
    crosspoint)."""
    train_images: Literal["auto", "yes", "no"] = "auto"
    """Train the image encoder too; auto: not for pic-at-point and dense."""
    image_lr: float | None = None
    """Peak learning rate of what projects pictures: their heads, and the encoder where it is trained;
    default: --lr. Pic@Point has 5e-5 for them, and 1e-3 for the rest."""

    def by_points(self) -> bool:
        """Whether points are looked for in pictures, so that a picture may not be cropped or turned."""
        return self.method in ("pic-at-point", "dense")

    def trains_images(self) -> bool:
        return self.train_images == "yes" or (self.train_images == "auto" and not self.by_points())

    def views(self, there: int | None = None) -> int:
        """Pictures of each shape in a step, of ``there`` that there are."""
        default = 4 if self.method in ("mm-point", "dense") else 1
        if self.method == "dense" and there is not None:
            default = min(default, there)
        return default if self.views_per_step is None else self.views_per_step

    def levels(self) -> int:
        default = {"pic-at-point": 0, "mm-point": 4, "crosspoint": 1, "dense": 0}[self.method]
        return default if self.image_levels is None else self.image_levels

    def maps(self) -> bool:
        """Whether feature maps are needed."""
        return self.method == "dense" or (self.method == "pic-at-point" and self.local_weight > 0)


@dataclass
class EncoderOptions:
    """Which image encoder."""

    encoder: Path | None = None
    """A trained one: run folder or file of train-teacher, whose way of making pictures is taken too."""
    backbone: str = "resnet18"
    """Any timm model, where --encoder does not say."""
    backbone_options: tuple[str, ...] = ()
    """Arguments for timm.create_model, as NAME=VALUE."""
    pretrained: bool = False
    """Start from ImageNet's weights: of the installed extra pretrained (--backbone tf_efficientnet_lite0),
    else timm's (needs the network)."""
    encoder_weights: Path | None = None
    """File with weights of the backbone, in timm's names: .safetensors or .pth."""
    images: Path | None = None
    """Folder of stored pictures of the same shapes, as pointcmt render-views writes them of their meshes,
    with their cameras where --method needs them; they are brought to --size. Default: made of the points."""


@dataclass
class Pretrain:
    """Pre-train a network by pictures of its clouds, without labels."""

    out: Path
    """Run folder to write; the network is network.safetensors in it, as its own load_state_dict takes it."""
    student: StudentOptions = field(default_factory=StudentOptions)
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    images: EncoderOptions = field(default_factory=EncoderOptions)
    data: DataOptions = field(default_factory=DataOptions)
    views: ViewOptions = field(default_factory=lambda: ViewOptions(rig="dodecahedron20", splat=1.5))
    cache_gb: float = 2.0
    """What a frozen encoder says of the training shapes' pictures is computed once and kept in memory, where
    it takes no more than this and fewer passes than the run; 0: never."""
    watch_shapes: int = 256
    """At most so many held-out shapes are looked at after an epoch, without labels."""
    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(epochs=100, optimizer="adam", lr=1e-3, weight_decay=1e-6)
    )
    machine: MachineOptions = field(default_factory=MachineOptions)
    resume: bool = False
    """Continue the run in --out."""


def hidden_points(options: Pretrain) -> Literal["count", "skip"]:
    """What hidden points do; which they are is not known of stored pictures."""
    wanted = options.contrast.hidden_points
    if wanted == "auto":
        skips = options.contrast.method == "dense" and options.images.images is None
        return "skip" if skips else "count"
    return wanted


def check(options: Pretrain) -> None:
    """Raise a ValueError for options that cannot go together."""
    contrast, images = options.contrast, options.images
    if images.encoder is not None and (images.pretrained or images.encoder_weights is not None):
        raise ValueError(
            "--encoder is a trained encoder already: leave out --pretrained and --encoder-weights"
        )
    if images.pretrained and images.encoder_weights is not None:
        raise ValueError("--pretrained and --encoder-weights both say where the weights come from: give one")
    if contrast.method == "dense" and contrast.trains_images():
        raise ValueError(
            "--method dense takes features that stand still: an encoder that is trained with it would put "
            "out a constant. Leave out --train-images yes"
        )
    if contrast.by_points() and contrast.levels():
        raise ValueError(
            "--image-levels crops and flips pictures, after which a point is in another cell: use it with "
            "--method mm-point or crosspoint"
        )
    if contrast.method == "crosspoint" and contrast.levels() > 1:
        raise ValueError("--method crosspoint has one change of its pictures: --image-levels 1 or 0")
    if images.images is not None and contrast.hidden_points == "skip":
        raise ValueError(
            "--hidden-points skip needs pictures that are made of the points: which points a stored picture "
            "shows is not known. Leave out --images, or let hidden points count"
        )
    if contrast.image_lr is not None and not contrast.image_lr > 0:
        raise ValueError(f"--image-lr is {contrast.image_lr}; expected a positive learning rate")
    if contrast.head_width < 1:
        raise ValueError(f"--head-width is {contrast.head_width}; expected at least 1")
    if contrast.views() < 1 or options.watch_shapes < 2:
        raise ValueError(
            f"--views-per-step {contrast.views()}, --watch-shapes {options.watch_shapes}: expected at "
            "least 1 and 2"
        )


def pretrain(options: Pretrain) -> dict[str, Any]:
    """Pre-train a network into a run folder and return its results.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: with what to do.
    """
    check(options)
    options = copy.deepcopy(options)
    images = options.images.images
    accelerator = make_accelerator(options.machine)
    main, device = accelerator.is_main_process, accelerator.device
    clouds = clouds_of(options.data, "train", labelled=False)
    train, watched, part = without_labels(
        clouds, options.data.holdout, options.watch_shapes, options.data.data_seed
    )
    inputs = {"data": clouds.fingerprint()}
    photographs = uses_photographs(options, clouds)
    encoder, spec = make_encoder(options, clouds.up, main, photographs)

    @functools.cache
    def raw() -> PointDataset:
        return replace(options.data, normalize=False).build("train", options.data.per_class)

    sources = [source_of(options, part, spec, encoder.in_chans, device, raw) for part in (train, watched)]
    encoder.to(device).train(options.contrast.trains_images())
    if options.images.encoder is not None or options.images.encoder_weights is not None:
        inputs["encoder"] = encoder.fingerprint()

    seed_everything(options.loop.seed)
    # a network for parts or scenes is built as pointcmt segment builds it, so that its weights fit there
    options.student = segmenter_options(options.student, clouds, clouds.points.shape[2])
    segments = options.student.student.endswith(("_part", "_scene"))
    classes = (segments and len(clouds.part_names)) or clouds.num_classes
    network = make_student(options.student, classes).to(device)
    adapter = find_adapter(network, options.student.adapter)
    sample = torch.from_numpy(train.points[: min(4, len(train))]).to(device)
    run = RunFolder.start(
        accelerator, options.out, options, command="pretrain", inputs=inputs, resume=options.resume
    )
    if (done := run.finished()) is not None:
        say(f"{run.path} is finished", main)
        return done
    if main:
        parts = {"train": train.shape_ids, "heldout": watched.shape_ids if part == "heldout" else []}
        write_json(run.path / "shapes.json", parts)

    untouched = freeze_unused(network, adapter.arrange(sample), adapter)
    method = make_method(options, encoder, network, adapter, adapter.arrange(sample))
    config = {
        "student": plain(options.student),
        "num_classes": classes,
        "classes": list(clouds.class_names),
        "num_points": options.data.num_points,
        "method": options.contrast.method,
    }
    before = frozen_features(network, adapter, watched, device, options.loop.batch_size)
    with method as pre:
        pictures = Pictures(encoder, sources[0], options)
        watch = Watch(options, pre, adapter, watched, part, sources[1], device, main)
        task = Task(
            step=make_step(options, pre, adapter, pictures),
            evaluate=watch,
            watch=Figure(
                watch.name,
                "highest",
                watch.means,
            ),
            headline=(watch.name,),
        )
        batches = Batches(
            train,
            options.loop.batch_size,
            device,
            options.loop.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )

        def save(model: nn.Module, path: Any) -> None:
            save_module(path, model, "network", config)

        rates = {}
        if options.contrast.image_lr is not None:
            rates = dict.fromkeys(pre.parameters("images"), options.contrast.image_lr)
        try:
            outcome = fit(
                network, task, batches, save, options.loop, options.machine, accelerator, run,
                extras=pre, rates=rates,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"a batch of {options.loop.batch_size} shapes does not fit into memory ({error}): use a "
                "smaller --batch-size (it has fewer negatives, which --accumulate does not bring back), "
                "smaller pictures (--size), fewer --views-per-step, or --precision bf16, and another --out"
            ) from error
        # from the metrics, which are kept with the training state: a run that was killed after its last epoch
        # makes no step when it is resumed
        chance = {}
        for metrics in (outcome["best"], outcome["last"]):
            for name in [name for name in metrics if name.startswith(_CHANCE)]:
                chance[name.removeprefix(_CHANCE)] = metrics.pop(name)
        if main:
            watch.draw(network, before, run.path)
    for parameter in untouched:
        parameter.requires_grad_(True)
    if main:
        save(network, run.path / "network.safetensors")
    return run.finish(
        {
            **outcome,
            "method": options.contrast.method,
            "student": options.student.student,
            "adapter": adapter.name,
            "encoder": encoder_words(options),
            "views": "photographs"
            if photographs
            else spec.describe()
            if images is None
            else {"images": "stored", "size": options.views.size},
            "views_per_step": pictures.count,
            "losses_at_chance": chance,
            "parameters": count_parameters(network),
            "not_trained": sum(parameter.numel() for parameter in untouched),
            "shapes": {"train": len(train), part: len(watched)},
            "seed": options.loop.seed,
        }
    )


def uses_photographs(options: Pretrain, clouds: PointDataset) -> bool:
    """Whether the real pictures that the data set itself has are used.

    Raises:
        ValueError: they are asked for, and there are none.
    """
    wanted = options.contrast.pictures
    if wanted == "stored" and clouds.stored_views is None:
        raise ValueError("--pictures stored: the data set has no pictures with cameras; use projected")
    return clouds.stored_views is not None and wanted != "projected" and options.images.images is None


def without_labels(
    clouds: PointDataset, part: float, most: int, seed: int
) -> tuple[PointDataset, PointDataset, str]:
    """Shapes to train on, shapes to watch, and whether those are ``heldout`` or of ``train``: drawn without a
    look at the labels."""
    if not 0 <= part < 1:
        raise ValueError(f"--holdout is {part}; expected a part of the training shapes in [0, 1)")
    order = np.random.default_rng([seed, 1]).permutation(len(clouds))
    held = min(len(clouds) - 2, max(2, round(part * len(clouds)))) if part else 0
    if part and held < 2:
        raise ValueError(
            f"--holdout {part} of {len(clouds)} shapes leaves fewer than 2 to train on or to watch: give "
            "more shapes, or --holdout 0"
        )
    train = subset(clouds, np.sort(order[held:]))
    if not held:
        return train, subset(clouds, np.sort(order[:most])), "train"
    return train, subset(clouds, np.sort(order[: min(held, most)])), "heldout"


# ---- the image encoder


def make_encoder(
    options: Pretrain, up: str | None, show: bool, photographs: bool = False
) -> tuple[ImageTeacher, ViewSpec]:
    """The image encoder, and how its pictures are made of points whose recorded axis is ``up``; the data
    set's own ``photographs`` have three colours, and are not made."""
    images, spec = options.images, options.views.spec(up)
    if images.encoder is not None:
        encoder = ImageTeacher.load(find_checkpoint(images.encoder, "teacher"))
        if images.images is not None or photographs:
            return encoder, spec
        if encoder.view_spec is not None:
            spec = replace(encoder.view_spec, rig=options.views.rig, up=spec.up)
        elif spec.num_channels != encoder.in_chans:
            raise ValueError(
                f"the encoder at {images.encoder} takes images of {encoder.in_chans} channels, and views of "
                f"{'+'.join(spec.channels)} have {spec.num_channels}: give --channels"
            )
        return encoder, spec
    seed_everything(options.loop.seed, 1)
    encoder = ImageTeacher(
        num_classes=None,
        backbone=images.backbone,
        in_chans=3 if images.images is not None or photographs else spec.num_channels,
        feature_dim=None,
        pretrained=images.pretrained if images.encoder_weights is None else images.encoder_weights,
        backbone_options=parse_assignments(images.backbone_options, "--backbone-options"),
        view_spec=spec if images.images is None and not photographs else None,
    )
    if not (images.pretrained or images.encoder_weights or options.contrast.trains_images()):
        warn(
            f"the image encoder ({images.backbone}) is frozen and has random weights; Pic@Point's has those "
            "of ImageNet. Give --pretrained, --encoder-weights FILE, --encoder RUN of train-teacher, or "
            "--train-images yes",
            show,
        )
    return encoder, spec


def encoder_words(options: Pretrain) -> str:
    """Where the image encoder's weights come from, in words."""
    images = options.images
    trained = "trained with it" if options.contrast.trains_images() else "frozen"
    if images.encoder is not None:
        return f"of train-teacher, which was trained with labels; {trained}"
    start = (
        "timm's pretrained" if images.pretrained else "from a file" if images.encoder_weights else "random"
    )
    return f"{images.backbone}, {start} weights, {trained}"


# ---- the method and its step


def make_method(
    options: Pretrain,
    encoder: ImageTeacher,
    network: nn.Module,
    adapter: Adapter,
    points: Any,
) -> CrossModalTraining:
    """The context of the method, not yet entered."""
    contrast = options.contrast
    if contrast.method == "dense":
        return DenseDistillation(
            encoder,
            network,
            points=points,
            adapter=adapter,
            hidden_points=hidden_points(options),
            local_points=contrast.local_points,
            hidden=contrast.head_width,
        )
    if contrast.method == "pic-at-point":
        return PicAtPoint(
            encoder,
            network,
            points=points,
            adapter=adapter,
            local_weight=contrast.local_weight,
            global_weight=contrast.global_weight,
            pose=contrast.pose,
            hidden_points=hidden_points(options),
            local_points=contrast.local_points,
            hidden=contrast.head_width,
            out_features=contrast.head_width,
            temperature=contrast.temperature,
            train_images=contrast.trains_images(),
        )
    levels: list[Callable[[Tensor], Tensor]] = []
    if contrast.levels():
        # views of points are no photographs: depth and normals are not in [0, 1]
        photographs = options.images.images is not None
        levels = (
            view_levels(options.views.size, contrast.levels(), photographs=photographs)
            if contrast.method == "mm-point"
            else [crosspoint_level(photographs=photographs)]
        )
    augment = ViewAugmentation(levels) if levels else None
    if contrast.method == "mm-point":
        return MMPoint(
            encoder,
            network,
            points=points,
            adapter=adapter,
            views=contrast.views(),
            augment=augment,
            intra_weight=contrast.intra_weight,
            inter_weight=contrast.cross_weight,
            shared_head=contrast.shared_head,
            temperature=contrast.temperature,
            train_images=contrast.trains_images(),
        )
    return CrossPoint(
        encoder,
        network,
        points=points,
        adapter=adapter,
        augment=augment,
        intra_weight=contrast.intra_weight,
        cross_weight=contrast.cross_weight,
        temperature=contrast.temperature,
        train_images=contrast.trains_images(),
    )


class Made:
    """Pictures that are made of points.

    Args:
        spec: how.
        data: the shapes.
        device: of the pictures.
    """

    def __init__(self, spec: ViewSpec, data: PointDataset, device: torch.device) -> None:
        self.spec, self.up, self.num_views = spec, spec.up, spec.num_views
        self.clouds = torch.from_numpy(np.ascontiguousarray(data.view_points)).to(device)

    def __len__(self) -> int:
        return len(self.clouds)

    def take(self, rows: Tensor, cameras: Tensor) -> Views:
        """Views by the cameras [B, V] of the shapes of ``rows`` [B]."""
        return project_chosen(self.spec, self.clouds[rows.to(self.clouds.device)], cameras)


class Photographs:
    """Real pictures that a data set itself has of its shapes, with their cameras.

    Args:
        data: with ``stored_views``.
        up: the axis of the clouds that points up.
        device: of the pictures.
    """

    def __init__(self, data: PointDataset, up: str, device: torch.device) -> None:
        assert data.stored_views is not None
        self.stored, self.up, self.num_views = data.stored_views, up, data.stored_views.images.shape[1]
        self.clouds = torch.from_numpy(np.ascontiguousarray(data.view_points)).to(device)

    def __len__(self) -> int:
        return len(self.clouds)

    def take(self, rows: Tensor, cameras: Tensor) -> Views:
        """Views by the cameras [B, V] of the shapes of ``rows`` [B]."""
        return self.stored.take(rows, cameras, self.clouds[rows.to(self.clouds.device)])


class Stored:
    """Stored pictures, with their cameras in the frame of the clouds.

    Args:
        images: those of the shapes, in their order.
        frames: [n, 4, 4] that took the coordinates that the cameras are for to those of the clouds; None: the
            pictures alone, without cameras.
        up: the axis of the clouds that points up.
        device: of the pictures.
    """

    def __init__(self, images: MultiViewImages, frames: Tensor | None, up: str, device: torch.device) -> None:
        self.images, self.frames, self.up, self.num_views = images, frames, up, images.num_views
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor, cameras: Tensor) -> Views:
        """Views by the cameras [B, V] of the shapes of ``rows`` [B]."""
        known = self.frames is not None
        parts = [
            self.images.views(row, chosen, cameras=known)
            for row, chosen in zip(rows.tolist(), cameras.tolist(), strict=True)
        ]
        views = Views(
            *(None if of[0] is None else torch.cat(of).to(self.device) for of in zip(*parts, strict=True))  # type: ignore[arg-type]
        )
        return views if self.frames is None else moved(views, self.frames[rows.cpu()].to(self.device))


Source = Made | Photographs | Stored


def source_of(
    options: Pretrain,
    data: PointDataset,
    spec: ViewSpec,
    channels: int,
    device: torch.device,
    raw: Callable[[], PointDataset],
) -> Source:
    """Where the pictures of some shapes come from.

    ``raw`` gives the training set as its files have it, where that is needed.

    Raises:
        FileNotFoundError: stored pictures or cameras that are missing.
        ValueError: cameras that are not of these clouds.
    """
    folder = options.images.images
    if folder is None:
        photographs = uses_photographs(options, data)
        return Photographs(data, spec.up, device) if photographs else Made(spec, data, device)
    size, white = options.views.size, options.views.white
    images = matching_images(folder, data, "train", size, channels, white=white)
    if not options.contrast.maps():
        return Stored(images, None, spec.up, device)
    stored = Stored(images, frames_of(options.data, data, raw), spec.up, device)
    few = torch.arange(min(8, len(data)))
    views = stored.take(few, torch.arange(images.num_views).expand(len(few), -1))
    assert views.view_matrix is not None and views.projection_matrix is not None
    points = torch.from_numpy(data.points[: len(few), :, :3]).to(device)
    pixels, _ = pixels_of(points, views.view_matrix, views.projection_matrix)
    inside = ((pixels >= 0) & (pixels <= 1)).all(-1).float().mean()
    if inside < 0.9:
        raise ValueError(
            f"{100 * (1 - float(inside)):.0f} % of the points are outside of their pictures: the cameras in "
            f"{folder} are not of these clouds. Render the very meshes that --data samples "
            "(pointcmt render-views), or leave out --images"
        )
    return stored


def frames_of(options: DataOptions, data: PointDataset, raw: Callable[[], PointDataset]) -> Tensor:
    """[n, 4, 4] that took each shape's coordinates as its file has them to those of its cloud."""
    whole = torch.eye(4).repeat(len(data), 1, 1)
    if not options.entry().takes("normalize"):
        return whole
    made = raw()
    rows = {name: row for row, name in enumerate(made.shape_ids)}
    before = torch.from_numpy(made.points[[rows[name] for name in data.shape_ids], :, :3]).double()
    after = torch.from_numpy(data.points[..., :3]).double()
    centres = before.mean(1), after.mean(1)
    spreads = [
        (cloud - centre[:, None]).square().sum((1, 2)).sqrt()
        for cloud, centre in zip((before, after), centres, strict=True)
    ]
    scale = spreads[1] / spreads[0].clamp(min=1e-12)
    whole[:, :3, :3] *= scale[:, None, None]
    whole[:, :3, 3] = centres[1] - scale[:, None] * centres[0]
    return whole


class Pictures:
    """Pictures of the training shapes, or what a frozen encoder says of them.

    Args:
        encoder: on the device it is used on.
        source: of the pictures.
        options: of the run.
    """

    def __init__(self, encoder: ImageTeacher, source: Source, options: Pretrain) -> None:
        self.encoder, self.source = encoder, source
        self.count, self.total = options.contrast.views(source.num_views), source.num_views
        self.maps = options.contrast.maps()
        self.points = self.maps and hidden_points(options) == "skip"
        self.kept: list[tuple[TeacherOutput, Views]] | None = None
        frozen = not (options.contrast.trains_images() or options.contrast.levels())
        if frozen and options.cache_gb > 0 and self.total <= options.loop.epochs * self.count:
            first = self._say(torch.arange(1))
            size = sum(part.nbytes for part in (*first[0][:4], *first[1]) if part is not None) * len(source)
            if size <= options.cache_gb * 1e9:
                with console.status(f"pictures of {len(source)} shapes, {self.total} views each"):
                    self.kept = [self._say(rows) for rows in torch.arange(len(source)).split(16)]

    def take(self, index: Tensor, motion: Tensor | None) -> dict[str, Any]:
        """Arguments of ``loss()`` for the shapes of rows ``index`` [B], whose clouds were moved by ``motion``
        [B, 4, 4] since."""
        cameras = draw_cameras(len(index), self.total, self.count)
        if self.kept is None:
            return {"views": _moved(self.source.take(index, cameras), motion)}
        rows = index.cpu()
        places = [(int(row) // 16, int(row) % 16) for row in rows]

        def pick(part: int, name: str) -> Tensor | None:
            if getattr(self.kept[0][part], name) is None:  # type: ignore[index]
                return None
            found = [
                getattr(self.kept[block][part], name)[row, chosen]  # type: ignore[index]
                for (block, row), chosen in zip(places, cameras, strict=True)
            ]
            return torch.stack(found).to(index.device, non_blocking=True)

        views = Views(*(pick(1, name) for name in Views._fields))  # type: ignore[arg-type]
        per_view = pick(0, "per_view")
        assert per_view is not None
        pooled = per_view.amax(1) if self.encoder.view_pool == "max" else per_view.mean(1)
        said = TeacherOutput(pooled, None, per_view, pick(0, "maps"))
        return {"image_features": said._replace(views=_moved(views, motion))}

    @torch.no_grad()
    def _say(self, rows: Tensor) -> tuple[TeacherOutput, Views]:
        """What the encoder says of all views of some shapes, on the CPU, and the views without their
        images."""
        views = self.source.take(rows, torch.arange(self.total).expand(len(rows), -1))
        encoder = self.encoder.to(views.images.device).eval()
        said = encoder(views.images, per_view=True, maps=self.maps)
        views = views._replace(images=views.images.new_empty(*views.images.shape[:3], 0, 0))
        if not self.points:
            views = views._replace(pixels=None, visible=None)
        return said.map(Tensor.cpu), views.map(Tensor.cpu)


def _moved(views: Views, motion: Tensor | None) -> Views:
    return views if motion is None or views.view_matrix is None else moved(views, motion)


def make_step(
    options: Pretrain, pre: CrossModalTraining, adapter: Adapter, pictures: Pictures
) -> Callable[[nn.Module, Batch, float], dict[str, Tensor]]:
    """A training step of the method."""
    change = cloud_augmentation(options, pictures.source.up)

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if pre.copies == 1:
            points, motion = change.with_motion(batch.inputs)
        else:
            points, motion = torch.cat([change(batch.inputs) for _ in range(pre.copies)]), None
        adapter.call(model, points)
        loss = pre.loss(**pictures.take(batch.index, motion))
        return {"loss": loss, **pre.loss_tensors}

    return step


def cloud_augmentation(options: Pretrain, up: Any) -> CloudAugmentation:
    """What is done to the clouds of a step."""
    if not options.contrast.augment_points:
        return CloudAugmentation()
    if options.contrast.by_points():
        return CloudAugmentation.pic_at_point(up)
    return CloudAugmentation.crosspoint(up)


# ---- the figures to watch


class Watch:
    """How well clouds and pictures of some shapes find each other, without labels.

    Called with the network in eval mode it gives

    * ``retrieval``: in % of the shapes, the right picture (or copy) is the most similar of all;
    * ``alignment``, the mean squared distance of the right pairs on the unit sphere, and ``uniformity``, the
      log of the mean of exp(−2 d²) over pairs of clouds: both the lower the better (Wang and Isola 2020);
    * ``cell``: in % of the local features, the right cell is the most similar of its picture;
    * ``pixels``: of dense distillation, the mean cosine in % of points with the features at their pixels.

    Args:
        options: of the run.
        pre: the entered context.
        adapter: of the network.
        shapes: what is looked at.
        part: what they are called in the metrics.
        source: of their pictures.
        device: to work on.
        show: whether to say, once, what guessing would give.
    """

    def __init__(
        self,
        options: Pretrain,
        pre: CrossModalTraining,
        adapter: Adapter,
        shapes: PointDataset,
        part: str,
        source: Source,
        device: torch.device,
        show: bool,
    ) -> None:
        self.pre, self.adapter, self.part, self.source, self.show = pre, adapter, part, source, show
        self.shapes = shapes
        self.batches = Batches(shapes, options.loop.batch_size, device)
        self.change = cloud_augmentation(options, source.up)
        self.count = options.contrast.views(source.num_views)
        self.pairing: Any = next((o for o in pre.objectives if hasattr(o, "embed")), None)
        self.local: LocalInfoNCE | PixelFeatures | None = next(
            (o for o in pre.objectives if isinstance(o, LocalInfoNCE | PixelFeatures)), None
        )
        self.found = "pixels" if isinstance(self.local, PixelFeatures) else "cell"

    @property
    def name(self) -> str:
        """The metric that stands for all: ``retrieval``, or ``cell`` or ``pixels`` where only points are
        compared."""
        return f"{self.part}_{self.found if self.pairing is None else 'retrieval'}"

    @property
    def means(self) -> str:
        """What choosing by it means."""
        if self.pairing is not None:
            what = "clouds find their pictures or copies"
        else:
            what = "points find their cells" if self.found == "cell" else "points say what their pixels do"
        shapes = "training shapes that were held out" if self.part == "heldout" else "some training shapes"
        return f"how often {what}, of {shapes}; no label and no test shape is looked at"

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        drawn = torch.Generator().manual_seed(0)  # the same copies at every epoch
        encoder, total = self.pre.teacher, self.source.num_views
        pairs: list[tuple[Tensor, Tensor]] = []
        cells: list[tuple[float, int]] = []
        with in_eval_mode(self.pre.objectives, encoder):
            for batch in self.batches.epoch():
                cameras = batch.index.cpu()[:, None] + torch.arange(self.count) * (total // self.count)
                views = self.source.take(batch.index, cameras % total)
                said = encoder(views.images, per_view=True, maps=self.local is not None)
                said = said._replace(views=views)
                points = batch.inputs
                if self.pre.copies > 1:
                    points = torch.cat([self.change(batch.inputs, drawn) for _ in range(self.pre.copies)])
                state = self._state(model, points, self.pre.copies)
                if self.pairing is not None:
                    pairs.append(self.pairing.embed(state, said))
                if self.local is not None:
                    cells.append((float(self.local.found(state, said)), len(batch.index)))
        metrics: dict[str, float] = {}
        if pairs:
            ours, theirs = (F.normalize(torch.cat(side).float(), dim=1) for side in zip(*pairs, strict=True))
            right = (ours @ theirs.T).argmax(1) == torch.arange(len(ours), device=ours.device)
            metrics[f"{self.part}_retrieval"] = 100 * float(right.float().mean())
            metrics[f"{self.part}_alignment"] = float((ours - theirs).square().sum(1).mean())
            metrics[f"{self.part}_uniformity"] = float(torch.pdist(ours).square().mul(-2).exp().mean().log())
        metrics |= {f"{_CHANCE}{name}": value for name, value in chances(self.pre).items()}
        if cells:
            shapes = sum(count for _, count in cells)
            metrics[f"{self.part}_{self.found}"] = sum(value * count for value, count in cells) / shapes
        if self.show:
            self.show = False
            losses = ", ".join(f"{name} {value:.2f}" for name, value in chances(self.pre).items())
            if self.pairing is not None:
                losses += f", and {self.part}_retrieval {100 / self.batches.n:.2g} %"
            say(f"who guesses has the losses {losses or f'pixels 1, and {self.part}_pixels 0 %'}")
        return metrics

    def _state(self, model: nn.Module, points: Tensor, copies: int) -> StudentState:
        found = encode(model, self.adapter, points)
        return StudentState(
            found.global_, None, None, found.local, found.centers, copies=copies, global_=found.global_
        )

    @torch.no_grad()
    def draw(self, model: nn.Module, before: np.ndarray, folder: Path) -> None:
        """Writes ``features.png`` and, of Pic@Point, ``similarity.png``.

        Args:
            model: in eval mode.
            before: features [n, D] of the shapes before pre-training.
            folder: of the run.
        """
        shapes = self.shapes
        after = frozen_features(model, self.adapter, shapes, self.batches.device, self.batches.batch_size)
        draw_features(before, after, shapes.labels, shapes.class_names, folder / "features.png")
        if not isinstance(self.local, LocalInfoNCE):
            return
        rows = torch.linspace(0, len(shapes) - 1, min(SHAPES, len(shapes))).long()
        places = torch.linspace(0, self.source.num_views - 1, min(VIEWS, self.source.num_views)).long()
        views = self.source.take(rows, places.expand(len(rows), -1))
        points = torch.from_numpy(shapes.points[rows.numpy()]).to(self.batches.device)
        with in_eval_mode(self.pre.objectives, self.pre.teacher):
            said = self.pre.teacher(views.images, per_view=True, maps=True)._replace(views=views)
            names = [shapes.shape_ids[row] for row in rows.tolist()]
            state = self._state(model, points, 1)
            draw_similarity(self.local, state, said, names, self.source.up, folder / "similarity.png")


def chances(pre: CrossModalTraining) -> dict[str, float]:
    """What each loss of the context is for one who guesses, once a step was made."""
    values = {str(o.name): getattr(o, "chance", None) for o in pre.objectives}
    return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def in_eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode; each gets its own mode back."""
    modes = [(child, child.training) for module in modules for child in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for child, mode in modes:
            child.training = mode
