"""Every recipe, killed at random instants and at each of its writes, then resumed: equal to the bit?

``make kill MINUTES=10`` goes on where it was. A kill is wrong where the resumed run refuses to start, ends
with an error, has other weights, metrics or results than the run that was never killed, or where another set
of files is left: temporary ones above all. Which values of the results are times, and differ in every run, is
found by running twice without a kill, and by their names.

Everything is imported once; each run is a child made by ``os.fork``, so that a kill costs no imports. Writes
are seen by an audit hook of Python: a file opened for writing, renamed, deleted, or a folder made, inside the
run's folder; the child ends itself with SIGKILL before the n-th of them. A third of the random kills are
followed by another one of the resumed run.

Each recipe also meets a full disk (a limit of the system on the size of files) and a folder that may not be
written to, at its first write: it must end with exit code 1 and a message that names what could not be
written and says what to do, and the run that is then resumed must be equal too. Of two processes the second
one has a loss or a gradient that is not finite, or an error, dies or stops answering in its second epoch: the
first must end within a minute with a message that names rank 1, and leave a checkpoint to go on from.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks._harness import RESULTS, ROOT, record
from pointcmt.cli import main as command_line
from pointcmt.recipes import engine
from pointcmt.recipes.config import write_json

QUESTION = "Is a run that was killed and resumed the run that was never killed?"
STATE = ROOT / "build" / "kill.json"
RECORD = RESULTS / "reliability" / "kill.json"
WANTED = 100
# times, which may be equal in two runs by chance; whether, where and how often a run was resumed
NOT_COMPARED = re.compile(r"(seconds|milliseconds\w*|per_second|/time|/parts|/config/resume)$|/environment/")
LONGEST = 120.0  # seconds after which a run of a second or two counts as hanging


class Tiny(nn.Module):
    """[B, N, 3] → [B, K]: a network of which a step takes a millisecond."""

    def __init__(self, num_classes: int, feature_dim: int = 16) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, feature_dim))
        self.norm = nn.BatchNorm1d(feature_dim)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.points(points).amax(1)).relu()))


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, its command line for a folder, given what was made before, and how it resumes."""

    name: str
    words: Callable[[Path, Path], Sequence[object]]
    resume: tuple[str, ...] = ("--resume",)
    processes: int = 1


CPU = ("--device", "cpu", "--no-tensorboard", "--no-progress")
DATA = ("--per-class", 2, "--test-per-class", 1, "--num-points", 32, "--holdout", 0.5)
LOOP = ("--epochs", 2, "--batch-size", 8)
STUDENT = ("--student", "benchmarks.kill:Tiny", "--feature-dim", 16, "--guard", "none")


def _teacher(out: Path, made: Path) -> Sequence[object]:
    backbone = ("--backbone-options", "layers=(1,)", "width=0.0625", "stem_stride=2", "--feature-dim", 16)
    return (
        "train-teacher",
        "--out",
        out / "run",
        *DATA,
        *LOOP,
        *CPU,
        "--size",
        16,
        "--accumulate",
        1,
        *backbone,
    )


def _generator(out: Path, made: Path) -> Sequence[object]:
    inputs = ("--teacher", made / "teacher", "--features", out / "features")
    return ("train-generator", "--out", out / "run", *inputs, *DATA, *LOOP, *CPU, "--generator-points", 24)


def _features(out: Path, made: Path) -> Sequence[object]:
    sizes = ("--batch-size", 8, "--draws", 1)
    return ("cache-features", "--teacher", made / "teacher", "--out", out / "features", *DATA, *CPU, *sizes)


def _train(out: Path, made: Path) -> Sequence[object]:
    inputs = (
        "--teacher",
        made / "teacher",
        "--generator",
        made / "generator",
        "--features",
        out / "features",
    )
    return ("train", "--out", out / "run", *inputs, *DATA, *LOOP, *CPU, *STUDENT)


