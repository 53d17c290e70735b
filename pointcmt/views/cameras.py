"""Camera rigs: where the cameras stand around a shape in the unit sphere; how to add one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = tuple[float, float, float]

_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Rig:
    """V pinhole cameras that all look at the origin.

    Attributes:
        name: what it is called in configurations.
        eyes: V camera positions, in the units of the cloud (a shape fills the unit sphere).
        ups: V directions that point to the top of the image; any vector not parallel to the view axis.
        field_of_view: full angle of the square image, in degrees.
    """

    name: str
    eyes: tuple[Vector, ...]
    ups: tuple[Vector, ...]
    field_of_view: float

    def __post_init__(self) -> None:
        if not self.eyes or len(self.eyes) != len(self.ups):
            raise ValueError(
                f"rig {self.name!r} has {len(self.eyes)} eyes and {len(self.ups)} ups; expected one up per "
                "eye, at least one"
            )
        if not 0 < self.field_of_view < 180:
            raise ValueError(
                f"rig {self.name!r} has a field of view of {self.field_of_view}; expected degrees in (0, 180)"
            )
        for eye, up in zip(self.eyes, self.ups, strict=True):
            if len(eye) != 3 or len(up) != 3:
                raise ValueError(f"rig {self.name!r}: eye {eye} and up {up} must have three coordinates each")
            across = torch.linalg.cross(torch.tensor(eye).double(), torch.tensor(up).double())
            if not across.norm() > 1e-6 * math.hypot(*eye) * math.hypot(*up):
                raise ValueError(
                    f"rig {self.name!r}: the camera at {eye} has its up vector {up} along its view axis; "
                    "give an up vector that is not parallel to the eye"
                )

    def __len__(self) -> int:
        return len(self.eyes)

    def frames(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Rotations [V, 3, 3], whose rows are right, down and forward, and eyes [V, 3]; float32.

        Camera coordinates of p are ``rotation @ (p - eye)``: x to the right, y down, z is the depth. The
        frame is right-handed, so images are not mirrored.
        """
        # in double on the CPU, then rounded: axis-aligned cameras get exact zeros and ones on every device
        eyes = torch.tensor(self.eyes, dtype=torch.float64)
        ups = torch.tensor(self.ups, dtype=torch.float64)
        forward = torch.nn.functional.normalize(-eyes, dim=1)
        right = torch.nn.functional.normalize(torch.linalg.cross(forward, ups), dim=1)
        down = torch.linalg.cross(forward, right)
        rotation = torch.stack([right, down, forward], dim=1)
        return rotation.to(device, torch.float32), eyes.to(device, torch.float32)

    def matrices(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """View and projection matrices [V, 4, 4] float32, in the conventions of ``pointcmt.types.Views``.

        With ``p = view @ (x, y, z, 1)`` in the camera's axes (right, down, depth) and ``c = projection @ p``,
        the point is at ``(u, v) = (c[:2] / c[3] + 1) / 2`` of the image; ``c[2] / c[3]`` grows from 0 at
        depth 0.1 to 1 at depth 10.
        """
        rotation, eyes = self.frames(device)
        view = torch.eye(4, device=device).repeat(len(self), 1, 1)
        view[:, :3, :3] = rotation
        view[:, :3, 3] = -(rotation * eyes[:, None, :]).sum(-1)
        near, far = 0.1, 10.0
        reach = 1 / math.tan(math.radians(self.field_of_view) / 2)
        projection = torch.zeros(4, 4, device=device)
        projection[0, 0] = projection[1, 1] = reach
        projection[2, 2], projection[2, 3] = far / (far - near), -far * near / (far - near)
        projection[3, 2] = 1
        return view, projection.repeat(len(self), 1, 1)


# name → the rig with z up
_RIGS: dict[str, Rig] = {}


def register_rig(rig: Rig | Callable[[], Rig]) -> Rig:
    """Make a rig known by its name; by call, or as a decorator of a function that returns it.

    Write it with the z axis up: ``rig(name, up=…)`` turns it.

    Raises:
        ValueError: the name is taken.
    """
    made = rig if isinstance(rig, Rig) else rig()
    if made.name in _RIGS:
        raise ValueError(f"there is a rig called {made.name!r} already; choose another name")
    _RIGS[made.name] = made
    return made


def list_rigs() -> list[str]:
    """Names of the registered rigs."""
    return sorted(_RIGS)


def rig(name: str | Rig, up: str = "z") -> Rig:
    """The rig of that name for shapes whose ``up`` axis points up (``"x"``, ``"y"`` or ``"z"``).

    A ``Rig`` object is returned as it is.

    Raises:
        ValueError: unknown name or axis.
    """
    if isinstance(name, Rig):
        return name
    if name not in _RIGS:
        raise ValueError(
            f"unknown rig {name!r}; expected one of {', '.join(list_rigs())}, or add one with register_rig"
        )
    if up not in _AXES:
        raise ValueError(f"unknown up axis {up!r}; expected 'x', 'y' or 'z'")
    found = _RIGS[name]
    if up == "z":
        return found
    # a cyclic change of the axes: z goes to `up`, and the frame stays right-handed
    shift = _AXES.index("z") - _AXES.index(up)

    def turn(vector: Vector) -> Vector:
        return vector[shift % 3], vector[(1 + shift) % 3], vector[(2 + shift) % 3]

    return Rig(found.name, tuple(map(turn, found.eyes)), tuple(map(turn, found.ups)), found.field_of_view)


@register_rig
def _simpleview() -> Rig:
    """Six views along the axes from 1.4 away, 90° wide (SimpleView, Goyal et al. 2021, and its public code).

    Four around the up axis, then from above, then from below.
    """
    eyes = [(-1, 0, 0), (0, -1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1)]
    ups = [(0, 0, 1)] * 4 + [(1, 0, 0), (-1, 0, 0)]
    return Rig(
        "simpleview",
        tuple((1.4 * x, 1.4 * y, 1.4 * z) for x, y, z in eyes),
        tuple((float(x), float(y), float(z)) for x, y, z in ups),
        90.0,
    )


# twice the radius away and 60° wide: the unit sphere touches the borders of the image
_RENDER_DISTANCE = 2.0
_RENDER_FIELD_OF_VIEW = 60.0


@register_rig
def _ring12() -> Rig:
    """Twelve cameras on a ring, 30° apart, looking down from 30° of elevation (MVCNN, Su et al. 2015)."""
    flat, high = math.cos(math.radians(30)), math.sin(math.radians(30))
    eyes = tuple(
        (
            _RENDER_DISTANCE * flat * math.cos(math.radians(30 * k)),
            _RENDER_DISTANCE * flat * math.sin(math.radians(30 * k)),
            _RENDER_DISTANCE * high,
        )
        for k in range(12)
    )
    return Rig("ring12", eyes, ((0.0, 0.0, 1.0),) * 12, _RENDER_FIELD_OF_VIEW)


@register_rig
def _dodecahedron20() -> Rig:
    """Twenty cameras on the vertices of a dodecahedron (MVCNN, Su et al. 2015, second setup).

    No vertex lies on an axis, so "up" is up in every image.
    """
    golden = (1 + math.sqrt(5)) / 2
    signs = (1.0, -1.0)
    vertices: list[Vector] = [(x, y, z) for x in signs for y in signs for z in signs]
    for a in signs:
        for b in signs:
            short, long = a / golden, b * golden
            vertices += [(0.0, short, long), (short, long, 0.0), (long, 0.0, short)]
    scale = _RENDER_DISTANCE / math.sqrt(3)  # every vertex is √3 from the origin
    eyes = tuple((scale * x, scale * y, scale * z) for x, y, z in vertices)
    return Rig("dodecahedron20", eyes, ((0.0, 0.0, 1.0),) * 20, _RENDER_FIELD_OF_VIEW)
