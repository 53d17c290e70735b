"""A task comes in as a few lines: its loss, metrics and figure to watch; the loop knows no accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pointcmt.data import PointDataset
from pointcmt.recipes.batches import Batches
from pointcmt.recipes.engine import LoopOptions, MachineOptions, fit, make_accelerator, seed_everything
from pointcmt.recipes.run import RunFolder, read_metrics
from pointcmt.tasks import Figure, Task, predict
from pointcmt.tasks.classification import classification


@dataclass
class Config:
    loop: LoopOptions = field(default_factory=LoopOptions)


class Radius(nn.Module):
    """Cloud [B, N, 3] → its radius [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, points):
        return self.mlp(points.abs().amax(1)).squeeze(1)


def balls(n: int, seed: int) -> PointDataset:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 24, 3)).astype(np.float32)
    points *= rng.uniform(0.5, 2, (n, 1, 1)) / np.linalg.norm(points, axis=-1, keepdims=True)
    return PointDataset(points, np.zeros(n, np.int64), ["ball"], [f"ball_{k}" for k in range(n)])


def regression(test: Batches) -> Task:
    """What a new task takes."""

    def radius(batch):
        return batch.inputs.norm(dim=-1).amax(1)

    def step(model, batch, done):
        return {"loss": F.mse_loss(model(batch.inputs), radius(batch))}

    def evaluate(model):
        errors, _ = predict(lambda batch: (model(batch.inputs) - radius(batch)).abs(), test.epoch())
        return {"test_mae": float(errors.mean())}

    return Task(step, evaluate, Figure("test_mae", "lowest", "mean error of the test shapes"), ("test_mae",))


def test_a_regression_is_trained_resumed_and_chosen_by_its_own_figure(tmp_path):
    def run(folder, epochs, resume=False):
        loop = LoopOptions(epochs=epochs, batch_size=8, lr=5e-3, schedule="constant", seed=1)
        accelerator = make_accelerator(MachineOptions(device="cpu"))
        run = RunFolder.start(accelerator, folder, Config(loop), command="train", resume=resume)
        seed_everything(loop.seed)
        test = Batches(balls(40, 1), 8, accelerator.device)
        outcome = fit(
            Radius(), regression(test), Batches(balls(40, 0), 8, accelerator.device, 1),
            lambda model, path: save_file(model.state_dict(), path), loop,
            MachineOptions(device="cpu", tensorboard=False, progress=False), accelerator, run,
        )  # fmt: skip
        return run.finish(outcome)

    results = run(tmp_path / "a", 8)
    errors = [record["test_mae"] for record in read_metrics(tmp_path / "a")]
    assert min(errors) < 0.8 * errors[0], "it learns"
    assert results["best"]["test_mae"] == min(errors)
    assert results["best"]["epoch"] == 1 + int(np.argmin(errors))
    assert results["best"]["chosen_by"] == "mean error of the test shapes"
    assert results["last"] == {"epoch": 8, "test_mae": errors[-1]}
    # more epochs, on a constant learning rate, are the run that had so many from the start
    run(tmp_path / "b", 5)
    run(tmp_path / "b", 8, resume=True)
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [r["test_mae"] for r in read_metrics(tmp_path / "b")] == errors


def test_figures_know_which_way_is_up():
    assert Figure("oa", "highest", "").improves(2, 1) and not Figure("oa", "highest", "").improves(1, 1)
    assert Figure("emd", "lowest", "").improves(1, 2) and not Figure("emd", "lowest", "").improves(1, 1)


def test_classification_against_counting_by_hand():
    data = balls(12, 3)
    data = PointDataset(data.points, np.arange(12) % 3, list("abc"), data.shape_ids)
    batches = Batches(data, 5, torch.device("cpu"))
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))

    def forward(model, batch):
        return logits[batch.index]

    task = classification(forward, {"x": batches.epoch}, "x", "words", label_smoothing=0.1)
    right = logits.argmax(1).numpy() == data.labels
    metrics = task.evaluate(nn.Identity())
    assert metrics["x_oa"] == pytest.approx(100 * right.mean())
    assert metrics["x_macc"] == pytest.approx(
        100 * np.mean([right[data.labels == k].mean() for k in range(3)])
    )
    assert task.watch == Figure("x_oa", "highest", "words") and task.headline == ("x_oa",)
    batch = next(batches.epoch())
    smooth = 0.9 * F.one_hot(batch.labels, 3) + 0.1 / 3
    by_hand = -(smooth * logits[batch.index].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.step(nn.Identity(), batch, 0.0)["loss"], by_hand)
