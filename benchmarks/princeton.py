"""How long does it take to render the Princeton shape benchmark? And the images, for its studies.

    python -m benchmarks.princeton --data DIR          # goes on where it was stopped

DIR holds ``psb_meshes.h5``. Every mesh is rendered once, from the twenty cameras of a dodecahedron, to
``runs/princeton/rendered-SIZE``; for each set of classes ``runs/princeton/<dataset>`` links to the images of
the size rendered last, in the folders that ``train-teacher --images`` reads. Studies:
``configs/princeton.yaml``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import numpy as np

from benchmarks._harness import RESULTS, record, show
from pointcmt.checkpoint import atomic_write
from pointcmt.data.princeton import PrincetonShapes, mesh_of, read_pack
from pointcmt.views.mesh import render_folder

QUESTION = "How long does it take to render the meshes of the Princeton shape benchmark?"
SETS = {"princeton36": {"course": True}, "princeton-coarse": {"level": 1}}


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """A mesh as binary PLY."""
    head = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\nproperty float x\n"
        f"property float y\nproperty float z\nelement face {len(faces)}\n"
        "property list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    rows["count"], rows["corners"] = 3, faces
    with atomic_write(path) as temporary:
        temporary.write_bytes(head.encode() + vertices.astype("<f4").tobytes() + rows.tobytes())


def export(data: Path, out: Path, limit: int | None) -> int:
    """The pack's meshes as files, those that are not there yet; returns how many there are."""
    path, pack = read_pack(data)
    rows = range(len(pack["id"]) if limit is None else limit)
    for row in rows:
        split = "test" if pack["split"][row] == 1 else "train"
        name = f"m{pack['id'][row]}"
        target = out / split / "psb" / f"{name}.ply"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_ply(target, *mesh_of(pack, row, f"{path}, {name}"))
    return len(rows)


def link(rendered: Path, data: Path, out: Path, name: str) -> int:
    """The images of one set of classes by split and class, as links to those rendered; returns how many."""
    made = 0
    for split in ("train", "test"):
        for shape in PrincetonShapes(data, split, 1, **SETS[name]).shape_ids:
            _, label, mesh = shape.split("/")
            for image in sorted((rendered / split / "psb").glob(f"{mesh}_[0-9]*.png")):
                target = out / name / split / label / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)  # it may be of another size
                try:
                    os.link(image, target)
                except OSError:  # another file system, or one without links
                    shutil.copy(image, target)
                made += 1
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.princeton", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of psb_meshes.h5")
    parser.add_argument("--work", type=Path, default=Path("runs/princeton"))
    parser.add_argument("--size", type=int, default=112, help="pixels of an image")
    parser.add_argument("--limit", type=int, help="only so many meshes, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS / "explore" / "princeton-rendering.json")
    options = parser.parse_args(argv)
    count = export(options.data, options.work / "meshes", options.limit)
    began, cpu = time.perf_counter(), time.process_time()
    rendered = options.work / f"rendered-{options.size}"
    now = render_folder(options.work / "meshes", rendered, size=options.size)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    for name in SETS:
        print(f"{name}: {link(rendered, options.data, options.work, name)} images")
    if not now:
        print(f"all {count} meshes were rendered before")
        return 0
    rows = [
        {
            "meshes": now,
            "views of each": 20,
            "pixels": options.size,
            "core seconds per mesh": cpu / now,
            "seconds per mesh": wall / now,
        }
    ]
    record(options.out, QUESTION, rows, notes={"renderer": "VTK, off-screen, software"})
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
