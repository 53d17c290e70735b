"""Sizes whose products pass 2³¹ are refused before anything is read; random calls end as they should."""

from __future__ import annotations

import pytest
import torch

from pointcmt.ops._extension import has_cpu_kernels
from tests.ops import random_calls

HUGE = 2**31 + 8


def _expanded(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Of this shape, in one number's memory."""
    return torch.zeros((1,) * len(shape), dtype=dtype).expand(shape)


@pytest.fixture(params=["cpu", "cuda"])
def ops(request):
    """The operators of the CPU, and of CUDA run on the CPU."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda_on_cpu")
    if not has_cpu_kernels():
        pytest.skip("needs the compiled kernels")
    return torch.ops.pointcmt


_INDEX = torch.zeros(1, 1, 3, dtype=torch.int64)
_WEIGHT = torch.ones(1, 1, 3)
_CHANNELS = torch.zeros(8)
_CLOUD = torch.zeros(1, 4, 3)
_STATISTICS = (None, None, 1e-5, 0.2)

TOO_LARGE = {
    "gather_points": (_expanded(1, 1, HUGE), _INDEX[0, :, :1]),
    "gather_points_backward": (torch.zeros(1, 1, 1), _INDEX[0, :, :1], HUGE),
    "group_points": (_expanded(1, 1, HUGE), _INDEX),
    "group_points_backward": (torch.zeros(1, 1, 1, 3), _INDEX, HUGE),
    "group_relative": (_expanded(1, HUGE, 3), _expanded(1, 1, 3), _INDEX, None),
    "group_relative_backward": (torch.zeros(1, 3, 1, 3), _INDEX, HUGE, True),
    "three_interpolate": (_expanded(1, 1, HUGE), _INDEX, _WEIGHT),
    "three_interpolate_backward": (torch.zeros(1, 1, 1), _INDEX, _WEIGHT, HUGE),
    "three_interpolate_weight_backward": (_expanded(1, 1, 1), _expanded(1, 1, HUGE), _INDEX),
    "ball_query": (0.1, 1, _expanded(1, HUGE, 3, dtype=torch.float32), _CLOUD, None),
    "knn": (_expanded(1, HUGE, 3, dtype=torch.float32), _CLOUD, 1, None),
    "three_nn": (_CLOUD, _expanded(1, HUGE, 3, dtype=torch.float32), None),
    "furthest_point_sample": (_expanded(1, HUGE, 3, dtype=torch.float32), 1, None),
    "voxel_subsample": (_expanded(HUGE, 3, dtype=torch.float32), 0.1),
    "emd": (*2 * [_expanded(1, 2**24 + 1, 3, dtype=torch.float32)], 0.01, 10),
    "norm_act_max": (_expanded(HUGE, 8, dtype=torch.float32), None, None, _CHANNELS, _CHANNELS, *_STATISTICS),
}
FURTHER = [
    ("ball_query", (0.1, HUGE, _CLOUD, _CLOUD, None)),
    ("knn", (*2 * [_expanded(1, 1, HUGE, dtype=torch.float32)], 1, None)),
    ("three_interpolate_backward", (torch.zeros(1, 1, 1), _INDEX, _WEIGHT, -1)),
    (
        "norm_act_max",
        (
            torch.zeros(1, 4, 8),
            torch.zeros(1, 1, 8),
            _expanded(1, 1, HUGE, dtype=torch.int64),
            _CHANNELS,
            _CHANNELS,
            *_STATISTICS,
        ),
    ),
]


@pytest.mark.parametrize(("name", "arguments"), [*TOO_LARGE.items(), *FURTHER])
def test_sizes_beyond_the_kernels_numbers_are_refused(ops, name, arguments):
    with pytest.raises(ValueError, match=r"too many|range|below|between|at most|2\^"):
        getattr(ops, name)(*arguments)


@pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled kernels")
def test_random_calls_succeed_or_are_refused_as_they_should():
    outcomes = [random_calls.run(number, torch.ops.pointcmt) for number in range(600)]
    assert {name for name, _, _ in outcomes} == set(random_calls.CALLS)
    assert {expected for _, expected, _ in outcomes} == {"succeeds", "refused", "either"}
    assert [(number, *outcome) for number, outcome in enumerate(outcomes) if outcome[2]] == []
