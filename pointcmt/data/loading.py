"""The order of an epoch, which depends on the seed and the epoch alone: a resumed run sees the same."""

from __future__ import annotations

import numpy as np


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The rows 0 … count-1 in the order of an epoch: int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)
