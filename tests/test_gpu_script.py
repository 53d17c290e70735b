"""Without a GPU: the calls that a GPU is to be given, in miniature on the CPU, prove that they would work."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import gpu
from pointcmt.cli import main

ROOT = Path(__file__).resolve().parents[1]
# what makes a script small; the last value of an option counts
SMALL = {
    "emd": "--points 64 --exact-points 64 --hard-points 32 --repeats 1 --seconds 0.01 --batch 2 --pairs 2",
    "neighbors": "--points 128 --batch 2 --repeats 1 --seconds 0.01 --part clouds",
    "training_step": "--batch 2 --points 64 --views 1 --image-size 32 --repeats 1 --students DGCNN",
}


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_in_miniature(tmp_path, monkeypatch):
    called: dict[str, list[str]] = {}

    def here(name: str, command: list[str], out: Path, seconds: float, **environment: str) -> dict:
        called[name] = command
        assert seconds > 0
        if name in SMALL:
            assert command[1:3] == ["-m", f"benchmarks.{name}"] and "cuda" in command
            words = ["cpu" if word == "cuda" else word for word in command[3:]]
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda: False)
                script = importlib.import_module(f"benchmarks.{name}")
                assert script.main([*words, *SMALL[name].split()]) != 1
        return {"step": name, "exit": 0, "seconds": 0.0}

    device = types.SimpleNamespace(name="none, in miniature", clock_rate=1980000, multi_processor_count=132)
    monkeypatch.setattr(gpu, "run", here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert gpu.main(["--out", str(tmp_path), "--seconds", "600"]) == 0
    assert list(called) == ["build", "tests", *SMALL]
    assert called["build"][1:] == ["setup.py", "build_ext", "--inplace"] and (ROOT / "setup.py").exists()
    assert "cuda" in called["tests"]
    records = {path.name for path in tmp_path.glob("*.json")}
    assert records == {"steps.json", "emd_floor-cuda.json", *(f"{name}-cuda.json" for name in SMALL)}
    # the CPU counts no bids, of which the floor is made: as a GPU's record has them
    row = {
        "case": "a",
        "points": 1024,
        "pairs": 32,
        "candidate": "c",
        "bids": 5e3,
        "per pair": {"median": 1e-3},
    }
    (tmp_path / "emd.json").write_text(json.dumps({"rows": [row]}))
    [floor] = gpu.floors(tmp_path / "emd.json", 1.98e9, 132)
    assert floor["floor of the batch, s"] == pytest.approx(1024 * 5e3 * 10 / 128 / 1.98e9)
    assert floor["measured / floor"] == pytest.approx(0.032 / floor["floor of the batch, s"])


@pytest.mark.slow
def test_the_study_for_a_gpu_runs_in_miniature(tmp_path):
    """gpu.yaml with less of everything: its teacher, generator, plain and PointCMT student, and its tests."""
    study = yaml.safe_load((ROOT / "benchmarks/configs/gpu.yaml").read_text())
    study["data"] = {
        "data": "synthetic", "num_points": 64, "per_class": 3, "test_per_class": 1,
        "holdout": study["data"]["holdout"],
    }  # fmt: skip
    study["views"]["size"] = 16
    for part in study["teachers"]["all"].values():
        part["loop"] |= {"epochs": 1, "batch_size": 8}
    study["teachers"]["all"]["teacher"]["backbone_options"] = ["width=0.25", "layers=(1,1)", "stem_stride=2"]
    study["teachers"]["all"]["generator"]["generator_points"] = 48
    study["students"] = {"pointnet2": study["students"]["pointnet2"] | {"width": 0.125}}
    study["train"]["loop"] |= {"epochs": 1, "batch_size": 8}
    study["seeds"], study["paper"] = [0], {}
    study["tests"] = {"voted": {"votes": 2}}
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    words = ["ablate", "--config", str(file), "--out", str(out), "--device", "cpu", "--no-progress"]
    assert main([*words, "--no-tensorboard", "--debug"]) == 0
    records = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    assert {record["method"] for record in records} == set(study["methods"])
    assert all("voted" in record["tests"] for record in records)
