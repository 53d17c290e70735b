"""PointFolder: one's own files in every format, their classes, their faults, and what is not data."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh

from pointcmt.data import DataOptions, PointFolder
from pointcmt.data.clouds import SUFFIXES, read_cloud

RNG = np.random.default_rng(0)
CLOUD = RNG.standard_normal((30, 3)).round(3)
NORMALS = CLOUD / np.linalg.norm(CLOUD, axis=1, keepdims=True)


def pcd(path: Path, points: np.ndarray, how: str = "binary", normals: np.ndarray | None = None) -> None:
    names = "x y z" + ("" if normals is None else " normal_x normal_y normal_z")
    columns = points if normals is None else np.hstack([points, normals])
    # a field of three numbers before the coordinates, as descriptors are kept
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS descriptor {names}\nSIZE 4{' 4' * columns.shape[1]}\n"
        f"TYPE U{' F' * columns.shape[1]}\nCOUNT 3{' 1' * columns.shape[1]}\nWIDTH {len(points)}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA {how}\n"
    )
    if how == "ascii":
        body = "".join(
            "7 8 9 " + " ".join(f"{value:.9g}" for value in row) + "\n" for row in columns
        ).encode()
    else:
        body = b"".join(np.uint32([7, 8, 9]).tobytes() + row.astype("<f4").tobytes() for row in columns)
    path.write_bytes(head.encode() + body)


def ply(path: Path, binary: bool = False) -> None:
    names = ("x", "y", "z", "nx", "ny", "nz")
    head = f"ply\nformat {'binary_little_endian' if binary else 'ascii'} 1.0\nelement vertex {len(CLOUD)}\n"
    head += "".join(f"property float {name}\n" for name in names) + "end_header\n"
    rows = np.hstack([CLOUD, NORMALS])
    body = rows.astype("<f4").tobytes() if binary else "\n".join(" ".join(map(str, r)) for r in rows).encode()
    path.write_bytes(head.encode() + body)


def write_clouds(folder: Path) -> dict[str, bool]:
    """The same cloud in every format; file name → whether it holds the normals."""
    folder.mkdir(parents=True, exist_ok=True)
    both = np.hstack([CLOUD, NORMALS])
    np.save(folder / "a.npy", CLOUD)
    np.save(folder / "an.npy", both.astype(np.float32))
    np.savez(folder / "b.npz", points=CLOUD)
    np.savez_compressed(folder / "bn.npz", pos=CLOUD, normals=NORMALS, other=np.arange(3))
    np.savetxt(folder / "c.xyz", CLOUD)
    np.savetxt(folder / "cn.txt", both, delimiter=",", header="x y z and normals")
    (folder / "d.XYZ").write_text("30\n" + "".join(f"{x}; {y};{z}\n" for x, y, z in CLOUD))
    np.savetxt(folder / "e.txt", np.hstack([CLOUD, RNG.integers(0, 256, (30, 3))]))  # colours
    np.savetxt(folder / "k.asc", CLOUD)
    (folder / "l.pts").write_text("30\n" + "".join(f"{x} {y} {z} -7 10 20 30\n" for x, y, z in CLOUD))
    np.savetxt(folder / "m.csv", CLOUD, delimiter=",")
    # by names, in another order; as CloudCompare writes them
    table = np.hstack([np.arange(30)[:, None], CLOUD[:, [2, 0, 1]], NORMALS])
    np.savetxt(folder / "nn.csv", table, delimiter=",", header='"id",Z,X,Y,Nx,Ny,Nz', comments="")
    np.savetxt(folder / "on.asc", both, header="//X Y Z Nx Ny Nz", comments="")
    pcd(folder / "f.pcd", CLOUD)
    pcd(folder / "fn.pcd", CLOUD, "ascii", NORMALS)
    ply(folder / "gn.ply")
    ply(folder / "hn.ply", binary=True)
    rows = "".join(f"{x} {y} {z}\n" for x, y, z in CLOUD)
    (folder / "i.off").write_text(f"OFF\n30 0 0\n{rows}")
    (folder / "j.obj").write_text("".join(f"v {line}\n" for line in rows.splitlines()))
    return {path.name: path.stem.endswith("n") for path in folder.iterdir()}


def test_formats(tmp_path: Path) -> None:
    """Case 15: own clouds of every format."""
    names = write_clouds(tmp_path)
    assert {Path(name).suffix.lower() for name in names} == set(SUFFIXES)
    for name, has_normals in names.items():
        cloud = read_cloud(tmp_path / name)
        np.testing.assert_allclose(cloud.points, CLOUD, atol=1e-6, err_msg=name)
        assert cloud.faces is None and (cloud.normals is not None) == has_normals, name
        if has_normals:
            np.testing.assert_allclose(cloud.normals, NORMALS, atol=1e-6, err_msg=name)


def test_missing_measurements_of_a_pcd_are_left_out(tmp_path: Path) -> None:
    points = CLOUD.copy()
    points[[3, 7], :] = np.nan
    pcd(tmp_path / "a.pcd", points)
    np.testing.assert_allclose(read_cloud(tmp_path / "a.pcd").points, np.delete(CLOUD, [3, 7], 0), atol=1e-6)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", bytes(200 << 20))


BROKEN = {
    "a.txt": "1 2 3\n4 5\n",
    "b.txt": "one two three\n",
    "c.txt": "",
    "d.txt": b"1 2 \xff\n",
    "e.npy": b"not numpy",
    "f.npz": b"PK nothing",
    "g.pcd": "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 9\nDATA binary\n1234",
    "h.pcd": "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 9\nDATA binary_compressed\n1234",
    "i.pcd": "FIELDS x y\nSIZE 4 4\nTYPE F F\nPOINTS 1\nDATA ascii\n1 2\n",
    "j.pcd": "VERSION 7\n",
    "k.ply": "ply\nformat ascii 1.0\nelement vertex 3\n",
    "l.off": "OFF\n9 0 0\n1 2 3\n",
    "m.xyz": "1 2 nan\n",
    "n.xyz": "0 0 0\n1 2 1e31\n",
    "o.txt": "1 2\n3 4\n",
    "p.pts": "version: 1\nn_points: 2\n{\n1 2\n3 4\n}\n",  # marks in a picture
    "q.asc": "ncols 2\nnrows 2\ncellsize 1\n1 2\n3 4\n",  # heights on a grid
    "r.csv": "time,temperature\n1,2\n",
    "s.csv": "x,y,z\n1,2\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    content = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name[0]}\.{name[2:]}"):
        read_cloud(tmp_path / name)


def test_damaged_files_are_read_or_named(tmp_path: Path) -> None:
    """Damaged copies of every format: finite points, or an error that names the file."""
    names = sorted(write_clouds(tmp_path))
    trimesh.creation.icosphere(1).export(tmp_path / "mesh.ply")
    rng = np.random.default_rng(5)
    refused = 0
    for case in range(40 * (len(names) + 1)):
        name = [*names, "mesh.ply"][case % (len(names) + 1)]
        content = bytearray((tmp_path / name).read_bytes())
        if case % 3 == 0:
            del content[int(rng.integers(1, len(content))) :]
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        for place, letter in enumerate(content[:300]):  # counts that promise more than there is
            if case % 3 == 1 and 48 <= letter <= 57 and rng.random() < 0.3:
                content[place] = 57
        path = tmp_path / f"broken-{name}"
        path.write_bytes(content)
        try:
            cloud = read_cloud(path)
            assert np.isfinite(cloud.points).all() and cloud.points.shape[1] == 3
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 200


def test_what_would_be_read_as_other_points_is_refused(tmp_path: Path) -> None:
    """Case 15: an array of one row for each coordinate, and numbers with a decimal comma."""
    for rows in (CLOUD.T, np.hstack([CLOUD, NORMALS]).T):
        np.save(tmp_path / "a.npy", rows)
        with pytest.raises(ValueError, match=r"a\.npy.*a row for each coordinate"):
            read_cloud(tmp_path / "a.npy")
    for between in (" ", ";", "\t"):
        lines = [between.join(f"{value:.4f}".replace(".", ",") for value in row) for row in CLOUD]
        (tmp_path / "b.txt").write_text("# x y z\n" + "\n".join(lines))
        with pytest.raises(ValueError, match=r"b\.txt.*commas in its numbers"):
            read_cloud(tmp_path / "b.txt")
        np.savetxt(tmp_path / "c.txt", CLOUD, delimiter=between if between != " " else ", ")
        np.testing.assert_allclose(read_cloud(tmp_path / "c.txt").points, CLOUD)
    (tmp_path / "d.txt").write_text("1,2,3\n4,5,6\n")
    assert read_cloud(tmp_path / "d.txt").points.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_one_class_in_two_spellings_is_said(root: Path) -> None:
    """Case 1: systems differ in capitals and in how accents are stored, and labels would part in silence."""
    for other, here in (("Box", "box"), ("gro\u0308\u00dfe", "gr\u00f6\u00dfe")):
        (root / "train" / "box").rename(root / "train" / here) if here != "box" else None
        (root / "test" / "tube").rename(root / "test" / other)
        with pytest.warns(UserWarning, match=r"differ in nothing but capitals or how an accent is stored"):
            PointFolder(root, "train", 8)
        (root / "test" / other).rename(root / "test" / "tube")


def test_what_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    bomb(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz.*unpacks to 210 MB: refused"):
        read_cloud(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros((4, 3)))
    content = (tmp_path / "b.npy").read_bytes().replace(b"(4, 3), }          ", b"(99999999999, 3), }")
    (tmp_path / "b.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.npy cannot be read"):
        read_cloud(tmp_path / "b.npy")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ball, box and tube of unequal numbers of points, no test shape of ball (case 1); meshes among them."""
    root = tmp_path / "own"
    for split, names in (("train", ("ball", "box", "tube")), ("test", ("box", "tube"))):
        for number, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(3):
                points = 5000 * RNG.random((40 + 30 * k, 3)) * [1, 1, 1 + number] + 9000
                np.savetxt(folder / f"model_{k}.xyz", points)
            trimesh.creation.box((1, 2, 3)).export(folder / "mesh.ply")
    return root


