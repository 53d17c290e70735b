import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pointcmt.generator import PointGenerator, generator_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_dropout_and_one_linear_layer_without_bias():
    generator = PointGenerator(feature_dim=6, num_points=4).eval()
    assert [tuple(p.shape) for p in generator.parameters()] == [(12, 6)]
    assert generator.dropout.p == 0.5
    feature = randn(3, 6)
    expected = (feature @ generator.linear.weight.t()).reshape(3, 4, 3)
    torch.testing.assert_close(generator(feature), expected)
    assert PointGenerator()(torch.zeros(2, 512)).shape == (2, 1024, 3)
    assert generator(torch.zeros(0, 6)).shape == (0, 4, 3)


def independent_loss(generated, real):
    """Unit cubes and optimal matching in numpy and SciPy."""
    distances = []
    for clouds in zip(generated.double().numpy(), real.double().numpy(), strict=True):
        x, y = ((c - (c.max(0) + c.min(0)) / 2) / (c.max(0) - c.min(0)).max() for c in clouds)
        cost = np.linalg.norm(x[:, None] - y[None], axis=-1)
        distances.append(cost[linear_sum_assignment(cost)].mean())
    return float(np.mean(distances))


def test_loss_against_scipy():
    generated, real = randn(4, 100, 3, seed=1) * 5 + 2, randn(4, 100, 3, seed=2)
    expected = independent_loss(generated, real)
    assert expected <= generator_loss(generated, real).item() * (1 + 1e-5)
    assert generator_loss(generated, real).item() <= expected * 1.01
    # position and scale of either cloud do not matter
    moved = generator_loss(generated * 3 - 1, real / 2 + 4)
    torch.testing.assert_close(moved, generator_loss(generated, real), rtol=2e-3, atol=0)


def test_more_real_points_than_generated_are_cut():
    generated, real = randn(2, 50, 3, seed=3), randn(2, 80, 3, seed=4)
    torch.testing.assert_close(generator_loss(generated, real), generator_loss(generated, real[:, :50]))


def test_it_learns_a_shape():
    """A generator on one feature per cloud drives the distance far below that of a random cloud."""
    torch.manual_seed(5)
    generator = PointGenerator(8, 32, dropout=0.0)
    feature, real = randn(4, 8, seed=5), randn(4, 32, 3, seed=6)
    optimizer = torch.optim.Adam(generator.parameters(), lr=5e-2)
    first = generator_loss(generator(feature), real).item()
    for _ in range(60):
        loss = generator_loss(generator(feature), real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * first


def test_save_load_and_fingerprint(tmp_path):
    generator = PointGenerator(6, 4, dropout=0.3)
    generator.save(tmp_path / "g.safetensors")
    loaded = PointGenerator.load(tmp_path / "g.safetensors")
    assert not loaded.training
    assert (loaded.feature_dim, loaded.num_points, loaded.dropout.p) == (6, 4, 0.3)
    assert torch.equal(loaded.linear.weight, generator.linear.weight)
    assert loaded.fingerprint() == generator.fingerprint()
    assert PointGenerator(6, 4).fingerprint() != generator.fingerprint()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="num_points=0"):
        PointGenerator(num_points=0)
    with pytest.raises(ValueError, match=r"shape \[2, 7\]; this generator takes \[B, 6\]"):
        PointGenerator(6, 4)(torch.zeros(2, 7))
    with pytest.raises(FileNotFoundError, match="train-generator"):
        PointGenerator.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="real clouds have 3 points, generated ones 4"):
        generator_loss(torch.zeros(1, 4, 3), torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="expected as many"):
        generator_loss(torch.zeros(2, 4, 3), torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"expected \[B, N, 3\]"):
        generator_loss(torch.zeros(2, 4, 2), torch.zeros(2, 4, 3))
