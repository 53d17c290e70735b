"""SyntheticShapes: an embedded set of procedural CAD-like shapes, for when there is no data at hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from pointcmt.data.dataset import PointDataset, Split, check_split
from pointcmt.data.primitives import Mesh, box, cylinder, ellipsoid, join, lathe, sample, slab, tube
from pointcmt.data.registry import register_dataset

Generator = np.random.Generator


@register_dataset("synthetic")
class SyntheticShapes(PointDataset):
    """Shapes assembled from parts by chance: furniture, vessels, vehicles, z up, in the unit sphere.

    Every shape has its own proportions, style and parts (a chair stands on four legs, on a pedestal or on
    runners; its back is a panel, slats or a frame …). Classes come in groups that are told apart by detail:
    chair, stool, bench, sofa, table, desk · cup, bowl, vase, bottle, lamp · shelf, dresser. Details are
    thin, so that few points fall on them. Shapes are turned and stretched by chance, their clouds noisy and
    seen from one side only in part, so that a student does not saturate.

    Everything is drawn by ``seed``; shape i of a class does not depend on how many others are asked for,
    and the test shapes are drawn apart from the training shapes.

    Args:
        split: ``"train"`` or ``"test"``.
        num_points: N points per cloud, uniform by area on the surface.
        num_classes: how many classes, the ones hardest to tell apart first; None is all 16.
        per_class: shapes per class.
        seed: draws everything.
        dense_points: also keep a clean, whole sampling of this many points as ``view_points``, so that
            views show more than the cloud does; None projects views from the clouds.
        yaw: greatest turn about the z axis, in degrees, to either side.
        noise: standard deviation of the noise on coordinates, in units of the unit sphere.
        occlusion: greatest part of a cloud that is missing on one side (0 … 0.9); the cloud still has N
            points.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        split: Split,
        num_points: int = 1024,
        *,
        num_classes: int | None = None,
        per_class: int = 50,
        seed: int = 0,
        dense_points: int | None = None,
        yaw: float = 30.0,
        noise: float = 0.01,
        occlusion: float = 0.3,
    ) -> None:
        check_split(split)
        if num_classes is not None and not 2 <= num_classes <= len(_BUILDERS):
            raise ValueError(f"num_classes is {num_classes}; expected 2 to {len(_BUILDERS)}")
        if per_class < 1 or num_points < 1:
            raise ValueError(
                f"per_class {per_class} and num_points {num_points}: expected at least 1 of each"
            )
        if not 0 <= occlusion <= 0.9 or noise < 0:
            raise ValueError(f"occlusion {occlusion} and noise {noise}: expected 0 … 0.9, and 0 or more")
        self.split, self.seed = split, seed
        names = sorted(list(_BUILDERS)[:num_classes])
        shapes = [(name, number) for name in names for number in range(per_class)]
        clouds = np.empty((len(shapes), num_points, 3), dtype=np.float32)
        dense = np.empty((len(shapes), dense_points, 3), dtype=np.float32) if dense_points else None
        frames = []
        for row, (name, number) in enumerate(shapes):
            generator = _generator(name, number, split, seed)
            surface = _build(name, generator, yaw)
            cloud = _scan(surface, num_points, occlusion, generator)
            cloud = cloud + noise * generator.standard_normal(cloud.shape)
            # as of a scan, only the cloud itself is known: it is normalised by what it shows
            centre = cloud.mean(0)
            radius = np.linalg.norm(cloud - centre, axis=1).max()
            frames.append((centre, radius))
            clouds[row] = (cloud - centre) / radius
            if dense is not None:
                dense[row] = (sample(surface, dense.shape[1], generator) - centre) / radius
        super().__init__(
            clouds,
            np.repeat(np.arange(len(names)), per_class),
            names,
            [f"{name}_{split}_{number:04d}" for name, number in shapes],
            dense,
            up="z",
        )
        self._yaw = yaw
        self._shapes = shapes
        self._frames = frames

    def mesh(self, index: int) -> Mesh:
        """The whole surface that item ``index`` was sampled on, in the frame of its cloud."""
        name, number = self._shapes[index]
        mesh = _build(name, _generator(name, number, self.split, self.seed), self._yaw)
        centre, radius = self._frames[index]
        return Mesh((mesh.vertices - centre) / radius, mesh.faces)