def test_classes_of_all_splits_and_points_of_unequal_numbers(root: Path) -> None:
    """Case 1: class names of all splits together; Case 12: equal file names have ids of class and split."""
    train, test = PointFolder(root, "train", 64), PointFolder(root, "test", 64)
    assert train.class_names == test.class_names == ["ball", "box", "tube"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [1] * 4 + [2] * 4
    assert test.shape_ids[:2] == ["test/box/mesh", "test/box/model_0"]
    assert len(set(train.shape_ids) | set(test.shape_ids)) == 20, "equal file names are told apart (case 12)"
    assert train.lengths.tolist() == [64, 40, 64, 64] * 3
    np.testing.assert_allclose(np.linalg.norm(train.points, axis=2).max(1), 1, atol=1e-5)
    raw = PointFolder(root, "train", 64, normalize=False)
    for row, own in enumerate(raw.lengths.tolist()):
        points = {tuple(point) for point in raw.points[row].tolist()}
        assert len(points) == len({tuple(point) for point in raw.points[row, :own].tolist()}) == own
    whole = np.loadtxt(root / "train" / "ball" / "model_1.xyz").astype(np.float32)
    assert {tuple(p) for p in raw.points[2].tolist()} < {tuple(p) for p in whole.tolist()}


def test_draws_depend_on_seed_and_path_alone(root: Path, tmp_path: Path) -> None:
    whole = PointFolder(root, "train", 50, seed=3, dense_points=80)
    few = PointFolder(root, "train", 50, seed=3, per_class=1, cache_dir=tmp_path / "kept")
    again = PointFolder(root, "train", 50, seed=3, per_class=1, cache_dir=tmp_path / "kept")
    assert few.fingerprint() == again.fingerprint() and len(few) == 3
    fifty = PointFolder(root, "train", 50, seed=3)
    for row, shape in enumerate(few.shape_ids):
        np.testing.assert_array_equal(few.points[row], fifty.points[fifty.shape_ids.index(shape)])
    assert whole.view_points.shape == (12, 80, 3)
    np.testing.assert_allclose(whole.view_points[:, :50], whole.points, atol=1e-5)
    assert PointFolder(root, "train", 50, seed=4).fingerprint() != fifty.fingerprint()


def test_loaded_like_the_others(root: Path) -> None:
    options = DataOptions(str(root), num_points=32, holdout=0.3, data_up="z")
    assert options.named() == "folder"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = options.load()
    assert {name: len(part) for name, part in splits.parts().items()} == {"train": 9, "heldout": 3, "test": 8}
    assert splits.test.up == "z"


def test_what_operating_systems_leave_behind_is_skipped(root: Path) -> None:
    """Case 13: whatever lies about, the set is the same."""
    before = PointFolder(root, "train", 32).fingerprint()
    for name in ("._model_0.xyz", ".DS_Store", "Thumbs.db", ".hidden.npy", "notes.md"):
        (root / "train" / "ball" / name).write_bytes(b"\0junk")
    for folder in (root / "__MACOSX", root / "train" / "__MACOSX", root / "train" / ".git"):
        folder.mkdir()
        (folder / "a.xyz").write_text("1 2 3\n")
    assert PointFolder(root, "train", 32).fingerprint() == before


def test_broken_files_stop_or_are_counted(root: Path, tmp_path: Path) -> None:
    (root / "train" / "box" / "bad.npy").write_bytes(b"junk")
    (root / "train" / "tube" / "worse.xyz").write_text("1 2 nan\n")
    with pytest.raises(ValueError, match=r"bad\.npy cannot be read"):
        PointFolder(root, "train", 32)
    for _ in range(2):  # the second time from what was kept
        with pytest.warns(UserWarning, match=r"2 of 14 train files are left out .*bad\.npy"):
            data = PointFolder(root, "train", 32, skip_broken=True, cache_dir=tmp_path / "kept")
        assert len(data) == 12 and len(data.broken) == 2
    with pytest.raises(ValueError, match=r"bad\.npy cannot be read"):
        PointFolder(root, "train", 32, cache_dir=tmp_path / "kept")


def test_a_list(root: Path) -> None:
    lines = ["path,label,split"]
    lines += [f"train/ball/model_{k}.xyz,house cat,train" for k in range(3)]
    lines += ['"train/box/mesh.ply", größe ,train', "test/tube/mesh.ply,größe,test"]
    listed = root / "list.csv"
    listed.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    for given in (root, listed):
        train, test = PointFolder(given, "train", 16), PointFolder(given, "test", 16)
        assert train.class_names == test.class_names == ["größe", "house cat"]
        assert train.labels.tolist() == [1, 1, 1, 0] and test.labels.tolist() == [0]
    assert DataOptions(str(listed)).named() == "folder"
    for line, words in (
        ("../../etc/passwd,a,train", r"line 7: names|line 7 names '../../etc/passwd'.*inside"),
        (f"{root}/test/tube/mesh.ply,a,test", "expected a path inside"),
        ("test/tube/mesh.ply,a,tset", "line 7: split 'tset'"),
        ("test/tube/model_0.xyz,,test", "line 7: path 'test/tube/model_0.xyz' and label ''"),
        ("train/box/mesh.ply,a,train", r"line 7: 'train/box/mesh.ply' is listed again after line 5"),
    ):
        listed.write_text("\n".join([*lines, line]), encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            PointFolder(root, "train", 16)
    listed.write_text("\n".join([*lines, "test/none.xyz,größe,test"]), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"none\.xyz does not exist"):
        PointFolder(root, "test", 16)
    with pytest.warns(UserWarning, match="1 of 2 test files"):
        assert len(PointFolder(root, "test", 16, skip_broken=True)) == 1


def test_without_a_test_split_it_says_what_to_do(root: Path) -> None:
    (root / "test").rename(root / "val")
    with pytest.raises(
        FileNotFoundError, match=r"no shapes of the split 'test'.*train \(12 files\), val \(8 files\)"
    ):
        DataOptions(str(root)).load()
    with pytest.raises(FileNotFoundError, match="rename val to test"):
        PointFolder(root, "test")
    assert PointFolder(root, "train", 8).class_names == ["ball", "box", "tube"]


LYING = {
    "chair/train/a.ply": r"such as chair/train/a\.ply: class before split; .*move chair/train to train/chair",
    "train/chair/scan/a.pts": r"a folder too deep; .*move the files of train/chair/scan to train/chair",
    "chair/a.asc": r"no splits; .*put some of each into train/chair/ and the others into test/chair/.* csv",
    "train/a.xyz": r"no folders of classes; .*put each into train/<class>/",
    "a.xyz": r"no folders; expected <split>/<class>/\*, or a csv list",
    "data/train/chair/a.ply": r"the data set seems to be .*/data: give that folder",
    "Training/chair/a.ply": r"rename the folder Training to train",
    "train/chair/a.las": r"\.las is of no known format; expected \.off, .*\.npz: convert them",
    "clouds.zip": r"There is 1 file such as clouds\.zip: unpack it",
}


@pytest.mark.parametrize("name", LYING)
def test_what_lies_otherwise_is_said_with_what_to_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / "own" / name
    path.parent.mkdir(parents=True)
    path.write_text("1 2 3\n4 5 6\n")
    (tmp_path / "own" / ".DS_Store").touch()
    with pytest.raises(FileNotFoundError, match=LYING[name]):
        DataOptions(str(tmp_path / "own")).load()
    with pytest.raises(FileNotFoundError, match=LYING[name]):
        PointFolder(tmp_path / "own", "train")


def test_normals(root: Path, tmp_path: Path) -> None:
    for name, has_normals in write_clouds(tmp_path / "n" / "train" / "a").items():
        if not has_normals:
            (tmp_path / "n" / "train" / "a" / name).unlink()
    data = PointFolder(tmp_path / "n", "train", 30, normals=True)
    assert data.points.shape == (8, 30, 6)
    order = np.lexsort(CLOUD.T)
    for cloud in PointFolder(tmp_path / "n", "train", 30, normals=True, normalize=False).points:
        np.testing.assert_allclose(cloud[np.lexsort(cloud[:, :3].T), 3:], NORMALS[order], atol=1e-5)
    with pytest.raises(ValueError, match=r"model_0\.xyz has no normals"):
        PointFolder(root, "train", normals=True)


def test_names_in_an_ascii_locale(root: Path) -> None:
    """Case 22: UTF-8 is read whatever the locale says."""
    (root / "train" / "ball").rename(root / "train" / "größe")
    (root / "train" / "größe" / "łódź.txt").write_text("0 0 0\n1 0 0\n# größe\n", encoding="utf-8")
    code = (
        "import sys; from pointcmt.data import PointFolder; d = PointFolder(sys.argv[1], 'train', 8); "
        "print(ascii(d.class_names), len(d))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.strip() == r"['box', 'gr\xf6\xdfe', 'tube'] 13", done.stderr
