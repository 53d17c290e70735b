import math

import pytest
import torch

from pointcmt.views import (
    Rig,
    ViewSpec,
    count_channels,
    estimate_normals,
    list_rigs,
    pixels_of,
    project_points,
    rig,
    unit_sphere,
)


def clouds(seed: int, batch: int = 3, number: int = 200) -> torch.Tensor:
    points = torch.randn(batch, number, 3, generator=torch.Generator().manual_seed(seed))
    return points / points.norm(dim=-1).amax(1)[:, None, None]


def slow_formula(points: torch.Tensor, cameras: Rig, size: int, radius: float = 0.0):
    """Depth and density, point by point in Python floats, from the paper's description.

    A camera that looks along f with its top towards u has right = f × u; the pixel is the square the ray
    falls in on a plane at unit distance whose half side is tan(field of view / 2).
    """
    depth = torch.zeros(len(points), len(cameras), size, size, dtype=torch.float64)
    density = torch.zeros_like(depth)
    half = math.tan(math.radians(cameras.field_of_view / 2))
    for b, cloud in enumerate(points.tolist()):
        for v, (eye, up) in enumerate(zip(cameras.eyes, cameras.ups, strict=True)):
            length = math.dist(eye, (0, 0, 0))
            f = [-e / length for e in eye]
            r = [f[1] * up[2] - f[2] * up[1], f[2] * up[0] - f[0] * up[2], f[0] * up[1] - f[1] * up[0]]
            r = [x / math.hypot(*r) for x in r]
            u = [r[1] * f[2] - r[2] * f[1], r[2] * f[0] - r[0] * f[2], r[0] * f[1] - r[1] * f[0]]
            pixels: dict[tuple[int, int], list[float]] = {}
            for point in cloud:
                ray = [p - e for p, e in zip(point, eye, strict=True)]
                z = sum(a * b for a, b in zip(ray, f, strict=True))
                x = sum(a * b for a, b in zip(ray, r, strict=True)) / z / half
                y = -sum(a * b for a, b in zip(ray, u, strict=True)) / z / half
                column, row = math.floor((x + 1) / 2 * size), math.floor((y + 1) / 2 * size)
                if not (0 <= column < size and 0 <= row < size):
                    continue
                reach = math.ceil(radius)
                for dr in range(-reach, reach + 1):
                    for dc in range(-reach, reach + 1):
                        inside = 0 <= row + dr < size and 0 <= column + dc < size
                        if inside and math.hypot(dr, dc) <= radius:
                            pixels.setdefault((row + dr, column + dc), []).append(z)
            for (row, column), values in pixels.items():
                weights = [1 / z for z in values]
                average = sum(w * z for w, z in zip(weights, values, strict=True)) / sum(weights)
                depth[b, v, row, column] = average
                density[b, v, row, column] = math.log(1 + len(values))
    return depth, density


def assert_same_images(actual: torch.Tensor, expected: torch.Tensor, points: int):
    """Equal but for points within rounding of a pixel's border: at most one in 500 may differ."""
    wrong = ((actual.double() - expected).abs() > 1e-5).sum().item()
    assert wrong <= 2 * points / 500, f"{wrong} pixels differ"


@pytest.mark.parametrize("name", ["simpleview", "ring12", "dodecahedron20"])
@pytest.mark.parametrize(("size", "splat"), [(16, 0.0), (31, 0.0), (16, 1.0), (9, 2.3)])
def test_against_the_slow_formula(name, size, splat):
    points = clouds(size)
    images = project_points(points, name, size, channels=("depth", "density"), splat=splat)
    assert images.shape == (3, len(rig(name)), 2, size, size)
    assert images.dtype == torch.float32
    depth, density = slow_formula(points, rig(name), size, splat)
    drawn = points.shape[0] * points.shape[1] * len(rig(name))
    assert (depth > 0).sum() > 100
    assert density.max() > math.log(2.5), "points must collide for this test to mean something"
    assert_same_images(images[:, :, 0], depth, drawn)
    assert_same_images(images[:, :, 1], density, drawn)