def _unlabelled(out: Path, made: Path) -> Sequence[object]:
    inputs = ("--teacher", made / "teacher", "--features", out / "features", "--unlabelled", made / "clouds")
    soft = ("--fe-weight", 0, "--ce-weight", 0, "--objectives", "soft_labels=1")
    more = ("--unlabelled-objectives", "soft_labels=1")
    return ("train", "--out", out / "run", *inputs, *DATA, *LOOP, *CPU, *STUDENT, *soft, *more)


def _pretrain(out: Path, made: Path) -> Sequence[object]:
    backbone = ("--backbone", "simpleview_resnet", "--backbone-options", "layers=(1,)", "width=0.0625")
    network = ("--method", "pic-at-point", "--student", "pointnet2", "--width", 0.06)
    views = ("--size", 16, "--rig", "simpleview")
    return ("pretrain", "--out", out / "run", *network, *DATA, *LOOP, *CPU, *views, *backbone)


def _segment(out: Path, made: Path) -> Sequence[object]:
    data = ("--data", made / "parts", "--data-up", "z", "--num-points", 48, "--epochs", 2, "--batch-size", 4)
    return (
        "segment",
        "--out",
        out / "run",
        *data,
        *CPU,
        "--width",
        0.05,
        "--student-options",
        "npoints=(16,8)",
    )


def _registration(out: Path, made: Path) -> Sequence[object]:
    network = ("--width", 0.06, "--keypoints", 16, "--iterations", 1, "--view-size", 8, "--views", 2)
    sizes = ("--per-class", 2, "--test-per-class", 1, "--holdout", 0.5, "--pair-points", 64, "--drawn", 1)
    return ("train-registration", "--out", out / "run", *sizes, *network, *LOOP, *CPU, "--baselines", "icp")


def _render(out: Path, made: Path) -> Sequence[object]:
    # the record of its twenty cameras is more than _full_disk has room for
    return ("render-views", made / "meshes", "--out", out / "images", "--size", 48)


def _ablate(out: Path, made: Path) -> Sequence[object]:
    return (
        "ablate",
        "--config",
        made / "study.yaml",
        "--out",
        out / "run",
        "--device",
        "cpu",
        "--no-tensorboard",
    )


def _in_two(words: Callable[[Path, Path], Sequence[object]]) -> Callable[[Path, Path], Sequence[object]]:
    """They wait no longer than this for each other."""
    return lambda out, made: (*words(out, made), "--timeout", 8)


RECIPES = (
    Recipe("train-teacher", _teacher),
    Recipe("train-generator", _generator),
    Recipe("cache-features", _features, ()),
    Recipe("train", _train),
    Recipe("train --unlabelled", _unlabelled),
    Recipe("pretrain", _pretrain),
    Recipe("segment", _segment),
    Recipe("train-registration", _registration),
    Recipe("render-views", _render, ()),
    Recipe("ablate", _ablate, ()),
    *(
        Recipe(f"{name}, two processes", _in_two(words), processes=2)
        for name, words in (
            ("train-teacher", _teacher),
            ("train-generator", _generator),
            ("train", _train),
            ("train --unlabelled", _unlabelled),
            ("pretrain", _pretrain),
            ("segment", _segment),
            ("train-registration", _registration),
        )
    ),
)

STUDY = """
data: {per_class: 2, test_per_class: 1, num_points: 32, holdout: 0.5}
views: {size: 16}
teachers:
  only:
    teacher:
      feature_dim: 16
      backbone_options: ["layers=(1,)", "width=0.0625", "stem_stride=2"]
      loop: {epochs: 1}
    generator: {generator_points: 24, loop: {epochs: 1}}
students:
  net: {student: pointnet2, width: 0.06}
methods:
  none: {method: none}
  FE: {ce_weight: 0}
seeds: [0]
train: {loop: {epochs: 1, batch_size: 16}}
"""


# ---- what the recipes start from


