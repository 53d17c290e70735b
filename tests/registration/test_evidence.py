"""The study of registration: cells are resumed, differences are what records say, the page is theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from benchmarks import registration, registration_page, registration_scans
from benchmarks._harness import between
from pointcmt.registration.align import Evidence, Thresholds

FIGURES = {
    "rotation_error": 0.0,
    "rotation_median": 1.0,
    "translation_error": 0.1,
    "recall_10_0.1": 0.5,
}


def made(method: str, seed: int, error: float) -> dict:
    """A record whose pairs are all off by ``error``, alternately a degree more and less."""
    errors = (error + np.tile([1.0, -1.0], 5)).tolist()
    test = {
        "pairs": 10, "overlap": 0.75, "figures": {**FIGURES, "rotation_error": error},
        "defined": {**FIGURES, "rotation_error": error}, "rotation_errors": errors, "refined_errors": errors,
    }  # fmt: skip
    tests = dict.fromkeys(("same", "unseen", "noise"), test)
    return {"method": method, "protocol": "independent", "seed": seed, "tests": tests,
            "protocol_in_words": "independent: in words"}  # fmt: skip


def test_the_page_in_the_repository_is_that_of_its_records():
    assert between(registration_page.PAGE, "evidence") == registration_page.evidence().strip(), (
        "run python -m benchmarks.registration_page"
    )


def test_training_adds_less_than_a_gigabyte_by_its_record():
    rows = json.loads((registration.RESULTS / "registration-memory-cpu.json").read_text())["rows"]
    (row,) = [row for row in rows if row["width"] == 1 and row["training, batch"] == 8]
    assert 300 < row["training adds, MB"] * 2**20 / 1e6 < 1000


def test_differences_are_paired_by_seed_and_one_seed_by_pairs():
    records = [made("ours", s, 10.0) for s in range(3)]
    records += [made("no images", s, 10.0 + gain) for s, gain in enumerate((1.0, 2.0, 3.0))]
    gaps, interval = registration_page.differences(records, "no images", "ours")
    assert gaps == [1.0, 2.0, 3.0]
    # Student's t with 2 degrees of freedom: 4.303 × 1 / √3
    assert interval == pytest.approx((2.0, 4.303 / 3**0.5), abs=1e-3)
    assert "no gain from images is shown" in registration_page.images_text(records)
    _, interval = registration_page.differences(records[:1] + records[3:4], "no images", "ours")
    assert interval == pytest.approx((1.0, 0.0))
    assert "images matter" in registration_page.images_text(records[:1] + records[3:4])
    assert "**-5.00 ± 0.00**" in registration_page.against_baselines([*records, made("fgr", 0, 15.0)])


def test_a_study_goes_on_where_it_stopped(tmp_path):
    study = yaml.safe_load(registration.CONFIG.read_text())
    study |= {
        "pair_points": 64, "test_pairs": 4, "keypoints": [8], "per_class": 2,
        "network": {"width": 0.06, "views": 2, "view_size": 8, "keypoints": 8, "iterations": 2},
        "loop": {"epochs": 1, "batch_size": 4},
        "plan": [{"methods": ["mean motion", "ours"], "protocols": ["independent"], "variants": True}],
    }  # fmt: skip
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    command = [
        "--data",
        "synthetic",
        "--config",
        str(config),
        "--out",
        str(out),
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert registration.main([*command, "--only", "mean"]) == 0
    first = out / "records" / "independent-mean_motion-0.json"
    written = first.stat().st_mtime_ns
    assert registration.main(command) == 0
    assert first.stat().st_mtime_ns == written
    control, ours = (
        json.loads((out / f"records/independent-{m}-0.json").read_text()) for m in ("mean_motion", "ours")
    )
    assert 5 < control["tests"]["unseen"]["figures"]["rotation_error"] < 35
    assert {"same", "unseen", "noise"} == set(ours["tests"]) and len(
        ours["tests"]["same"]["rotation_errors"]
    ) == 4
    asked = ours["asked_otherwise"]
    assert set(asked) == {
        "K 8, by score", "K 8, furthest points", "iterations 1", "another object's images", "empty images",
    }  # fmt: skip
    # the weights as they are, asked as they are
    assert asked["K 8, by score"]["rotation_errors"] == ours["tests"]["unseen"]["rotation_errors"]
    study["plan"][0]["methods"] = ["umeyama"]
    config.write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match="method 'umeyama'"):
        registration.Study.read(config)


def evidence(right: bool, apart: float) -> dict:
    row = Evidence(matches=100, agree=40, fitness=0.5, apart=apart, normals=0.9, spread=0.1, correction=0.0)
    return {"right": right, "evidence": list(row)}


def test_thresholds_are_counted_and_chosen():
    rows = [evidence(True, 0.2), evidence(True, 0.4), evidence(False, 0.37), evidence(False, 0.6)]
    assert registration_scans.counts(rows) == (1, 1, 1, 1)
    chosen = registration_scans.choose(rows)
    assert registration_scans.counts(rows, chosen) == (1, 1, 0, 2)
    assert chosen == Thresholds(matches=30, apart=0.26, normals=0.8)  # the strictest that does as well
    # no event in 59 trials: 1 − 0.05^(1/59)
    assert registration_scans.upper_bound(0, 59) == pytest.approx(4.95, abs=0.01)


def test_a_record_of_before_the_way_back_is_completed(tmp_path, monkeypatch):
    """Only what is called good without it is registered again; it can then only be called good no more."""
    rows = [
        {"pair": name, "evidence": evidence(True, apart)["evidence"][:-1], "right": right, "degrees": 5.4}
        for name, apart, right in (
            ("a", 0.2, True),
            ("b", 0.5, True),
            (registration_scans.LOOKED_AT, 0.2, False),
        )
    ]
    assert registration_scans.incomplete(rows) == [0, 2]
    assert "known of 0 of the 2 pairs" in registration_scans.way_back(rows)
    path = tmp_path / "some-ransac.json"
    path.write_text(json.dumps({"set": "some", "rows": rows}))
    asked = []

    def judge(scan, method):
        asked.append(scan.name)
        again = rows[2 if scan.name == registration_scans.LOOKED_AT else 0]
        return {**again, "evidence": [*again["evidence"], 0.2 if scan.name == "a" else 1.2]}

    monkeypatch.setattr(registration_scans, "judge", judge)
    scans = [registration_scans.Scan(row["pair"], np.zeros(3), np.zeros(3), None, 0.0) for row in rows]
    registration_scans.complete("some", "ransac", iter(scans), tmp_path)
    assert asked == ["a", registration_scans.LOOKED_AT]
    after = json.loads(path.read_text())["rows"]
    assert registration_scans.incomplete(after) == [] and registration_scans.counts(after) == (1, 1, 0, 1)
    text = registration_scans.way_back(after)
    assert "wrong and called good 1 and 0, right and called good 1 and 1" in text and "known of" not in text
    path.write_text(json.dumps({"set": "some", "rows": rows}))
    with pytest.raises(ValueError, match="row 0 is of a; the set has b"):
        registration_scans.complete("some", "ransac", iter(scans[1:]), tmp_path)
