"""Arguments that are no tensors or numbers at all: every operator names the argument and what to do.

Shapes, devices, ranges and sizes are in tests/ops/test_sizes.py and in the tests of each operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pointcmt import ops

CLOUD, CENTRES = torch.rand(2, 9, 3), torch.rand(2, 4, 3)
FEATURES, IDX = torch.rand(2, 5, 9), torch.zeros(2, 4, 3, dtype=torch.int64)
LENGTHS = torch.tensor([9, 4])
ROWS, CHANNELS = torch.rand(2, 6, 5), torch.ones(5)

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "emd": (ops.emd, {"x": CLOUD, "y": CLOUD.flip(1), "tolerance": 0.01, "max_rounds": 9}),
    "furthest_point_sample": (
        ops.furthest_point_sample,
        {"xyz": CLOUD, "npoint": 3, "lengths": LENGTHS},
    ),
    "gather_points": (ops.gather_points, {"features": FEATURES, "idx": IDX[..., 0]}),
    "group_points": (ops.group_points, {"features": FEATURES, "idx": IDX}),
    "group_relative": (
        ops.group_relative,
        {"xyz": CLOUD, "new_xyz": CENTRES, "idx": IDX, "features": FEATURES},
    ),
    "three_interpolate": (
        ops.three_interpolate,
        {"features": FEATURES, "idx": IDX, "weight": torch.rand(2, 4, 3)},
    ),
    "ball_query": (
        ops.ball_query,
        {"radius": 0.5, "nsample": 3, "xyz": CLOUD, "new_xyz": CENTRES, "lengths": LENGTHS},
    ),
    "knn": (ops.knn, {"queries": CENTRES, "points": CLOUD, "k": 2, "lengths": LENGTHS}),
    "three_nn": (ops.three_nn, {"unknown": CENTRES, "known": CLOUD, "lengths": LENGTHS}),
    "unit_cube": (ops.unit_cube, {"points": CLOUD}),
    "weighted_procrustes": (
        ops.weighted_procrustes,
        {"source": CLOUD, "target": CLOUD.flip(1), "weights": torch.ones(2, 9)},
    ),
    "voxel_subsample": (ops.voxel_subsample, {"points": CLOUD[0], "size": 0.5}),
    "norm_act_max": (
        ops.norm_act_max,
        {
            "x": ROWS, "running_mean": 0 * CHANNELS, "running_var": CHANNELS, "weight": CHANNELS,
            "bias": CHANNELS, "training": True, "momentum": 0.1, "eps": 1e-5, "slope": 0.2,
        },
    ),
}  # fmt: skip
OPTIONAL = {"lengths", "weights", "running_mean", "running_var"}


def test_every_operator_is_here():
    made_of_them = {"query_and_group", "emd_statistics", "check_deferred", "EmdStatistics", "Rigid"}
    assert set(ops.__all__) - made_of_them == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_or_number_is_named(name):
    call, arguments = CALLS[name]
    call(**arguments)
    for argument, right in arguments.items():
        if isinstance(right, torch.Tensor):
            optional = argument in OPTIONAL or (name, argument) == ("group_relative", "features")
            wrong = [right.tolist(), right.numpy(), right.to_sparse(), *([] if optional else [None])]
            if right.is_floating_point():
                wrong.append(right.to(torch.float8_e4m3fn))
        elif isinstance(right, bool):
            continue
        else:
            wrong = ["3", None, *([2.5] if isinstance(right, int) else [])]
        for value in wrong:
            # group_relative hands its coordinates on as features, and may name them so
            words = rf"^{name}: ({argument}|features) is .*; expected"
            with pytest.raises(TypeError, match=words):
                call(**{**arguments, argument: value})


def test_too_many_neighbours_are_no_question_of_memory():
    for many in (2**30, 2**40):
        with pytest.raises(ValueError, match=r"ball_query: nsample must be at least 1 and below 2\^30"):
            ops.ball_query(0.5, many, CLOUD, CENTRES)
