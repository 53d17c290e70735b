"""Changes to views in contrastive pre-training: one level for all views, or from weak to strong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

ImageTransform = Callable[[Tensor], Tensor]
"""An image [C, H, W] → an image of that shape."""

_CROPS = (None, (0.6, 1.0), (0.4, 1.0), (0.2, 1.0))


def view_levels(size: int, levels: int = 4, photographs: bool = True) -> list[ImageTransform]:
    """Levels of change from none to that of SimCLR, for MM-Point's views.

    1: the image as it is. 2: horizontal flip, random resized crop of 0.6 to 1 of the area. 3: crop from 0.4
    on, colour jitter of 0.4 (brightness, contrast, saturation). 4: crop from 0.2 on, hue jitter of 0.1, grey
    with 0.2, Gaussian blur with 0.5.

    Args:
        size: height and width of the images.
        levels: how many of them, evenly from the weakest to the strongest; 1 takes the strongest.
        photographs: whether the images are colours in [0, 1]. Depth, density and normals are not: their
            values are multiplied by a factor in place of colour changes, and they are not flipped (a mirror
            image would have its normals' first channel negated).

    Raises:
        ValueError: no level, or more than there are.

    Source: MM-Point (Yu and Song, AAAI 2024) has such a ladder and states no parameters; these run from the
    plain image to the augmentation of SimCLR (Chen et al. 2020).
    """
    if not 1 <= levels <= len(_CROPS):
        raise ValueError(f"levels is {levels}; expected 1 to {len(_CROPS)}, or give transforms of your own")
    chosen = spread(levels, len(_CROPS)) if levels > 1 else [len(_CROPS) - 1]
    return [_level(number, size, photographs) for number in chosen]


def _level(number: int, size: int, photographs: bool) -> ImageTransform:
    steps: list[Callable] = []
    crop = _CROPS[number]
    if crop is None:
        return _unchanged
    steps.append(v2.RandomResizedCrop((size, size), scale=crop, antialias=True))
    if photographs:
        steps.append(v2.RandomHorizontalFlip())
    if number >= 2:
        steps.append(
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1 if number == 3 else 0.0) if photographs else _scaled_values
        )
    if number == 3:
        if photographs:
            steps.append(v2.RandomGrayscale(0.2))
        width = max(3, size // 10 // 2 * 2 + 1)  # a tenth of the image, odd, as in SimCLR
        steps.append(v2.RandomApply([v2.GaussianBlur(width, (0.1, 2.0))], 0.5))
    return v2.Compose(steps)


def crosspoint_level(photographs: bool = True) -> ImageTransform:
    """CrossPoint's change of images: colour jitter of 0.4, horizontal flip.

    For images that are not ``photographs`` a factor on their values, and no flip.

    Source: Afham et al., CVPR 2022, and its public code.
    """
    if not photographs:
        return _scaled_values
    return v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomHorizontalFlip()])


class ViewAugmentation:
    """Changes views [B, V, C, H, W], each image by itself: the first view by the first level, the last by the
    last.

    Args:
        levels: transforms of an image [C, H, W], from weak to strong (``torchvision.transforms.v2`` and
            anything like it). With as many as views, one each; otherwise they are spread over the views
            evenly.

    Raises:
        ValueError: no level.
    """

    def __init__(self, levels: Sequence[ImageTransform]) -> None:
        if not levels:
            raise ValueError("levels is empty; give at least one transform of an image, or view_levels(size)")
        self.levels = list(levels)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Raises ``ValueError`` for another shape, or a transform that changes an image's size."""
        if images.ndim != 5:
            raise ValueError(f"images have shape {list(images.shape)}; expected [B, V, C, H, W]")
        changed = []
        for view, level in enumerate(spread(images.shape[1], len(self.levels))):
            parts = [self.levels[level](image) for image in images[:, view]]
            wrong = next((part for part in parts if part.shape != images.shape[2:]), None)
            if wrong is not None:
                raise ValueError(
                    f"level {level + 1} makes images of {list(wrong.shape)} from {list(images.shape[2:])}; "
                    "give it the images' own size"
                )
            changed.append(torch.stack(parts))
        return torch.stack(changed, 1)


def spread(places: int, levels: int) -> list[int]:
    """Which of the levels 0 … levels−1 each place has, evenly from the first to the last."""
    if places == 1:
        return [0]
    return [round(place * (levels - 1) / (places - 1)) for place in range(places)]


def _unchanged(image: Tensor) -> Tensor:
    return image


def _scaled_values(image: Tensor) -> Tensor:
    return image * float(torch.empty(()).uniform_(0.6, 1.4))
