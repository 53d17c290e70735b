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

import dataclasses
import enum
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pointcmt.checkpoint import atomic_write
from pointcmt.ops._extension import has_cpu_kernels, has_cuda_kernels

PACKAGES = ("pointcmt", "torch", "torchvision", "timm", "numpy", "accelerate", "h5py", "safetensors")

# where a run is written to, on what it runs and how it reports do not change its result
NOT_PART_OF_THE_RESULT = ("out", "resume", "device", "progress", "tensorboard", "workers", "minutes")


def to_json(value: Any) -> Any:
    """``value`` as plain JSON types: dataclasses and mappings as objects, paths and enums as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "item"):  # a numpy or torch scalar
        return value.item()
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(to_json(value), indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; a ValueError that names the file where it is not one."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run folder was changed by hand") from error


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
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise FileExistsError(f"{run.path} is a file; a run needs a folder: give another --out")
        wanted = {"command": command, "config": to_json(config), "inputs": dict(inputs or {})}
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
            run._check_same(wanted)
            then = read_json(run.path / "environment.json")
            then.setdefault("resumed", []).append(environment(device))
            write_json(run.path / "environment.json", then)
        elif strangers:
            raise FileExistsError(
                f"{run.path} is not empty and is not a run folder (it has no config.json, but "
                f"{strangers[0]}). "
                "Give another --out."
            )
        else:
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
        return read_json(self.config_path)

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

    # metrics

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if self.main:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(to_json(record)) + "\n")

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
            return torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{self.state_path} cannot be read ({error}); delete {self.path} and start the run again"
            ) from error

    # results

    def finished(self) -> dict[str, Any] | None:
        """The results of a finished run, or None."""
        return read_json(self.results_path) if self.results_path.exists() else None

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write results.json, which marks the run as finished, and return its content."""
        results = to_json(results)
        if self.main:
            write_json(self.results_path, results)
        return dict(results)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``path/metrics.jsonl``, without a last line that a kill cut short; [] where there
    are none."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    records = []
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{file}:{number} is not JSON; the run folder was changed by hand") from None
    return records


def find_checkpoint(path: Path, kind: str) -> Path:
    """The checkpoint file that a user means by ``path``: the file itself, or that of a run folder.

    Args:
        path: a ``.safetensors`` file, or a run folder.
        kind: ``teacher``, ``generator``, ``student`` or ``registration``.

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
    command = {
        "teacher": "train-teacher",
        "generator": "train-generator",
        "student": "train",
        "registration": "train-registration",
    }[kind]
    unfinished = (
        " The run in that folder is not finished: continue it with --resume."
        if (path / "config.json").exists() and not (path / "results.json").exists()
        else ""
    )
    raise FileNotFoundError(
        f"no {kind} at {path} (looked for {', '.join(str(p) for p in [path, *tried])}).{unfinished} "
        f"Make one with: pointcmt {command} --out FOLDER"
    )


def run_config_beside(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration of the run that wrote ``checkpoint``, where config.json lies beside it."""
    file = Path(checkpoint).parent / "config.json"
    return read_json(file) if file.exists() else None


def results_beside(checkpoint: Path) -> dict[str, Any]:
    """The results of the run that wrote ``checkpoint``; {} where results.json does not lie beside it."""
    file = Path(checkpoint).parent / "results.json"
    return read_json(file) if file.exists() else {}