def test_known_pixels_and_orientation():
    """One point up and to the right as seen from the camera at +x (z up): right of it is +y."""
    point = torch.tensor([[[0.0, 0.35, 0.7]]])
    images = project_points(point, "simpleview", 8)[0, :, 0]
    seen = rig("simpleview").eyes.index((1.4, 0.0, 0.0))
    # 0.35 / 1.4 · 4 + 4 = 5.0 → column 5 ; 4 − 0.7 / 1.4 · 4 = 2 → row 2
    assert images[seen].nonzero().tolist() == [[2, 5]]
    assert images[seen][2, 5] == pytest.approx(1.4)
    behind = rig("simpleview").eyes.index((-1.4, 0.0, 0.0))
    assert images[behind].nonzero()[0, 1] < 4, "from the other side it is on the left"


def test_collisions_average_with_inverse_depth():
    camera = Rig("one", ((0.0, 0.0, 2.0),), ((0.0, 1.0, 0.0),), 90.0)
    points = torch.tensor([[[0.01, 0.01, 1.0], [0.01, 0.01, -1.0]]])
    image = project_points(points, camera, 2)[0, 0, 0]
    # depths 1 and 3, weights 1 and 1/3: (1·1 + 3/3) / (4/3) = 1.5
    assert sorted(image.flatten().tolist()) == pytest.approx([0, 0, 0, 1.5])


