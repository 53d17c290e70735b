"""PointCMT in Lightning: the LightningModule is not edited; a callback enters, adds its loss and leaves.

    pointcmt train-teacher   --feature-dim 128 --out runs/teacher
    pointcmt train-generator --teacher runs/teacher --out runs/generator
    python examples/lightning_loop.py --teacher runs/teacher/teacher.safetensors \
        --generator runs/generator/generator.safetensors
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pointcmt import ImageTeacher
from pointcmt.data import SyntheticShapes
from pointcmt.integrations.lightning import PointCMTCallback


class Classifier(lightning.LightningModule):
    """Somebody's module, as it was before PointCMT; its 128-d feature goes into a last linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU())
        self.shape = nn.Sequential(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.shape(self.points(points).amax(dim=1)))

    def training_step(self, batch, batch_idx):
        points, labels, _ = batch
        return F.cross_entropy(self(points), labels)

    def validation_step(self, batch, batch_idx):
        points, labels, _ = batch
        self.log("accuracy", (self(points).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, and returns the metrics of the last validation."""
    parser = argparse.ArgumentParser(description="PointCMT in a Lightning training")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--num-points", type=int, default=512)
    options = parser.parse_args(arguments)

    data = {
        split: SyntheticShapes(split, options.num_points, per_class=options.per_class)
        for split in ("train", "test")
    }
    module = Classifier(data["train"].num_classes)
    teacher = ImageTeacher.load(options.teacher)
    images = PointCMTCallback(
        teacher,
        generator=options.generator,
        images=lambda batch: {"views": teacher.project(batch[0])},
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs, callbacks=[images], logger=False, enable_checkpointing=False
    )
    trainer.fit(
        module,
        DataLoader(data["train"], batch_size=32, shuffle=True, drop_last=True),
        DataLoader(data["test"], batch_size=64),
    )
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main()
