"""Simple surfaces as triangle meshes, and uniform sampling of them: the parts of synthetic shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Mesh(NamedTuple):
    """Triangles: vertices float64 [v, 3] and faces int64 [f, 3]."""

    vertices: np.ndarray
    faces: np.ndarray

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Mesh:
        return Mesh(self.vertices + np.array([x, y, z]), self.faces)

    def scaled(self, x: float, y: float, z: float) -> Mesh:
        return Mesh(self.vertices * (x, y, z), self.faces)

    def rotated(self, axis: int, angle: float) -> Mesh:
        """Turned about coordinate axis 0, 1 or 2 through the origin by ``angle`` in radians."""
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turned = self.vertices.copy()
        cos, sin = np.cos(angle), np.sin(angle)
        turned[:, first] = cos * self.vertices[:, first] - sin * self.vertices[:, second]
        turned[:, second] = sin * self.vertices[:, first] + cos * self.vertices[:, second]
        return Mesh(turned, self.faces)


def join(parts: list[Mesh]) -> Mesh:
    """All parts as one mesh; parts may cross each other, as in CAD models."""
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    return Mesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)]),
    )


_CUBE = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
_CUBE_FACES = np.array([
    [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
    [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],
])  # fmt: skip


def box(x: float, y: float, z: float, at: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    """A box of sides x, y, z that *stands* at ``at``: centred on it in x and y, its bottom there in z."""
    return Mesh(_CUBE * (x, y, z) + (at[0], at[1], at[2] + z / 2), _CUBE_FACES)


def _strips(rings: int, around: int, closed: bool) -> np.ndarray:
    """Faces between consecutive rings of ``around`` vertices each."""
    steps = around if closed else around - 1
    ring, step = np.repeat(np.arange(rings - 1), steps), np.tile(np.arange(steps), rings - 1)
    a, b = ring * around + step, ring * around + (step + 1) % around
    return np.concatenate([np.stack([a, b, a + around], 1), np.stack([b, b + around, a + around], 1)])


def lathe(profile: list[tuple[float, float]] | np.ndarray, around: int = 20) -> Mesh:
    """The surface that a profile of (radius, height) points sweeps when turned about the z axis."""
    radius, height = np.asarray(profile, dtype=float).T
    angle = np.arange(around) * (2 * np.pi / around)
    level = np.repeat(height[:, None], around, axis=1)
    vertices = np.stack([np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle)), level], axis=-1)
    return Mesh(vertices.reshape(-1, 3), _strips(len(radius), around, closed=True))


def cylinder(radius: float, height: float, top: float | None = None, around: int = 20) -> Mesh:
    """A closed cylinder standing on the origin; with ``top``, a cone frustum of that upper radius."""
    return lathe([(0, 0), (radius, 0), (radius if top is None else top, height), (0, height)], around)


def ellipsoid(x: float, y: float, z: float) -> Mesh:
    """An ellipsoid of half axes x, y, z about the origin."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 9)
    return lathe(np.stack([np.cos(angle), np.sin(angle)], 1), 16).scaled(x, y, z)


def tube(path: np.ndarray | list[tuple[float, float, float]], radius: float, around: int = 8) -> Mesh:
    """A pipe of a radius along a polyline [k, 3], open at its ends."""
    points = np.asarray(path, dtype=float)
    tangent = np.gradient(points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    # a direction off the whole path; a plane curve gets its own normal, so that the pipe does not pinch
    side = np.cross(tangent[0], tangent[-1])
    if np.linalg.norm(side) < 1e-6:
        side = np.eye(3)[np.abs(tangent[0]).argmin()]
    first = np.cross(tangent, side)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(tangent, first)
    angle = np.arange(around) * (2 * np.pi / around)
    circle = np.cos(angle)[:, None] * first[:, None] + np.sin(angle)[:, None] * second[:, None]
    vertices = points[:, None] + radius * circle
    return Mesh(vertices.reshape(-1, 3), _strips(len(points), around, closed=True))


def slab(outline: np.ndarray | list[tuple[float, float]], thickness: float) -> Mesh:
    """A plate over a polygon [k, 2] in the xy plane, from z = 0 to ``thickness``.

    The polygon must be visible from its centroid (convex ones are).
    """
    edge = np.asarray(outline, dtype=float)
    count, centre = len(edge), edge.mean(0)
    levels = [np.column_stack([edge, np.full(count, z)]) for z in (0.0, thickness)]
    middle = [[*centre, 0.0], [*centre, thickness]]
    step = np.arange(count)
    fan = np.stack([np.full(count, 2 * count), step, (step + 1) % count], 1)
    lid = np.stack([np.full(count, 2 * count + 1), count + step, count + (step + 1) % count], 1)
    return Mesh(np.concatenate([*levels, middle]), np.concatenate([fan, lid, _strips(2, count, closed=True)]))


def sample(mesh: Mesh, count: int, generator: np.random.Generator) -> np.ndarray:
    """``count`` points drawn uniformly by area on the surface of ``mesh``: float64 [count, 3]."""
    corner = mesh.vertices[mesh.faces]
    first, second = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    normal = np.cross(first, second)
    total = np.cumsum(np.sqrt(np.einsum("ij,ij->i", normal, normal)))
    face = np.searchsorted(total, generator.random(count) * total[-1], side="right")
    face = np.minimum(face, len(total) - 1)  # rounding may reach the very end
    u, v = generator.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return corner[face, 0] + u * first[face] + v * second[face]
