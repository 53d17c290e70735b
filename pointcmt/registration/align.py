"""Registration of any two clouds, in any unit, with a verdict on whether the result can be trusted."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from pointcmt.registration.baselines import (
    REACH,
    described,
    icp,
    mutual_matches,
    ransac_described,
    run_baseline,
)
from pointcmt.registration.model import CMIGNet

AlignMethod = Literal["ransac", "fgr", "icp", "kiss", "cmignet"]

VOXELS = 100
"""Voxels along the diagonal of the larger cloud, where the points are that dense."""
MOST_POINTS = 10_000
"""Of a thinned cloud: a voxel that leaves more is enlarged, so that the time is bounded for any cloud."""
FEWEST_POINTS = 10
"""Of a cloud; fewer have no pose to speak of."""
OUTLIER = 20.0
"""Points this many times the middle 98 % of a cloud away from its median are left out."""


class Thresholds(NamedTuple):
    """When a motion, after point-to-plane ICP, is trusted.

    Chosen on the 90 ordered pairs of the Stanford bunny's scans and on 60 of 3DMatch's and 3DLoMatch's, by
    RANSAC and by FGR; docs/registration.md counts on pairs that took no part. Fitness does not tell right
    from wrong.

    Attributes:
        matches: that must agree, and
        root: relative to the square root of all.
        apart: most root mean square distance of the source's points from the target's tangent planes, in
            voxels, where they meet. Of those pairs right poses had at most 0.35, wrong ones with matches at
            least 0.41.
        normals: least part of the places where surfaces meet whose normals are within 26 degrees.
        fitness: least part of the source that comes near the target.
        spread: least standard deviation of the matches across their line, relative to the cloud's diagonal.
        correction: voxels by which ICP may move the source's points before a motion counts as not found.
        returns: most degrees between the motion and what ICP makes of its inverse, from the target to the
            source. Two rigid scans meet alike from either side; where they are bent, or meet in part by
            chance, each side pulls another way. Right poses of 3DMatch's pairs above had at most 0.8.
    """

    matches: int = 15
    root: float = 1.0
    apart: float = 0.38
    normals: float = 0.6
    fitness: float = 0.1
    spread: float = 0.02
    correction: float = 3.0
    returns: float = 1.0


class Evidence(NamedTuple):
    """What :class:`Thresholds` are compared with.

    Attributes:
        matches: features that are each other's nearest, and
        agree: how many of them the motion brings within 1.5 voxels.
        fitness, apart, normals, spread: as there.
        correction: voxels by which ICP moved the source's points, on average.
        returns: degrees, as there; 0 where it was not asked for.
    """

    matches: int
    agree: int
    fitness: float
    apart: float
    normals: float
    spread: float
    correction: float
    returns: float = 0.0

    def reasons(self, least: Thresholds = Thresholds()) -> list[str]:  # noqa: B008  (immutable)
        """Why the motion cannot be trusted; nothing where it can."""
        reasons = []
        expected = max(least.matches, math.ceil(least.root * math.sqrt(self.matches)))
        if self.agree < expected:
            reasons.append(
                f"only {self.agree} of {self.matches} feature matches agree with it (expected at least "
                f"{expected})"
            )
        elif self.spread < least.spread:
            reasons.append("the feature matches that agree with it lie on a line, about which it may turn")
        if self.fitness < least.fitness:
            reasons.append(
                f"only {100 * self.fitness:.0f} % of the source comes near the target (expected at least "
                f"{100 * least.fitness:.0f} %)"
            )
            return reasons
        if self.normals < least.normals:
            reasons.append(
                f"surfaces that meet are parallel in {100 * self.normals:.0f} % of places only (expected at "
                f"least {100 * least.normals:.0f} %)"
            )
        if self.apart > least.apart:
            reasons.append(
                f"surfaces that meet lie {self.apart:.2f} voxels apart, as by chance (expected at most "
                f"{least.apart:g})"
            )
        if self.returns > least.returns:
            reasons.append(
                f"the way back from the target turns by {self.returns:.1f} degrees more (expected at most "
                f"{least.returns:g}): the clouds do not meet as rigid ones do"
            )
        if self.correction > least.correction and not reasons:
            reasons.append(
                f"refining it moves the source by {self.correction:.1f} voxels (expected at most "
                f"{least.correction:g}): use the refined one"
            )
        return reasons


class Alignment(NamedTuple):
    """A motion between two clouds and the evidence for it, in the clouds' own unit.

    Attributes:
        motion: [4, 4] takes the source to the target.
        fitness: part of the source's voxels with a point of the target within one voxel.
        inlier_rmse: root mean square distance of those.
        overlap: part of both clouds' voxels that have the other within one voxel.
        matches: FPFH features that are each other's nearest.
        inliers: how many of them the motion brings within 1.5 voxels: the evidence that tells right from
            wrong poses of real scans; the fitness alone does not.
        voxel: the length that clouds were thinned to.
        correspondences: [m, 2, 3] points of the source (unmoved) and of the target that belong together.
        weights: [m] of them, in [0, 1].
        reasons: why the motion cannot be trusted; empty where it can.
        evidence: of the motion after ICP.
    """

    motion: np.ndarray
    fitness: float
    inlier_rmse: float
    overlap: float
    matches: int
    inliers: int
    voxel: float
    correspondences: np.ndarray
    weights: np.ndarray
    reasons: list[str]
    evidence: Evidence

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against the motion."""
        return not self.reasons