def test_order_of_points_changes_nothing_bit_by_bit():
    points = clouds(5, batch=2, number=3000)
    images = project_points(points, size=12, channels=("depth", "density"), splat=1)
    shuffled = points[:, torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(images, project_points(shuffled, size=12, channels=("depth", "density"), splat=1))
    assert torch.equal(
        images[1:], project_points(points[1:], size=12, channels=("depth", "density"), splat=1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    points = clouds(6).to(dtype)
    images = project_points(points, size=16)
    assert images.dtype == torch.float32
    assert torch.equal(images, project_points(points.float(), size=16))


def test_under_autocast():
    points = clouds(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = project_points(points, size=32, channels=("depth", "normal"))
    assert torch.equal(images, project_points(points, size=32, channels=("depth", "normal")))


def test_no_gradient_and_no_change_of_the_input():
    points = clouds(8).requires_grad_()
    before = points.detach().clone()
    assert not project_points(points, size=8, normalize=True).requires_grad
    assert torch.equal(points.detach(), before)


def test_points_that_cannot_be_drawn_are_left_out():
    points = clouds(9, batch=1)
    bad = torch.tensor(
        [[[math.nan, 0, 0], [math.inf, 0, 0], [0, -math.inf, math.nan], [50, 0, 0], [1.4, 0, 0]]]
    )
    # (50, 0, 0) is behind one camera, and straight ahead of the opposite one
    expected = project_points(torch.cat([points, bad[:, 3:]], dim=1), size=16, splat=1)
    assert torch.equal(project_points(torch.cat([bad, points], dim=1), size=16, splat=1), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 10, 3), (2, 0, 3)])
def test_empty(shape):
    images = project_points(torch.zeros(shape), size=4, channels=("depth", "normal"))
    assert images.shape == (shape[0], 6, 4, 4, 4)
    assert not images.any()


def test_normalize():
    points = clouds(10)
    moved = points * 7 + torch.tensor([1.0, -5.0, 3.0])
    centred = unit_sphere(points)
    torch.testing.assert_close(centred.norm(dim=-1).amax(1), torch.ones(3))
    torch.testing.assert_close(unit_sphere(moved), centred, atol=1e-5, rtol=0)
    assert torch.equal(project_points(points, size=16, normalize=True), project_points(centred, size=16))
    assert not unit_sphere(torch.full((1, 4, 3), 2.5)).any()


def test_normals_of_planes_lines_and_places():
    generator = torch.Generator().manual_seed(11)
    flat = torch.rand(40, 300, 2, generator=generator)
    basis = torch.linalg.qr(torch.randn(40, 3, 3, generator=generator))[0]
    plane = flat @ basis[:, :2]
    normals = estimate_normals(plane, 12)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(40, 300))
    cosine = (normals * basis[:, 2:]).sum(-1).abs()
    assert cosine.min() > 0.999
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([0.6, 0.0, 0.8])
    across = estimate_normals(line[None], 8)
    torch.testing.assert_close(across.norm(dim=-1), torch.ones(1, 50))
    assert (across @ torch.tensor([0.6, 0.0, 0.8])).abs().max() < 1e-3
    torch.testing.assert_close(estimate_normals(torch.ones(1, 5, 3), 8).norm(dim=-1), torch.ones(1, 5))


def test_normals_against_eigh():
    points = clouds(12, batch=4, number=100)
    normals = estimate_normals(points, 10).double()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    index = distance.topk(10, largest=False).indices
    near = points[torch.arange(4)[:, None, None], index].double()
    near = near - near.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh(near.transpose(2, 3) @ near)
    clear = values[..., 1] - values[..., 0] > 0.05 * values[..., 2]
    assert clear.float().mean() > 0.5
    cosine = (normals * vectors[..., 0]).sum(-1).abs()
    assert cosine[clear].min() > 0.999


def test_normal_channels_face_the_camera():
    """A sphere from outside: the normal at the middle of the image points at the eye, −forward."""
    points = torch.nn.functional.normalize(
        torch.randn(1, 8000, 3, generator=torch.Generator().manual_seed(13)), dim=-1
    )
    points = points[:, points[0, :, 0] > 0.75]  # the cap that the camera at +x sees from its place at 1.4
    images = project_points(points, "simpleview", 16, channels=("depth", "normal"))
    seen = rig("simpleview").eyes.index((1.4, 0.0, 0.0))
    depth, normal = images[0, seen, 0], images[0, seen, 1:]
    assert (normal[2][depth > 0] < 0).all()
    assert normal[2, 6:10, 6:10][depth[6:10, 6:10] > 0].mean() < -0.9
    # to the right of the middle it leans right, above the middle it leans up (negative down)
    assert normal[0, :, 11][depth[:, 11] > 0].mean() > 0.1
    assert normal[1, 4][depth[4] > 0].mean() < -0.1


def test_view_spec_is_the_projection_and_survives_json():
    import json

    spec = ViewSpec(rig="ring12", size=24, channels=["depth", "density"], splat=1.0, up="y", normalize=True)
    points = clouds(14)
    expected = project_points(
        points, "ring12", 24, channels=("depth", "density"), splat=1.0, up="y", normalize=True
    )
    assert torch.equal(spec.project(points), expected)
    assert (spec.num_views, spec.num_channels) == expected.shape[1:3]
    assert ViewSpec(**json.loads(json.dumps(spec.describe()))) == spec
    assert ViewSpec(size=64).describe() != ViewSpec(size=32).describe()
    with pytest.raises(ValueError, match="unknown rig"):
        ViewSpec(rig="none")


def test_the_rigs_give_the_views_they_promise():
    for name in list_rigs():
        assert project_points(clouds(15, 1, 20), name, 8).shape == (1, len(rig(name)), 1, 8, 8)


def test_errors():
    points = clouds(16)
    with pytest.raises(ValueError, match=r"shape \[3, 200\]; expected \[B, N, 3\]"):
        project_points(points[..., 0])
    with pytest.raises(ValueError, match=r"int64; expected a floating one"):
        project_points(points.long())
    with pytest.raises(ValueError, match="size=0"):
        project_points(points, size=0)
    with pytest.raises(ValueError, match="splat=-1"):
        project_points(points, splat=-1)
    for channels in ((), "depth", ("depth", "depth"), ("colour",)):
        with pytest.raises(ValueError, match="expected a sequence of distinct names out of"):
            project_points(points, channels=channels)
    assert count_channels(("depth", "normal")) == 4
    with pytest.raises(ValueError, match="at most 524288"):
        project_points(torch.zeros(1, 1, 3).expand(1, (1 << 19) + 1, 3))
    with pytest.raises(ValueError, match="neighbors=2"):
        estimate_normals(points, 2)


@pytest.mark.cuda
def test_cuda_agrees_and_repeats_itself(cuda):
    points = clouds(17, batch=8, number=5000)
    options = {"size": 32, "channels": ("depth", "density", "normal"), "splat": 1.0}
    expected = project_points(points, **options)
    first = project_points(points.to(cuda), **options)
    assert torch.equal(first, project_points(points.to(cuda), **options))
    differs = ((first.cpu() - expected).abs() > 1e-3).any(2).float().mean()
    assert differs < 0.01


# ---- cameras


@pytest.mark.parametrize("splat", [0.0, 1.5])
@pytest.mark.parametrize("size", [7, 64, 128])
@pytest.mark.parametrize("up", ["x", "y", "z"])
@pytest.mark.parametrize("name", ["simpleview", "ring12", "dodecahedron20"])
def test_a_point_that_is_drawn_lands_on_its_own_pixel(name, up, size, splat):
    points = clouds(11, batch=40, number=1) * 0.8
    views = project_points(points, name, size, up=up, splat=splat, cameras=True)
    cell = (views.pixels.squeeze(2) * size).floor().long()  # [B, V, 2], column and row
    assert views.visible.all() and (cell >= 0).all() and (cell < size).all()
    depth = views.images[:, :, 0]
    batch, view = torch.meshgrid(torch.arange(40), torch.arange(len(rig(name))), indexing="ij")
    assert (depth[batch, view, cell[..., 1], cell[..., 0]] > 0).all()
    if splat == 0:
        assert ((depth > 0).sum((2, 3)) == 1).all()
    # the matrices say the same as the drawing
    pixels, inside = pixels_of(points, views.view_matrix, views.projection_matrix)
    torch.testing.assert_close(pixels, views.pixels, atol=1e-5, rtol=0)
    assert inside.all()


def test_matrices_take_the_points_as_they_were_given():
    points = 40 * clouds(12) + 300
    views = project_points(points, "ring12", 32, normalize=True, cameras=True)
    pixels, inside = pixels_of(points, views.view_matrix, views.projection_matrix)
    torch.testing.assert_close(pixels, views.pixels, atol=2e-4, rtol=0)
    assert torch.equal(inside, ((views.pixels >= 0) & (views.pixels <= 1)).all(-1))
    assert torch.equal(views.images, project_points(points, "ring12", 32, normalize=True))


def test_what_lies_behind_is_not_visible():
    """Two points on the ray of the first camera, and one beside them."""
    points = torch.tensor([[[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.6, 0.0]]])
    views = project_points(points, "simpleview", 64, cameras=True)
    assert rig("simpleview").eyes[0] == (-1.4, 0, 0) and rig("simpleview").eyes[2] == (1.4, 0, 0)
    assert views.visible[0, 0].tolist() == [True, False, True]
    assert views.visible[0, 2].tolist() == [False, True, True]
    near = torch.tensor([[[-0.5, 0.0, 0.0], [-0.49, 0.0, 0.0]]])
    assert project_points(near, "simpleview", 64, cameras=True).visible[0, 0].all()
    strict = project_points(near, "simpleview", 64, cameras=True, tolerance=0.0).visible[0, 0]
    assert strict.tolist() == [True, False]


def test_points_outside_of_the_image_are_not_visible():
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [-1.5, 0.0, 0.0], [math.nan, 0, 0]]])
    views = project_points(points, "simpleview", 64, cameras=True)
    assert views.visible[0, 0].tolist() == [True, False, False, False]
    _, inside = pixels_of(points[:, :3], views.view_matrix, views.projection_matrix)
    assert inside[0, 0].tolist() == [True, False, False]


