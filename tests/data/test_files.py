"""Lists of names, text and JSON that somebody else wrote, and writing that two processes may do at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from pointcmt import checkpoint
from pointcmt.checkpoint import atomic_write, remove_stale
from pointcmt.data import ModelNet40
from pointcmt.data.files import is_junk, read_json, read_names, read_text, within


def test_one_name_a_line(tmp_path: Path) -> None:
    """Case 11: one class a line, whatever is in the line; Case 25: a name twice is an error with its line."""
    path = tmp_path / "names.txt"
    path.write_bytes("house\u2028cat\r\nbig\x0cbox\x85\rcup".encode())
    assert read_names(path) == ["house\u2028cat", "big\x0cbox", "cup"]
    path.write_bytes("\ufeffhouse cat\r\n\n  größe \nbox\n".encode())
    assert read_names(path) == ["house cat", "größe", "box"]
    path.write_text("box\nball\n\nbox\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"names\.txt, line 4: 'box' is named again after line 1"):
        read_names(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"names\.txt is empty"):
        read_names(path)
    path.write_bytes(b"box\n\xff\n")
    with pytest.raises(ValueError, match=r"names\.txt is not UTF-8.*byte 4"):
        read_text(path)
    path.write_text('{"a": [')
    with pytest.raises(ValueError, match=r"names\.txt is not JSON"):
        read_json(path)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "a\0b"])
def test_lists_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"list\.csv, line 3 names .*inside"):
        within(tmp_path, name, "list.csv, line 3")
    assert within(tmp_path, "a/b..c", "") == tmp_path / "a" / "b..c"


def test_junk() -> None:
    """Case 13: of macOS, Windows, network storage and file systems."""
    for name in ("._x.off", "a/.DS_Store", "__MACOSX/a/x.off", "a/Thumbs.db", ".git/x.off", "a/Desktop.ini"):
        assert is_junk(Path(name)), name
    for name in ("a/@eaDir/x.off", "$RECYCLE.BIN/x.off", "lost+found/a", "System Volume Information/x.off"):
        assert is_junk(Path(name)), name
    for name in ("x.off", "a/b/x_.off", "MACOSX/x.off"):
        assert not is_junk(Path(name)), name


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    """Three classes, one named by two words; 1024 or 2048 points are what says which axis is up."""
    for split, labels in (("train", [0, 2, 1, 0]), ("test", [0, 1])):
        with h5py.File(tmp_path / f"ply_data_{split}0.h5", "w") as file:
            points = np.random.default_rng(0).standard_normal((len(labels), 2048, 3)) / 4
            file["data"], file["label"] = points.astype(np.float32), np.array(labels)
    (tmp_path / "shape_names.txt").write_text("house cat\nbox\ncup\n")
    return tmp_path


def test_hdf5_names_and_axis(hdf5: Path) -> None:
    data = ModelNet40(hdf5, "train", 16)
    assert data.class_names == ["house cat", "box", "cup"] and data.up == "y"
    assert data.shape_ids[0] == "train/house cat/ply_data_train0_0000"
    assert ModelNet40(hdf5, "train", 16, up="z").up == "z"
    assert ModelNet40(hdf5, "train", 16, up="z").fingerprint() != data.fingerprint()
    (hdf5 / "ply_data_train_0_id2file.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"id2file\.json is no list of names"):
        ModelNet40(hdf5, "train", 16)


def test_resampled_lists_stay_inside_and_name_their_lines(tmp_path: Path) -> None:
    (tmp_path / "modelnet40_test.txt").write_text("bed_0001\n")
    (tmp_path / "modelnet40_train.txt").write_text("bed_0001\n../../bed_0002\n")
    with pytest.raises(
        ValueError, match=r"modelnet40_train\.txt, line 2 names '../../bed/../../bed_0002\.txt'"
    ):
        ModelNet40(tmp_path, "train", 4)
    (tmp_path / "modelnet40_shape_names.txt").write_text("bed\n")
    (tmp_path / "modelnet40_train.txt").write_text("bed_0001\ndesk_0001\n")
    with pytest.raises(ValueError, match=r"modelnet40_train\.txt, line 2: 'desk_0001' is of class 'desk'"):
        ModelNet40(tmp_path, "train", 4)


def test_a_class_absent_from_a_split_keeps_its_number(tmp_path: Path) -> None:
    """Case 1, in the two layouts of ModelNet that are lists of files."""
    mesh = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 2 1\n3 0 1 3\n3 1 2 3\n3 0 3 2\n"
    for name, splits in (("ball", ["train"]), ("box", ["train", "test"]), ("tube", ["train", "test"])):
        for split in splits:
            path = tmp_path / "meshes" / name / split / "model.off"
            path.parent.mkdir(parents=True)
            path.write_text(mesh)
        cloud = tmp_path / "text" / name / f"{name}_0001.txt"
        cloud.parent.mkdir(parents=True)
        np.savetxt(cloud, np.random.default_rng(0).random((8, 6)), delimiter=",")
    (tmp_path / "text" / "modelnet40_train.txt").write_text("ball_0001\nbox_0001\ntube_0001\n")
    (tmp_path / "text" / "modelnet40_test.txt").write_text("box_0001\ntube_0001\n")
    for root in ("meshes", "text"):
        train, test = (ModelNet40(tmp_path / root, split, 8) for split in ("train", "test"))
        assert train.class_names == test.class_names == ["ball", "box", "tube"]
        assert test.labels.tolist() == [1, 2]
    assert len({*train.shape_ids, *test.shape_ids}) == 5


def test_written_with_the_mode_of_the_user_and_no_change_of_the_umask(tmp_path: Path) -> None:
    """The umask is the process's: another thread's files must not see it changed."""
    before = os.umask(0o027)
    try:
        modes = set()
        stop = threading.Event()

        def other() -> None:
            number = 0
            while not stop.is_set():
                path = tmp_path / f"other{number}"
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
                modes.add(path.stat().st_mode & 0o777)
                number += 1

        thread = threading.Thread(target=other)
        thread.start()
        for _ in range(100):
            with atomic_write(tmp_path / "file.txt") as temporary:
                temporary.write_text("a")
        stop.set()
        thread.join()
        assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o640
        assert modes == {0o640}
    finally:
        os.umask(before)


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pointcmt.checkpoint import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n    temporary.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], timeout=120)
    (left,) = tmp_path.iterdir()
    with atomic_write(tmp_path / "sub" / "b.json") as temporary:
        temporary.write_text("whole")
        assert remove_stale(tmp_path / "sub") == 0, "a file that is being written stays"
        foreign = tmp_path / left.name.replace(checkpoint._HOST, "another")
        foreign.write_text("of another machine")
        for name in (".hidden.json", ".a.x-1-y.tmp.json"):
            (tmp_path / name).write_text("somebody's own")
        assert remove_stale(tmp_path) == 1
        assert not left.exists() and foreign.exists()
        os.utime(foreign, (0, 0))
        assert remove_stale(tmp_path) == 1 and not foreign.exists()
    assert (tmp_path / "sub" / "b.json").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.x-1-y.tmp.json", ".hidden.json", "sub"]


def test_what_safetensors_left_of_a_killed_write_is_removed(tmp_path: Path) -> None:
    """It writes to a file of its own beside the one that it is given."""
    left, own = tmp_path / ".tmpJiu6mx", tmp_path / ".tmpfiles"
    for path in (left, own):
        path.write_text("half")
    assert remove_stale(tmp_path) == 0, "it may be that of another process"
    assert remove_stale(tmp_path, held=True) == 1 and not left.exists() and own.exists()
    left.write_text("half")
    os.utime(left, (0, 0))
    assert remove_stale(tmp_path) == 1 and not left.exists()
