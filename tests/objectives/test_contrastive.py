"""Contrastive losses: as the formulas written out, as a peer has them, in pieces; their errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pointcmt.objectives import info_nce, local_info_nce, nt_xent
from tests.objectives.contrastive_cases import CASES, batch, projector


def features(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return tensor.requires_grad_(grad)


# ---- what they are


def test_info_nce_is_cross_entropy_over_cosines():
    a, c = features(5, 8), features(5, 8, seed=1)
    logits = F.normalize(a, dim=1) @ F.normalize(c, dim=1).T / 0.3
    target = torch.arange(5)
    torch.testing.assert_close(info_nce(a, c, temperature=0.3), F.cross_entropy(logits, target))
    both = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(info_nce(a, c, temperature=0.3, symmetric=True), both)
    raw = F.cross_entropy(a @ c.T / 0.3, target)
    torch.testing.assert_close(info_nce(a, c, temperature=0.3, normalize=False), raw)


def test_several_positives_are_averaged():
    a, c = features(3, 8), features(4, 8, seed=1)
    positives = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    log_p = F.log_softmax(F.normalize(a, dim=1) @ F.normalize(c, dim=1).T / 0.1, 1)
    expected = -torch.stack([log_p[i][positives[i]].mean() for i in range(3)]).mean()
    torch.testing.assert_close(info_nce(a, c, positives), expected)


@pytest.mark.parametrize("size", [2, 7, 32])
def test_nt_xent_is_lightlys(size):
    peer = pytest.importorskip("lightly.loss", reason="lightly is a peer of the tests; pip install lightly")
    a, b = features(size, 16), features(size, 16, seed=1)
    ours, theirs = nt_xent(a, b, temperature=0.1), peer.NTXentLoss(temperature=0.1)(a, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_nt_xent_has_all_other_versions_as_candidates_and_not_itself():
    a, b = features(3, 8), features(3, 8, seed=1)
    rows = F.normalize(torch.cat([a, b]), dim=1)
    logits = (rows @ rows.T / 0.2).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.tensor([3, 4, 5, 0, 1, 2]))
    torch.testing.assert_close(nt_xent(a, b, temperature=0.2), expected)


def test_local_info_nce_tells_the_cell_among_all_cells_of_all_images():
    local, maps = features(2, 3, 8), features(2, 8, 2, 2, seed=1)
    cell = torch.tensor([[0, 3, 3], [1, -1, 2]])  # two points share a cell; one has none
    z = F.normalize(local, dim=-1)
    # image k's row i, column j is candidate 4k + 2i + j
    q = torch.stack([F.normalize(maps[k, :, i, j], dim=0) for k in (0, 1) for i in (0, 1) for j in (0, 1)])
    losses = [
        F.cross_entropy(z[k, m] @ q.T / 0.1, 4 * k + cell[k, m])
        for k in (0, 1)
        for m in range(3)
        if cell[k, m] >= 0
    ]
    torch.testing.assert_close(local_info_nce(local, maps, cell), torch.stack(losses).mean())


def test_losses_stand_at_chance_for_features_that_say_nothing():
    """Pic@Point at 32 shapes and maps of 7×7: ln(49·32) = 7.36 and ln 32 = 3.47; NT-Xent: ln(2B − 1)."""
    same = torch.ones(32, 16)
    assert info_nce(same, same).item() == pytest.approx(3.47, abs=0.01)
    local = local_info_nce(
        torch.ones(32, 4, 16), torch.ones(32, 16, 7, 7), torch.zeros(32, 4, dtype=torch.long)
    )
    assert local.item() == pytest.approx(7.36, abs=0.01)
    assert nt_xent(same, same).item() == pytest.approx(math.log(63), abs=1e-4)
    # and near it for features drawn by chance, where the temperature is high
    drawn = info_nce(features(32, 512), features(32, 512, seed=1), temperature=1.0)
    assert drawn.item() == pytest.approx(3.47, abs=0.02)


def test_losses_fall_to_nothing_for_features_that_match():
    a = torch.eye(6, 16)
    assert info_nce(a, 3 * a, temperature=0.05).item() < 1e-6
    assert nt_xent(a, 3 * a, temperature=0.05).item() < 1e-6


# ---- in pieces, in half precision


@pytest.mark.parametrize("limit", [1, 7, 40, 10**6])
def test_in_pieces_as_whole(limit):
    def run(max_logits):
        a, c = features(9, 8), features(9, 8, seed=1)
        local, maps = features(4, 5, 8, seed=2), features(4, 8, 3, 2, seed=3)
        cell = torch.randint(-1, 6, (4, 5), generator=torch.Generator().manual_seed(4))
        losses = [
            info_nce(a, c, max_logits=max_logits, symmetric=True),
            nt_xent(a, c, max_logits=max_logits),
            local_info_nce(local, maps, cell, max_logits=max_logits),
        ]
        sum(losses).backward()
        return [*losses, a.grad, c.grad, local.grad, maps.grad]

    for piece, whole in zip(run(limit), run(1 << 24), strict=True):
        torch.testing.assert_close(piece, whole, rtol=1e-5, atol=1e-6)


def test_in_pieces_the_logits_are_never_whole_in_memory():
    """48 MB of logits would be whole; the largest tensor that is made has the limit's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    local, maps = features(16, 250, 4), features(16, 4, 14, 14, seed=1)
    cell = torch.zeros(16, 250, dtype=torch.long)
    with Watch():
        local_info_nce(local, maps, cell, max_logits=100_000).backward()
    assert largest <= 100_000
    assert local.grad is not None and maps.grad is not None


