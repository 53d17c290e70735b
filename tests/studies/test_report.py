"""Reports: what is read from run folders, what the page holds, that pictures show what they should."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from pointcmt.pictures import draw_cloud, save_clouds, save_views
from pointcmt.studies.charts import Curve, Entry, Row, human, save_comparison, save_curves, save_rows, spread
from pointcmt.studies.report import Section, compare, find_runs, write_page, write_report


def make_run(folder, command, results, records=(), config=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"command": command, "config": config or {}, "inputs": {}})
    )
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "versions": {"torch": "2.9"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def student(method, oa, best=None, name="pointnet2"):
    return {
        "last": {"epoch": 2, "test_oa": oa, "test_macc": oa - 1},
        "best": {"epoch": 1, "test_oa": best or oa + 1, "test_macc": oa, "chosen_by": "the held-out part"},
        "method": method,
        "student": name,
        "parameters": 94752,
        "milliseconds_per_cloud": 1.5,
        "seconds": 12,
    }


@pytest.fixture
def study(tmp_path):
    records = [{"epoch": e, "loss": 3 / e, "test_oa": 30.0 + 10 * e} for e in (1, 2)]
    teacher = {**student("", 71.25), "parameters": 300_000}
    del teacher["method"], teacher["student"], teacher["milliseconds_per_cloud"]
    make_run(tmp_path / "teacher", "train-teacher", teacher, records)
    make_run(
        tmp_path / "generator", "train-generator", {"last": {}, "best": {}}, [{"epoch": 1, "test_emd": 0.1}]
    )
    for seed, (plain, taught) in enumerate([(60.0, 62.5), (64.0, 63.5)]):
        make_run(tmp_path / f"plain-{seed}", "train", student("none", plain), records)
        make_run(tmp_path / f"pointcmt-{seed}", "train", student("pointcmt", taught), records)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.json").write_text('{"command": "train", "config": {}}')
    return tmp_path


def test_seeds_of_one_method_are_one_line_and_unfinished_runs_none(study):
    entries = compare(find_runs(study))
    assert [(e.name, e.oa) for e in entries] == [
        ("image teacher", [71.25]),
        ("plain student", [60.0, 64.0]),
        ("PointCMT student", [62.5, 63.5]),
    ]
    # mean and sample standard deviation, by hand
    assert entries[1].cells()[1] == "62.0 ± 2.8"
    assert entries[0].cells()[1:] == ["71.2", "70.2", "72.2", "300.00 k", "–"]


def test_students_of_two_networks_are_told_apart(study):
    make_run(study / "other", "train", student("none", 50.0, name="dgcnn"))
    names = [entry.name for entry in compare(find_runs(study))]
    assert names == ["image teacher", "dgcnn, plain", "pointnet2, plain", "pointnet2, PointCMT"]


def test_the_page_stands_alone_and_shows_the_numbers(study):
    page = write_report(study).read_text()
    assert "62.0 ± 2.8" in page and "PointCMT student" in page and "the held-out part" in page
    sources = re.findall(r"(?:src|href)=['\"]([^'\"]+)", page)
    assert len(sources) >= 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert base64.b64decode(sources[0].split(",", 1)[1]).startswith(b"\x89PNG")
    assert {p.name for p in (study / "report").iterdir()} == {"comparison.png", "curves.png"}
    assert "<script" not in page and "http" not in page


def test_text_of_a_page_is_escaped(tmp_path):
    page = write_page(
        "a < b", "&", [Section("<x>", "<y>", [["<h>"], ["<c>"]])], tmp_path / "p.html"
    ).read_text()
    assert "a &lt; b" in page and "&lt;y&gt;" in page and "&lt;c&gt;" in page and "<y>" not in page


def test_names_from_data_are_text_on_the_page(study):
    name = "<script>alert(1)</script>"
    make_run(study / "x", "train", student(name, 50.0, name="$\\foo"))
    page = write_report(study).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_a_folder_without_runs_is_an_error_that_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished run in .*pointcmt train"):
        write_report(tmp_path)


def ink(path):
    """Part of the pixels that are not white."""
    return float((imread(path)[..., :3].min(-1) < 0.9).mean())


def test_pictures_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    clouds = rng.uniform(-1, 1, (3, 200, 3))
    views = np.zeros((2, 4, 1, 16, 16), np.float32)
    views[:, :, :, 4:12, 4:12] = rng.uniform(0.5, 1.5, (2, 4, 1, 8, 8))
    rows = [
        Row("dgcnn", "none", None, {"test": [80.0, 81.0], "hard": [60.0, 61.0]}, [82.0, 82.0], {}, 92.9),
        Row("dgcnn", "FE", "few", {"test": [81.0, 83.0]}, [83.0, 84.0], {"test": (1.5, 0.8)}, None),
    ]
    made = [
        save_clouds(clouds, clouds, ["a", "b_c", "d"], tmp_path / "clouds.png"),
        save_views(views, ["a", "b"], tmp_path / "views.png"),
        save_curves([Curve("t", "teacher", [{"epoch": 1, "loss": 1.0, "test_oa": 5.0}])], tmp_path / "c.png"),
        save_comparison(
            [Entry("a", "none", [5.0, 7.0], [4.0, 6.0]), Entry("b", "pointcmt", [90], [89])],
            tmp_path / "b.png",
        ),
        save_rows(rows, tmp_path / "rows.png"),
    ]  # fmt: skip
    for path in made:
        assert 0.005 < ink(path) < 0.9, path
    save_views(views, ["$\\foo", "$x$"], tmp_path / "names.png")  # names are no mathematics
    # a picture of nothing has less in it
    save_views(np.zeros_like(views), ["a", "b"], tmp_path / "empty.png")
    assert ink(tmp_path / "empty.png") < ink(tmp_path / "views.png")


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_the_up_axis_points_up(up):
    points = np.random.default_rng(1).uniform(-0.1, 0.1, (50, 3))
    points[:, "xyz".index(up)] += np.repeat([-0.9, 0.9], 25)
    axes = Figure().subplots()
    draw_cloud(axes, points, up)
    heights = np.asarray(axes.collections[0].get_offsets())[:, 1]
    assert ((heights > 0).sum(), (heights < 0).sum()) == (25, 25)


def test_numbers_are_written_as_people_read_them():
    assert [human(n) for n in (12, 94_752, 1_620_000)] == ["12", "94.75 k", "1.62 M"]
    assert spread([50.0]) == "50.0"
