"""Fuzzing: files that were damaged on purpose are read rightly, or refused with their name and a reason.

``make fuzz MINUTES=10`` goes on where it was, once those that were wrong were run again; ``--case k`` runs
one case (the same again, but for safetensors files, whose library writes metadata in no fixed order).
A case is wrong where a reader

* crashes the process, or takes longer than 10 seconds,
* takes more memory than 256 MB and 64 times the file (a limit of the operating system holds it back),
* raises anything but ValueError and OSError (FileNotFoundError and so on), or does not name the file in it,
* or returns what no file can mean: coordinates or weights that are not finite, labels without a class.

The readers run in a process of their own, which is started again where one dies.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / "build" / "fuzz.json"
SECONDS = 10
MEMORY = 256 << 20
EXPANSION = 64
SLACK = 1 << 30  # address space beyond that, for the libraries' own


def draw_case(number: int, folder: Path, whole: dict[str, dict[str, bytes]]) -> tuple[Any, Path, int]:
    """Puts the files of a case into ``folder``: its target, the changed file, and that file's size."""
    from tests.fuzz.mutate import mutate
    from tests.fuzz.targets import TARGETS

    draw = random.Random(number)
    target = TARGETS[number % len(TARGETS)]
    files = whole[target.name]
    changed = draw.choice(sorted(files))
    others = [content for content in files.values() if len(content) < 1 << 16] or [b""]
    made = mutate(files[changed], draw, [*others, draw.choice(list(whole["meshes"].values()))])
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made if name == changed else content)
    return target, folder / changed, len(made)