@pytest.mark.parametrize("kind", ["pairs", "nt_xent", "local"])
def test_float32_under_autocast(kind):
    network, inputs = projector(), batch()
    first, second, cell = inputs
    outputs = network(torch.cat([first, second]))
    with torch.autocast("cpu", torch.bfloat16):
        value = CASES[kind](lambda _: outputs if kind == "local" else outputs.mean(1), first, second, cell)
    expected = CASES[kind](lambda _: outputs if kind == "local" else outputs.mean(1), first, second, cell)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    half = info_nce(features(4, 8).bfloat16(), features(4, 8, seed=1).bfloat16())
    assert half.dtype == torch.float32


def test_gradients_are_right_in_double():
    a, c = features(4, 5).double(), features(4, 5, seed=1).double()
    a, c = a.detach().requires_grad_(), c.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: info_nce(x, y, max_logits=8), (a, c))
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, max_logits=8), (a, c))


# ---- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(features(1, 4), features(1, 4)), "has no negatives.*drop_last=True"),
        (lambda: nt_xent(features(1, 4), features(1, 4)), "batch of 1 shape.*has no negatives"),
        (lambda: info_nce(features(3, 4), features(4, 4)), "positives=<bool"),
        (lambda: info_nce(features(3, 4), features(3, 5)), r"one size D > 0.*pointcmt\.heads"),
        (lambda: info_nce(features(3, 4, 1), features(3, 4)), r"expected \[A, D\] and \[M, D\]"),
        (lambda: info_nce(features(3, 4), features(3, 4), temperature=0), "positive number, such as 0.1"),
        (lambda: info_nce(features(2, 4) * torch.nan, features(2, 4)), "8 values of anchors are NaN"),
        (lambda: nt_xent(features(2, 4), features(2, 4) / 0), "8 values of second are NaN or infinite"),
        (
            lambda: info_nce(features(2, 4), features(2, 4), torch.tensor([[True, False], [False, False]])),
            "1 rows of positives have no positive",
        ),
        (lambda: info_nce(features(2, 4), features(2, 4), torch.eye(2)), "expected bool"),
        (lambda: info_nce(torch.ones(2, 4, dtype=torch.int64), features(2, 4)), "expected a floating"),
        (lambda: nt_xent(features(2, 4), features(3, 4)), "the same shapes in the same order"),
        (
            lambda: local_info_nce(features(2, 3, 4), features(2, 5, 7, 7), torch.zeros(2, 3).long()),
            r"expected \[B, M, D\] and \[B, D, h, w\]",
        ),
        (
            lambda: local_info_nce(features(2, 3, 4), features(2, 4, 7, 7), torch.zeros(2, 3)),
            "cell is torch.float32",
        ),
        (
            lambda: local_info_nce(features(2, 3, 4), features(2, 4, 2, 2), torch.full((2, 3), 4)),
            "cell goes up to 4",
        ),
        (
            lambda: local_info_nce(features(2, 3, 4), features(2, 4, 2, 2), torch.full((2, 3), -1)),
            "no centre falls into its image: the cameras are not those of these points",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
