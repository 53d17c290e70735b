"""FeatureCache: what is written is read, killed and doubled builds end well, bad files are made anew."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pointcmt.data import FeatureCache
from pointcmt.types import TeacherOutput

VIEWS = {"rig": "simpleview", "size": 128}
N = 20


def outputs(seed: int, everything: bool = False) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(N, *size, generator=generator) for size in ((6,), (3,), (2, 6), (2, 4, 3, 3))]
    return TeacherOutput(*made) if everything else TeacherOutput(*made[:2])


def part(output: TeacherOutput, rows: Tensor) -> TeacherOutput:
    return TeacherOutput(*(None if value is None else value[rows] for value in output[:4]))


class Fill:
    """Gives outputs(seed) in pieces; dies before it has given ``until`` rows."""

    def __init__(self, seed: int = 0, until: int = N, everything: bool = False, delay: float = 0.0) -> None:
        self.output, self.until, self.delay = outputs(seed, everything), until, delay
        self.asked: list[int] = []

    def __call__(self, rows: Tensor) -> Iterator[tuple[Tensor, TeacherOutput]]:
        self.asked = rows.tolist()
        for piece in rows.split(7):
            if int(piece[-1]) >= self.until:
                raise KeyboardInterrupt
            time.sleep(self.delay)
            yield piece, part(self.output, piece)


def build(
    path: Path, fill: Fill, teacher: str = "teacher-a", data: str = "data-a", views=VIEWS
) -> FeatureCache:
    return FeatureCache.build(path, teacher, data, views, N, fill)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished cache of ``outputs(0)``."""
    path = tmp_path / "deep" / "features.safetensors"
    build(path, Fill())
    return path


@pytest.mark.parametrize("everything", [False, True])
def test_round_trip(tmp_path: Path, everything: bool) -> None:
    path = tmp_path / "features.safetensors"
    build(path, Fill(everything=everything))
    cache = FeatureCache.open(path, teacher_fingerprint="teacher-a", data_fingerprint="data-a", views=VIEWS)
    rows = torch.tensor([3, 19, 3, 0])
    expected = part(outputs(0, everything), rows)
    for value, right in zip(cache.output(rows), expected, strict=True):
        assert value is None if right is None else torch.equal(value, right)
    assert torch.equal(cache[rows], expected.feature)
    assert (len(cache), cache.feature_dim, cache.num_classes, cache.views) == (N, 6, 3, VIEWS)
    assert cache[rows[:0]].shape == (0, 6)
    cache[rows].zero_()
    assert torch.equal(cache[rows], expected.feature), "a batch shares memory with the file"
    assert torch.equal(load_file(path)["feature"], outputs(0).feature)


def test_an_encoder_without_a_classifier(tmp_path: Path) -> None:
    fill = Fill()
    fill.output = TeacherOutput(fill.output.feature)
    cache = build(tmp_path / "a.safetensors", fill)
    assert cache.num_classes is None and cache.output(torch.tensor([1])).logits is None


def test_what_is_there_is_not_computed_again(path: Path) -> None:
    fill = Fill()
    build(path, fill)
    assert fill.asked == []


def test_killed_build_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build(path, Fill(until=14))
    with pytest.raises(FileNotFoundError, match=r"interrupted.*cache-features"):
        FeatureCache.open(path)
    fill = Fill()
    cache = build(path, fill)
    assert fill.asked == list(range(14, 20))
    assert torch.equal(cache[torch.arange(N)], outputs(0).feature)
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"] == [path.name]


@pytest.mark.parametrize("change", [{"teacher": "teacher-b"}, {"data": "data-b"}, {"views": {}}])
def test_a_build_for_something_else_starts_again(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "features.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build(path, Fill(until=14))
    fill = Fill(seed=5)
    cache = build(path, fill, **change)
    assert fill.asked == list(range(N)) and torch.equal(cache[torch.arange(N)], outputs(5).feature)


def test_broken_pieces_are_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build(path, Fill(until=14))
    pieces = sorted((tmp_path / "features.safetensors.partial").glob("*"))
    content = bytearray(pieces[0].read_bytes())
    content[-30] ^= 1  # a flipped bit among the numbers
    pieces[0].write_bytes(content)
    fill = Fill()
    cache = build(path, fill)
    assert fill.asked == [*range(7), *range(14, 20)]
    assert torch.equal(cache[torch.arange(N)], outputs(0).feature)


def test_another_teacher_in_the_same_file_replaces_it_when_done(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="stale"):
        build(path, Fill(seed=5, until=14), teacher="teacher-b")
    assert FeatureCache.open(path).teacher_fingerprint == "teacher-a"
    with pytest.warns(UserWarning, match="stale"):
        cache = build(path, Fill(seed=5), teacher="teacher-b")
    assert torch.equal(cache[torch.arange(N)], outputs(5).feature)


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


def test_damaged_files_are_refused_and_made_anew(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-300] ^= 4
    for broken in (content[:0], content[:5], content[:100], content[:-1], bytes(flipped), b"{}" * 300):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"features\.safetensors.*(damaged|not a feature cache)"):
            FeatureCache.open(path)
        with pytest.warns(UserWarning, match="this is done now"):
            assert torch.equal(build(path, Fill())[torch.arange(N)], outputs(0).feature)
    with pytest.raises(FileNotFoundError, match="cache-features"):
        FeatureCache.open(tmp_path / "none")


