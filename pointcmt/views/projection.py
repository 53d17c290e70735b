"""Images from points: each point becomes a pixel, or a small disc, of a depth image (SimpleView)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pointcmt.ops import knn
from pointcmt.types import Views
from pointcmt.views.cameras import Rig
from pointcmt.views.cameras import rig as find_rig

# channels that project_points knows, and how many image channels each takes
CHANNELS = {"depth": 1, "near": 1, "density": 1, "normal": 3, "shaded": 1}

# Sums over the points of a pixel are kept in 64-bit integers: the order of addition, which a GPU does not
# fix, then cannot change the result. The count lies in the high bits, the sum of 1/depth in the low ones.
_FRACTION = 20
_COUNT_SHIFT = 44
_MAX_POINTS = 1 << 19
_AMBIENT = 0.25  # part of the light that comes from all around
# points nearer than this to a camera are not drawn; keeps 1/depth inside its bits
_NEAR = 0.1


def count_channels(channels: Sequence[str] = ("depth",)) -> int:
    """Number of image channels C that ``project_points(channels=…)`` returns.

    Raises:
        ValueError: an unknown channel, one named twice, or none.
    """
    unknown = [name for name in channels if name not in CHANNELS]
    if isinstance(channels, str) or unknown or not channels or len(set(channels)) != len(channels):
        raise ValueError(
            f"channels={channels!r}: expected a sequence of distinct names out of {tuple(CHANNELS)}"
        )
    return sum(CHANNELS[name] for name in channels)


@overload
def project_points(
    points: Tensor, rig: str | Rig = ..., size: int = ..., *, cameras: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def project_points(
    points: Tensor, rig: str | Rig = ..., size: int = ..., *, cameras: Literal[True], **options: Any
) -> Views: ...
@torch.no_grad()  # type: ignore[misc]  # the options stand below, once
def project_points(
    points: Tensor,
    rig: str | Rig = "simpleview",
    size: int = 128,
    *,
    up: str = "z",
    channels: Sequence[str] = ("depth",),
    splat: float = 0.0,
    normalize: bool = False,
    neighbors: int = 16,
    cameras: bool = False,
    tolerance: float = 0.02,
) -> Tensor | Views:
    """Project clouds onto the images of a rig, in batch, on the device of the points.

    With the defaults this is SimpleView's projection (Goyal et al. 2021, §4; princeton-vl/SimpleView,
    ``models/mv_utils.py``): perspective; a pixel holds the depth of the point in it, 0 where there is none;
    where several fall on a pixel, their depths averaged with weight 1/depth. Three details differ: pixels are
    half-open squares that tile the image symmetrically (the public code shifts them by half a pixel), images
    are not mirrored, and the up axis is a parameter (theirs is y).

    No gradient flows to the points. Depth and density do not depend on the order of the points, and every
    image is the same, bit by bit, from call to call, on a GPU too.

    Args:
        points: [B, N, 3] clouds in the unit sphere; any floating dtype. Points outside a camera's image,
            nearer to it than 0.1, or not finite, are not drawn.
        rig: a registered name (``simpleview``, ``ring12``, ``dodecahedron20``) or a ``Rig``.
        size: height and width S of the images, in pixels.
        up: the axis of the cloud that points up (ModelNet40: z in the resampled files, y in the h5 files of
            2048 points). A ``Rig`` object is taken as it is.
        channels: what the image shows, in this order.
            ``depth``: distance from the camera along its axis, in the units of the cloud.
            ``near``: the same turned round, as encoders of photographs take it: 1 at the front of the unit
            sphere, 0 at its back and where there is no point.
            ``density``: log(1 + number of points on the pixel).
            ``normal``: 3 channels, the mean surface normal on the pixel in the camera's axes (right, down,
            forward), each turned towards the camera; estimated by PCA of ``neighbors`` nearest points.
            ``shaded``: the mean brightness on the pixel of a surface with these normals under a light at the
            camera, as ``render_mesh`` lights meshes: 0.25 + 0.75 |cos|, in front of black.
        splat: radius of a point in pixels; 0 draws one pixel, 1 a plus, 1.5 a 3×3 square.
        normalize: centre each cloud and scale it to the unit sphere first.
        neighbors: points in each normal's estimate (at most N are used).
        cameras: give a ``Views``: the images with the pixel of each point, whether it is visible, and the
            cameras' matrices, which take the coordinates as they were given, before ``normalize``.
        tolerance: a point is visible where nothing drawn on its pixel, discs included, lies nearer to the
            camera by more than this, in units of the unit sphere. Points of one surface that share a pixel
            differ in depth; 0.02 is about a pixel's side in views of 128 pixels.

    Returns:
        [B, V, C, S, S] float32; with ``cameras`` a ``Views`` of it.

    Raises:
        ValueError: shapes, dtypes or options other than these.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points has shape {list(points.shape)}; expected [B, N, 3]")
    if not points.is_floating_point():
        raise ValueError(f"points has dtype {points.dtype}; expected a floating one: convert with .float()")
    if size < 1:
        raise ValueError(f"size={size}; expected at least 1 pixel")
    if not 0 <= splat <= size:
        raise ValueError(f"splat={splat}; expected a radius in pixels between 0 and size={size}")
    total = count_channels(channels)
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance}; expected a distance of 0 or more")
    rigged = find_rig(rig, up)
    batch, number, views = points.shape[0], points.shape[1], len(rigged)
    if number > _MAX_POINTS:
        raise ValueError(
            f"points has {number} points per cloud; expected at most {_MAX_POINTS}: sample fewer"
        )
    with torch.autocast(points.device.type, enabled=False):
        points = points.float()
        given = points
        if normalize:
            points = unit_sphere(points)
        if batch == 0 or number == 0:
            nothing = points.new_zeros(batch, views, total, size, size)
            return _with_cameras(nothing, given, rigged, normalize) if cameras else nothing
        rotation, eyes = rigged.frames(points.device)
        seen_from = (rotation * eyes[:, None, :]).sum(-1)  # [V, 3] the eyes in their own cameras' axes
        camera = [
            turned - eye[:, None] for turned, eye in zip(_turn(points, rotation), seen_from.t(), strict=True)
        ]
        across, down, depth = camera

        # each image is padded by the radius of a point, so that a disc never wraps around a border
        margin = math.floor(splat)
        width = size + 2 * margin
        focal = size / (2 * math.tan(math.radians(rigged.field_of_view) / 2))
        scale = focal / depth
        column = torch.floor(across * scale + size / 2)
        row = torch.floor(down * scale + size / 2)
        # compared as floats: false for NaN and infinity, which have no integer
        drawn = (column >= 0) & (column < size) & (row >= 0) & (row < size) & (depth >= _NEAR)
        home = margin * (width + 1)  # where points that are not drawn add nothing, any offset away
        image = torch.arange(batch * views, device=points.device).view(batch, views, 1) * (width * width)
        pixel = (
            ((row + margin) * width + (column + margin))
            .masked_fill_(~drawn, home)
            .long()
            .add_(image)
            .view(-1)
        )
        offsets = _disc(splat, width)

        inverse = torch.where(drawn, (1 << _FRACTION) / depth, 0.0)
        packed = inverse.round_().long() + (drawn.long() << _COUNT_SHIFT)
        sums = _accumulate(packed.view(-1, 1), pixel, offsets, batch * views * width * width)
        sums = _crop(sums, batch, views, width, margin)
        count = (sums >> _COUNT_SHIFT).float()
        total_inverse = (sums & ((1 << _COUNT_SHIFT) - 1)).float()

        def averaged(values: Tensor) -> Tensor:
            """Values of the points [B, V, N, C]: their mean on each pixel."""
            fixed = (values * (1 << _FRACTION)).round_().long().reshape(-1, values.shape[-1])
            sums = _accumulate(fixed, pixel, offsets, batch * views * width * width)
            mean = _crop(sums, batch, views, width, margin).float() / (1 << _FRACTION)
            return mean / count.clamp(min=1)

        if {"normal", "shaded"} & set(channels):
            rays = torch.stack(camera, dim=-1)
            estimated = estimate_normals(points, neighbors)  # [B, N, 3]
            normals = torch.stack(_turn(estimated, rotation), dim=-1)  # [B, V, N, 3]
        if {"depth", "near"} & set(channels):
            # Σ w·d / Σ w with w = 1/d; an empty pixel is 0 / 1
            depths = count * (1 << _FRACTION) / total_inverse.clamp(min=1)
        images = []
        for name in channels:
            if name == "depth":
                images.append(depths)
            elif name == "near":
                # the front and the back of the unit sphere are 1 nearer and 1 further than its centre
                back = eyes.norm(dim=-1)[:, None, None, None] + 1
                images.append(torch.where(count > 0, ((back - depths) / 2).clamp(0, 1), 0.0))
            elif name == "density":
                images.append(count.log1p())
            elif name == "shaded":
                cosine = (normals * rays).sum(-1).abs() / rays.norm(dim=-1).clamp(min=_NEAR)
                light = torch.where(drawn, _AMBIENT + (1 - _AMBIENT) * cosine, 0.0)
                images.append(averaged(light[..., None]))
            else:
                # towards the camera: against the ray from the eye to the point
                away = (normals * rays).sum(-1, keepdim=True) > 0
                facing = torch.where(away, -normals, normals)
                images.append(averaged(torch.where(drawn[..., None], facing, 0.0)))
        made = images[0] if len(images) == 1 else torch.cat(images, dim=2)
        if not cameras:
            return made
        pixels = torch.stack([across * scale, down * scale], dim=-1) / size + 0.5
        nearest = depth.new_full((batch * views * width * width,), math.inf)
        behind = torch.where(drawn, depth, math.inf).view(-1)
        for offset in offsets:
            nearest.scatter_reduce_(0, pixel + offset, behind, "amin")
        visible = drawn & (depth <= nearest[pixel].view_as(depth) + tolerance)
        return _with_cameras(made, given, rigged, normalize, pixels, visible)