def test_cameras_of_nothing():
    views = project_points(torch.zeros(2, 0, 3), cameras=True, normalize=True)
    assert views.pixels.shape == (2, 6, 0, 2) and views.view_matrix.shape == (2, 6, 4, 4)
    with pytest.raises(ValueError, match="tolerance"):
        project_points(torch.zeros(1, 1, 3), cameras=True, tolerance=-1)


def test_near_is_depth_turned_round_into_the_range_of_pictures():
    points = clouds(9)
    depth, near = (project_points(points, size=24, channels=(name,)) for name in ("depth", "near"))
    eyes = torch.tensor(rig("simpleview").eyes).norm(dim=1).view(1, -1, 1, 1, 1)
    expected = torch.where(depth > 0, (eyes + 1 - depth) / 2, 0.0)
    torch.testing.assert_close(near, expected.clamp(0, 1))
    assert near.min() >= 0 and near.max() <= 1 and near[depth > 0].std() > 0.1


def test_shaded_is_the_light_of_a_lamp_at_the_camera():
    side = torch.linspace(-0.5, 0.5, 40)
    for slant in (0.0, 0.7):  # a plate, seen by the camera on +z, turned about y
        x, y = torch.meshgrid(side, side, indexing="ij")
        plate = torch.stack([x * math.cos(slant), y, -x * math.sin(slant)], -1).view(1, -1, 3)
        cameras = Rig("above", eyes=((0, 0, 3.0),), ups=((0, 1.0, 0),), field_of_view=30)
        image = project_points(plate, cameras, 32, channels=("shaded",))[0, 0, 0]
        middle = image[15:17, 15:17]
        assert middle.mean().item() == pytest.approx(0.25 + 0.75 * math.cos(slant), abs=0.03)
        assert image.min() == 0 and image[0, 0] == 0