def prepare(made: Path, start: Callable[[Sequence[object], Path], tuple[int, str]] | None = None) -> None:
    """Data, a teacher and a generator in ``made``; ``start`` runs a command line, by default in a child."""
    import trimesh

    start = start or run

    made.mkdir(parents=True)
    draw = np.random.default_rng(0)
    (made / "study.yaml").write_text(STUDY)
    (made / "clouds").mkdir()
    for number in range(6):
        np.save(made / "clouds" / f"{number}.npy", draw.normal(size=(40, 3)).astype(np.float32))
    (made / "parts").mkdir()
    (made / "parts" / "labels.txt").write_text("cup/base\ncup/top\nfork/base\nfork/top\n")
    for split, count in (("train", 4), ("test", 1)):
        for number, kind in enumerate(("cup", "fork")):
            (made / "parts" / split / kind).mkdir(parents=True)
            (made / "meshes" / kind / split).mkdir(parents=True)
            for shape in range(count):
                points = draw.uniform(-1, 1, (80, 3)) * [1, 1, 1 + number]
                labels = 2 * number + (points[:, 2] > 0)
                np.save(made / "parts" / split / kind / f"{shape}.npy", np.column_stack([points, labels]))
            trimesh.creation.box((1, 2, 1 + number)).export(
                made / "meshes" / kind / split / f"{kind}_{split}.off"
            )
    for name, words in (("teacher", _teacher), ("generator", _generator)):
        folder = made / f"of-{name}"
        code, said = start(words(folder, made), folder)
        if code:
            raise RuntimeError(f"{name} could not be made: {said}")
        (folder / "run").rename(made / name)


def load_libraries() -> None:
    """What the recipes import while they run, here once for all children."""
    import importlib

    from pointcmt.cli import COMMANDS
    from pointcmt.data.registry import datasets

    torch.set_num_threads(1)
    datasets()
    for name in (
        "timm",
        "torchvision",
        "matplotlib.pyplot",
        "h5py",
        "accelerate",
        "scipy.optimize",
        "trimesh",
        "typeguard",
    ):
        importlib.import_module(name)
    for name in ("open3d", "pyvista"):  # extras; seconds each, which no kill should be spent on
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for module, _, _ in COMMANDS.values():
        importlib.import_module(f"pointcmt.{module}")


# ---- one run in a child


def _on_write(folder: Path, act: Callable[[str], None]) -> None:
    """Calls ``act`` with the path before every write of this process inside ``folder``."""
    inside = f"{folder}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+")
            writes = writes or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path, writes = arguments[0], True
        else:
            return
        if writes and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(inside):
            act(os.fsdecode(path))

    sys.addaudithook(hook)


def _watch_writes(folder: Path, kill_at: int | None, report: Path) -> None:
    """Counts writes inside ``folder``; dies before number ``kill_at``, else adds each to ``report``."""
    count = 0
    notes = os.open(report, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def act(path: str) -> None:
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(notes, b".")

    _on_write(folder, act)


def _full_disk(folder: Path) -> None:
    """Files of this process may have 2000 bytes, as on a disk that is full."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))


def _read_only(folder: Path) -> None:
    """Nothing may be written in ``folder``; said of this process alone, as permissions do not bind root."""

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    _on_write(folder, refuse)


FAULTS = {"a full disk": _full_disk, "a read-only folder": _read_only}


def _in_second_epoch(act: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A fault of rank 1 in the first step of the second epoch, when there is a checkpoint."""

    def install(folder: Path) -> None:
        if os.environ.get("RANK") != "1":
            return
        see = engine._Finite.see

        def faulty(self: Any, step: int, losses: dict[str, torch.Tensor]) -> None:
            if self.epoch == 1 and step == 0:
                act(losses)
            see(self, step, losses)

        engine._Finite.see = faulty  # type: ignore[method-assign]

    return install


def _nan_loss(losses: dict[str, torch.Tensor]) -> None:
    losses["loss"] = losses["loss"] * float("nan")


def _nan_gradient(losses: dict[str, torch.Tensor]) -> None:
    losses["loss"].register_hook(lambda gradient: gradient * float("nan"))


def _error(losses: dict[str, torch.Tensor]) -> None:
    raise ValueError("broken on purpose")


# what it does, and what the other process must say of it beside its rank
RANK_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "its loss is NaN": (_in_second_epoch(_nan_loss), "the loss is nan in step 1 of epoch 2"),
    "its gradient is NaN": (
        _in_second_epoch(_nan_gradient),
        "the gradient is not finite in step 1 of epoch 2",
    ),
    "it has an error": (_in_second_epoch(_error), "ended with an error: broken on purpose"),
    "it dies": (_in_second_epoch(lambda _: os._exit(9)), "died or does not answer"),
    "it stops answering": (_in_second_epoch(lambda _: time.sleep(3600)), "died or does not answer"),
}


