"""Stage II of PointCMT: the cross-modal point generator (CMPG), and the loss that trains it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pointcmt.checkpoint import PathLike, fingerprint, load_module, save_module


class PointGenerator(nn.Module):
    """Image feature → point cloud: dropout and one linear layer without bias (Yan et al. 2022, §3.2).

    Frozen, it carries the features of stage III into a space where distances mean shape. Point k of two
    generated clouds comes from the same weights, so they start near each other.

    Args:
        feature_dim: size D of the teacher's feature.
        num_points: points N of a generated cloud.
        dropout: probability, on the feature.

    Attributes:
        config: the arguments from which ``load`` builds it again.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, feature_dim: int = 512, num_points: int = 1024, dropout: float = 0.5) -> None:
        super().__init__()
        for name, value in (("feature_dim", feature_dim), ("num_points", num_points)):
            if value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        self.feature_dim = feature_dim
        self.num_points = num_points
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(feature_dim, 3 * num_points, bias=False)
        self.config: dict[str, Any] = {
            "feature_dim": feature_dim,
            "num_points": num_points,
            "dropout": dropout,
        }

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, D] → clouds [B, N, 3], of free position and scale.

        Raises:
            ValueError: another shape.
        """
        if feature.ndim != 2 or feature.shape[1] != self.feature_dim:
            raise ValueError(
                f"feature has shape {list(feature.shape)}; this generator takes [B, {self.feature_dim}]. "
                "The generator, the teacher and the student must have the same feature size"
            )
        return self.linear(self.dropout(feature)).view(-1, self.num_points, 3)

    def fingerprint(self) -> str:
        """sha256 of configuration and weights."""
        return fingerprint(self, self.config)

    def save(self, path: PathLike) -> None:
        """Write weights and configuration to one safetensors file, atomically."""
        save_module(path, self, "generator", self.config)

    @classmethod
    def load(cls, path: PathLike) -> PointGenerator:
        """The generator that ``save`` wrote: in eval mode, on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a whole generator checkpoint.
        """
        return load_module(path, "generator", cls)


def generator_loss(generated: Tensor, real: Tensor) -> Tensor:
    """Mean earth mover's distance between generated and real clouds, each in its own unit cube.

    The loss of stage II without its weight of 30 (Yan et al. 2022 and the authors' code): every cloud is
    centred and scaled by its longest side, then matched one to one.

    Args:
        generated: [B, N, 3].
        real: [B, M, 3] with M ≥ N; of more points than generated, the first N are taken (clouds come in
            random order, or by furthest point sampling).

    Returns:
        Scalar: mean over the batch of the mean matched Euclidean distance, in sides of the unit cube.

    Raises:
        ValueError: shapes other than these.
    """
    # here, so that a generator can be loaded and used without the kernels
    from pointcmt.ops import emd, unit_cube

    if generated.ndim != 3 or generated.shape[-1] != 3 or real.ndim != 3 or real.shape[-1] != 3:
        raise ValueError(
            f"generated has shape {list(generated.shape)} and real {list(real.shape)}; expected [B, N, 3]"
        )
    if len(generated) != len(real):
        raise ValueError(f"{len(generated)} generated clouds against {len(real)} real ones; expected as many")
    number = generated.shape[1]
    if real.shape[1] < number:
        raise ValueError(
            f"real clouds have {real.shape[1]} points, generated ones {number}: matching is one to one. Make "
            f"PointGenerator(num_points={real.shape[1]}), or give clouds of more points"
        )
    distance, _ = emd(unit_cube(generated), unit_cube(real[:, :number]))
    return distance.mean()