def align(
    source: np.ndarray,
    target: np.ndarray,
    method: AlignMethod = "ransac",
    *,
    refine: bool = False,
    model: CMIGNet | None = None,
    voxel: float | None = None,
) -> Alignment:
    """The motion that takes the source to the target.

    Both are centred, thinned to one voxel, registered, and the motion is carried back to their own unit and
    place. The time does not grow with the clouds beyond the thinning.

    Args:
        source: [N, 3] and
        target: [M, 3], in one unit, whatever it is. Points that are not finite, or far from all others, are
            left out.
        method: ``ransac`` and ``fgr`` on FPFH features, ``icp`` from where the clouds lie, ``kiss``
            (KISS-Matcher), or ``cmignet``.
        refine: point-to-plane ICP after it.
        model: the network of ``cmignet``; default: the one that comes with the package.
        voxel: the length that clouds are thinned to; default: a hundredth of the larger one's diagonal, and
            at least twice the typical distance between neighbours.

    Raises:
        ValueError: a cloud of fewer than 10 points, or of one place; a voxel out of range.
        ImportError: the library of the method, or open3d, is not installed.
    """
    if method not in ("ransac", "fgr", "icp", "kiss", "cmignet"):
        raise ValueError(f"method {method!r}: expected ransac, fgr, icp, kiss or cmignet")
    clouds, centres = [], []
    for name, points in (("source", source), ("target", target)):
        kept, centre = clean(points, name)
        clouds.append(kept - centre)
        centres.append(centre)
    diagonal = max(float(np.linalg.norm(np.ptp(cloud, axis=0))) for cloud in clouds)
    if voxel is not None and not diagonal / 2000 < voxel < diagonal / 5:
        raise ValueError(
            f"voxel {voxel:g} for clouds of {diagonal:g}: expected {diagonal / 2000:g} to {diagonal / 5:g}"
        )
    if voxel is None:
        voxel = max(diagonal / VOXELS, *(2 * _spacing(cloud) for cloud in clouds))
    (a, fa), (b, fb), voxel = _described(clouds, voxel)
    places = [np.asarray(cloud.points) for cloud in (a, b)]
    pairs = mutual_matches(fa, fb)
    given = None
    few = [
        f"{len(points)} points of the {name} are left when it is thinned to a voxel of {voxel:.4g} (expected "
        f"at least {Thresholds().matches}): it is sparse, or the smaller by far. Are both in one unit?"
        for name, points in zip(("source", "target"), places, strict=True)
        if len(points) < Thresholds().matches
    ]
    if few:  # no motion could be trusted, and KISS-Matcher ends the process on a single point
        motion = np.eye(4)
    elif method == "cmignet":
        motion, given = _by_network(model or default_model(), places[0], places[1])
    elif method == "icp":
        # from where the clouds lie: not from where their centres do
        start = np.eye(4)
        start[:3, 3] = centres[0] - centres[1]
        motion = icp(places[0], places[1], voxel, start)
    elif method == "ransac":
        motion = ransac_described(a, b, fa, fb, voxel) if len(pairs) >= 3 else np.eye(4)
    else:
        motion = run_baseline(method, places[0], places[1], voxel)
    refined = motion if few else icp(places[0], places[1], voxel, motion, REACH)
    returns = 0.0
    if not few:
        around = icp(places[1], places[0], voxel, np.linalg.inv(refined), REACH) @ refined
        returns = float(np.degrees(Rotation.from_matrix(around[:3, :3]).magnitude()))
    found = _judged(refined if refine else motion, refined, (a, b), pairs, given, voxel, centres, returns)
    return found._replace(reasons=few) if few else found