def _child(
    words: Sequence[object],
    folder: Path,
    environment: Mapping[str, str],
    kill_at: int | None,
    fault: str | None,
) -> None:
    code = 70
    try:
        os.setsid()  # what it starts is killed with it
        os.environ.update(environment)
        rank = environment.get("RANK", "0")
        said = os.open(folder.with_name(f"{folder.name}.said{rank}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if fault in RANK_FAULTS:
            RANK_FAULTS[fault][0](folder)
        elif fault is not None:
            FAULTS[fault](folder)
        elif rank == "0":
            _watch_writes(folder, kill_at, folder.with_name(f"{folder.name}.writes"))
        code = command_line([str(word) for word in words])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(
    words: Sequence[object],
    folder: Path,
    processes: int = 1,
    *,
    kill_at: int | None = None,
    kill_after: float | None = None,
    fault: str | None = None,
) -> tuple[int, str]:
    """A command in children of this process.

    Args:
        words: the command line.
        folder: everything that it writes lies in it.
        processes: how many, joined by gloo.
        kill_at: it is killed before this write of its first process, counted from 0.
        kill_after: seconds after which all its processes are killed.
        fault: one of ``FAULTS`` that it meets, or one of ``RANK_FAULTS`` of its second process.

    Returns:
        the exit code of the first process, −9 where it was killed, and what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_name(f"{folder.name}.writes").unlink(missing_ok=True)
    environment: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    children = []
    for rank in range(processes):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        child = os.fork()
        if child == 0:
            _child(words, folder, own, kill_at, fault)
        children.append(child)
    started = time.monotonic()
    until = started + (LONGEST if kill_after is None else kill_after)
    codes: dict[int, int] = {}
    hung = False
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        # one that does not answer waits on for what its fault makes it wait for
        killed = -signal.SIGKILL in codes.values() or (fault in RANK_FAULTS and children[0] in codes)
        if time.monotonic() > until or killed:
            hung = not killed and kill_after is None
            for child in children:
                if child not in codes:
                    try:
                        os.killpg(child, signal.SIGKILL)
                    except ProcessLookupError:  # it has not come to setsid yet
                        os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)
    said = folder.with_name(f"{folder.name}.said0")
    text = said.read_text(errors="replace") if said.exists() else ""
    return (124 if hung else codes[children[0]]), text


def writes_of(folder: Path) -> int:
    """How many writes the latest run into ``folder`` began."""
    return folder.with_name(f"{folder.name}.writes").stat().st_size


# ---- what a run left


def contents(folder: Path) -> dict[str, Any]:
    """Path → what must be equal: tensors, values of JSON by name, and of other files that they are there."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = dict(_leaves([json.loads(line) for line in lines]))
        else:
            found[name] = {}
    return found


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in pairs for leaf in _leaves(item, f"{name}/{key}")]
    return [(name, value)]


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], varies: frozenset[tuple[str, str]] = frozenset()
) -> list[tuple[str, str]]:
    """(file, value) where two folders differ, without what ``varies``; (file, "") where one lacks it."""
    found = [(name, "") for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        found += [
            (name, key)
            for key in sorted(one[name].keys() | other[name].keys())
            if one[name].get(key, None) != other[name].get(key, None)
        ]
    return [
        each
        for each in found
        if each not in varies
        and not NOT_COMPARED.search(each[1])
        and not each[0].endswith("environment.json")
    ]


@dataclass
class Whole:
    """The run that was never killed, made twice."""

    contents: dict[str, Any]
    varies: frozenset[tuple[str, str]]
    writes: int
    seconds: float


def whole_of(recipe: Recipe, work: Path, made: Path) -> Whole:
    """Runs a recipe twice without a kill, in the same folder as the killed ones, so that paths are equal."""
    kept: list[dict[str, Any]] = []
    seconds = 0.0
    for _ in range(2):
        shutil.rmtree(work, ignore_errors=True)
        began = time.monotonic()
        code, said = run(recipe.words(work, made), work, recipe.processes)
        seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"{recipe.name} does not run: exit code {code}: {said[-2000:]}")
        kept.append(contents(work))
    # of a file's values only those of JSON may vary; weights and files may not
    unequal = differences(kept[0], kept[1])
    varying = frozenset(each for each in unequal if each[1].startswith("/"))
    if rest := [each for each in unequal if each not in varying]:
        raise RuntimeError(f"{recipe.name} is not the same twice: {rest[:3]}")
    return Whole(kept[0], varying, writes_of(work), seconds)


