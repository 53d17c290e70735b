"""PointCMT in an accelerate loop: CPU, one GPU, several processes, mixed precision.

    pointcmt train-teacher   --feature-dim 128 --out runs/teacher
    pointcmt train-generator --teacher runs/teacher --out runs/generator
    accelerate launch examples/accelerate_loop.py --teacher runs/teacher/teacher.safetensors \
        --generator runs/generator/generator.safetensors

Two processes on a CPU: ``ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 examples/accelerate_loop.py …``.
Without that variable each would train alone; ``accelerate launch --cpu --num_processes 2`` starts only one.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pointcmt import ImageTeacher, PointCMT
from pointcmt.data import SyntheticShapes


class Network(nn.Module):
    """Somebody's network; its 128-d feature goes into a last linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU())
        self.shape = nn.Sequential(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.shape(self.points(points).amax(dim=1)))


def main(arguments: list[str] | None = None) -> float:
    """Trains, and returns the accuracy on the test shapes."""
    parser = argparse.ArgumentParser(description="PointCMT in an accelerate training loop")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--num-points", type=int, default=512)
    options = parser.parse_args(arguments)

    accelerator = Accelerator()
    train = SyntheticShapes("train", options.num_points, per_class=options.per_class)
    test = SyntheticShapes("test", options.num_points, per_class=options.per_class)
    network = Network(train.num_classes)
    network, optimizer, train_loader, test_loader = accelerator.prepare(
        network,
        torch.optim.AdamW(network.parameters(), lr=1e-3),
        DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=64),
    )

    teacher = ImageTeacher.load(options.teacher)
    with PointCMT(
        teacher, network, generator=options.generator
    ) as cmt:  # after prepare: as the loop calls it
        for epoch in range(options.epochs):
            network.train()
            for points, labels, _ in train_loader:
                views = teacher.project(points)
                loss = F.cross_entropy(network(points), labels) + cmt.loss(views=views)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {cmt.losses}")

    network.eval()
    hits = []
    for points, labels, _ in test_loader:
        with torch.no_grad():
            hit = network(points).argmax(1) == labels
        hits.append(accelerator.gather_for_metrics(hit))
    accuracy = torch.cat(hits).float().mean().item()
    accelerator.print(f"accuracy on the test shapes: {accuracy:.3f}")
    accelerator.end_training()
    return accuracy


if __name__ == "__main__":
    main()
