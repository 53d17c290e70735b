"""Dense distillation: pre-training by which each point learns the image features at its pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from pointcmt.adapters.registry import Adapter
from pointcmt.objectives import Objective, PixelFeatures
from pointcmt.schedules import Guard
from pointcmt.training import CrossModalTraining


class DenseDistillation(CrossModalTraining):
    """Pre-training of a network with a feature for each point, without labels, under a frozen image encoder.

    ::

        with DenseDistillation(images, network, points=sample) as pre:
            optimizer = Adam([*network.parameters(), *pre.parameters()])
            for points in loader:
                network(points)
                loss = pre.loss(views=images.project(points, cameras=True))

    See :class:`~pointcmt.training.CrossModalTraining` for what entering, training and leaving do.

    Args:
        images: image encoder with feature maps; the finer the maps, the more it says of a point
            (``backbone_options={"output_stride": 8}`` where timm's backbone takes that).
        network: the network to be trained; its adapter must say where local features are.
        points: a few clouds as the network takes them: the head is made by the sizes of its features.
        adapter: where the network's features are: an ``Adapter``, the name of one, or None to find one.
        hidden_points: whether points that the cloud's own surface hides are ``"skip"``-ped or ``"count"``.
        local_points: at most so many points of each cloud in a step, drawn by chance; None: all.
        hidden: width of the head.
        objectives: in place of this one.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.

    Raises:
        ValueError: on entering: the adapter knows no local features, or the encoder has no maps.

    Source: ours; see :class:`~pointcmt.objectives.PixelFeatures`.
    """

    def __init__(
        self,
        images: nn.Module,
        network: nn.Module,
        *,
        points: Any,
        adapter: Adapter | str | None = None,
        hidden_points: Literal["count", "skip"] = "skip",
        local_points: int | None = None,
        hidden: int = 256,
        objectives: Iterable[Objective] | None = None,
        guard: Guard | None = None,
    ) -> None:
        if objectives is None:
            objectives = [
                PixelFeatures(
                    1.0, hidden, hidden_points=hidden_points, local_points=local_points, name="pixels"
                )
            ]
        super().__init__(images, network, objectives=objectives, adapter=adapter, guard=guard, points=points)