def kill_once(
    recipe: Recipe, whole: Whole, work: Path, made: Path, draw: random.Random, write: int | None
) -> tuple[bool, str]:
    """One kill, at a write or at a random instant, and the resumed run.

    Returns:
        whether the run was killed before its end, and what is wrong, empty where nothing is.
    """
    shutil.rmtree(work, ignore_errors=True)
    after = None if write is not None else draw.uniform(0, whole.seconds)
    words = recipe.words(work, made)
    code, said = run(words, work, recipe.processes, kill_at=write, kill_after=after)
    hit = code == -signal.SIGKILL
    if code not in (0, -signal.SIGKILL):
        return hit, f"before the kill: exit code {code}: {said[-600:]}"
    if hit and write is None and draw.random() < 1 / 3:
        run([*words, *recipe.resume], work, recipe.processes, kill_after=draw.uniform(0, whole.seconds))
    code, said = run([*words, *recipe.resume], work, recipe.processes)
    where = f"killed {f'at write {write}' if write is not None else f'after {after:.3f} s'}"
    if code:
        return hit, f"{where}: exit code {code} of the resumed run: {said[-600:]}"
    wrong = differences(whole.contents, contents(work), whole.varies)
    if wrong:
        return hit, f"{where}: {len(wrong)} values or files differ, such as {' '.join(wrong[0])}"
    return hit, ""


def meet(recipe: Recipe, whole: Whole, work: Path, made: Path, fault: str) -> str:
    """A fault, and the run that is resumed when it is over: what is wrong, empty where nothing is."""
    shutil.rmtree(work, ignore_errors=True)
    words = recipe.words(work, made)
    code, said = run(words, work, fault=fault)
    message = said.strip().splitlines()[-2:]
    if code != 1 or "Traceback" in said or not any(f"{work}{os.sep}" in line for line in message):
        return f"{fault}: exit code {code}, and it says {message}"
    if "make room" not in said and "permissions" not in said:
        return f"{fault}: it does not say what to do: {message}"
    code, said = run([*words, *recipe.resume], work)
    wrong = differences(whole.contents, contents(work), whole.varies)
    if code or wrong:
        return f"{fault}: resumed, exit code {code}, differs in {wrong[:1]}"
    return ""


def lose_a_rank(recipe: Recipe, work: Path, made: Path, fault: str) -> str:
    """A fault of rank 1 of two: what is wrong with how rank 0 ends, empty where nothing is."""
    shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()
    code, said = run(recipe.words(work, made), work, recipe.processes, fault=fault)
    spent = time.monotonic() - began
    words = RANK_FAULTS[fault][1]
    named = re.search("rank (0, )?1 of 2", said)  # a contrastive loss takes a gradient to all processes
    if code != 1 or "Traceback" in said or not named or words not in said or spent > 60:
        return f"{fault}: exit code {code} after {spent:.0f} s, and it says {said.strip().splitlines()[-3:]}"
    state = torch.load(work / "run" / "state.pt", weights_only=True)
    if state["epoch"] != 1 or not all(value.isfinite().all() for value in state["model"].values()):
        return f"{fault}: the checkpoint is of epoch {state['epoch']}, or not finite"
    return ""


