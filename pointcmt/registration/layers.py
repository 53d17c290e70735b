"""What CMIGNet is made of: EdgeConv encoder, views' encoder, fusion, significance score, matching heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcmt.backbones import SimpleViewResNet
from pointcmt.ops import knn, norm_act_max
from pointcmt.views import project_points
from pointcmt.views.cameras import Rig, rig

# added to a distance before a difference is divided by it, in the features' or the coordinates' unit: the
# difference of two equal rows, each through a matrix product, is rounding, which a smaller number would
# blow up
_NO_DISTANCE = 1e-3


class EdgeConv(nn.Module):
    """EdgeConv over given neighbours: maximum over j of ReLU(BN(W [x_j − x_i, x_i])).

    [B, N, C] and neighbours int64 [B, N, k] → [B, N, C']. The matrix product is linear in the two halves, so
    it is applied to the N points and its results are gathered, k times less work than on the edges.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * in_channels, out_channels, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor, neighbors: Tensor) -> Tensor:
        difference, own = self.linear.weight.chunk(2, 1)
        norm = self.norm
        return norm_act_max(
            x @ difference.t(),
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            self.training,
            centres=x @ (own - difference).t(),
            idx=neighbors,
        )


class PointEncoder(nn.Module):
    """Features of every point: points [B, N, 3] → [B, N, feature_dim].

    Four EdgeConv layers of 64, 64, 64 and 128 channels, each on the coordinates and all outputs before it,
    with its neighbours found anew by the last output (LDGCNN; the public code of CMIGNet), then one layer on
    all.

    Args:
        feature_dim: channels of the result.
        width: factor of the EdgeConv layers' channels.
        k: neighbours of a point, itself included; clouds of fewer points use all.
    """

    def __init__(self, feature_dim: int, width: float = 1.0, k: int = 20) -> None:
        super().__init__()
        self.k = k
        sizes = [max(8, round(channels * width)) for channels in (64, 64, 64, 128)]
        self.edges = nn.ModuleList(EdgeConv(3 + sum(sizes[:i]), size) for i, size in enumerate(sizes))
        self.fuse = nn.Linear(3 + sum(sizes), feature_dim, bias=False)
        self.norm = nn.BatchNorm1d(feature_dim)

    def forward(self, points: Tensor) -> Tensor:
        found, last = points, points
        k = min(self.k, points.shape[1])
        for layer in self.edges:
            neighbors = knn(last.detach(), last.detach(), k)[1]
            last = layer(found, neighbors)
            found = torch.cat([found, last], -1)
        fused = self.fuse(found)
        return F.relu_(self.norm(fused.flatten(0, 1))).view_as(fused)


def first_cameras(name: str, views: int) -> Rig:
    """The first ``views`` cameras of a registered rig.

    Raises:
        ValueError: the rig has fewer, or there is none of that name.
    """
    whole = rig(name)
    if not 1 <= views <= len(whole):
        raise ValueError(f"views={views}: expected 1 to {len(whole)}, the cameras of the rig {name!r}")
    return Rig(f"{name}[:{views}]", whole.eyes[:views], whole.ups[:views], whole.field_of_view)


