import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from pointcmt.data import MultiViewImages
from pointcmt.views import Rig, pixels_of, project_points
from pointcmt.views import mesh as module
from pointcmt.views.mesh import read_mesh, render_folder, render_mesh

ROOT = Path(__file__).resolve().parents[2]
TETRAHEDRON = "4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 2 1\n3 0 1 3\n3 1 2 3\n3 0 3 2\n"


@pytest.fixture(scope="module")
def renders():
    """Skips where VTK cannot draw; the error of the package itself is the reason."""
    pytest.importorskip("pyvista", reason="pyvista is not installed: pip install 'pointcmt[mesh]'")
    try:
        with module._plotter(8):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))


def lopsided() -> trimesh.Trimesh:
    """A body without symmetry, off the origin: a slab with a leg under one corner."""
    leg = trimesh.creation.cylinder(0.1, 2).apply_translation((0.8, 0.3, -1))
    return trimesh.util.concatenate([trimesh.creation.box((2, 1, 0.2)), leg]).apply_translation((5, -2, 3))


@pytest.mark.parametrize("header", ["OFF\n", "OFF", "OFF ", "# made by hand\nOFF\n\n"])
def test_off_files_as_modelnet_has_them(tmp_path, header):
    path = tmp_path / "a.off"
    path.write_text(header + TETRAHEDRON)
    vertices, faces = read_mesh(path)
    assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert faces.tolist() == [[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]


def test_polygons_become_triangles(tmp_path):
    path = tmp_path / "a.off"
    path.write_text("OFF\n5 1 0\n0 0 0\n1 0 0\n2 1 0\n1 2 0\n0 1 0\n5 0 1 2 3 4\n")
    vertices, faces = read_mesh(path)
    corners = vertices[faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    assert len(faces) == 3
    assert area.sum() == pytest.approx(2.5)


@pytest.mark.parametrize("suffix", ["off", "obj", "ply"])
def test_formats_agree(tmp_path, suffix):
    mesh = lopsided()
    mesh.export(tmp_path / f"m.{suffix}")
    vertices, faces = read_mesh(tmp_path / f"m.{suffix}")
    assert len(faces) == len(mesh.faces)
    corners = vertices[faces].mean((0, 1))
    np.testing.assert_allclose(corners, mesh.triangles.mean((0, 1)), atol=1e-5)


def test_unreadable_meshes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mesh at .*none\.off"):
        read_mesh(tmp_path / "none.off")
    (tmp_path / "a.stl").write_text("")
    with pytest.raises(ValueError, match=r"no known format '\.stl'; expected one of \.off, \.obj, \.ply"):
        read_mesh(tmp_path / "a.stl")
    for name, text, reason in (
        ("truncated.off", "OFF\n" + TETRAHEDRON[:40], "promises 4 vertices and 4 faces"),
        ("other.off", "ply\n", "does not begin with OFF"),
        ("empty.off", "", "does not begin with OFF"),
        ("far.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "name vertices 0 to 7 of 3"),
        ("nan.off", "OFF\n3 1 0\n0 0 nan\n1 0 0\n0 1 0\n3 0 1 2\n", r"vertex 0 is .*nan.*finite"),
        ("corner.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n9 0 1 2\n", "a face of 9 corners"),
        ("flat.off", "4OFF\n1 0 0\n0 0 0 0\n", "other than three dimensions"),
        ("short.off", "OFF BINARY\n\0\0\0\x03", "cannot be read as a mesh"),
        ("broken.ply", "ply\nformat ascii 1.0\nelement vertex 3\n", "cannot be read as a mesh"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=reason) as error:
            read_mesh(tmp_path / name)
        assert name in str(error.value)
    cloud = tmp_path / "points.off"
    cloud.write_text("OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n")
    assert read_mesh(cloud)[1].shape == (0, 3)
    with pytest.raises(ValueError, match=r"points\.off has 3 vertices and no face"):
        module._read_surface(cloud)


def binary_off(kind: str) -> bytes:
    """A square and a triangle of two, with the columns of ``kind`` beside the coordinates."""
    width = {"": 0, "C": 4, "N": 3, "ST": 2, "CN": 7}[kind]
    rows = np.full((4, 3 + width), 7.5, ">f4")
    rows[:, :3] = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    faces = [np.array([4, 0, 1, 2, 3, 0], ">i4"), np.array([3, 0, 1, 3, 3], ">i4"), np.ones(3, ">f4")]
    counts = np.array([4, 2, 0], ">i4").tobytes()
    return f"{kind}OFF BINARY\n".encode() + counts + rows.tobytes() + b"".join(f.tobytes() for f in faces)


@pytest.mark.parametrize("kind", ["", "C", "N", "ST", "CN"])
def test_kinds_of_off(tmp_path, kind):
    """Case 18: COFF, NOFF, STOFF and so on, in text of either case and binary: the same mesh."""
    more = " 9" * {"": 0, "C": 4, "N": 3, "ST": 2, "CN": 7}[kind]
    rows = "".join(f"{point}{more}\n" for point in ("0 0 0", "1 0 0", "1 1 0", "0 1 0"))
    text = f"{kind}OFF\n4 2 0\n{rows}4 0 1 2 3\n3 0 1 3 255 0 0\n"
    for name, content in (
        ("a.off", text.encode()), ("b.OFF", text.lower().encode()), ("c.off", binary_off(kind)),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        vertices, faces = read_mesh(tmp_path / name)
        assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], name
        assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 3]], name


def test_what_would_write_the_same_images_is_refused_and_hidden_files_are_skipped(tmp_path):
    folder = tmp_path / "ball" / "train"
    folder.mkdir(parents=True)
    for name in ("a.off", "a.obj", "._a.off"):
        (folder / name).write_text("OFF\n" + TETRAHEDRON)
    with pytest.raises(ValueError, match=r"a\.obj and .*a\.off would write the same images"):
        render_folder(tmp_path, tmp_path / "out")
    (folder / "a.obj").rename(folder / "A.off")
    if len(list(folder.iterdir())) == 3:  # this system tells them apart
        with pytest.raises(ValueError, match=r"A\.off and .*a\.off would write the same images \(capitals"):
            render_folder(tmp_path, tmp_path / "out")


def test_without_pyvista_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.off").write_text("OFF\n" + TETRAHEDRON)
    monkeypatch.setitem(sys.modules, "pyvista", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pointcmt\[mesh\]'"):
        render_mesh(tmp_path / "a.off")


def test_without_opengl_it_says_what_to_install(tmp_path, monkeypatch):
    pyvista = pytest.importorskip("pyvista")

    def broken(*args, **kwargs):
        raise RuntimeError("no libGL.so.1")

    (tmp_path / "a.off").write_text("OFF\n" + TETRAHEDRON)
    monkeypatch.setattr(pyvista, "Plotter", broken)
    with pytest.raises(RuntimeError, match=r"no libGL\.so\.1.*apt-get install libgl1"):
        render_mesh(tmp_path / "a.off")


def test_views_match_the_projection_of_points_on_the_same_mesh(tmp_path, renders):
    """Mesh and point views come from the same cameras: silhouettes agree, and only in the matching view."""
    mesh = lopsided()
    mesh.export(tmp_path / "m.obj")
    size = 160
    images = render_mesh(tmp_path / "m.obj", "simpleview", size)
    assert images.shape == (6, 3, size, size)
    assert images.dtype == torch.float32
    assert images.max() == 1
    assert images.min() >= 0
    rendered = images.amin(1) < 0.99
    points, _ = trimesh.sample.sample_surface(mesh, 400_000, seed=1)
    centre = (mesh.vertices.max(0) + mesh.vertices.min(0)) / 2
    points = (points - centre) / np.linalg.norm(mesh.vertices - centre, axis=1).max()
    projected = project_points(torch.from_numpy(points)[None], "simpleview", size)[0, :, 0] > 0
    overlap = torch.tensor(
        [[(r & p).sum() / (r | p).sum() for p in projected] for r in rendered], dtype=torch.float64
    )
    assert overlap.diagonal().min() > 0.85
    assert torch.equal(overlap.argmax(1), torch.arange(6))


RENDER_FIRST = """
import importlib.util, sys
import torch
from pointcmt.views.mesh import render_mesh

assert render_mesh(sys.argv[1], "simpleview", 16).shape == (6, 3, 16, 16)
from pointcmt import ImageTeacher

teacher = ImageTeacher(3, backbone="test_resnet", feature_dim=8).eval()
if importlib.util.find_spec("triton"):
    import triton
assert teacher(render_mesh(sys.argv[1], "simpleview", 32)[None]).logits.shape == (1, 3)
"""


def test_rendering_before_all_else_ends_no_process(tmp_path, renders):
    """Case 9: render_mesh, then a teacher and triton, whose LLVM is not Mesa's."""
    lopsided().export(tmp_path / "m.obj")
    command = [sys.executable, "-c", RENDER_FIRST, str(tmp_path / "m.obj")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_shading_tells_the_slant(tmp_path, renders):
    """Under a light at the camera, a face seen square is brighter than one seen at 60°."""
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.ply")
    angle = math.radians(60)
    eyes = ((2.0, 0, 0), (2 * math.cos(angle), 2 * math.sin(angle), 0))
    images = render_mesh(tmp_path / "box.ply", Rig("two", eyes, ((0, 0, 1.0),) * 2, 60.0), 64)
    square = images[0, 0, 32, 32]
    slanted = images[1, 0, 32][images[1, 0, 32] < 0.99].min()
    assert slanted < square - 0.1
    assert square < 0.99, "the shape must differ from the background"


def test_size_and_place_of_the_mesh_do_not_matter(tmp_path, renders):
    lopsided().export(tmp_path / "a.off")
    lopsided().apply_scale(40).apply_translation((9, 9, -300)).export(tmp_path / "b.off")
    one, other = (render_mesh(tmp_path / name, "ring12", 32) for name in ("a.off", "b.off"))
    assert ((one - other).abs() > 0.05).float().mean() < 0.01


def test_render_folder_names_resumes_and_matches(tmp_path, renders):
    meshes, out = tmp_path / "meshes", tmp_path / "views"
    for name in ("desk/train/desk_0001", "desk/test/desk_0002", "night_stand/train/night_stand_0001"):
        path = meshes / f"{name}.off"
        path.parent.mkdir(parents=True, exist_ok=True)
        lopsided().export(path)
    assert render_folder(meshes, out, "ring12", 24, progress=False) == 3
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert len(written) == 36
    assert written[0] == "test/desk/desk_0002_001.png"
    assert "train/night_stand/night_stand_0001_012.png" in written
    third = torch.from_numpy(np.array(Image.open(out / "test/desk/desk_0002_003.png"))).permute(2, 0, 1) / 255
    expected = render_mesh(meshes / "desk/test/desk_0002.off", "ring12", 24)[2]
    assert (third - expected).abs().max() < 1 / 255
    # a run that was killed inside a shape does that shape again, and nothing else
    kept = (out / "test/desk/desk_0002_001.png").stat().st_mtime_ns
    os.remove(out / "train/desk/desk_0001_012.png")
    assert render_folder(meshes, out, "ring12", 24, progress=False) == 1
    assert (out / "train/desk/desk_0001_012.png").exists()
    assert (out / "test/desk/desk_0002_001.png").stat().st_mtime_ns == kept
    assert render_folder(meshes, out, "ring12", 24, progress=False) == 0
    with pytest.raises(FileNotFoundError, match=r"no mesh under .*<class>/train/\*\.off"):
        render_folder(out, tmp_path / "other")


def test_rendered_views_carry_their_cameras(renders, tmp_path):
    """Three small tetrahedra far from the origin: each is found where the matrices say, in every view."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]) * 0.5
    centres = np.array([[100.0, 50, 7], [110, 50, 7], [100, 58, 12]])
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    vertices = np.concatenate([corners + centre - corners.mean(0) for centre in centres])
    triangles = np.concatenate([faces + 4 * k for k in range(3)])
    folder = tmp_path / "thing" / "train"
    folder.mkdir(parents=True)
    lines = ["OFF", f"{len(vertices)} {len(triangles)} 0", *(" ".join(map(str, v)) for v in vertices)]
    lines += [f"3 {a} {b} {c}" for a, b, c in triangles]
    (folder / "three.off").write_text("\n".join(lines))
    views = render_mesh(folder / "three.off", "dodecahedron20", 96, cameras=True)
    points = torch.from_numpy(centres).float()[None]
    pixels, inside = pixels_of(points, views.view_matrix, views.projection_matrix)
    assert inside.all() and views.images.shape == (1, 20, 3, 96, 96)
    cells = (pixels[0] * 96).long()
    for view, picture in enumerate(views.images[0]):
        for column, row in cells[view].tolist():
            assert (picture[:, row - 2 : row + 3, column - 2 : column + 3] < 0.97).any(), (view, row, column)
    # and those in files say the same
    render_folder(tmp_path, tmp_path / "images", size=96, progress=False)
    stored = MultiViewImages(tmp_path / "images", "train").views(0)
    torch.testing.assert_close(stored.view_matrix, views.view_matrix)
    torch.testing.assert_close(stored.projection_matrix, views.projection_matrix)
    torch.testing.assert_close(stored.images, views.images, atol=0.01, rtol=0)
    (tmp_path / "images" / "train" / "thing" / "three_cameras.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        MultiViewImages(tmp_path / "images", "train").views(0)
    (tmp_path / "images" / "train" / "thing" / "three_cameras.json").unlink()
    with pytest.raises(FileNotFoundError, match="where the cameras"):
        MultiViewImages(tmp_path / "images", "train").views(0)
