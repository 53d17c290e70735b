"""emd: what its users rely on, held against the exact optimum."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pointcmt.ops import emd, emd_statistics
from pointcmt.ops.emd import reference_emd


def optimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Exact mean distance [B], float64."""
    costs = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return torch.tensor([c[linear_sum_assignment(c)].mean() for c in costs], dtype=torch.float64)


def is_permutation(assignment: torch.Tensor) -> bool:
    n = assignment.shape[1]
    return assignment.dtype == torch.int64 and bool((assignment.sort(1).values == torch.arange(n)).all())


@pytest.mark.parametrize("op", [emd, reference_emd])
@pytest.mark.parametrize("n", [1, 2, 9, 130])
def test_near_the_optimum(op, n):
    generator = torch.Generator().manual_seed(n)
    x, y = torch.rand(2, 4, n, 3, generator=generator).unbind(0)
    distance, assignment = op(x, y)
    assert is_permutation(assignment)
    best = optimum(x, y)
    assert (distance.double() >= best * (1 - 1e-6)).all()
    assert (distance.double() <= best + 0.002).all()
    matched = (x - y.gather(1, assignment[..., None].expand(-1, -1, 3))).norm(dim=-1).mean(1)
    torch.testing.assert_close(distance, matched)


def test_statistics_tell_when_the_bound_was_met():
    x, y = torch.rand(2, 2, 64, 3, generator=torch.Generator().manual_seed(1)).unbind(0)
    _, assignment, statistics = emd_statistics(x, y, max_rounds=1)
    assert is_permutation(assignment)
    assert (statistics.completed > 0).all() and (statistics.rounds == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", [emd, reference_emd])
def test_values_that_are_not_finite_are_an_error(op, bad):
    x = torch.rand(2, 8, 3)
    broken = x.clone()
    broken[1, 3, 2] = bad
    for clouds in ((broken, x), (x, broken)):
        with pytest.raises(ValueError, match="finite"):
            op(*clouds)