class ViewEncoder(nn.Module):
    """Depth images of clouds, and one token for each.

    Args:
        cameras: the rig.
        size: height and width of an image in pixels.
        feature_dim: channels of a token.
        width: of the residual network; 1 is ResNet-18, 0.25 that of SimpleView.
        layers: its blocks in each stage.
    """

    def __init__(
        self, cameras: Rig, size: int, feature_dim: int, width: float, layers: Sequence[int] = (2, 2, 2, 2)
    ) -> None:
        super().__init__()
        self.cameras, self.size = cameras, size
        # at full width the stem is ResNet-18's: a stride of 2 and a pooling of 2, as one stride of 4
        kernel, stride = (7, 4) if width >= 0.5 else (5, 2)
        self.backbone = SimpleViewResNet(1, width, layers, kernel, stride)
        self.project = nn.Linear(self.backbone.num_features, feature_dim)
        # an attention over tokens has no order: which camera saw it is added to each
        self.camera = nn.Parameter(0.02 * torch.randn(len(cameras), feature_dim))

    def render(self, points: Tensor) -> Tensor:
        """Depth images of each cloud as it is observed, in the unit sphere: [B, N, 3] → [B, V, 1, S, S].

        Points are drawn as a plus of five pixels: with 768 points, one pixel each covers a hundredth of an
        image.
        """
        return project_points(points.detach(), self.cameras, self.size, splat=1.0, normalize=True)

    def forward(self, images: Tensor) -> Tensor:
        """[B, V, 1, S, S] → tokens [B, V, feature_dim]."""
        tokens = self.project(self.backbone(images.flatten(0, 1)))
        return tokens.view(*images.shape[:2], -1) + self.camera


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017): queries [B, N, C], memory [B, M, C] → [B, N, C]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.heads * memory.shape[1] < x.shape[2] // 2:
            return self.to_few(x, memory)
        key, value = self.key_value(memory).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(x)), self._split(key), self._split(value)
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def to_few(self, x: Tensor, memory: Tensor) -> Tensor:
        """The same to rounding, for a memory of few rows, such as view tokens: the two layers on N queries
        are applied to the M rows, each head's part of them to its keys and values."""
        key, value = (self._split(part) for part in self.key_value(memory).chunk(2, -1))  # [B, h, M, d]
        scale = key.shape[-1] ** -0.5
        asked = self.query.weight.unflatten(0, (self.heads, -1))  # [h, d, C]
        keys = scale * (key @ asked)  # [B, h, M, C]
        offset = scale * (key @ self.query.bias.view(self.heads, -1, 1)).transpose(2, 3)  # [B, h, 1, M]
        weights = (x[:, None] @ keys.mT + offset).softmax(-1)  # [B, h, N, M]
        values = value @ self.out.weight.t().unflatten(0, (self.heads, -1))  # [B, h, M, C]
        return weights.transpose(1, 2).flatten(2) @ values.flatten(1, 2) + self.out.bias


class Fusion(nn.Module):
    """Self-attention, cross-attention to the other cloud and to the view tokens, feed-forward; each residual.

    One set of weights serves both clouds, so exchanging them exchanges the results.
    """

    def __init__(self, channels: int, heads: int, images: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(4 if images else 3))
        self.within = Attention(channels, heads)
        self.across = Attention(channels, heads)
        self.to_views = Attention(channels, heads) if images else None
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.ReLU(inplace=True), nn.Linear(2 * channels, channels)
        )

    def attend(self, x: Tensor) -> Tensor:
        """x plus what it finds in itself."""
        normed = self.norms[0](x)
        return x + self.within(normed, normed)

    def forward(self, x: Tensor, other: Tensor, tokens: Tensor | None) -> Tensor:
        """x [B, N, C] and other [B, M, C], both from :meth:`attend`; tokens [B, V, C] → [B, N, C]."""
        x = x + self.across(self.norms[1](x), self.norms[1](other))
        if self.to_views is not None and tokens is not None:
            x = x + self.to_views(self.norms[3](x), tokens)
        return x + self.feed_forward(self.norms[2](x))


