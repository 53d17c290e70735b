"""``pointcmt register``: two clouds in files → the motion between them, and whether it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from pointcmt.checkpoint import atomic_write
from pointcmt.data.clouds import Cloud
from pointcmt.data.clouds import read_cloud as _read_cloud
from pointcmt.data.modelnet_off import sample_surface
from pointcmt.recipes.progress import say, warn
from pointcmt.recipes.run import find_checkpoint, write_json
from pointcmt.registration import CMIGNet
from pointcmt.registration.align import Alignment, align
from pointcmt.registration.baselines import need

NOT_TRUSTED = 3
"""Exit code of a result that should not be used."""
SUFFIXES = (".ply", ".pcd", ".xyz", ".obj", ".npy")
SURFACE_POINTS = 20_000
"""Points that are drawn on a mesh: its vertices may lie anywhere."""


@dataclass
class Register:
    """Register two clouds: print the 4x4 that takes SOURCE to TARGET, and whether it can be trusted."""

    source: Annotated[Path, tyro.conf.Positional]
    """The cloud to move: .ply, .pcd, .xyz, .obj or .npy, in any unit."""
    target: Annotated[Path, tyro.conf.Positional]
    """The cloud to move it to, in the same unit."""
    out: Path | None = None
    """Folder to write: moved.ply (the source, with its normals and colours), matrix.txt, result.json."""
    method: Literal["ransac", "fgr", "icp", "kiss", "cmignet"] = "ransac"
    """ransac and fgr on FPFH features (open3d), icp from where the clouds lie, kiss (KISS-Matcher), or
    cmignet."""
    refine: bool = False
    """Point-to-plane ICP after it."""
    picture: Path | None = None
    """Draw before, after and the correspondences to this file (.png)."""
    model: Path | None = None
    """Network of --method cmignet: a run folder of train-registration, or its .safetensors; default: the
    small one that comes with the package."""
    voxel: float | None = None
    """Length that the clouds are thinned to; default: a hundredth of the larger one's diagonal, and at least
    twice the distance between neighbours."""


def read_cloud(path: Path) -> Cloud:
    """A cloud from a file; of a mesh with faces, points drawn on its surface, the same each time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file that cannot be read, or one without points.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; expected a cloud ({', '.join(SUFFIXES)})")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path} is of no known format {path.suffix!r}; expected one of {', '.join(SUFFIXES)}"
        )
    cloud = _read_cloud(path, finite=False)
    if cloud.faces is None:
        return cloud
    drawn = sample_surface(cloud.points, cloud.faces, SURFACE_POINTS, np.random.default_rng(0), path)
    return Cloud(drawn[:, :3].astype(np.float64), drawn[:, 3:].astype(np.float64))


