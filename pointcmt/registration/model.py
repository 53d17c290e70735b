"""CMIGNet: registration of two clouds, guided by images of them (Xie et al., RA-L 2024, arXiv 2311.01202)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcmt import checkpoint as files
from pointcmt.ops import furthest_point_sample, knn, weighted_procrustes
from pointcmt.ops.rigid import Rigid
from pointcmt.registration.layers import (
    FeatureMatcher,
    Fusion,
    Matching,
    PointEncoder,
    Significance,
    ViewEncoder,
    first_cameras,
    rows_of,
)
from pointcmt.registration.pieces import in_pieces
from pointcmt.views.values import bounds_of, check_values

Images = Literal["observed", "canonical", "none"]

KEPT_NUMBERS = 2**26
"""A part of the network that would keep more numbers than this for the backward pass (256 MB in float32) is
computed again in it; matching, in pieces of a sixteenth of this, also where nothing is kept: that is what a
processor's cache holds of its largest tensor."""


class Iteration(NamedTuple):
    """What one iteration said, for the losses.

    Attributes:
        logits: [B, K, K] of all pairs of keypoints.
        credibility: [B, K] logits.
        chosen: int64 [B, K] column of each row's best match.
    """

    logits: Tensor
    credibility: Tensor
    chosen: Tensor


class Trace(NamedTuple):
    """What the losses need of a training step; see :func:`pointcmt.registration.registration_loss`.

    Attributes:
        source_features, target_features: [B, N, C] and [B, M, C], of the encoder, before any fusion.
        view_features: [B, C] mean over the clouds of the maximum over their views; None without images.
        source_scores, target_scores: [B, K] significance of the keypoints; None without the mask.
        source_index, target_index: int64 [B, K] the keypoints: row k's true match is column k.
        matched: bool [B, K], whether keypoint k of the source has a counterpart.
        iterations: one after the other.
    """

    source_features: Tensor
    target_features: Tensor
    view_features: Tensor | None
    source_scores: Tensor | None
    target_scores: Tensor | None
    source_index: Tensor
    target_index: Tensor
    matched: Tensor
    iterations: list[Iteration]


class Registration(NamedTuple):
    """The motion that takes the source to the target, and what it rests on.

    Attributes:
        rotation: [B, 3, 3], determinant +1, and
        translation: [B, 3]: ``moved = source @ rotation.mT + translation[:, None]``.
        correspondences: int64 [B, K, 2], rows of the source and of the target, of the last iteration.
        weights: [B, K] of them, summing to 1; 0 for the less credible half.
        trace: what the losses need; in training only.
    """

    rotation: Tensor
    translation: Tensor
    correspondences: Tensor
    weights: Tensor
    trace: Trace | None = None


