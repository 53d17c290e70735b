"""Projection heads: what carries features of clouds and of images into one space, and is thrown away after.

Heads belong to a method, never to the network that it trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: features [..., C] → [..., D].

    All leading dimensions are one batch to the BatchNorm: local features [B, M, C] are B·M rows.

    Args:
        in_features: C.
        hidden: width in between.
        out_features: D.
        bias: of both linear layers.

    Source: CrossPoint (Afham et al. 2022) and its public code: point head 2048 → 1024 → 256 with biases,
    image head 2048 → 512 → 256 without.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, bias: bool = True) -> None:
        super().__init__(
            nn.Linear(in_features, hidden, bias=bias),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_features, bias=bias),
        )

    def forward(self, features: Tensor) -> Tensor:
        projected = super().forward(features.flatten(0, -2))
        return projected.unflatten(0, features.shape[:-1])


class MapHead(nn.Module):
    """A :class:`ProjectionHead` on feature maps [B, C, h, w] → [B, D, h, w]: convolutions of one cell."""

    def __init__(self, in_channels: int, hidden: int = 512, out_channels: int = 512) -> None:
        super().__init__()
        self.head = ProjectionHead(in_channels, hidden, out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(maps.movedim(1, -1)).movedim(-1, 1)


class PoseEncoder(nn.Sequential):
    """View matrices [..., 4, 4] → [..., D]: Linear, ReLU, Linear on their 16 numbers.

    Source: Pic@Point (Herzog and Suwelack 2024), section 3.2: two layers, 64-d. The paper has a 3×3 matrix
    in section 3.1 and 4×4 in 3.3; a 3×3 one cannot carry the camera's distance. The width in between is not
    given and is D here.
    """

    def __init__(self, out_features: int = 64) -> None:
        super().__init__(nn.Linear(16, out_features), nn.ReLU(), nn.Linear(out_features, out_features))

    def forward(self, view_matrix: Tensor) -> Tensor:
        return super().forward(view_matrix.flatten(-2))


class LocalHead(nn.Module):
    """Local features [B, M, C] → [B, M, D], under the pose that they are looked at from.

    Linear, BatchNorm, ReLU; the pose's encoding, the same for all M, is joined; Linear.

    Args:
        in_features: C.
        hidden: width of the first layer.
        out_features: D.
        pose: size of the pose's encoding; 0: the head is not told the pose.

    Source: Pic@Point (Herzog and Suwelack 2024), section 3.2. Width and normalisation of the first layer are
    not given there; 512 and BatchNorm are the defaults, as in CrossPoint's heads.
    """

    def __init__(self, in_features: int, hidden: int = 512, out_features: int = 512, pose: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.pose = PoseEncoder(pose) if pose else None
        self.last = nn.Linear(hidden + pose, out_features)

    def before_pose(self, local: Tensor) -> Tensor:
        """[B, M, C] → [B, M, hidden]: what does not depend on the pose, for several poses."""
        rows = F.relu(self.norm(self.first(local).flatten(0, 1)))
        return rows.view(*local.shape[:2], -1)

    def with_pose(self, hidden: Tensor, view_matrix: Tensor | None) -> Tensor:
        """[B, M, hidden] of :meth:`before_pose` under the cameras [B, 4, 4] → [B, M, D]."""
        if self.pose is not None:
            if view_matrix is None:
                raise ValueError(
                    "the local head needs the view matrix that the image was taken with: give views with "
                    "cameras (teacher.project(points, cameras=True)), or use a head without pose (pose=0)"
                )
            code = self.pose(view_matrix).to(hidden.dtype)
            hidden = torch.cat([hidden, code[:, None].expand(-1, hidden.shape[1], -1)], -1)
        return self.last(hidden)

    def forward(self, local: Tensor, view_matrix: Tensor | None = None) -> Tensor:
        return self.with_pose(self.before_pose(local), view_matrix)


class SizedHead(nn.Module):
    """A :class:`ProjectionHead` whose input size is known only when a training context is entered.

    Args:
        hidden, out_features, bias: as of :class:`ProjectionHead`.
    """

    def __init__(self, hidden: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.hidden, self.out_features, self.bias = hidden, out_features, bias
        self.head: ProjectionHead | None = None

    def build(self, in_features: int) -> None:
        """Makes the layers; a head that is made already stays, and must have that size.

        Raises:
            ValueError: it was made for another size.
        """
        if self.head is None:
            self.head = ProjectionHead(in_features, self.hidden, self.out_features, self.bias)
        made = self.head[0].in_features
        if made != in_features:
            raise ValueError(
                f"this head was made for features of {made}, and is given {in_features}: use new objectives "
                "for another network"
            )

    def forward(self, features: Tensor) -> Tensor:
        if self.head is None:
            raise RuntimeError(
                "this head has no size yet: enter the training context, or call the objective's "
                "bind(sizes=...)"
            )
        return self.head(features)
