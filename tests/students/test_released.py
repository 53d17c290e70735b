"""Checkpoints in the forms that the public training scripts write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pointcmt import students


@pytest.fixture
def source():
    torch.manual_seed(3)
    return students.dgcnn(7, width=0.125)


FORMS = {
    "bare": lambda state: state,
    "DataParallel (antao97)": lambda state: {f"module.{k}": v for k, v in state.items()},
    "yanx27": lambda state: {
        "epoch": 12,
        "instance_acc": np.float64(0.92),
        "class_acc": np.float64(0.9),
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
    },
    "ma-xu": lambda state: {
        "net": {f"module.{k}": v for k, v in state.items()},
        "epoch": 3,
        "best_test_acc": np.float32(94.0),
    },
    "Lightning": lambda state: {"state_dict": state, "global_step": 3, "pytorch-lightning_version": "0.6"},
    "before counted batches": lambda state: {
        k: v for k, v in state.items() if not k.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_public_form_loads(source, tmp_path, form, zipped):
    path = tmp_path / "model.pth"
    torch.save(FORMS[form](source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    student = students.dgcnn(7, width=0.125)
    assert students.load_released_checkpoint(student, path) is student
    for name, value in source.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_what_does_not_fit_is_named(source, tmp_path):
    state = dict(source.state_dict())
    del state["conv5.0.weight"]
    state["extra.weight"] = torch.zeros(1)
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError) as caught:
        students.load_released_checkpoint(students.dgcnn(8, width=0.125), path)
    message = str(caught.value)
    for part in ("conv5.0.weight", "extra.weight", "linear3.weight", "[7, 32] instead of [8, 32]", str(path)):
        assert part in message
    untouched = students.dgcnn(8, width=0.125)
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    with pytest.raises(ValueError):
        students.load_released_checkpoint(untouched, path)
    assert all(torch.equal(v, before[k]) for k, v in untouched.state_dict().items())


def test_code_is_never_unpickled(source, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(source, path)  # a whole module: unpickling it would run code
    with pytest.raises(ValueError, match="cannot be read as weights only"):
        students.load_released_checkpoint(source, path)


def test_other_files_are_explained(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        students.load_released_checkpoint(source, tmp_path / "missing.pth")
    whole = tmp_path / "model.pth"
    torch.save(source.state_dict(), whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.pth \(2000 bytes\)"):
        students.load_released_checkpoint(source, cut)
    torch.save({"epoch": 3, "accuracy": 0.9}, whole)
    with pytest.raises(ValueError, match=r"holds no state_dict.*accuracy.*epoch"):
        students.load_released_checkpoint(source, whole)