def whole_files(folder: Path) -> dict[str, dict[str, bytes]]:
    """What every target's seeds are: name of the target → name of the file → content."""
    from tests.fuzz.targets import TARGETS

    found = {}
    for target in TARGETS:
        place = folder / "seed"
        place.mkdir()
        target.make(place)
        found[target.name] = {
            str(path.relative_to(place)): path.read_bytes()
            for path in sorted(place.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        shutil.rmtree(place)
    found["meshes"] = next(files for name, files in found.items() if name.startswith("meshes"))
    return found


def run_case(number: int, folder: Path, whole: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    """One case in this process: what came of it, and what is wrong with that (empty: nothing)."""
    target, changed, size = draw_case(number, folder, whole)
    text = changed.read_bytes().decode("utf-8", "replace").strip() if target.lines else ""
    text = text.splitlines()[0] if text else ""  # the line that is read
    how, wrong, where = "read", "", ""
    _reset_peak()
    before = _memory("VmRSS")
    try:
        target.read(folder, changed)
    except AssertionError as error:
        # of the target itself: what was returned cannot be
        wrong, where = f"returned what cannot be: {error}", _where(error)
    except (ValueError, OSError) as error:
        how = "refused"
        named = str(folder) in str(error) or (target.lines and _names(str(error), text))
        if not named:
            wrong, where = f"{type(error).__name__} does not name the file: {error}", _where(error)
    except BaseException as error:
        wrong, where = f"raised {type(error).__name__}: {error}", _where(error)
    taken = _memory("VmHWM") - before
    if not wrong and taken > MEMORY + EXPANSION * size:
        wrong = f"took {taken >> 20} MB of memory for a file of {size} bytes"
    return {"target": target.name, "how": how, "wrong": wrong[:300], "where": where, "file": changed.name}


def _names(message: str, text: str) -> bool:
    """Whether a message has what a line of options begins with: its first word."""
    found = re.match(r"[\W_]*([A-Za-z0-9]+)", text)
    return found is None or found[1][:20] in message


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # not everywhere; then the limit alone tells
        Path("/proc/self/clear_refs").write_text("5")


def child(first: int, end: int) -> None:
    """Cases one after another; a line of JSON before and after each."""
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    say = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what readers print
    os.dup2(null, 2)
    sys.stdout = sys.stderr = os.fdopen(null, "w")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary)
        whole = whole_files(folder)
        from tests.fuzz.targets import TARGETS

        for target in TARGETS:  # whole files are read, and libraries are loaded before memory is limited
            for name, content in whole[target.name].items():
                _put(folder / "case", whole[target.name])
                try:
                    target.read(folder / "case", folder / "case" / name)
                except Exception as error:
                    say.write(json.dumps({"seed": f"{target.name}: {name}: {error!r}"}) + "\n")
                del content
        most = _memory("VmSize") + MEMORY + SLACK
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in range(first, end):
            say.write(f"{number}\n")
            say.write(json.dumps(run_case(number, folder / "case", whole)) + "\n")


def _put(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def cases(first: int, end: int, seconds: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Outcomes of the cases ``first`` to ``end``, until ``seconds`` are over."""
    from_here, stop = first, time.monotonic() + seconds
    while from_here < end and time.monotonic() < stop:
        # a process for some thousand cases: what a library keeps does not add up for ever
        until = min(end, from_here + 5000)
        command = [sys.executable, "-m", "tests.fuzz.run", "--child", str(from_here), str(until)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert process.stdout is not None
        current, fate = -1, ""
        try:
            while time.monotonic() < stop:
                ready, _, _ = select.select([process.stdout], [], [], SECONDS if current >= 0 else 180)
                if not ready:
                    fate = f"took longer than {SECONDS} seconds"
                    break
                line = process.stdout.readline()
                if not line:
                    fate = f"ended the process: {_ending(process.wait())}" if current >= 0 else ""
                    if current < 0 and from_here < until:
                        raise RuntimeError(f"the process that reads cannot start: {' '.join(command)}")
                    break
                said = json.loads(line)
                if isinstance(said, int):
                    current = said
                elif "seed" in said:
                    raise RuntimeError(f"a whole file is not read: {said['seed']}")
                else:
                    from_here = current + 1
                    yield current, said
                    if from_here == until:
                        break
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if fate and from_here < until:
            from_here = current + 1
            yield current, {"target": "", "how": "lost", "wrong": fate, "where": "", "file": ""}


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--state", type=Path, default=STATE, help="where it goes on; removed to begin anew")
    parser.add_argument("--out", type=Path, help="the record, where all cases were run")
    parser.add_argument("--case", type=int, help="run this one in this process, and keep its files")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(*args.child)
        return 0
    if args.case is not None:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        print(
            json.dumps(run_case(args.case, folder / "case", whole_files(folder)), indent=2), folder / "case"
        )
        return 0
    state: dict[str, Any] = {"next": 0, "counts": {}, "wrong": {}, "mended": {}}
    if args.state.exists():
        state |= json.loads(args.state.read_text())
    counts = collections.Counter(state["counts"])
    started = time.monotonic()
    for before in [int(number) for number in state["wrong"]]:
        for number, said in cases(before, before + 1, 60):
            old = state["wrong"].pop(str(number))
            counts[f"{old['target']}|{old['how']}"] -= 1
            counts[f"{said['target']}|{said['how']}"] += 1
            state["wrong" if said["wrong"] else "mended"] |= {str(number): said}
    for number, said in cases(state["next"], args.cases, 60 * args.minutes):
        counts[f"{said['target']}|{said['how']}"] += 1
        if said["wrong"]:
            state["wrong"][str(number)] = said
        state |= {"next": number + 1, "counts": dict(counts)}
        if number % 1000 == 999:
            _keep(args.state, state)
            print(
                f"{number + 1} cases, {len(state['wrong'])} wrong, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    _keep(args.state, state)
    for number, said in list(state["wrong"].items())[:40]:
        print(f"  --case {number}: {said['target']}, {said['file']}: {said['wrong']} ({said['where']})")
    print(f"{state['next']} cases: {len(state['wrong'])} wrong")
    if args.out and state["next"] >= args.cases:
        from benchmarks._harness import record

        names = dict.fromkeys(key.partition("|")[0] for key in counts)
        rows = [
            {
                "read": name,
                "files": sum(count for key, count in counts.items() if key.partition("|")[0] == name),
                "taken as they are": counts[f"{name}|read"],
                "refused by name and reason": counts[f"{name}|refused"],
            }
            for name in names
        ]
        notes = {"files": state["next"], "wrong": len(state["wrong"]), "command": "make fuzz"}
        if state["mended"]:
            notes["wrong at first, mended since and run again"] = len(state["mended"])
        record(args.out, "What becomes of damaged files?", rows, notes=notes)
    return 1 if state["wrong"] else 0


def _keep(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(state))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