def clean(points: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite points [n, 3] of a cloud, float64, without far outliers; and their median [3].

    Raises:
        ValueError: not [N, 3], fewer than 10 such points, or all in one place.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"the {name} has shape {list(points.shape)}; expected [N, 3]")
    finite = points[np.isfinite(points).all(1)]
    if len(finite) < FEWEST_POINTS:
        raise ValueError(
            f"the {name} has {len(finite)} finite points of {len(points)}; a pose needs at least "
            f"{FEWEST_POINTS}"
        )
    centre = np.median(finite, axis=0)
    spread = np.ptp(np.percentile(finite, [1, 99], axis=0), axis=0)
    size = float(np.linalg.norm(spread))
    if not size > 1e-9 * max(1e-12, float(np.abs(centre).max())):
        raise ValueError(f"the {name}'s points all lie in one place: such a cloud has no pose")
    return finite[np.linalg.norm(finite - centre, axis=1) <= OUTLIER * size], centre


def default_model() -> CMIGNet:
    """The small network that comes with the package, trained on the embedded synthetic shapes.

    Raises:
        FileNotFoundError: this installation has none.
    """
    file = resources.files("pointcmt.registration") / "weights" / "cmignet_small.safetensors"
    with resources.as_file(file) as path:
        return CMIGNet.load(path)


def _described(clouds: list[np.ndarray], voxel: float) -> tuple[tuple[Any, Any], tuple[Any, Any], float]:
    """Both clouds thinned, with features, and the voxel that leaves neither too many points."""
    while max(_count_voxels(cloud, voxel) for cloud in clouds) > MOST_POINTS:
        voxel *= 1.25
    return described(clouds[0], voxel), described(clouds[1], voxel), voxel


