"""CrossPoint: pre-training by two augmented copies of each cloud and one image of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from pointcmt.adapters.registry import Adapter
from pointcmt.methods.augmented import WithAugmentedImages
from pointcmt.objectives import CrossModalNTXent, IntraModalNTXent, Objective
from pointcmt.schedules import Guard


class CrossPoint(WithAugmentedImages):
    """CrossPoint's pre-training of any network, without labels, as its public code has it.

    ::

        images = ImageTeacher(backbone="resnet50")
        change = CloudAugmentation.crosspoint(up="y")
        with CrossPoint(images, network, points=sample) as pre:
            optimizer = Adam([*network.parameters(), *pre.parameters()])
            for points, views in loader:                             # views [B, 1, C, H, W]
                network(torch.cat([change(points), change(points)]))
                loss = pre.loss(views=views)

    See :class:`~pointcmt.training.CrossModalTraining` for what entering, training and leaving do.

    Args:
        images: image encoder, with or without a classifier; trained too, unless ``train_images`` is False.
        network: the network to be trained.
        points: a few clouds as the network takes them: the heads are made by the sizes of its features.
        adapter: where the network's features are: an ``Adapter``, the name of one, or None to find one.
        augment: changes views [B, V, C, H, W] before the encoder sees them, such as
            ``ViewAugmentation([crosspoint_level()])`` of ``pointcmt.views.augmentation``; None: not.
        intra_weight: of the term between the two copies; 0 leaves it out.
        cross_weight: of the term between copies and image; 0 leaves it out.
        temperature: τ of both terms.
        train_images: train the image encoder too.
        objectives: in place of those that the weights say.
        guard: scales the weights as training goes on (``pointcmt.schedules``); None leaves them.

    Raises:
        ValueError: both weights are 0; on entering: sizes are not known.

    Source: Afham et al., "CrossPoint: self-supervised cross-modal contrastive learning for 3D point cloud
    understanding", CVPR 2022, and its public code, which chooses its checkpoint on the test set; here nothing
    is chosen.
    """

    views_per_step = 1

    def __init__(
        self,
        images: nn.Module,
        network: nn.Module,
        *,
        points: Any,
        adapter: Adapter | str | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        intra_weight: float = 1.0,
        cross_weight: float = 1.0,
        temperature: float = 0.1,
        train_images: bool = True,
        objectives: Iterable[Objective] | None = None,
        guard: Guard | None = None,
    ) -> None:
        if objectives is None:
            chosen: list[Objective] = []
            head = None
            if intra_weight:
                intra = IntraModalNTXent(intra_weight, temperature, name="intra")
                head = intra.point_head
                chosen.append(intra)
            if cross_weight:
                chosen.append(CrossModalNTXent(cross_weight, temperature, point_head=head, name="cross"))
            if not chosen:
                raise ValueError(
                    "CrossPoint with intra_weight=0 and cross_weight=0 has no loss: give one of them"
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
        self.augment = augment