def _with_cameras(
    images: Tensor,
    points: Tensor,
    rigged: Rig,
    normalize: bool,
    pixels: Tensor | None = None,
    visible: Tensor | None = None,
) -> Views:
    """Images of clouds [B, N, 3] with the matrices of a rig, which undo the clouds' normalisation."""
    batch, number, _ = points.shape
    view, projection = rigged.matrices(points.device)
    view, projection = view.repeat(batch, 1, 1, 1), projection.repeat(batch, 1, 1, 1)
    if normalize and number:
        centre, radius = _sphere(points)
        scaled = torch.eye(4, device=points.device).repeat(batch, 1, 1)
        scaled[:, :3, :3] /= radius
        scaled[:, :3, 3] = (-centre / radius).squeeze(1)
        view = view @ scaled[:, None]
    if pixels is None or visible is None:
        pixels = points.new_zeros(batch, len(rigged), number, 2)
        visible = torch.zeros(batch, len(rigged), number, dtype=torch.bool, device=points.device)
    return Views(images, pixels, visible, view, projection)


def pixels_of(points: Tensor, view_matrix: Tensor, projection_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Where points are in images, by the images' cameras.

    Args:
        points: [B, N, 3].
        view_matrix, projection_matrix: [B, V, 4, 4], as of ``Views``.

    Returns:
        (u, v) [B, V, N, 2], and whether the point is in front of the camera and inside its image: bool
        [B, V, N].
    """
    matrix = (projection_matrix.double() @ view_matrix.double()).float()
    homogeneous = torch.cat([points.float(), points.new_ones(*points.shape[:2], 1).float()], dim=-1)
    clip = (matrix[:, :, None] * homogeneous[:, None, :, None]).sum(-1)  # [B, V, N, 4]
    depth = clip[..., 3:]
    ahead = depth > 0
    pixels = (clip[..., :2] / torch.where(ahead, depth, 1.0) + 1) / 2
    inside = ahead.squeeze(-1) & ((pixels >= 0) & (pixels <= 1)).all(-1)
    return pixels, inside


def unit_sphere(points: Tensor) -> Tensor:
    """Centre each cloud [B, N, 3] on its mean and divide it by its largest distance from there.

    A cloud of a single place is centred and not scaled.
    """
    if points.shape[1] == 0:
        return points
    centre, radius = _sphere(points)
    return (points - centre) / radius


def _sphere(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, 1, 3] of each cloud, and its largest distance from there [B, 1, 1]; 1 where that is 0."""
    centre = points.mean(1, keepdim=True)
    radius = (points - centre).norm(dim=-1).amax(1)[:, None, None]
    return centre, torch.where(radius > 0, radius, 1.0)


@torch.no_grad()
def estimate_normals(points: Tensor, neighbors: int = 16) -> Tensor:
    """Unit normals [B, N, 3] of clouds [B, N, 3], of arbitrary sign: PCA of each point's nearest points.

    The normal is the direction of least variance (Hoppe et al. 1992), from the closed-form eigenvalues of a
    symmetric 3×3 matrix (Smith 1961), because batched ``eigh`` of small matrices is slow on every device.
    Where the least variance has no single direction (points on a line, or all in one place) some unit
    vector across the points is returned.

    Raises:
        ValueError: fewer than 3 neighbours.
    """
    if neighbors < 3:
        raise ValueError(f"neighbors={neighbors}; a plane needs at least 3 points")
    index = knn(points, points, min(neighbors, points.shape[1]))[1]
    batch, number, count = index.shape
    near = points.gather(1, index.view(batch, -1, 1).expand(-1, -1, 3)).view(batch, number, count, 3)
    near = near - near.mean(2, keepdim=True)
    covariance = (near[..., :, None] * near[..., None, :]).sum(2)
    return _least_eigenvector(covariance)


def _least_eigenvector(matrix: Tensor) -> Tensor:
    """Unit eigenvectors [..., 3] of the smallest eigenvalues of symmetric matrices [..., 3, 3]."""
    # scaled to trace 1: the tolerances below then mean the same for every cloud
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    matrix = matrix / torch.where(trace > 0, trace, 1.0)
    identity = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    deviation = matrix - mean * identity
    spread = (deviation.square().sum((-2, -1)) / 6).sqrt().clamp(min=1e-12)
    angle = (torch.linalg.det(deviation) / (2 * spread**3)).clamp(-1, 1).acos() / 3
    least = mean + (2 * spread * torch.cos(angle + 2 * math.pi / 3))[..., None, None]
    # the rows of (matrix − least·I) span the plane across the eigenvector: the longest of their cross
    # products is the best conditioned
    rows = matrix - least * identity
    products = torch.stack(
        [torch.linalg.cross(rows[..., i, :], rows[..., j, :]) for i, j in ((0, 1), (0, 2), (1, 2))],
        dim=-2,
    )
    best = products.square().sum(-1).argmax(-1)
    vector = products.gather(-2, best[..., None, None].expand(*best.shape, 1, 3)).squeeze(-2)
    length = vector.norm(dim=-1, keepdim=True)
    # points on a line: the rows are parallel, any vector across the longest row serves
    longest = rows.gather(
        -2, rows.square().sum(-1).argmax(-1)[..., None, None].expand(*best.shape, 1, 3)
    ).squeeze(-2)
    axis = identity[longest.abs().argmin(-1)]
    across = torch.linalg.cross(longest, axis)
    across_length = across.norm(dim=-1, keepdim=True)
    fallback = torch.where(across_length > 0, across / across_length.clamp(min=1e-30), identity[2])
    return torch.where(length > 1e-7, vector / length.clamp(min=1e-30), fallback)


def _turn(vectors: Tensor, rotation: Tensor) -> list[Tensor]:
    """[B, N, 3] in the axes of V cameras: three coordinates [B, V, N].

    Written out, because a matrix product may run in TF32 or half precision where the user allows that for
    his network, and because here every point is computed alike, whatever its place in the batch.
    """
    x, y, z = vectors[:, None].unbind(-1)  # [B, 1, N] each
    return [x * axis[:, :1] + y * axis[:, 1:2] + z * axis[:, 2:] for axis in rotation.unbind(1)]


def _disc(radius: float, width: int) -> list[int]:
    """Offsets, in a flattened image of that width, of the pixels within ``radius`` of one."""
    reach = math.floor(radius)
    steps = range(-reach, reach + 1)
    return [dy * width + dx for dy in steps for dx in steps if dx * dx + dy * dy <= radius * radius]


def _accumulate(values: Tensor, pixel: Tensor, offsets: list[int], pixels: int) -> Tensor:
    """Sum int64 values [P, C] into pixels [pixels, C], each at every offset from its own pixel."""
    sums = torch.zeros(pixels, values.shape[1], dtype=torch.int64, device=values.device)
    for offset in offsets:
        index = pixel if offset == 0 else pixel + offset
        if values.shape[1] == 1:
            sums.view(-1).index_add_(0, index, values.view(-1))
        else:
            sums.index_add_(0, index, values)
    return sums


def _crop(sums: Tensor, batch: int, views: int, width: int, margin: int) -> Tensor:
    """[pixels, C] of padded images → [B, V, C, S, S] without the padding."""
    images = sums.view(batch, views, width, width, -1).permute(0, 1, 4, 2, 3)
    return images[..., margin : width - margin, margin : width - margin]
