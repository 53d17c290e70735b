"""The records that flow through the house; every one is plain tensors, and says their shapes.

Points → network → :class:`PointFeatures`; images → encoder → :class:`ImageFeatures`; points and cameras →
:class:`Views`; a data set → :class:`Batch`. Objectives see :class:`StudentState` and :class:`TeacherOutput`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor


class PointFeatures(NamedTuple):
    """What a point-cloud encoder says of B clouds.

    Attributes:
        global_: [B, D] one feature per cloud, what its head reads.
        local: [B, M, C] one feature per centre; None where the network has none.
        centers: [B, M, 3] where the local features are, in the network's input coordinates; None without
            ``local``.
    """

    global_: Tensor
    local: Tensor | None = None
    centers: Tensor | None = None


class ImageFeatures(NamedTuple):
    """What an image encoder says of B shapes with V views each.

    Attributes:
        pooled: [B, D] one feature per shape, pooled over its views.
        per_view: [B, V, D] one feature per view; None where it was not asked for.
        maps: [B, V, C, h, w] the backbone's top-level feature maps; None where they were not asked for.
    """

    pooled: Tensor
    per_view: Tensor | None = None
    maps: Tensor | None = None


class Views(NamedTuple):
    """Images of B shapes, with where each point is in each of them and with the cameras.

    Attributes:
        images: [B, V, C, H, W] float32.
        pixels: [B, V, N, 2] (u, v) of each point in [0, 1]², u along the columns to the right, v along the
            rows downwards; outside of [0, 1] where the point falls beside the image. None where the images
            are not of known points.
        visible: bool [B, V, N], whether the point is inside the image and nothing drawn lies nearer on its
            pixel. None with ``pixels``.
        view_matrix: [B, V, 4, 4] world to camera, ``p_camera = view_matrix @ (p, 1)``: x to the right, y
            down, z the depth along the view axis.
        projection_matrix: [B, V, 4, 4] camera to clip space: with ``c = projection_matrix @ p_camera``,
            ``(u, v) = (c[:2] / c[3] + 1) / 2``.
    """

    images: Tensor
    pixels: Tensor | None = None
    visible: Tensor | None = None
    view_matrix: Tensor | None = None
    projection_matrix: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Views:
        """A copy with every tensor changed alike."""
        return Views._make(None if part is None else change(part) for part in self)


class TeacherOutput(NamedTuple):
    """What the image teacher says of B shapes; carries no gradient into a frozen teacher.

    Attributes:
        feature: [B, D] shape feature after pooling over views.
        logits: [B, K] class scores of the teacher's own classifier; None where it has none.
        per_view: [B, V, D] one feature per view, where an objective asks for it.
        maps: [B, V, C, h, w] top-level feature maps, where an objective asks for them.
        views: the images' pixels and cameras, where they were given.
    """

    feature: Tensor
    logits: Tensor | None = None
    per_view: Tensor | None = None
    maps: Tensor | None = None
    views: Views | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherOutput:
        """A copy with every tensor changed alike, those of the views too."""
        *tensors, views = self
        changed = [None if value is None else change(value) for value in tensors]
        return TeacherOutput._make((*changed, None if views is None else views.map(change)))


class StudentState(NamedTuple):
    """What one forward pass of the student left for the objectives.

    Attributes:
        feature: [B, D] the student's shape feature, attached to its graph.
        logits: [B, K] the student's output, attached to its graph; None where it has no classifier.
        classify: ``feature [B, D] -> logits [B, K]`` through the student's *own* classifier, in the student's
            current mode, leaving its BatchNorm running statistics untouched; None where it has none.
        local: [B, M, C] local features, attached to the graph, where an objective asks for them.
        centers: [B, M, 3] where they are.
        copies: k, where the pass was of k augmented copies of the teacher's B/k shapes, copy after copy.
        global_: [B, D'] the encoder's pooled feature, where an objective asks for it; the shape feature where
            the adapter does not say.
        labels: int64 [B] the classes of the B shapes, where ``loss`` was given them.
    """

    feature: Tensor
    logits: Tensor | None
    classify: Callable[[Tensor], Tensor] | None
    local: Tensor | None = None
    centers: Tensor | None = None
    copies: int = 1
    global_: Tensor | None = None
    labels: Tensor | None = None

    def rows(self, which: slice) -> StudentState:
        """The state of a part of the shapes; ``labels`` are left as they are."""

        def part(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[which]

        return self._replace(
            feature=self.feature[which],
            logits=part(self.logits),
            local=part(self.local),
            centers=part(self.centers),
            global_=part(self.global_),
        )


@dataclass(frozen=True)
class Batch:
    """B clouds with whatever is known of them; None where it is not.

    Attributes:
        points: float32 [B, N, 3] coordinates.
        features: float32 [B, N, F] further values per point.
        normals: float32 [B, N, 3] unit vectors; they turn with the cloud.
        colors: float32 [B, N, 3] in [0, 1].
        point_labels: int64 [B, N] class of each point; negative where it has none.
        labels: int64 [B] class of each cloud.
        category: int64 [B] category of each cloud, where parts depend on it.
        index: int64 [B] rows of the data set.
        lengths: int64 [B] how many of the N points are the cloud's own, from the first; the rest is padding.
        images: float32 [B, V, C, H, W] stored views.
    """

    points: Tensor | None = None
    features: Tensor | None = None
    normals: Tensor | None = None
    colors: Tensor | None = None
    point_labels: Tensor | None = None
    labels: Tensor | None = None
    category: Tensor | None = None
    index: Tensor | None = None
    lengths: Tensor | None = None
    images: Tensor | None = None

    PER_POINT: ClassVar[tuple[str, ...]] = ("points", "features", "normals", "colors", "point_labels")

    def __len__(self) -> int:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None:
                return len(value)
        return 0

    def replace(self, **changes: Tensor | None) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with every tensor changed alike."""
        present = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return self.replace(**{name: change(value) for name, value in present.items() if value is not None})

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def take(self, order: Tensor) -> Self:
        """A copy whose clouds are made of the points that ``order`` int64 [B, M] names.

        Every field that has one value per point follows: a label stays with its point.
        """
        changes = {}
        for name in self.PER_POINT:
            value = getattr(self, name)
            if value is not None:
                index = order if value.ndim == 2 else order.unsqueeze(-1).expand(-1, -1, value.shape[2])
                changes[name] = value.gather(1, index)
        return self.replace(**changes)

    def inputs(self) -> Tensor:
        """[B, N, 3 + …]: coordinates, then normals, colours and features where there are any, as networks
        take them."""
        assert self.points is not None
        parts = [self.points, self.normals, self.colors, self.features]
        present = [part for part in parts if part is not None]
        return present[0] if len(present) == 1 else torch.cat(present, dim=-1)