class CMIGNet(nn.Module):
    """Cross-Modal Information-Guided Network: two clouds → the motion between them.

    Encoder (EdgeConv) on both clouds as one batch; a CNN on V depth views of each cloud; fusion by attention
    within a cloud, to the other cloud and to the cloud's view tokens; significance scores, of which the K
    highest are keypoints; matching from features and coordinates; weighted Procrustes; ``iterations`` times.

    The method is the paper's. What differs from the public code (IvanXie416/CMIGNet), and why:

    - Each cloud is centred first, so a translation of either changes nothing but the translation found. There
      the networks see absolute coordinates and have to learn as much.
    - Images are rendered from *each cloud as it is observed*. There they show the complete object in its
      canonical pose, which no real registration has; ``images="canonical"`` takes such images, as a prior.
    - A point attends to V view tokens. There the memory is one vector repeated N times: a softmax over equal
      keys, which adds the same vector to every point.
    - The two clouds exchange features in one block that serves both, not in three passes of encoder and
      decoder: a quarter of the work.
    - A cloud's scores come from its own features and the other's pooled one, with linear output. There they
      come from the *other* cloud's points, whose order is unrelated, through a sigmoid that cannot reach the
      negative entropy it is fitted to.
    - The overlap contrast has margins that normalised features can reach (see ``losses``); there it is off,
      and without gradient where it is on.
    - Procrustes has weighted centroids; there they are unweighted. No gradient passes through the pose, as
      there.
    - Features do not change between iterations, so one head compares them, once; there each iteration has one
      of its own on the same input, two thirds of the whole network's work. Coordinates, which do change, have
      heads of their own in each.
    - Matching heads normalise channels (LayerNorm), not the batch: the result does not depend on the other
      pairs of a batch, and large ones are computed pair by pair and again in the backward pass, in bounded
      memory.
    - Logits are not clamped to ±20, where they would tie and lose their gradient.

    Args:
        views: V, images of each cloud: the first cameras of ``rig``.
        keypoints: K; fewer where a cloud has fewer points.
        iterations: matchings one after the other, each with heads of its own.
        width: factor of all layers' channels; 1 is the paper's network, 0.25 one for CPUs.
        images: ``observed``: rendered from the clouds; ``canonical``: given by the caller, of the complete
            object in its own pose, a prior; ``none``: no images at all.
        fusion: attention of any kind; without it images take no part at inference.
        mask: keypoints by their scores; without it by furthest point sampling.
        credibility: weigh correspondences by their credibility; without it all alike.
        rig: name of the cameras. size: pixels of a view's side.
        k: neighbours in the encoder.
        heads: of the attention.
        points: of the clouds it is trained on. Any number is taken, but features depend on the density:
            ``pointcmt register`` draws as many.

    Raises:
        ValueError: options out of range.
    """

    def __init__(
        self,
        views: int = 6,
        keypoints: int = 256,
        iterations: int = 3,
        width: float = 1.0,
        images: Images = "observed",
        fusion: bool = True,
        mask: bool = True,
        credibility: bool = True,
        rig: str = "simpleview",
        size: int = 64,
        k: int = 20,
        heads: int = 4,
        points: int = 768,
    ) -> None:
        super().__init__()
        if images not in ("observed", "canonical", "none"):
            raise ValueError(f"images={images!r}; expected 'observed', 'canonical' or 'none'")
        if (
            min(keypoints, points) < 3
            or iterations < 1
            or k < 1
            or not 0 < width <= 4
            or size < 8
            or heads < 1
        ):
            raise ValueError(
                f"keypoints={keypoints}, iterations={iterations}, k={k}, width={width}, size={size}, "
                f"heads={heads}: expected at least 3 keypoints and points, 1 iteration, "
                "1 neighbour, 8 pixels and 1 head, and a width in (0, 4]"
            )
        self.config: dict[str, Any] = {
            "views": views,
            "keypoints": keypoints,
            "iterations": iterations,
            "width": width,
            "images": images,
            "fusion": fusion,
            "mask": mask,
            "credibility": credibility,
            "rig": rig,
            "size": size,
            "k": k,
            "heads": heads,
            "points": points,
        }
        self.keypoints, self.iterations, self.use_credibility = keypoints, iterations, credibility
        self.images = images
        self.feature_dim = max(8, round(512 * width / heads)) * heads
        self.encoder = PointEncoder(self.feature_dim, width, k)
        self.views: ViewEncoder | None = None
        if images != "none":
            layers = (2, 2, 2, 2) if width >= 0.5 else (1, 1, 1, 1)
            self.views = ViewEncoder(first_cameras(rig, views), size, self.feature_dim, width, layers)
        self.fusion = Fusion(self.feature_dim, heads, self.views is not None) if fusion else None
        self.significance = Significance(self.feature_dim, -math.log(keypoints)) if mask else None
        self.features = FeatureMatcher(self.feature_dim, width)
        self.matching = nn.ModuleList(Matching(width) for _ in range(iterations))

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        images: Tensor | tuple[Tensor, Tensor] | None = None,
        truth: Rigid | tuple[Tensor, Tensor] | None = None,
    ) -> Registration:
        """The motion from source to target.

        Args:
            source: [B, N, 3] and
            target: [B, M, 3], in the scale of the unit sphere, N and M at least 3.
            images: with ``images="observed"`` the two clouds' images, [B, V, 1, S, S] each, in place of
                rendered ones; with ``canonical`` the object's, [B, V, 1, S, S], for both clouds.
            truth: rotation [B, 3, 3] and translation [B, 3], in training only: keypoints are then drawn half
                from the source's points that have a counterpart, half from the others, and the target's are
                the true nearest of each.

        Raises:
            ValueError: shapes other than these, NaN or infinite coordinates, truth given outside of training
                or missing in it.
        """
        self._check(source, target, truth)
        centres = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
        given = source, target
        source, target = source - centres[0], target - centres[1]
        source_features, target_features = self._encode(source, target)
        source_tokens, target_tokens = self._tokens(source, target, images)
        source_fused, target_fused = self._fuse(
            source_features, target_features, source_tokens, target_tokens
        )
        fused = source_fused, target_fused
        # max, not amax: its gradient needs a row's number for each channel, not the features
        pooled = [x.max(1).values for x in fused]
        matched = None
        if truth is None:
            scores = self._scores(fused, pooled)
            count = min(self.keypoints, source.shape[1], target.shape[1])
            chosen = [
                self._select(points, score, count)
                for points, score in zip((source, target), scores, strict=True)
            ]
        else:
            chosen, matched = draw_keypoints(*given, truth, self.keypoints)
        keys = [rows_of(x, index) for x, index in zip(fused, chosen, strict=True)]
        places = [rows_of(x, index) for x, index in zip((source, target), chosen, strict=True)]
        # features of points that are no keypoints are kept no longer than this
        del fused, source_fused, target_fused
        pose, correspondences, weights, steps = self._iterate(*keys, *places)
        trace = None
        if truth is not None:
            assert matched is not None
            seen = None
            if source_tokens is not None and target_tokens is not None:
                seen = (source_tokens.amax(1) + target_tokens.amax(1)) / 2
            scores = self._scores(keys, pooled)  # of the others, nothing would be learnt from
            trace = Trace(
                source_features,
                target_features,
                seen,
                scores[0],
                scores[1],
                chosen[0],
                chosen[1],
                matched,
                steps,
            )
        pairs = torch.stack([chosen[0], chosen[1].gather(1, correspondences)], -1)
        shift = pose.translation[:, None] + centres[1] - centres[0] @ pose.rotation.mT
        return Registration(pose.rotation, shift.squeeze(1), pairs, weights, trace)

    def save(self, path: files.PathLike) -> None:
        """Write the network, with its configuration, as one safetensors file."""
        files.save_module(path, self, "registration", self.config)

    @classmethod
    def load(cls, path: files.PathLike) -> CMIGNet:
        """The network in a file of :meth:`save`: eval mode, CPU.

        Raises:
            FileNotFoundError, ValueError: no such file, or not such a file.
        """
        return files.load_module(path, "registration", cls)

    def _check(self, source: Tensor, target: Tensor, truth: Any) -> None:
        for name, points in (("source", source), ("target", target)):
            if points.dim() != 3 or points.shape[-1] != 3 or not points.is_floating_point():
                raise ValueError(
                    f"CMIGNet: {name} must be a floating-point tensor [B, N, 3], "
                    f"got {points.dtype} of shape {list(points.shape)}"
                )
            if points.shape[1] < 3:
                raise ValueError(f"CMIGNet: {name} has {points.shape[1]} points; a pose needs at least 3")
            if not torch.isfinite(points).all():
                raise ValueError(f"CMIGNet: {name} holds a NaN or an infinity; remove such points first")
        if len(source) != len(target):
            raise ValueError(f"CMIGNet: {len(source)} sources and {len(target)} targets; expected as many")
        if self.training != (truth is not None):
            raise ValueError(
                "CMIGNet: truth=(rotation, translation) is given in training mode and only there: "
                + ("call .eval() to register clouds" if self.training else "call .train() to train")
            )

    def _encode(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if source.shape == target.shape:  # one batch: shared statistics of the batch normalisation
            both = self.encoder(torch.cat([source, target]))
            return both[: len(source)], both[len(source) :]
        return self.encoder(source), self.encoder(target)

    def _tokens(
        self, source: Tensor, target: Tensor, images: Tensor | tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.views is None:
            if images is not None:
                raise ValueError("CMIGNet: images were given to a network made with images='none'")
            return None, None
        if self.images == "canonical":
            if not isinstance(images, Tensor):
                raise ValueError(
                    "CMIGNet: a network made with images='canonical' needs images [B, V, 1, S, S] of the "
                    "complete object"
                )
            tokens = self.views(self._fitting(images, len(source)))
            return tokens, tokens
        if images is None:
            both = torch.cat([self.views.render(source), self.views.render(target)])
        elif isinstance(images, Tensor):
            raise ValueError(
                "CMIGNet: images must be a pair, those of the source and those of the target; one set for "
                "both is what images='canonical' means"
            )
        else:
            both = torch.cat([self._fitting(part, len(source)) for part in images])
        tokens = self.views(both)
        return tokens[: len(source)], tokens[len(source) :]

    def _fitting(self, images: Tensor, batch: int) -> Tensor:
        assert self.views is not None
        size = self.views.size
        expected = [batch, len(self.views.cameras), 1, size, size]
        if list(images.shape) != expected:
            raise ValueError(f"CMIGNet: images have shape {list(images.shape)}; expected {expected}")
        if images.device.type == "cpu":  # a GPU would be waited for
            check_values(images, bounds_of(("depth",)))
        return images

    def _fuse(
        self, source: Tensor, target: Tensor, source_tokens: Tensor | None, target_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.fusion is None:
            return source, target
        source, target = (self._by_pairs(self.fusion.attend, x) for x in (source, target))
        return (
            self._by_pairs(self.fusion, source, target, source_tokens),
            self._by_pairs(self.fusion, target, source, target_tokens),
        )

    def _scores(self, features: Sequence[Tensor], pooled: Sequence[Tensor]) -> list[Tensor | None]:
        """Significance of some points of the source and of the target, from their features [B, n, C] and both
        clouds' pooled ones [B, C]."""
        if self.significance is None:
            return [None, None]
        return [self.significance(own, other) for own, other in zip(features, reversed(pooled), strict=True)]

    def _select(self, points: Tensor, score: Tensor | None, count: int) -> Tensor:
        if score is None:
            return furthest_point_sample(points, count).long()
        return score.topk(count, dim=1).indices

    def _by_pairs(self, function: Any, *inputs: Tensor | None) -> Tensor:
        """``function`` of a batch; where it would keep much, of one pair after the other, computed again."""
        given = [x for x in inputs if x is not None]
        if not torch.is_grad_enabled() or 32 * given[0].numel() <= KEPT_NUMBERS:  # some 16 tensors of each
            return function(*inputs)
        assert self.fusion is not None
        missing = [None] * (len(inputs) - len(given))  # the last ones
        pieces = [(slice(one, one + 1), slice(None)) for one in range(len(given[0]))]
        (found,) = in_pieces(
            lambda *pair: (function(*pair, *missing),), pieces, given[:1], given[1:], self.fusion.parameters()
        )
        return found

    def _by_rows(
        self,
        function: Any,
        kept: int,
        rows: tuple[Tensor, ...],
        others: tuple[Tensor, ...],
        parameters: Iterable[Tensor],
    ) -> tuple[Tensor, ...]:
        """``function(*rows, *others)`` of K keypoints with L others each: at once where that is small, else
        for some rows of one pair after the other, which do not depend on each other.

        Args:
            function: of the rows [B, K, …] and the others [B, L, …]; its results have the rows in front.
            kept: numbers that it keeps for one of the K·L.
            rows, others: its arguments.
            parameters: what else it depends on.
        """
        batch, count = rows[0].shape[:2]
        row = others[0].shape[1] * kept
        piece = KEPT_NUMBERS // 16
        if batch * count * row <= (KEPT_NUMBERS if torch.is_grad_enabled() else piece):
            return function(*rows, *others)
        step = max(1, piece // row)
        pieces = [
            (slice(one, one + 1), slice(start, start + step))
            for one in range(batch)
            for start in range(0, count, step)
        ]
        return in_pieces(function, pieces, rows, others, parameters)

    def _iterate(
        self, source: Tensor, target: Tensor, places: Tensor, others: Tensor
    ) -> tuple[Rigid, Tensor, Tensor, list[Iteration]]:
        rotation = torch.eye(3, dtype=places.dtype, device=places.device).expand(len(places), 3, 3)
        pose = Rigid(rotation, places.new_zeros(len(places), 3))
        steps: list[Iteration] = []
        moved, chosen, weights = places, None, None
        head = self.features
        (features,) = self._by_rows(
            lambda *pair: (head.compare(*pair),),
            head.kept,
            (source, head.project(source)),
            (target, head.project(target)),
            head.parameters(),
        )
        for heads in self.matching:
            assert isinstance(heads, Matching)
            logits, credibility = self._by_rows(
                heads, heads.coordinates.kept, (features, moved), (others,), heads.parameters()
            )
            chosen = logits.argmax(2)
            steps.append(Iteration(logits, credibility, chosen))
            with torch.no_grad():
                weights = self._weights(credibility)
                step = weighted_procrustes(moved, rows_of(others, chosen), weights)
                moved = step.move(moved)
                pose = Rigid(
                    step.rotation @ pose.rotation,
                    (step.rotation @ pose.translation[..., None]).squeeze(-1) + step.translation,
                )
        assert chosen is not None and weights is not None
        return pose, chosen, weights, steps

    def _weights(self, credibility: Tensor) -> Tensor:
        """Weights [B, K] that sum to 1, of the more credible half."""
        if not self.use_credibility:
            return torch.full_like(credibility, 1 / credibility.shape[1])
        kept = credibility >= credibility.median(1, keepdim=True).values
        # sigmoid up to a factor, in float64 in Procrustes: its largest is never 0
        weights = F.logsigmoid(credibility.float()).masked_fill(~kept, -torch.inf)
        return weights.softmax(1)


def draw_keypoints(
    source: Tensor,
    target: Tensor,
    truth: Rigid | tuple[Tensor, Tensor],
    count: int,
    distance: float = 0.05,
) -> tuple[list[Tensor], Tensor]:
    """Keypoints of a training step: half of them with a counterpart, half without, as far as there are.

    Returns:
        rows of the source and of the target, int64 [B, K] each: the target's are the true nearest of the
        source's; and bool [B, K], whether that is within ``distance``.
    """
    truth = Rigid(*truth)
    near, nearest = knn(truth.move(source), target, 1)
    matched = near.squeeze(-1) < distance**2
    count = min(count, source.shape[1])
    key = matched + torch.rand(matched.shape, device=source.device)
    positive = key.topk(count // 2, 1).indices
    key = (~matched + torch.rand(matched.shape, device=source.device)).scatter(1, positive, -1.0)
    negative = key.topk(count - count // 2, 1).indices
    rows = torch.cat([positive, negative], 1)
    return [rows, nearest.squeeze(-1).gather(1, rows)], matched.gather(1, rows)