def lose_and_resume(recipe: Recipe, whole: Whole, work: Path, made: Path, fault: str) -> str:
    """:func:`lose_a_rank`, and the run that is then resumed."""
    if wrong := lose_a_rank(recipe, work, made, fault):
        return wrong
    code, said = run([*recipe.words(work, made), *recipe.resume], work, recipe.processes)
    differing = differences(whole.contents, contents(work), whole.varies)
    if code or differing:
        return f"{fault}: resumed, exit code {code}, differs in {differing[:1]}: {said[-300:]}"
    return ""


# ---- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=WANTED, help="random kills wanted of each recipe")
    parser.add_argument("--writes", type=int, help="kills at writes wanted of each recipe; default: at all")
    parser.add_argument("--recipes", nargs="+", help="of these alone", choices=[one.name for one in RECIPES])
    parser.add_argument("--state", type=Path, default=STATE, help="where it goes on; removed to begin anew")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    until = time.monotonic() + 60 * args.minutes
    state: dict[str, Any] = json.loads(args.state.read_text()) if args.state.exists() else {}
    load_libraries()
    chosen = [one for one in RECIPES if not args.recipes or one.name in args.recipes]
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        made, work = Path(temporary) / "made", Path(temporary) / "work"
        prepare(made)
        wholes: dict[str, Whole] = {}
        while chosen and time.monotonic() < until:
            for recipe in list(chosen):
                own = state.setdefault(
                    recipe.name, {"random": 0, "writes": 0, "of": 0, "wrong": [], "next": 0, "met": []}
                )
                if time.monotonic() > until:
                    break
                if recipe.name not in wholes:
                    wholes[recipe.name] = whole_of(recipe, work, made)
                whole = wholes[recipe.name]
                own["of"] = whole.writes
                # some of each kind in turn, so that a short time has some of all
                wanted = args.kills if recipe.processes == 1 else args.kills // 5
                order = random.Random(recipe.name).sample(range(whole.writes), whole.writes)[: args.writes]
                if recipe.processes > 1:
                    order = []
                for turn in range(6):
                    at_write = turn % 2 == 0 and own["writes"] < len(order)
                    if not at_write and own["random"] >= wanted:
                        continue
                    draw = random.Random(f"{recipe.name} {own['next']}")
                    own["next"] += 1
                    hit, wrong = kill_once(
                        recipe, whole, work, made, draw, order[own["writes"]] if at_write else None
                    )
                    own["writes"] += at_write
                    own["random"] += hit and not at_write
                    if wrong:
                        own["wrong"].append(wrong)
                        print(f"{recipe.name}: {wrong}", flush=True)
                for fault in FAULTS if recipe.processes == 1 else RANK_FAULTS:
                    if fault not in own["met"]:
                        own["met"].append(fault)
                        meeting = meet if recipe.processes == 1 else lose_and_resume
                        if wrong := meeting(recipe, whole, work, made, fault):
                            own["wrong"].append(wrong)
                            print(f"{recipe.name}: {wrong}", flush=True)
                write_json(args.state, state)
                done = own["random"] >= wanted and own["writes"] >= len(order)
                if done:
                    chosen.remove(recipe)
    rows = [
        {
            "recipe": name,
            "killed at random instants": own["random"],
            "killed at a write": own["writes"],
            "of its writes": own["of"],
            "full disk, read-only folder": len(FAULTS.keys() & own["met"]),
            "rank 1 lost, or NaN": len(RANK_FAULTS.keys() & own["met"]),
            "wrong": len(own["wrong"]),
        }
        for name, own in state.items()
    ]
    total = sum(own["random"] + own["writes"] for own in state.values())
    wrong_ones = sum(len(own["wrong"]) for own in state.values())
    record(args.out, QUESTION, rows, notes={"kills": total, "wrong": wrong_ones, "command": "make kill"})
    print(f"{total} kills, {wrong_ones} wrong")
    return 1 if wrong_ones else 0


if __name__ == "__main__":
    sys.exit(main())