class Significance(nn.Module):
    """Score of every point from its own feature and the other cloud's pooled one; linear output.

    [B, N, C] and [B, C] → [B, N]. The first layer on the two side by side (MaskNet) is the sum of a layer on
    each, so the pooled half is computed once per cloud. ``start`` is what the scores are about at first.
    """

    def __init__(self, channels: int, start: float = 0.0) -> None:
        super().__init__()
        sizes = [channels, max(8, channels // 2), max(8, channels // 4)]
        self.own = nn.Linear(channels, sizes[0])
        self.other = nn.Linear(channels, sizes[0], bias=False)
        last = nn.Linear(sizes[2], 1)
        nn.init.constant_(last.bias, start)
        layers: list[nn.Module] = [nn.ReLU(inplace=True)]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.rest = nn.Sequential(*layers, last)

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        return self.rest(self.own(features) + self.other(pooled)[:, None]).squeeze(-1)


def _head(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with LayerNorm and ReLU before each but the first; the last has one output."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.LayerNorm(before), nn.ReLU(inplace=True), nn.Linear(before, after)]
    return nn.Sequential(*layers)


class FeatureMatcher(nn.Module):
    """Logit of every pair of keypoints from their features: [B, K, C] and [B, L, C] → [B, K, L].

    A multi-layer perceptron on ``[‖t − s‖, (t − s) / ‖t − s‖]``, C + 1 channels. Its first layer is linear in
    the two features up to the one scale ``1 / ‖t − s‖``: it is applied to the K + L points and combined, so
    the K·L·(C + 1) numbers are never written; :meth:`naive` writes them, and gives the same to rounding.

    Args:
        channels: C.
        width: factor of the hidden layers, 256, 128, 64, 32, 32, 32 of the public code.
    """

    def __init__(self, channels: int, width: float = 1.0) -> None:
        super().__init__()
        sizes = [max(8, round(size * width)) for size in (256, 128, 64, 32, 32, 32)]
        self.kept = 3 * sum(sizes)  # each layer, normalised, rectified
        self.first = nn.Linear(channels + 1, sizes[0])
        self.rest = _head([*sizes, 1])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.compare(source, self.project(source), target, self.project(target))

    def project(self, features: Tensor) -> Tensor:
        """The first layer of features: [B, K, C] → [B, K, hidden]."""
        return features @ self.first.weight[:, 1:].t()

    def compare(self, source: Tensor, own: Tensor, target: Tensor, other: Tensor) -> Tensor:
        """Logits [B, K, L] of features [B, K, C] and [B, L, C] with their projections."""
        distance = torch.cdist(source, target, compute_mode="donot_use_mm_for_euclid_dist")[..., None]
        inverse = 1 / (distance + _NO_DISTANCE)
        # (other - own) / distance + distance * weight + bias, in two passes over the [K, L, hidden]
        scalars = torch.cat([inverse, distance, torch.ones_like(distance)], -1)
        of_distance, bias = self.first.weight[:, 0].expand_as(own), self.first.bias.expand_as(own)
        rows = torch.stack([-own, of_distance, bias], -2)
        first = torch.baddbmm(
            (other[:, None] * inverse).flatten(0, 1), scalars.flatten(0, 1), rows.flatten(0, 1)
        )
        return self.rest(first).squeeze(-1).unflatten(0, distance.shape[:2])

    def naive(self, source: Tensor, target: Tensor) -> Tensor:
        """The readable twin of :meth:`forward`."""
        difference = target[:, None] - source[:, :, None]
        distance = difference.norm(dim=-1, keepdim=True)
        inputs = torch.cat([distance, difference / (distance + _NO_DISTANCE)], -1)
        return self.rest(self.first(inputs)).squeeze(-1)


class CoordinateMatcher(nn.Module):
    """Logit of every pair of keypoints from where they are: [B, K, 3] and [B, L, 3] → [B, K, L].

    A perceptron on ``[‖s − t‖, (s − t) / ‖s − t‖, s]``, 7 channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        hidden = max(16, round(32 * width))
        self.kept = 3 * 3 * hidden
        self.first = nn.Linear(7, hidden)
        self.rest = _head([hidden, hidden, hidden, 1])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        own = source[:, :, None].expand(-1, -1, target.shape[1], -1)
        difference = own - target[:, None]
        distance = difference.norm(dim=-1, keepdim=True)
        inputs = torch.cat([distance, difference / (distance + _NO_DISTANCE), own], -1)
        return self.rest(self.first(inputs)).squeeze(-1)


class Matching(nn.Module):
    """One iteration's heads: logits of all pairs of keypoints, and how credible each match is.

    Args:
        width: factor of the hidden layers.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.coordinates = CoordinateMatcher(width)
        hidden = max(16, round(32 * width))
        self.pairs = nn.Linear(2, hidden)
        self.credibility = _head([hidden, hidden, 1])

    def forward(self, features: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K, L] from features (of :class:`FeatureMatcher`) and coordinates [B, K, 3], [B, L, 3] →
        logits [B, K, L] of both and the logits [B, K] of credibility."""
        both = torch.stack([features, self.coordinates(source, target)], -1)
        return both.sum(-1), self.credibility(self.pairs(both).amax(2)).squeeze(-1)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, K, C] of x [B, N, C], by int64 [B, K]. ``gather`` would keep x for the backward pass."""
    offset = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).view(*index.shape, x.shape[2])