def _spacing(cloud: np.ndarray, asked: int = 1000) -> float:
    """Median distance to the nearest other point; 0 for a cloud so large that it is dense enough."""
    if len(cloud) > 10 * MOST_POINTS:
        return 0.0
    some = cloud[:: max(1, len(cloud) // asked)]
    return float(np.median(cKDTree(cloud).query(some, 2)[0][:, 1]))


def _count_voxels(cloud: np.ndarray, voxel: float) -> int:
    if len(cloud) <= MOST_POINTS:
        return len(cloud)
    cell = np.floor((cloud - cloud.min(0)) / voxel).astype(np.int64)
    side = cell.max(0) + 1
    return len(np.unique((cell[:, 0] * side[1] + cell[:, 1]) * side[2] + cell[:, 2]))


def _by_network(
    model: CMIGNet, source: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The motion that a network finds, and its correspondences and weights."""
    scale = max(float(np.linalg.norm(cloud - cloud.mean(0), axis=1).max()) for cloud in (source, target))
    random = np.random.default_rng(0)
    drawn = [cloud[random.permutation(len(cloud))[: model.config["points"]]] for cloud in (source, target)]
    centres = [cloud.mean(0) for cloud in drawn]
    inputs = [
        torch.from_numpy((cloud - centre) / scale).float()[None]
        for cloud, centre in zip(drawn, centres, strict=True)
    ]
    with torch.no_grad():
        found = model.eval()(*inputs)
    motion = np.eye(4)
    motion[:3, :3] = found.rotation[0].double().numpy()
    motion[:3, 3] = scale * found.translation[0].double().numpy() + centres[1] - motion[:3, :3] @ centres[0]
    rows = found.correspondences[0].numpy()
    weights = found.weights[0].numpy()
    pairs = np.stack([drawn[0][rows[:, 0]], drawn[1][rows[:, 1]]], 1)
    return motion, (pairs, weights / max(float(weights.max()), 1e-12))


def _judged(
    motion: np.ndarray,
    refined: np.ndarray,
    clouds: tuple[Any, Any],
    pairs: np.ndarray,
    given: tuple[np.ndarray, np.ndarray] | None,
    voxel: float,
    centres: list[np.ndarray],
    returns: float,
) -> Alignment:
    """The evidence for a motion of two thinned and centred clouds, and the motion in their own place."""
    source, target = (np.asarray(cloud.points) for cloud in clouds)
    pose = _Meeting(motion, clouds, pairs, voxel)
    best = pose if motion is refined else _Meeting(refined, clouds, pairs, voxel)
    correction = float(np.linalg.norm(pose.moved - best.moved, axis=1).mean()) / voxel
    evidence = Evidence(
        matches=len(pairs),
        agree=int(best.agree.sum()),
        fitness=best.fitness,
        apart=best.apart,
        normals=best.parallel,
        spread=best.spread,
        correction=correction,
        returns=returns,
    )
    if given is None:
        shown = pairs[pose.agree]
        residual = np.linalg.norm(pose.moved[shown[:, 0]] - target[shown[:, 1]], axis=1) / (REACH * voxel)
        given = np.stack([source[shown[:, 0]], target[shown[:, 1]]], 1), 1 - residual
    whole = motion.copy()
    whole[:3, 3] += centres[1] - motion[:3, :3] @ centres[0]
    return Alignment(
        motion=whole,
        fitness=pose.fitness,
        inlier_rmse=pose.rmse * voxel,
        overlap=pose.overlap,
        matches=len(pairs),
        inliers=int(pose.agree.sum()),
        voxel=voxel,
        correspondences=given[0] + np.stack(centres)[None],
        weights=given[1],
        reasons=evidence.reasons(),
        evidence=evidence,
    )


class _Meeting:
    """How two thinned clouds meet under a motion."""

    def __init__(self, motion: np.ndarray, clouds: tuple[Any, Any], pairs: np.ndarray, voxel: float) -> None:
        source, target = (np.asarray(cloud.points) for cloud in clouds)
        normals = [np.asarray(cloud.normals) for cloud in clouds]
        self.moved = source @ motion[:3, :3].T + motion[:3, 3]
        forth, nearest = cKDTree(target).query(self.moved)
        back, _ = cKDTree(self.moved).query(target)
        near = forth < voxel
        self.fitness = float(near.mean())
        self.overlap = float((near.sum() + (back < voxel).sum()) / (len(source) + len(target)))
        self.rmse, self.apart, self.parallel, self.spread = float("nan"), float("nan"), 0.0, 0.0
        if near.any():
            self.rmse = float(np.sqrt(np.square(forth[near]).mean())) / voxel
            cosine = np.abs(np.einsum("ij,ij->i", normals[0] @ motion[:3, :3].T, normals[1][nearest]))
            self.parallel = float((cosine[near] > 0.9).mean())
            planes = np.einsum("ij,ij->i", self.moved - target[nearest], normals[1][nearest])[near]
            self.apart = float(np.sqrt(np.square(planes).mean())) / voxel
        apart = np.linalg.norm(self.moved[pairs[:, 0]] - target[pairs[:, 1]], axis=1)
        self.agree = apart < REACH * voxel
        if self.agree.sum() >= 3:
            places = source[pairs[self.agree, 0]]
            deviations = np.linalg.svd(places - places.mean(0), compute_uv=False) / np.sqrt(len(places))
            self.spread = float(deviations[1] / np.linalg.norm(np.ptp(source, axis=0)))
