"""Are the values of views those of images?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# What an encoder takes: values from 0 to 1, and a little more where augmentation changes them. Normals are
# from -1 to 1; a depth, and the logarithm of a number of points, are a few times 1. 8 bits end at 255, and
# images that were normalised by ImageNet's mean and standard deviation reach from -2.1 to 2.6.
_LOWEST, _LOWEST_OF_NORMALS = -0.5, -1.6
_HIGHEST, _HIGHEST_OF_DEPTHS = 1.6, 16.0


def bounds_of(channels: Sequence[str]) -> tuple[float, float]:
    """Between which values views of these channels (see ``ViewSpec``) are, augmented ones too."""
    return (
        _LOWEST_OF_NORMALS if "normal" in channels else _LOWEST,
        _HIGHEST_OF_DEPTHS if {"depth", "density"} & set(channels) else _HIGHEST,
    )


def check_values(views: Tensor, bounds: tuple[float, float], hint: str = "") -> None:
    """Refuse views whose values are not those of images.

    Args:
        views: floats of any shape.
        bounds: the smallest and the largest value that are taken.
        hint: what to do with views that were normalised already.

    Raises:
        ValueError: values of 8 or 16 bits, NaN, or values that were normalised; says which were found, which
            are expected and what to do.
    """
    if views.numel() == 0:
        return
    low, high = (value.item() for value in views.detach().aminmax())
    if bounds[0] <= low and high <= bounds[1]:
        return
    found = f"views have values from {low:.4g} to {high:.4g}; expected images from 0 to 1"
    if low >= -4 and high <= _HIGHEST_OF_DEPTHS:
        raise ValueError(
            f"{found}, as they are before a mean is taken off: leave Normalize(mean, std) out{hint}"
        )
    raise ValueError(f"{found}: divide those of 8 bits by 255, of 16 bits by 65535, and look for NaN")