def write_cloud(path: Path, cloud: Cloud) -> None:
    """Write a cloud as a binary PLY file, atomically; coordinates in double precision."""
    fields = [(name, "<f8") for name in "xyz"]
    values = [cloud.points]
    if cloud.normals is not None:
        fields += [(name, "<f4") for name in ("nx", "ny", "nz")]
        values.append(cloud.normals)
    if cloud.colors is not None:
        fields += [(name, "u1") for name in ("red", "green", "blue")]
        values.append(np.round(255 * cloud.colors))
    rows = np.empty(len(cloud.points), dtype=fields)
    for (name, _), column in zip(fields, np.concatenate(values, 1).T, strict=True):
        rows[name] = column
    kinds = {"<f8": "double", "<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in fields]
    with atomic_write(path) as temporary:
        temporary.write_bytes("\n".join([*header, "end_header\n"]).encode() + rows.tobytes())


def moved_cloud(cloud: Cloud, motion: np.ndarray) -> Cloud:
    """The cloud moved; its normals turn with it."""
    rotation = motion[:3, :3]
    normals = None if cloud.normals is None else cloud.normals @ rotation.T
    return Cloud(cloud.points @ rotation.T + motion[:3, 3], normals, colors=cloud.colors)


def register(options: Register) -> int:
    """Run the command; returns 0, or ``NOT_TRUSTED`` where the result should not be used."""
    need("open3d")
    if options.model is not None and options.method != "cmignet":
        raise ValueError(f"--model belongs to --method cmignet; the method is {options.method}")
    source, target = read_cloud(options.source), read_cloud(options.target)
    for path, cloud in ((options.source, source), (options.target, target)):
        bad = int((~np.isfinite(cloud.points).all(1)).sum())
        if bad:
            warn(f"{path}: {bad} of {len(cloud.points)} points are not finite and are left out")
    model = None
    if options.model is not None:
        model = CMIGNet.load(find_checkpoint(options.model, "registration"))
    found = align(
        source.points,
        target.points,
        options.method,
        refine=options.refine,
        model=model,
        voxel=options.voxel,
    )
    say("\n".join("  ".join(f"{value: .9g}".rjust(16) for value in row) for row in found.motion))
    say(
        f"fitness {found.fitness:.3f}  inlier RMSE {found.inlier_rmse:.4g}  overlap {found.overlap:.3f}  "
        f"feature matches that agree {found.inliers} of {found.matches}  (voxel {found.voxel:.4g})"
    )
    if options.out is not None:
        write_cloud(options.out / "moved.ply", moved_cloud(source, found.motion))
        with atomic_write(options.out / "matrix.txt") as temporary:
            np.savetxt(temporary, found.motion, fmt="%.17g")
        write_json(
            options.out / "result.json",
            {
                "method": options.method,
                "refined": options.refine,
                "trusted": found.trusted,
                **{
                    name: getattr(found, name)
                    for name in (
                        "reasons",
                        "fitness",
                        "inlier_rmse",
                        "overlap",
                        "matches",
                        "inliers",
                        "voxel",
                    )
                },
                "motion": found.motion.tolist(),
            },
        )
        say(f"written: {options.out}/moved.ply, matrix.txt, result.json")
    if options.picture is not None:
        draw(source.points, target.points, found, options.picture)
        say(f"picture: {options.picture}")
    if found.trusted:
        return 0
    warn("DO NOT USE this motion: " + "; ".join(found.reasons) + ".")
    advice = "" if options.method == "ransac" else "; --method ransac finds a pose from anywhere"
    say(f"The clouds may not overlap, or show too little that tells places apart{advice}.")
    return NOT_TRUSTED


def draw(source: np.ndarray, target: np.ndarray, found: Alignment, path: Path, shown: int = 4000) -> None:
    """Three pictures side by side: before, after, and the correspondences coloured by weight.

    Looked at along the direction in which the target is thinnest.
    """
    from matplotlib.figure import Figure

    random = np.random.default_rng(0)

    def some(points: np.ndarray) -> np.ndarray:
        points = points[np.isfinite(points).all(1)]
        return points[random.permutation(len(points))[:shown]]

    source, target = some(source), some(target)
    rotation, shift = found.motion[:3, :3], found.motion[:3, 3]
    moved = source @ rotation.T + shift
    axes = np.linalg.svd(target - target.mean(0), full_matrices=False)[2][:2]
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    blue, orange = "tab:blue", "tab:orange"
    for panel, title, points in zip(
        panels, ("before", "after", "correspondences"), (source, moved, moved), strict=True
    ):
        panel.scatter(*(points @ axes.T).T, s=1, c=blue, label="source", rasterized=True)
        panel.scatter(*(target @ axes.T).T, s=1, c=orange, label="target", rasterized=True)
        panel.set_title(title)
        panel.set_aspect("equal")
        panel.set_axis_off()
    panels[0].legend(markerscale=6, loc="lower left", frameon=False)
    # drawn apart, so that the lines between them can be seen
    last = panels[2]
    last.clear()
    last.set_axis_off()
    last.set_aspect("equal")
    width = 1.15 * float(np.ptp(np.concatenate([moved, target]) @ axes[0]))
    aside = np.array([width, 0.0])
    last.scatter(*(moved @ axes.T - aside).T, s=1, c="lightgrey", rasterized=True)
    last.scatter(*(target @ axes.T).T, s=1, c="lightgrey", rasterized=True)
    order = np.argsort(found.weights)[-200:]
    starts = (found.correspondences[order, 0] @ rotation.T + shift) @ axes.T - aside
    ends = found.correspondences[order, 1] @ axes.T
    from matplotlib.collections import LineCollection

    lines = LineCollection(np.stack([starts, ends], 1).tolist(), cmap="viridis", linewidths=0.8)
    lines.set_array(found.weights[order])
    lines.set_clim(0, 1)
    last.add_collection(lines)
    last.autoscale_view()
    last.set_title(f"{len(order)} correspondences, by weight")
    if len(order):
        figure.colorbar(lines, ax=last, shrink=0.6)
    verdict = "" if found.trusted else ": NOT TRUSTED"
    figure.suptitle(f"fitness {found.fitness:.3f}, overlap {found.overlap:.3f}{verdict}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
