"""MM-Point: pre-training by several views of each cloud at once, and by two augmented copies of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from pointcmt.adapters.registry import Adapter
from pointcmt.methods.augmented import WithAugmentedImages
from pointcmt.objectives import IntraModalInfoNCE, MultiViewInfoNCE, Objective
from pointcmt.schedules import Guard


class MMPoint(WithAugmentedImages):
    """MM-Point's pre-training of any network, without labels.

    ::

        images = ImageTeacher(backbone="resnet18")
        change = CloudAugmentation.crosspoint(up="y")
        with MMPoint(images, network, points=sample) as pre:
            optimizer = Adam([*network.parameters(), *pre.parameters()])
            for points, views in loader:                             # views [B, 4, C, H, W]
                network(torch.cat([change(points), change(points)]))
                loss = pre.loss(views=views)

    See :class:`~pointcmt.training.CrossModalTraining` for what entering, training and leaving do.

    Args:
        images: image encoder, with or without a classifier; trained too, unless ``train_images`` is False.
        network: the network to be trained.
        points: a few clouds as the network takes them: the heads are made by the sizes of its features.
        adapter: where the network's features are: an ``Adapter``, the name of one, or None to find one.
        views: m, how many views of each shape ``loss`` is given.
        augment: changes views [B, m, C, H, W] before the encoder sees them: a
            ``pointcmt.views.augmentation.ViewAugmentation`` with levels from weak to strong; None: not.
        intra_weight: of the term between the two copies; 0 leaves it out.
        inter_weight: of the term between copies and views; 0 leaves it out.
        shared_head: one pair of heads for all views in place of a pair each (ablation).
        reduction: the inter-modal term is the ``"sum"`` over views and directions, or the ``"mean"``.
        temperature: τ of all terms.
        train_images: train the image encoder too.
        objectives: in place of those that the weights say.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.

    Raises:
        ValueError: both weights are 0; on entering: sizes are not known.

    Source: Yu and Song, "MM-Point: multi-view information-enhanced multi-modal self-supervised 3D point cloud
    understanding", AAAI 2024. Its code was not released; what the paper's public parts do not say is chosen
    as the objectives' documentation states.
    """

    def __init__(
        self,
        images: nn.Module,
        network: nn.Module,
        *,
        points: Any,
        adapter: Adapter | str | None = None,
        views: int = 4,
        augment: Callable[[Tensor], Tensor] | None = None,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        shared_head: bool = False,
        reduction: Literal["sum", "mean"] = "sum",
        temperature: float = 0.1,
        train_images: bool = True,
        objectives: Iterable[Objective] | None = None,
        guard: Guard | None = None,
    ) -> None:
        if objectives is None:
            chosen: list[Objective] = []
            if intra_weight:
                chosen.append(IntraModalInfoNCE(intra_weight, temperature, name="intra"))
            if inter_weight:
                chosen.append(
                    MultiViewInfoNCE(
                        inter_weight,
                        views,
                        temperature,
                        shared=shared_head,
                        reduction=reduction,
                        name="inter",
                    )
                )
            if not chosen:
                raise ValueError(
                    "MMPoint with intra_weight=0 and inter_weight=0 has no loss: give one of them"
                )
            objectives = chosen
        super().__init__(
            images,
            network,
            objectives=objectives,
            adapter=adapter,
            guard=guard,
            points=points,
            copies=2,
            train_teacher=train_images,
        )
        self.augment, self.views_per_step = augment, views
