"""Small networks for the suite: fast, and each with a trait that real point-cloud networks have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt.types import TeacherOutput

FEATURE, CLASSES, POINTS, BATCH = 16, 5, 12, 6


class Teacher(nn.Module):
    """An image teacher of one linear layer, with batch norm and dropout to show its mode by."""

    feature_dim = FEATURE

    def __init__(self, feature_dim: int = FEATURE, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.encoder = nn.Linear(3 * 4 * 4, feature_dim)
        self.norm = nn.BatchNorm1d(feature_dim)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def encode(self, views: Tensor) -> Tensor:
        return self.norm(self.encoder(views.flatten(2)).amax(1)).relu()

    def classify(self, feature: Tensor) -> Tensor:
        return self.classifier(self.dropout(feature))

    def forward(self, views: Tensor) -> TeacherOutput:
        feature = self.encode(views)
        return TeacherOutput(feature, self.classify(feature))


class Generator(nn.Module):
    """Dropout and a linear layer, as the paper's."""

    def __init__(self, feature_dim: int = FEATURE, num_points: int = 24) -> None:
        super().__init__()
        self.feature_dim, self.num_points = feature_dim, num_points
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(feature_dim, 3 * num_points, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(self.dropout(feature)).view(-1, self.num_points, 3)


class Student(nn.Module):
    """[B, N, 3] -> [B, K], ending in one linear layer; the encoder has batch norm."""

    def __init__(self, feature_dim: int = FEATURE, num_classes: int = CLASSES, norm: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32))
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.neck = nn.Linear(32, feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)

    def feature(self, points: Tensor) -> Tensor:
        return F.leaky_relu(self.neck(self.norm(self.encoder(points).amax(1))), 0.2)

    def forward(self, points: Tensor) -> Any:
        return self.head(self.feature(points))


class DeepHead(Student):
    """A classifier with batch norm and dropout after the feature, as DGCNN and PointMLP have.

    The dropout works in place on the very tensor that is the feature.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Dropout(dropout, inplace=True),
            nn.Linear(FEATURE, 10),
            nn.BatchNorm1d(10),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Dropout(dropout),
            nn.Linear(10, CLASSES),
        )


class LogProbabilities(Student):
    """Returns (log-probabilities, something else), as yanx27's networks do."""

    def forward(self, points: Tensor) -> Any:
        feature = self.feature(points)
        return F.log_softmax(self.head(feature), -1), feature.unsqueeze(-1)


class Dictionary(Student):
    """Returns a dictionary."""

    def forward(self, points: Tensor) -> Any:
        feature = self.feature(points)
        return {"embedding": feature, "logits": self.head(feature)}


class DefinedFirst(Student):
    """Its last layer is defined before the others, and a layer that never runs after all."""

    def __init__(self) -> None:
        head = nn.Linear(FEATURE, CLASSES)
        super().__init__()
        del self.head
        children = dict(self._modules)
        self._modules.clear()
        self.head = head
        for name, child in children.items():
            self._modules[name] = child
        self.unused = nn.Linear(FEATURE, CLASSES)


class NoLinearEnd(nn.Module):
    """Ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, FEATURE)
        self.scores = nn.Conv1d(FEATURE, CLASSES, 1)

    def forward(self, points: Tensor) -> Tensor:
        return self.scores(self.encoder(points).amax(1).unsqueeze(-1)).squeeze(-1)


class BentEnd(NoLinearEnd):
    """Bends the scores, which no rule of the generic adapter undoes."""

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points).sinh()


def deep_head_adapter():
    from pointcmt.adapters import Adapter

    return Adapter(
        name="deep head",
        matches=lambda module: type(module).__name__ == "DeepHead",
        feature_module="head.0",
        feature_from="input",
        classify=lambda module, feature: module.head(feature.clone()),
    )


def batch(seed: int, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """points [B, N, 3], labels [B], views [B, 2, 3, 4, 4]."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, POINTS, 3, generator=random),
        torch.randint(CLASSES, (size,), generator=random),
        torch.rand(size, 2, 3, 4, 4, generator=random),
    )


def hooks(module: nn.Module) -> int:
    """Hooks of any kind on any submodule."""
    kinds = [key for key in module.__dict__ if key.endswith("_hooks")]
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)