def _build_in_process(path: Path, teacher: str, seed: int) -> None:
    build(path, Fill(seed=seed, delay=0.05), teacher=teacher)


@pytest.mark.parametrize("teachers", [("teacher-a", "teacher-a"), ("teacher-a", "teacher-b")])
def test_two_processes_and_one_file(tmp_path: Path, teachers: tuple[str, str]) -> None:
    """Both end well, and the file holds the rows of the teacher that it names."""
    path = tmp_path / "features.safetensors"
    context = multiprocessing.get_context("fork")
    seeds = [0, 0 if teachers[0] == teachers[1] else 5]
    both = [
        context.Process(target=_build_in_process, args=(path, teacher, seed))
        for teacher, seed in zip(teachers, seeds, strict=True)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    cache = FeatureCache.open(path)
    seed = dict(zip(teachers, seeds, strict=True))[cache.teacher_fingerprint]
    assert torch.equal(cache[torch.arange(N)], outputs(seed).feature)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_an_error_that_names_file_and_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk here: {mounted.stderr.strip()}")
    try:
        big = Fill()
        big.output = TeacherOutput(torch.zeros(N, 100_000))
        with pytest.raises(
            OSError, match=rf"no space for {small}/features.*the disk of {small} has .* MB are needed"
        ):
            build(small / "features.safetensors", big)
        (small / "filler").write_bytes(bytes(56 << 10))
        with pytest.raises(OSError, match=r"a-.*\.npz cannot be written .*is full: make room"):
            from pointcmt.data.array_cache import cached_array

            cached_array(small, "a", [], lambda: torch.zeros(50_000).numpy())
        assert {entry.suffix for entry in small.iterdir() if entry.is_file()} <= {"", ".lock"}
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_misuse(path: Path, tmp_path: Path) -> None:
    cache = FeatureCache.open(path)
    for wrong in (torch.tensor([20]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="20 shapes"):
            cache[wrong]
    for wrong in (torch.tensor([0.5]), torch.tensor([[1]]), torch.ones(20, dtype=torch.bool)):
        with pytest.raises(ValueError, match="index"):
            cache[wrong]
    other = tmp_path / "other.safetensors"
    fill = Fill()
    fill.output.feature[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"feature holds NaN"):
        build(other, fill)

    def changing(rows: Tensor) -> Iterator[tuple[Tensor, TeacherOutput]]:
        yield rows[:5], TeacherOutput(torch.zeros(5, 6))
        yield rows[5:], TeacherOutput(torch.zeros(15, 7))

    with pytest.raises(ValueError, match=r"\(7,\).*after.*\(6,\)"):
        FeatureCache.build(other, "a", "b", {}, N, changing)
    with pytest.raises(ValueError, match="expected 15 rows"):
        FeatureCache.build(other, "a", "b", {}, N, lambda rows: [(rows, TeacherOutput(torch.zeros(5, 6)))])
    with pytest.raises(RuntimeError, match=r"15 of 20 rows .*\(first 5\)"):
        FeatureCache.build(
            other, "a", "c", {}, N, lambda rows: [(rows[:5], TeacherOutput(torch.zeros(5, 6)))]
        )


@pytest.mark.cuda
def test_features_come_to_the_device_of_the_index(path: Path, cuda: torch.device) -> None:
    assert FeatureCache.open(path)[torch.arange(4, device=cuda)].device.type == "cuda"


def test_what_a_kill_left_beside_a_finished_cache_goes(path: Path) -> None:
    """Killed when the cache had its name and its pieces were about to be deleted."""
    left = path.with_name(path.name + ".partial")
    left.mkdir()
    (left / "000000.safetensors").touch()
    fill = Fill()
    build(path, fill)
    assert fill.asked == [] and not left.exists()
