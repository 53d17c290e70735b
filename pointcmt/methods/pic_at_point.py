"""Pic@Point: pre-training by which picture shows the cloud, and which cell of it each of its points is in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from pointcmt.adapters.registry import Adapter
from pointcmt.objectives import GlobalInfoNCE, LocalInfoNCE, Objective
from pointcmt.schedules import Guard
from pointcmt.training import CrossModalTraining


class PicAtPoint(CrossModalTraining):
    """Pic@Point's pre-training of any network, without labels, under a frozen image encoder.

    ::

        images = ImageTeacher(backbone="resnet18", pretrained=True)
        with PicAtPoint(images, network, points=sample) as pre:
            optimizer = Adam([*network.parameters(), *pre.parameters()])
            for points in loader:
                views = pre.project(points)
                points, motion = change.with_motion(points)
                network(points)
                loss = pre.loss(views=moved(views, motion))

    Here, as in the paper, with one view by chance of a rig's twenty per shape and step, and with clouds that
    are turned (``change``, a ``pointcmt.data.contrastive.CloudAugmentation``) and their cameras with them
    (``pointcmt.views.cells.moved``). The paper's learning rates, 1e-3 and for the images' heads 5e-5::

        optimizer = Adam(
            [
                {"params": [*network.parameters(), *pre.parameters("points")]},
                {"params": [*pre.parameters("images")], "lr": 5e-5},
            ],
            lr=1e-3,
        )

    See :class:`~pointcmt.training.CrossModalTraining` for what entering, training and leaving do.

    Args:
        images: image encoder, with or without a classifier; frozen and in eval mode, as in the paper, unless
            ``train_images``.
        network: the network to be trained; its adapter must say where local features are, for the local term.
        points: a few clouds as the network takes them: the heads are made by the sizes of its features.
        adapter: where the network's features are: an ``Adapter``, the name of one, or None to find one.
        local_weight: of the local term; 0 leaves it out (ablation).
        global_weight: of the global term; 0 leaves it out (ablation).
        pose: whether the head for local features is told the view matrix (ablation: False).
        hidden_points: whether points that the cloud's own surface hides ``"count"``, as in the paper, or are
            ``"skip"``-ped.
        local_points: at most so many local features of each cloud in a step, drawn by chance: the loss
            has the same mean, and networks with one per point (DGCNN) cost less; None: all, as in the paper.
        temperature: τ of both terms, which the paper does not say; 0.1 is CrossPoint's.
        hidden: width of all heads.
        out_features: size of the common spaces.
        train_images: train the image encoder too, for one without pretrained weights.
        objectives: in place of all of these.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.

    Raises:
        ValueError: both weights are 0; on entering: the adapter knows no local features, or sizes are not
            known.

    Source: Herzog and Suwelack, "Pic@Point: cross-modal learning by local and global point-picture
    correspondence", ACML 2024. The ablation with normals needs nothing here: give a network that takes
    [B, N, 6] such points.
    """

    views_per_step = 1

    def __init__(
        self,
        images: nn.Module,
        network: nn.Module,
        *,
        points: Any,
        adapter: Adapter | str | None = None,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        pose: bool = True,
        hidden_points: Literal["count", "skip"] = "count",
        local_points: int | None = 64,
        temperature: float = 0.1,
        hidden: int = 512,
        out_features: int = 512,
        train_images: bool = False,
        objectives: Iterable[Objective] | None = None,
        guard: Guard | None = None,
    ) -> None:
        if objectives is None:
            chosen: list[Objective] = []
            if local_weight:
                chosen.append(
                    LocalInfoNCE(
                        local_weight,
                        temperature,
                        hidden,
                        out_features,
                        pose=64 if pose else 0,
                        hidden_points=hidden_points,
                        local_points=local_points,
                        name="local",
                    )
                )
            if global_weight:
                chosen.append(GlobalInfoNCE(global_weight, temperature, hidden, out_features, name="global"))
            if not chosen:
                raise ValueError(
                    "PicAtPoint with local_weight=0 and global_weight=0 has no loss: give one of them"
                )
            objectives = chosen
        super().__init__(
            images,
            network,
            objectives=objectives,
            adapter=adapter,
            guard=guard,
            points=points,
            train_teacher=train_images,
        )