def _generator(name: str, number: int, split: str, seed: int) -> Generator:
    return np.random.default_rng([seed, int(split == "test"), list(_BUILDERS).index(name), number])


def _build(name: str, generator: Generator, yaw: float) -> Mesh:
    """A shape of a class, stretched and turned by chance, in the unit sphere."""
    mesh = join(_BUILDERS[name](generator))
    mesh = mesh.scaled(*generator.uniform(0.8, 1.25, 3))
    mesh = mesh.rotated(2, np.radians(generator.uniform(-yaw, yaw)))
    vertices = mesh.vertices - (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    return Mesh(vertices / np.linalg.norm(vertices, axis=1).max(), mesh.faces)


def _scan(surface: Mesh, count: int, occlusion: float, generator: Generator) -> np.ndarray:
    """``count`` points of the surface, less up to the part ``occlusion`` beyond a plane by chance."""
    part = generator.uniform(0, occlusion)
    total = int(np.ceil(count / (1 - part)))
    points = sample(surface, total, generator)
    direction = generator.standard_normal(3)
    kept = np.argsort(points @ direction, kind="stable")[:count]
    return points[generator.permutation(kept)]


# Parts that several classes share ------------------------------------------------------------------


def _chance(generator: Generator, probability: float) -> bool:
    return bool(generator.random() < probability)


def _plate(generator: Generator, x: float, y: float, z: float, thickness: float, round_: bool) -> Mesh:
    """A seat or a table top at height z: a rectangle, or an ellipse."""
    if not round_:
        return box(x, y, thickness, (0, 0, z))
    return cylinder(0.5, thickness, around=28).scaled(x, y, 1).moved(z=z)


def _legs(generator: Generator, x: float, y: float, height: float) -> list[Mesh]:
    """What carries a plate of x by y at a height: legs, a pedestal, panels, runners or a trestle."""
    radius = generator.uniform(0.012, 0.035)
    style = generator.choice(5, p=[0.45, 0.2, 0.12, 0.13, 0.1])
    inset = generator.uniform(0.75, 0.98)
    hx, hy = inset * x / 2, inset * y / 2
    if style == 0:
        splay = generator.uniform(0.8, 1.25)
        corners = [(sx, sy) for sx in (-1.0, 1.0) for sy in (-1.0, 1.0)]
        if _chance(generator, 0.15):  # three legs
            corners = [(-1.0, -1.0), (1.0, -1.0), (0.0, 1.0)]
        parts = [
            tube([(sx * hx, sy * hy, height), (sx * hx * splay, sy * hy * splay, 0)], radius)
            for sx, sy in corners
        ]
        if _chance(generator, 0.35):  # stretchers
            z, at = generator.uniform(0.15, 0.5) * height, splay + (1 - splay) * 0.3
            parts += [
                tube([(s * hx * at, -hy * at, z), (s * hx * at, hy * at, z)], radius * 0.7) for s in (-1, 1)
            ]
        return parts
    if style == 1:
        spread = generator.uniform(0.5, 0.9) * min(x, y) / 2
        pole = tube([(0, 0, 0), (0, 0, height)], radius * generator.uniform(1, 2.5), 12)
        if _chance(generator, 0.5):
            return [pole, cylinder(spread, generator.uniform(0.01, 0.05), spread * 0.8)]
        count = int(generator.integers(3, 6))
        angle = 2 * np.pi * np.arange(count) / count
        rise = generator.uniform(0.03, 0.2) * height
        return [pole] + [
            tube([(0, 0, rise), (spread * np.cos(a), spread * np.sin(a), 0)], radius) for a in angle
        ]
    if style == 2:
        return [box(0.03, 2 * hy, height, (s * hx, 0, 0)) for s in (-1, 1)]
    if style == 3:
        return [
            tube([(s * hx, -hy, height), (s * hx, -hy, 0), (s * hx, hy, 0), (s * hx, hy, height)], radius)
            for s in (-1, 1)
        ]
    feet = [box(0.05, 2 * hy, 0.04, (s * hx * 0.8, 0, 0)) for s in (-1, 1)]
    posts = [tube([(s * hx * 0.8, 0, 0), (s * hx * 0.8, 0, height)], radius * 1.5) for s in (-1, 1)]
    return [*feet, *posts, tube([(-hx * 0.8, 0, height * 0.4), (hx * 0.8, 0, height * 0.4)], radius)]


def _back(generator: Generator, x: float, y: float, z: float, height: float) -> list[Mesh]:
    """A back rest of a width x on the rear edge (+y) of a seat at height z, leaning by chance."""
    depth, lean = generator.uniform(0.015, 0.05), generator.uniform(-0.3, 0.02)
    style = generator.choice(4, p=[0.35, 0.25, 0.25, 0.15])
    if style == 0:
        gap = generator.uniform(0, 0.35) * height
        parts = [box(x, depth, height - gap, (0, 0, gap))]
        if gap > 0.02:
            parts += [tube([(s * x * 0.35, 0, 0), (s * x * 0.35, 0, gap)], 0.015) for s in (-1, 1)]
    else:
        parts = [tube([(s * x / 2, 0, 0), (s * x / 2, 0, height)], 0.018) for s in (-1, 1)]
        parts.append(tube([(-x / 2, 0, height), (x / 2, 0, height)], 0.018))
        count = int(generator.integers(2, 6))
        if style == 1:
            parts += [
                tube([(t * x / 2, 0, 0), (t * x / 2, 0, height)], 0.012)
                for t in np.linspace(-0.7, 0.7, count)
            ]
        elif style == 2:
            parts += [box(x, 0.015, height * 0.12, (0, 0, height * t)) for t in np.linspace(0.2, 0.8, count)]
    return [part.rotated(0, lean).moved(y=y / 2, z=z) for part in parts]


def _arms(generator: Generator, x: float, y: float, z: float) -> list[Mesh]:
    height, radius = generator.uniform(0.12, 0.25), generator.uniform(0.012, 0.025)
    return [
        tube(
            [(s * x / 2, -y * 0.4, z), (s * x / 2, -y * 0.4, z + height), (s * x / 2, y / 2, z + height)],
            radius,
        )
        for s in (-1, 1)
    ]


def _wall(outer: np.ndarray, thickness: float) -> Mesh:
    """A vessel, open at the top: the profile (radius, height) outside, and again inside it."""
    inner = np.column_stack([np.maximum(outer[:, 0] - thickness, 0), outer[:, 1]])[::-1]
    inner[-1, 1] += thickness
    return lathe(np.concatenate([[(0, outer[0, 1])], outer, inner, [(0, inner[-1, 1])]]), 24)


def _curve(knots: list[tuple[float, float]], steps: int = 14) -> np.ndarray:
    """A smooth profile (radius, height) through knots of rising height (monotone in between)."""
    radius, height = np.asarray(knots, dtype=float).T
    z = np.linspace(height[0], height[-1], steps)
    piece = np.clip(np.searchsorted(height, z, side="right") - 1, 0, len(height) - 2)
    t = (z - height[piece]) / (height[piece + 1] - height[piece])
    t = t * t * (3 - 2 * t)
    return np.column_stack([radius[piece] * (1 - t) + radius[piece + 1] * t, z])


def _handle(generator: Generator, radius: float, low: float, high: float) -> Mesh:
    """A ring on the side of a vessel between two heights."""
    reach = generator.uniform(0.5, 0.9) * (high - low)
    angle = np.linspace(-np.pi / 2, np.pi / 2, 10)
    height = (low + high) / 2 + (high - low) / 2 * np.sin(angle)
    path = np.column_stack([radius - 0.01 + reach * np.cos(angle), np.zeros(10), height])
    return tube(path, generator.uniform(0.015, 0.035)).rotated(2, generator.uniform(0, 2 * np.pi))


def _knobs(generator: Generator, x: float, y: float, z: float, bar: float) -> list[Mesh]:
    """A handle on the front (-y) of furniture: a knob, or a bar of a length."""
    if _chance(generator, 0.4):
        return [ellipsoid(0.015, 0.02, 0.015).moved(x, y - 0.02, z)]
    return [tube([(x - bar / 2, y - 0.02, z), (x + bar / 2, y - 0.02, z)], 0.008)]


# Classes: each returns parts in units of about a metre, z up, front towards -y ------------------------


def _chair(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(0.38, 0.6), g.uniform(0.38, 0.55), g.uniform(0.35, 0.55)
    seat = _plate(g, x, y, z, g.uniform(0.02, 0.1), _chance(g, 0.25))
    parts = [seat, *_legs(g, x, y, z), *_back(g, x * g.uniform(0.8, 1), y, z, g.uniform(0.2, 0.6))]
    return parts + (_arms(g, x, y, z) if _chance(g, 0.3) else [])


def _stool(g: Generator) -> list[Mesh]:
    x, z = g.uniform(0.28, 0.5), g.uniform(0.3, 0.85)
    y = x * g.uniform(0.85, 1.15)
    parts = [_plate(g, x, y, z, g.uniform(0.02, 0.12), _chance(g, 0.6)), *_legs(g, x, y, z)]
    if _chance(g, 0.3):  # a foot ring
        angle = np.linspace(0, 2 * np.pi, 17)
        radius, height = 0.42 * x, g.uniform(0.2, 0.4) * z
        ring = np.column_stack([radius * np.cos(angle), radius * np.sin(angle), np.full(17, height)])
        parts.append(tube(ring, 0.012))
    if _chance(g, 0.25):  # a rim to lean on, lower than a chair's back
        parts += _back(g, x * 0.9, y, z, g.uniform(0.06, 0.16))
    return parts


def _table(g: Generator) -> list[Mesh]:
    x, z = g.uniform(0.5, 1.6), g.uniform(0.35, 0.8)
    y = min(x, g.uniform(0.4, 0.9))
    parts = [_plate(g, x, y, z, g.uniform(0.02, 0.07), _chance(g, 0.35)), *_legs(g, x, y, z)]
    if _chance(g, 0.3):
        parts.append(box(x * 0.8, y * 0.8, 0.02, (0, 0, z * g.uniform(0.2, 0.5))))
    return parts


def _bench(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(0.9, 1.7), g.uniform(0.3, 0.5), g.uniform(0.35, 0.5)
    count = int(g.integers(1, 5))  # planks
    parts = [box(x, y / count * 0.85, 0.04, (0, (k + 0.5) * y / count - y / 2, z)) for k in range(count)]
    parts += _legs(g, x, y, z)
    if _chance(g, 0.45):
        parts += _back(g, x, y, z, g.uniform(0.2, 0.5))
    return parts + (_arms(g, x, y, z) if _chance(g, 0.2) else [])


def _cup(g: Generator) -> list[Mesh]:
    radius, height = g.uniform(0.3, 0.5), g.uniform(0.5, 1.1)
    bottom = radius * g.uniform(0.5, 1.0)
    profile = _curve([(bottom, 0), (radius * g.uniform(0.85, 1.1), height * 0.5), (radius, height)])
    parts = [_wall(profile, g.uniform(0.02, 0.05))]
    if _chance(g, 0.85):
        parts.append(
            _handle(g, (bottom + radius) / 2, height * g.uniform(0.15, 0.35), height * g.uniform(0.6, 0.85))
        )
    if _chance(g, 0.3):
        parts.append(cylinder(radius * g.uniform(1.2, 1.7), 0.03).moved(z=-0.03))  # a saucer
    return parts


def _bowl(g: Generator) -> list[Mesh]:
    radius, height = g.uniform(0.45, 0.7), g.uniform(0.25, 0.75)
    bottom = radius * g.uniform(0.25, 0.6)
    profile = _curve([(bottom, 0), (radius * g.uniform(0.75, 1.0), height * 0.5), (radius, height)])
    parts = [_wall(profile, g.uniform(0.02, 0.06))]
    if _chance(g, 0.4):
        parts.append(cylinder(bottom * 0.8, 0.06, bottom).moved(z=-0.06))
    return parts


def _vase(g: Generator) -> list[Mesh]:
    height = g.uniform(0.8, 1.5)
    foot, belly, neck = g.uniform(0.12, 0.35), g.uniform(0.25, 0.5), g.uniform(0.1, 0.3)
    knots = [
        (foot, 0),
        (belly, height * g.uniform(0.25, 0.55)),
        (neck, height * g.uniform(0.65, 0.88)),
        (neck * g.uniform(1.0, 2.0), height),
    ]
    parts = [_wall(_curve(knots), g.uniform(0.015, 0.04))]
    if _chance(g, 0.25):
        turn = g.uniform(0, np.pi)
        ring = _handle(g, neck, height * 0.55, height * 0.85)
        parts += [ring.rotated(2, turn), ring.rotated(2, turn + np.pi)]
    return parts


def _bottle(g: Generator) -> list[Mesh]:
    height, body, neck = g.uniform(1.0, 1.6), g.uniform(0.18, 0.38), g.uniform(0.05, 0.13)
    shoulder, start = g.uniform(0.4, 0.7), g.uniform(0.65, 0.85)
    knots = [
        (body * g.uniform(0.85, 1.05), 0),
        (body, height * shoulder),
        (neck, height * max(start, shoulder + 0.08)),
        (neck * g.uniform(0.95, 1.3), height),
    ]
    profile = _curve(knots)
    parts = [lathe(np.concatenate([[(0, 0)], profile, [(0, height)]]), 24)]
    if _chance(g, 0.4):
        parts.append(cylinder(neck * g.uniform(1.2, 1.6), height * 0.08).moved(z=height * 0.95))
    if _chance(g, 0.15):
        parts.append(_handle(g, body * 0.8, height * 0.35, height * 0.7))
    return parts


def _lamp(g: Generator) -> list[Mesh]:
    height, base = g.uniform(0.6, 1.6), g.uniform(0.1, 0.25)
    shade, thick = g.uniform(0.14, 0.35), g.uniform(0.008, 0.03)
    parts = [cylinder(base, g.uniform(0.02, 0.08), base * g.uniform(0.4, 1))]
    cover = lathe([(shade * g.uniform(0.3, 1.0), g.uniform(0.15, 0.4)), (shade, 0)], 24)
    if _chance(g, 0.3):  # an arm with a joint
        elbow, head = (
            (g.uniform(-0.3, 0), 0, height * 0.5),
            (g.uniform(0.1, 0.5), 0, height * g.uniform(0.7, 0.95)),
        )
        parts += [tube([(0, 0, 0), elbow], thick), tube([elbow, head], thick)]
        return [*parts, cover.rotated(1, g.uniform(-0.6, 0.6)).moved(*head)]
    if _chance(g, 0.3):  # a body instead of a pole
        knots = [
            (base, 0),
            (base * g.uniform(0.8, 1.6), height * 0.3),
            (base * 0.3, height * 0.7),
            (0.02, height),
        ]
        parts.append(lathe(_curve(knots), 20))
    else:
        parts.append(tube([(0, 0, 0), (0, 0, height)], thick, 10))
    return [*parts, cover.moved(z=height - g.uniform(0.0, 0.1))]


def _airplane(g: Generator) -> list[Mesh]:
    length, radius = g.uniform(1.2, 1.8), g.uniform(0.06, 0.14)
    nose, tail = g.uniform(0.05, 0.15), g.uniform(0.6, 0.8)
    body = [(0.005, 0), (radius, length * nose), (radius, length * tail), (radius * 0.25, length)]
    parts = [lathe(_curve(body, 18), 16).rotated(1, np.pi / 2)]

    def wing(root: float, span: float, at: float, z: float) -> list[Mesh]:
        sweep, tip = g.uniform(0.0, 0.8) * span, root * g.uniform(0.2, 0.8)
        half = np.array([(at, 0), (at + root, 0), (at + sweep + tip, span), (at + sweep, span)])
        return [slab(half * (1, s), 0.02).moved(z=z) for s in (-1, 1)]

    low = g.uniform(-0.8, 0.8) * radius
    parts += wing(
        length * g.uniform(0.15, 0.3), length * g.uniform(0.35, 0.6), length * g.uniform(0.25, 0.4), low
    )
    high = radius * g.uniform(0, 0.6)
    parts += wing(length * g.uniform(0.08, 0.14), length * g.uniform(0.12, 0.22), length * 0.84, high)
    fin = length * g.uniform(0.1, 0.2)
    plate = np.array([(0, 0), (length * 0.13, 0), (length * 0.15, fin), (length * 0.08, fin)])
    parts.append(slab(plate, 0.02).rotated(0, np.pi / 2).moved(x=length * 0.84))
    if _chance(g, 0.7):
        size = radius * g.uniform(0.3, 0.5)
        for s in (-1, 1):
            engine = lathe([(size, 0), (size, length * 0.15)], 12).rotated(1, np.pi / 2)
            parts.append(engine.moved(length * 0.38, s * length * 0.18, low - size))
    return parts


def _shelf(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(0.5, 1.3), g.uniform(0.2, 0.45), g.uniform(0.7, 1.8)
    board, levels = g.uniform(0.015, 0.04), int(g.integers(3, 7))
    heights = np.linspace(g.uniform(0, 0.15), 1, levels) * z
    parts = [box(x, y, board, (0, 0, height)) for height in heights]
    if _chance(g, 0.7):
        parts += [box(board, y, z, (s * x / 2, 0, 0)) for s in (-1, 1)]
    else:
        corners = [(sx, sy) for sx in (-1, 1) for sy in (-1, 1)]
        parts += [
            tube([(sx * x / 2, sy * y / 2, 0), (sx * x / 2, sy * y / 2, z)], 0.015) for sx, sy in corners
        ]
    if _chance(g, 0.5):
        parts.append(box(x, 0.01, z, (0, y / 2, 0)))
    if _chance(g, 0.4):
        parts.append(box(board, y, z, (g.uniform(-0.25, 0.25) * x, 0, 0)))
    for low, high in pairwise(heights):
        if _chance(g, 0.35):  # things on it
            size = g.uniform(0.4, 0.8) * (high - low)
            parts.append(box(x * g.uniform(0.1, 0.4), y * 0.7, size, (x * g.uniform(-0.25, 0.25), 0, low)))
    return parts


def _dresser(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(0.5, 1.4), g.uniform(0.35, 0.55), g.uniform(0.5, 1.5)
    lift = g.uniform(0.03, 0.2) if _chance(g, 0.5) else 0.0
    parts = [box(x, y, z, (0, 0, lift)), box(x * 1.04, y * 1.04, 0.03, (0, 0, lift + z))]
    if lift:
        parts += [
            tube([(sx * x * 0.45, sy * y * 0.42, 0), (sx * x * 0.45, sy * y * 0.42, lift)], 0.02)
            for sx in (-1, 1)
            for sy in (-1, 1)
        ]
    rows, columns = int(g.integers(1, 6)), int(g.integers(1, 3))
    for row in range(rows):
        for column in range(columns):
            front = (((column + 0.5) / columns - 0.5) * x, -y / 2 - 0.008, lift + (row + 0.07) * z / rows)
            parts.append(box(x / columns * 0.9, 0.02, z / rows * 0.86, front))
            parts += _knobs(g, front[0], front[1] - 0.01, front[2] + z / rows * 0.43, x / columns * 0.3)
    return parts


def _desk(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(0.9, 1.6), g.uniform(0.5, 0.8), g.uniform(0.65, 0.8)
    parts = [box(x, y, 0.035, (0, 0, z))]
    sides = [(-1,), (1,), (-1, 1)][int(g.integers(3))]
    width = g.uniform(0.2, 0.35) * x
    for s in (-1, 1):
        if s in sides:
            low = 0.0 if _chance(g, 0.6) else z * g.uniform(0.3, 0.6)
            parts.append(box(width, y * 0.9, z - low, (s * (x - width) / 2, 0, low)))
            for height in np.linspace(low, z, int(g.integers(2, 5)))[:-1]:
                parts += _knobs(g, s * (x - width) / 2, -y * 0.45, height + 0.08, width * 0.4)
        if s not in sides or parts[-1].vertices[:, 2].min() > 0.05:
            parts += [
                tube([(s * x * 0.47, t * y * 0.44, 0), (s * x * 0.47, t * y * 0.44, z)], 0.02)
                for t in (-1, 1)
            ]
    if _chance(g, 0.5):
        parts.append(box(x * 0.95, 0.02, z * g.uniform(0.3, 0.8), (0, y * 0.4, z * 0.2)))
    if _chance(g, 0.25):
        parts += [part.moved(y=y * 0.35, z=z) for part in (box(x, 0.2, 0.02, (0, 0, 0.3)), box(x, 0.02, 0.3))]
    return parts


def _sofa(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(0.7, 2.0), g.uniform(0.65, 0.9), g.uniform(0.3, 0.45)
    back, arm = g.uniform(0.25, 0.5), g.uniform(0.08, 0.22)
    lift = g.uniform(0.03, 0.12) if _chance(g, 0.6) else 0.0
    parts = [box(x, y, z - lift, (0, 0, lift))]
    rest = box(x, g.uniform(0.1, 0.25), back).rotated(0, g.uniform(-0.25, 0)).moved(y=y * 0.4, z=z)
    parts.append(rest)
    if _chance(g, 0.85):
        height = g.uniform(0.1, 0.3)
        parts += [box(arm, y, z + height - lift, (s * (x + arm) / 2, 0, lift)) for s in (-1, 1)]
    count = max(1, round(x / 0.65))
    if _chance(g, 0.6):
        step = x / count
        parts += [
            box(step * 0.94, y * 0.75, 0.1, ((k + 0.5) * step - x / 2, -y * 0.1, z)) for k in range(count)
        ]
    if lift:
        parts += [
            tube([(sx * x * 0.45, sy * y * 0.42, 0), (sx * x * 0.45, sy * y * 0.42, lift)], 0.02)
            for sx in (-1, 1)
            for sy in (-1, 1)
        ]
    return parts


def _car(g: Generator) -> list[Mesh]:
    x, y, z = g.uniform(1.5, 2.2), g.uniform(0.65, 0.9), g.uniform(0.25, 0.4)
    wheel, cabin = g.uniform(0.14, 0.22), g.uniform(0.25, 0.5)
    front, rear = g.uniform(0.15, 0.35), g.uniform(0.02, 0.25)
    slope, drop = g.uniform(0.05, 0.2), g.uniform(0.02, 0.2)
    side = np.array([
        (-0.5, 0), (0.5, 0), (0.5, z * 0.8), (0.5 - front, z), (0.5 - front - slope, z + cabin),
        (-0.5 + rear + drop, z + cabin), (-0.5 + rear, z), (-0.5, z),
    ]) * (x, 1)  # fmt: skip
    parts = [slab(side, y).rotated(0, np.pi / 2).moved(y=y / 2, z=wheel * 0.8)]
    for sx in (-1, 1):
        for sy in (-1, 1):
            disc = cylinder(wheel, 0.1).rotated(0, np.pi / 2)
            parts.append(disc.moved(sx * x * 0.32, sy * y * 0.5 + 0.05, wheel))
    return parts


def _monitor(g: Generator) -> list[Mesh]:
    x, y = g.uniform(0.7, 1.2), g.uniform(0.02, 0.12)
    z, rise = x * g.uniform(0.5, 0.85), g.uniform(0.08, 0.35)
    screen = box(x, y, z).rotated(0, g.uniform(-0.2, 0.1)).moved(z=rise)
    parts = [screen]
    if _chance(g, 0.4):
        parts.append(box(x * 0.6, y + 0.15, z * 0.6, (0, 0.08, rise + z * 0.2)))  # a tube behind the screen
    base = x * g.uniform(0.2, 0.4)
    if _chance(g, 0.5):
        parts.append(cylinder(base, 0.03).scaled(1, 0.6, 1))
    else:
        parts.append(box(base * 2, base, 0.03))
    return [*parts, box(g.uniform(0.05, 0.15), 0.05, rise + z * 0.2, (0, y / 2 + 0.02, 0))]


# the classes that are hardest to tell apart come first, so that a few classes are not an easy task
_BUILDERS: dict[str, Callable[[Generator], list[Mesh]]] = {
    "chair": _chair,
    "stool": _stool,
    "table": _table,
    "bench": _bench,
    "cup": _cup,
    "bowl": _bowl,
    "vase": _vase,
    "bottle": _bottle,
    "lamp": _lamp,
    "desk": _desk,
    "shelf": _shelf,
    "dresser": _dresser,
    "sofa": _sofa,
    "airplane": _airplane,
    "car": _car,
    "monitor": _monitor,
}
