"""FeatureCache: what is written is read, killed builds go on, and stale or broken files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pointcmt.data import FeatureCache

SIZES = {"n": 20, "feature_dim": 6, "num_classes": 3}
VIEWS = {"rig": "simpleview", "size": 128}


def begin(path: Path, teacher: str = "teacher-a", data: str = "data-a", **change) -> FeatureCache:
    return FeatureCache.create(path, teacher, data, VIEWS, **(SIZES | change))


def outputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 6, generator=generator), torch.randn(20, 3, generator=generator)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished cache of ``outputs(0)``."""
    path = tmp_path / "deep" / "features.safetensors"
    cache = begin(path)
    feature, logits = outputs(0)
    for rows in torch.randperm(20, generator=torch.Generator().manual_seed(1)).split(7):
        cache.write(rows, feature[rows], logits[rows])
    cache.finish()
    return path


def test_round_trip(path: Path) -> None:
    cache = FeatureCache.open(path, teacher_fingerprint="teacher-a", data_fingerprint="data-a", views=VIEWS)
    feature, logits = outputs(0)
    rows = torch.tensor([3, 19, 3, 0])
    assert torch.equal(cache[rows], feature[rows])
    output = cache.output(rows)
    assert torch.equal(output.feature, feature[rows]) and torch.equal(output.logits, logits[rows])
    assert (len(cache), cache.feature_dim, cache.num_classes, cache.views) == (20, 6, 3, VIEWS)
    assert cache[rows[:0]].shape == (0, 6)
    cache[rows].zero_()
    assert torch.equal(cache[rows], feature[rows]), "a batch shares memory with the file"


def test_it_is_a_safetensors_file(path: Path) -> None:
    tensors = load_file(path)
    feature, logits = outputs(0)
    assert torch.equal(tensors["feature"], feature) and torch.equal(tensors["logits"], logits)


def test_killed_build_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    feature, logits = outputs(2)
    cache = begin(path)
    cache.write(torch.arange(8), feature[:8], logits[:8])
    del cache  # killed: no finish
    with pytest.raises(FileNotFoundError, match=r"interrupted.*cache-features"):
        FeatureCache.open(path)
    cache = begin(path)
    assert cache.missing().tolist() == list(range(8, 20))
    with pytest.raises(RuntimeError, match="12 of 20 rows"):
        cache.finish()
    cache.write(cache.missing(), feature[8:], logits[8:])
    cache = cache.finish()
    assert torch.equal(cache[torch.arange(20)], feature)
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.safetensors"]


@pytest.mark.parametrize("change", [{"teacher": "teacher-b"}, {"data": "data-b"}, {"feature_dim": 7}])
def test_a_build_for_something_else_starts_again(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "features.safetensors"
    feature, logits = outputs(2)
    begin(path).write(torch.arange(8), feature[:8], logits[:8])
    assert len(begin(path, **change).missing()) == 20


def test_broken_partial_file_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    feature, logits = outputs(2)
    begin(path).write(torch.arange(8), feature[:8], logits[:8])
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(partial.read_bytes()[:-100])
    assert len(begin(path).missing()) == 20


def test_old_cache_stays_until_the_new_one_is_finished(path: Path) -> None:
    feature, logits = outputs(5)
    cache = begin(path, teacher="teacher-b")
    assert FeatureCache.open(path).teacher_fingerprint == "teacher-a"
    cache.write(torch.arange(20), feature, logits)
    cache.finish()
    assert torch.equal(FeatureCache.open(path, teacher_fingerprint="teacher-b")[torch.arange(20)], feature)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"teacher_fingerprint": "teacher-b"}, "teacher teacher-a.*teacher teacher-b"),
        ({"data_fingerprint": "data-b"}, "data data-a.*data data-b"),
        ({"views": {"rig": "ring12", "size": 128}}, "simpleview.*ring12"),
    ],
)
def test_stale_cache_names_both_and_the_command(path: Path, expected: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"stale.*{words}.*pointcmt cache-features"):
        FeatureCache.open(path, **expected)


def test_truncated_or_foreign_files(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"features\.safetensors.*(damaged|truncated).*cache-features"):
            FeatureCache.open(path)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a cache at all, though long enough")
    with pytest.raises(ValueError, match="not a feature cache"):
        FeatureCache.open(foreign)
    with pytest.raises(FileNotFoundError, match="cache-features"):
        FeatureCache.open(tmp_path / "none")


def test_misuse(path: Path) -> None:
    cache = FeatureCache.open(path)
    feature, logits = outputs(0)
    with pytest.raises(RuntimeError, match="open for reading"):
        cache.write(torch.arange(20), feature, logits)
    for wrong in (torch.tensor([20]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="20 shapes"):
            cache[wrong]
    for wrong in (torch.tensor([0.5]), torch.tensor([[1]]), torch.ones(20, dtype=torch.bool)):
        with pytest.raises(ValueError, match="index"):
            cache[wrong]
    writable = begin(path.with_name("other"))
    with pytest.raises(ValueError, match=r"feature has shape \[20, 5\]"):
        writable.write(torch.arange(20), feature[:, :5], logits)
    feature[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        writable.write(torch.arange(20), feature, logits)
    assert len(writable.missing()) == 20


@pytest.mark.cuda
def test_features_come_to_the_device_of_the_index(path: Path, cuda: torch.device) -> None:
    assert FeatureCache.open(path)[torch.arange(4, device=cuda)].device.type == "cuda"
