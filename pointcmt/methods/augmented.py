"""What MM-Point and CrossPoint share: pictures that are changed before the encoder sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pointcmt.training import CrossModalTraining
from pointcmt.types import Views


class WithAugmentedImages(CrossModalTraining):
    """A context that changes the images it is given.

    Attributes:
        augment: views [B, V, C, H, W] -> views; None: as they are. What was known of their pixels and cameras
            is true of changed ones no more, and is left out.
    """

    augment: Callable[[Tensor], Tensor] | None = None

    def loss(
        self,
        *,
        views: Tensor | Views | None = None,
        image_features: Any = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        if views is not None and self.augment is not None:
            views = self.augment(views.images if isinstance(views, Views) else views)
        return super().loss(views=views, image_features=image_features, labels=labels)
