"""Writes the seeds, a small whole file of every format that is read: ``python -m tests.fuzz.make_seeds``."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

SEEDS = Path(__file__).parent / "seeds"
CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
FACES = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6)]


def rows(table: np.ndarray) -> str:
    return "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in table)


def main(root: Path = SEEDS) -> None:
    random = np.random.default_rng(0)
    clouds = random.random((4, 12, 3)).astype(np.float32) - 0.5

    def write(name: str, content: str | bytes) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    faces = "".join(f"3 {a} {b} {c}\n" for a, b, c in FACES)
    for split in ("train", "test"):
        folder = root / "modelnet_hdf5"
        write(f"modelnet_hdf5/{split}_files.txt", f"data/ply_data_{split}0.h5\n")
        names = ["ball/ball_0001.ply", "ball/ball_0002.ply", "box/box_0001.ply", "box/box_0002.ply"]
        write(f"modelnet_hdf5/ply_data_{split}_0_id2file.json", json.dumps(names))
        with h5py.File(folder / f"ply_data_{split}0.h5", "w") as file:
            packed = {"compression": "gzip"} if split == "train" else {}
            file.create_dataset("data", data=clouds, **packed)
            file.create_dataset("label", data=np.array([[0], [0], [1], [1]], dtype=np.uint8))
    write("modelnet_hdf5/shape_names.txt", "ball\nhouse cat\n")

    mesh, cloud = "mesh", "cloud"
    write(f"{mesh}/plain.off", f"OFF\n8 8 0\n{rows(CORNERS)}{faces}")
    write(f"{mesh}/glued.off", f"OFF8 8 0\n{rows(CORNERS)}{faces}")
    write(f"{mesh}/coloured.off", f"COFF\n8 8 0\n{rows(np.hstack([CORNERS, np.ones((8, 4))]))}{faces}")
    binary = struct.pack(">3i", 8, 8, 0) + CORNERS.astype(">f4").tobytes()
    binary += b"".join(struct.pack(">5i", 3, *face, 0) for face in FACES)
    write(f"{mesh}/binary.off", b"OFF BINARY\n" + binary)
    ones = "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in FACES)
    write(f"{mesh}/plain.obj", "# a box\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS) + ones)
    head = "ply\nformat {} 1.0\nelement vertex {}\n" + "".join(f"property float {a}\n" for a in "xyz")
    listed = "element face 8\nproperty list uchar int vertex_indices\n"
    write(f"{mesh}/plain.ply", head.format("ascii", 8) + listed + "end_header\n" + rows(CORNERS) + faces)
    packed_faces = b"".join(struct.pack("<B3i", 3, *face) for face in FACES)
    header = (head.format("binary_little_endian", 8) + listed + "end_header\n").encode()
    write(f"{mesh}/binary.ply", header + CORNERS.astype("<f4").tobytes() + packed_faces)

    points = clouds[0]
    normals = points / np.linalg.norm(points, axis=1, keepdims=True)
    write(f"{cloud}/cloud.ply", head.format("ascii", 12) + "end_header\n" + rows(points))
    pcd = "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 12\nHEIGHT 1\nPOINTS 12\n"
    write(f"{cloud}/text.pcd", f"# .PCD v.7\n{pcd}DATA ascii\n{rows(points)}")
    write(f"{cloud}/binary.pcd", f"{pcd}DATA binary\n".encode() + points.astype("<f4").tobytes())
    write(f"{cloud}/plain.xyz", rows(points))
    write(f"{cloud}/normals.txt", rows(np.hstack([points, normals])).replace(" ", ","))
    np.save(root / cloud / "points.npy", points)
    np.savez(root / cloud / "points.npz", points=points, normals=normals)

    for split in ("train", "test"):
        for label in ("ball", "box"):
            write(f"folder/{split}/{label}/{label}_1.xyz", rows(clouds[1]))
    lines = [f"{split}/{label}.xyz,{label},{split}" for split in ("train", "test") for label in ("a", "b")]
    write("list/list.csv", "path,label,split\n" + "\n".join(lines) + "\n")
    for split in ("train", "test"):
        for label in ("a", "b"):
            write(f"list/{split}/{label}.xyz", rows(clouds[2]))

    pixels = (random.random((6, 6)) * 255).astype(np.uint8)
    images = root / "images" / "train" / "ball"
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(images / "ball_1_001.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(images / "ball_1_002.png")
    Image.fromarray(np.dstack([pixels] * 4)).save(images / "ball_1_003.png")
    Image.fromarray(np.dstack([pixels] * 3)).save(images / "ball_1_004.jpg")
    Image.fromarray(pixels).save(images / "ball_1_005.tif")
    cameras = [np.eye(4).tolist()] * 5
    written = {"view_matrix": cameras, "projection_matrix": cameras}
    write("images/train/ball/ball_1_cameras.json", json.dumps(written))

    write(
        "study/study.yaml",
        "data: {num_points: 32, per_class: 4}\n"
        "students:\n  small: {student: pointnet2, width: 0.25}\n"
        "methods:\n  none: {method: none}\n  FE: {method: pointcmt, fe_weight: 3.0}\n"
        "train:\n  loop: &loop {epochs: 2, lr: 1e-3}\n"
        "seeds: [0, 1]\nbaseline: none\npaper: {small: {FE: 91.0}}\nabout: a study\n",
    )
    write(
        "strings/strings.txt",
        "tests.toys:Student\ntests/toys.py:Student\ntorch.nn:Linear\nradius=0.2\nvariant='msg'\nsoft_labels=1\n"
        "nst=0.5\npointnet2\ndgcnn\nscipy.special:expit\n",
    )


if __name__ == "__main__":
    main()
