"""The run folder: one training run, described well enough to be understood, resumed and compared.

config.json        the resolved configuration, and fingerprints of what the run started from
environment.json   versions, device, commit, which kernels were compiled
metrics.jsonl      one JSON object per epoch
state.pt           everything that resuming needs (``torch.load(weights_only=True)``)
last.safetensors   the model after the last finished epoch
best.safetensors   the model of the best epoch, and results.json says best by what
results.json       the outcome; its presence means that the run is finished
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pointcmt import locks
from pointcmt.checkpoint import atomic_write, maker, naming_file, read_about, remove_stale
from pointcmt.ops._extension import has_cpu_kernels, has_cuda_kernels
from pointcmt.recipes.config import plain, read_json, write_json
from pointcmt.recipes.progress import warn

PACKAGES = ("pointcmt", "torch", "torchvision", "timm", "numpy", "accelerate", "h5py", "safetensors")

# where a run is written to, on what it runs and how it reports do not change its result
NOT_PART_OF_THE_RESULT = (
    "out", "resume", "device", "progress", "tensorboard", "workers", "minutes", "timeout",
    "features", "data_cache",
)  # fmt: skip


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine, device, commit and compiled kernels, as the run folder records them."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": versions,
        "kernels": {"cpu": has_cpu_kernels(), "cuda": has_cuda_kernels()},
        "commit": commit(),
        "command": " ".join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def described_environment(device: str = "auto") -> dict[str, Any]:
    """Hardware, versions and commit for a record that is shown to others: no path, no name of the machine.

    Args:
        device: auto, cpu or cuda, as the option --device.
    """
    on_gpu = torch.cuda.is_available() and device != "cpu"
    known = environment("cuda" if on_gpu else "cpu")
    left_out = ("command", "platform", "processes")
    return {key: value for key, value in known.items() if key not in left_out} | {"cores": cores()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+`` where files were changed; or
    None."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        name = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if name.returncode:
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _lock_of(path: Path) -> Path:
    """Of a folder, inside it; of a file (a name with a suffix), beside it."""
    path = Path(path)
    return path.with_name(f".{path.name}.lock") if path.suffix and not path.is_dir() else path / ".lock"


def hold(path: Path) -> bool:
    """Keep other processes out of a folder, or off a file, that this one writes, until :func:`let_go` or the
    process's end.

    Two commands in one folder would write the same files twice over. In one process it may be held again.

    Returns:
        whether it was not held yet.

    Raises:
        RuntimeError: another process holds it; the message says which.
    """
    try:
        return locks.take(_lock_of(path))
    except locks.BusyError as error:
        raise RuntimeError(
            f"another process is at work in {path} ({error}): wait for it, stop it, or give another --out"
        ) from None


def let_go(path: Path) -> None:
    """Give up what :func:`hold` took."""
    locks.release(_lock_of(path))


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """:func:`hold`, for the time of a ``with``."""
    new = hold(path)
    try:
        yield
    finally:
        if new:
            let_go(path)


class RunFolder:
    """A run folder that is being written; ``open`` makes one or continues one.

    In a run of several processes only the main one writes; the others read.
    """

    def __init__(self, path: Path, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main

    @classmethod
    def open(
        cls,
        path: Path,
        config: Any,
        *,
        command: str,
        inputs: Mapping[str, str] | None = None,
        resume: bool = False,
        device: torch.device | str = "cpu",
    ) -> RunFolder:
        """Make the run folder, or with ``resume`` continue the one that is there.

        Args:
            path: the folder.
            config: dataclass with the resolved configuration.
            command: the subcommand of ``pointcmt`` that this is a run of.
            inputs: fingerprints of what the run starts from (data, teacher, generator …).
            resume: continue an existing run. An empty or absent folder starts a new one, so that the same
                command line can be repeated until the run is done.
            device: recorded in environment.json.

        Raises:
            FileExistsError: the folder holds something and ``resume`` is False.
            ValueError: the folder holds a run of another configuration, or no run at all.
            RuntimeError: another process is at work in the folder.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise FileExistsError(f"{run.path} is a file; a run needs a folder: give another --out")
        if _lock_of(run.path).exists():
            with held(run.path):  # who is at work there is said before what is there
                pass
        wanted = {"command": command, "config": plain(config), "inputs": dict(inputs or {})}
        # a run that was killed while it began leaves no more than these
        strangers = sorted(
            file.name
            for file in (run.path.iterdir() if run.path.is_dir() else ())
            if not file.name.startswith(".") and file.name != "environment.json"
        )
        if run.config_path.exists():
            if not resume:
                raise FileExistsError(
                    f"{run.path} already holds a run of `pointcmt {run.read_config().get('command')}`. "
                    "Add --resume to continue it, or give another --out."
                )
            hold(run.path)
            run._check_same(wanted)
            run._go_on_to(wanted)
            remove_stale(run.path, held=True)
            then, now = read_json(run.path / "environment.json"), environment(device)
            for name in ("processes", "threads"):
                if then.get(name, now[name]) != now[name]:
                    warn(
                        f"{run.path} was begun with {name}: {then[name]}, and goes on with {now[name]}: the "
                        "result will not be that of a run that was never interrupted"
                        + (" in the last digits" if name == "threads" else "")
                    )
            then.setdefault("resumed", []).append(now)
            write_json(run.path / "environment.json", then)
        elif strangers:
            raise FileExistsError(
                f"{run.path} is not empty and is not a run folder (it has no config.json, but "
                f"{strangers[0]}). "
                "Give another --out."
            )
        else:
            hold(run.path)
            # config.json last: with it the folder is a run, and a kill before it leaves nothing to resume
            write_json(run.path / "environment.json", environment(device))
            write_json(run.config_path, wanted)
        return run

    @classmethod
    def start(
        cls,
        accelerator: Accelerator,
        path: Path,
        config: Any,
        *,
        command: str,
        inputs: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> RunFolder:
        """``open`` in a run of one or several processes: the main one makes the folder, then all go on."""
        run = cls(path, accelerator.is_main_process)
        if accelerator.is_main_process:
            run = cls.open(
                path, config, command=command, inputs=inputs, resume=resume, device=accelerator.device
            )
        accelerator.wait_for_everyone()
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def state_path(self) -> Path:
        return self.path / "state.pt"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results_path(self) -> Path:
        return self.path / "results.json"

    def read_config(self) -> dict[str, Any]:
        """What the run was started with: command, config and inputs; ValueError where the file is damaged."""
        found = read_json(self.config_path)
        kinds = {"command": str, "config": dict, "inputs": dict}
        if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()) or not all(
            isinstance(value, str) for value in found["inputs"].values()
        ):
            raise ValueError(
                f"{self.config_path} lacks command, config or inputs, or holds them otherwise; it was "
                "damaged, or changed by hand: give another --out"
            )
        return found

    def _check_same(self, wanted: dict[str, Any]) -> None:
        there = self.read_config()
        if there.get("command") != wanted["command"]:
            raise ValueError(
                f"{self.path} holds a run of `pointcmt {there.get('command')}`, not of "
                f"`pointcmt {wanted['command']}`: give another --out"
            )
        old, new = flatten(there["config"]), flatten(wanted["config"])
        missing = object()
        # of inputs the contents count, by their fingerprints below: a folder may have moved
        by_fingerprint = there["inputs"].keys() | wanted["inputs"].keys()
        differing = [
            f"{name.split('.')[-1]}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} now"
            for name in sorted(old.keys() | new.keys())
            if old.get(name, missing) != new.get(name, missing)
            and name.split(".")[-1] not in (*NOT_PART_OF_THE_RESULT, *by_fingerprint)
            and name != "loop.epochs"  # see _go_on_to
        ]
        if differing:
            raise ValueError(
                f"{self.path} was started with another configuration; {'; '.join(differing)}. "
                "Resume with the options it was started with, or give another --out."
            )
        changed = [
            f"{name} ({there['inputs'].get(name, 'absent')[:12]} there, "
            f"{wanted['inputs'].get(name, 'absent')[:12]} now)"
            for name in sorted(there["inputs"].keys() | wanted["inputs"].keys())
            if there["inputs"].get(name) != wanted["inputs"].get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was started from other inputs; by fingerprint these changed: "
                f"{', '.join(changed)}. "
                "A resumed run would mix the two: give another --out."
            )

    def _go_on_to(self, wanted: dict[str, Any]) -> None:
        """Another number of epochs: the run goes on to it where that many are not over yet."""
        there = self.read_config()
        before, now = (each["config"].get("loop", {}).get("epochs") for each in (there, wanted))
        if before == now:
            return
        state = self.load_state()
        done = 0 if state is None else state["epoch"]
        if now < done or (state is None and self.results_path.exists()):
            raise ValueError(
                f"{self.path} has {before} epochs, of which {done} are over"
                + ("" if state is not None else "; its training state (state.pt) is gone")
                + f": it cannot go on to --epochs {now}. Give another --out."
            )
        rate = wanted["config"]["loop"].get("schedule", "constant")
        warn(
            f"{self.path} was begun with --epochs {before} and goes on to {now} after {done}: "
            + (
                "the learning rate is constant, as it was"
                if rate == "constant"
                else f"the {rate} schedule of the learning rate is planned anew over {now} epochs, so that "
                f"this is not the run that --epochs {now} makes from the start"
            )
            + "; weights and guards that follow the part of the run that is done follow the new length"
        )
        self.results_path.unlink(missing_ok=True)
        there["config"]["loop"]["epochs"] = now
        there.setdefault("epochs_before", []).append([before, done])
        write_json(self.config_path, there)

    # metrics

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if self.main:
            with naming_file(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(record)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line that a kill cut short is left out."""
        return read_metrics(self.path)

    def forget_metrics_after(self, epoch: int) -> None:
        """Drop the records of epochs that finished after the checkpoint: they are about to run again."""
        if self.main and self.metrics_path.exists():
            kept = [record for record in self.metrics() if record.get("epoch", 0) <= epoch]
            with atomic_write(self.metrics_path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))

    # training state

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write state.pt atomically; tensors, numbers, strings, lists and dictionaries only."""
        if self.main:
            with atomic_write(self.state_path) as temporary:
                torch.save(dict(state), temporary)

    def load_state(self) -> dict[str, Any] | None:
        """The training state on the CPU, or None where no epoch was finished.

        Raises:
            ValueError: state.pt is damaged.
        """
        if not self.state_path.exists():
            return None
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not isinstance(state.get("epoch"), int):
                raise ValueError("it holds no epoch")
            return state
        except Exception as error:
            raise ValueError(
                f"{self.state_path} cannot be read ({error}); delete {self.path} and start the run again"
            ) from error

    # results

    def finished(self) -> dict[str, Any] | None:
        """The results of a finished run, or None."""
        if not self.results_path.exists():
            return None
        let_go(self.path)
        return read_json(self.results_path)

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write results.json, which marks the run as finished, and return its content."""
        made: dict[str, Any] = plain(results)
        if self.main:
            write_json(self.results_path, made)
            let_go(self.path)
        return made


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``path/metrics.jsonl``, without a last line that a kill cut short; [] where there
    are none."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    records = []
    lines = file.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            if not isinstance(record, dict) or not isinstance(record.get("epoch", 0), int | float):
                raise ValueError
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise ValueError(
                f"{file}:{number} is not JSON of an epoch; the run folder was damaged or changed by hand"
            ) from None
        records.append(record)
    return records


def find_checkpoint(path: Path, kind: str) -> Path:
    """The checkpoint file that a user means by ``path``: the file itself, or that of a run folder.

    Args:
        path: a ``.safetensors`` file, or a run folder.
        kind: ``teacher``, ``generator``, ``student``, ``registration`` or ``segmenter``.

    Raises:
        FileNotFoundError: neither is there; names the command that makes one.
    """
    path = Path(path)
    if path.is_file():
        return path
    tried = [path / f"{kind}.safetensors", path / kind / f"{kind}.safetensors"]
    for file in tried:
        if file.is_file():
            return file
    unfinished = (
        " The run in that folder is not finished: continue it with --resume."
        if (path / "config.json").exists() and not (path / "results.json").exists()
        else ""
    )
    raise FileNotFoundError(
        f"no {kind} at {path} (looked for {', '.join(str(p) for p in [path, *tried])}).{unfinished} "
        f"Make one with: {maker(kind)} --out FOLDER"
    )


def run_config_beside(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration of the run that wrote ``checkpoint``: as the file itself says, else config.json
    beside it; None where neither is there."""
    about = read_about(checkpoint)
    if "config" in about:
        return about
    file = Path(checkpoint).parent / "config.json"
    return read_json(file) if file.exists() else None


def results_beside(checkpoint: Path) -> dict[str, Any]:
    """What is known of the run that wrote ``checkpoint``: as the file itself says, else results.json beside
    it; {} where neither is there."""
    about = read_about(checkpoint)
    if "classes" in about:
        return about
    file = Path(checkpoint).parent / "results.json"
    return read_json(file) if file.exists() else {}
