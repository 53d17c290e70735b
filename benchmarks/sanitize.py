"""The kernels with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`), or ThreadSanitizer
(`make sanitize THREAD=1`).

Builds csrc/ with them into build/sanitize/, beside links to the package's own files, so that what is
installed stays as it is; then runs the ops' suite there, and random calls (tests/ops/random_calls.py), with
each library of CPU kernels that this CPU can run. The CUDA kernels are checked too, as the suite runs them on
a CPU. Every step that does not end well is printed, and counted in the record. ``--suite`` and
``--capability`` choose a part; what the record has of other parts stays.

For threads, at::parallel_for runs on threads of the standard library (tests/ops/tsan/ says why), and a race
on purpose (tests/ops/tsan/race.cpp) must be reported first.

Memory that is still held when the process ends is not reported: CPython and PyTorch hold theirs on purpose.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import RESULTS, ROOT, commit, record
from pointcmt.ops import _extension

QUESTIONS = {
    "address": "Do the kernels touch memory that is not theirs, or do what C++ leaves undefined?",
    "thread": "Does a thread of the kernels touch what another writes?",
}
# the last is libstdc++'s: a broken precondition, or an index outside of a vector
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer|Assertion '")
RUNTIME = {"address": "asan", "thread": "tsan"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1:allocator_may_return_null=1",
}
# at::get_num_threads is MKL's number of threads, by default of no more than there are cores
THREADS = {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"}
# the tests of what has threads; the CUDA kernels on a CPU have fibers in their place
THREADED = " ".join(
    f"tests/ops/test_{name}.py" for name in ("grouping", "edges", "neighbors", "sampling", "emd", "deferred")
)
# Inductor compiles code of its own in processes of its own, for minutes; it adds no call of a kernel
LEFT_OUT = "not compile and not inductor"


def build(sanitizers: str) -> Path:
    """Compiles the libraries and links the rest of the package beside them; the folder to import it from."""
    tree = ROOT / "build" / "sanitize" / sanitizers.partition(",")[0]
    environment = {
        **os.environ,
        "POINTCMT_SANITIZE": sanitizers,
        "POINTCMT_REQUIRE_EXT": "1",
        "FORCE_CUDA": "0",
    }
    if sanitizers == "thread":  # threads are the same for every CPU: one library is enough
        environment["POINTCMT_ARCH"] = "native"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tree)]
    command += ["--build-temp", str(tree / "objects")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    links = {path.name: path for path in (ROOT / "pointcmt").iterdir() if path.suffix != ".so"}
    for name, path in {**links, "adapters": ROOT / "adapters"}.items():
        link = tree / "pointcmt" / name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    return tree


def preloads(sanitizers: str) -> str:
    """The sanitizer's runtime, which must come before Python's own libraries, and libstdc++, so that it finds
    what throws exceptions."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    names = [f"lib{RUNTIME[sanitizers.partition(',')[0]]}.so", "libstdc++.so"]
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in names
    ]
    return ":".join(str(Path(one.stdout.strip()).resolve()) for one in found)


def step(what: str, command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Runs one command, its output in a file; a line of the record."""
    start = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    text = log.read_text(errors="replace")
    reports = len(REPORT.findall(text))
    summary = [
        line.strip("= ") for line in text.splitlines() if re.search(r"\d+ (passed|failed|calls)", line)
    ]
    print(f"{what}: exit {code}, {reports} reports; {log.relative_to(ROOT)}", flush=True)
    if code or reports:
        print("\n".join(text.splitlines()[-60:]), flush=True)
    return {
        "run": what,
        "outcome": re.sub(r" in .*", "", summary[-1]) if summary else "did not end",
        "reports": reports,
        "exit code": code,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "commit": (commit() or "unknown")[:10],
    }


def race(tree: Path, environment: dict[str, str]) -> bool:
    """Whether a race on purpose is reported, in the way in which the kernels are run."""
    home = Path(torch.__file__).parent
    source, library = ROOT / "tests/ops/tsan/race.cpp", tree / "race.so"
    command = ["c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-fsanitize=thread", str(source)]
    command += [f"-I{source.parent}", f"-isystem{home / 'include'}", f"-L{home / 'lib'}"]
    command += ["-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    code = f"import ctypes, torch; ctypes.CDLL({str(library)!r}).race(1000)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return "WARNING: ThreadSanitizer: data race" in run.stderr and "race.cpp" in run.stderr


def keep(path: Path, question: str, rows: list[dict[str, Any]], notes: dict[str, Any]) -> None:
    """Writes the record; rows of other runs and other notes that it has stay."""
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "notes": {}}
    done = {row["run"] for row in rows}
    rows = [*(row for row in old["rows"] if row["run"] not in done), *rows]
    record(path, question, sorted(rows, key=lambda row: row["run"]), notes={**old["notes"], **notes})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer, on four threads")
    parser.add_argument("--calls", type=int, default=100_000, help="random calls for each library; 0: none")
    parser.add_argument("--suite", help='the tests to run, as pytest takes them; none: ""')
    parser.add_argument("--capability", help="the library of CPU kernels to run; default: each in turn")
    options = parser.parse_args()
    sanitizers = "thread" if options.thread else "address,undefined"
    suite = (THREADED if options.thread else "tests/ops") if options.suite is None else options.suite
    tree = build(sanitizers)
    environment = {
        **os.environ,
        **OPTIONS,
        **(THREADS if options.thread else {"OMP_NUM_THREADS": "1"}),
        "PYTHONUNBUFFERED": "1",
        "POINTCMT_SANITIZE": sanitizers,
        "LD_PRELOAD": preloads(sanitizers),
        "PYTHONPATH": str(tree),
    }
    kind = sanitizers.partition(",")[0]
    out = RESULTS / "reliability" / f"sanitize-{kind}.json"
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    notes = {
        "sanitizers": sanitizers,
        "compiler": compiler,
        "tests left out": f"-k '{LEFT_OUT}'",
        "command": "make sanitize" + (" THREAD=1" if options.thread else ""),
    }
    if options.thread:
        if not race(tree, environment):
            print("ThreadSanitizer does not report the race of tests/ops/tsan/race.cpp: nothing was checked")
            return 1
        notes["a race on purpose"] = "reported"
    built = {path.name.partition(".")[0] for path in (tree / "pointcmt").glob("_cpu_*.so")}
    capabilities = [name for name in _extension.CAPABILITIES if f"_cpu_{name}" in built]
    if options.capability and options.capability not in capabilities:
        parser.error(f"--capability is {options.capability!r}; expected one of {', '.join(capabilities)}")
    wrong = False
    for name in (
        ["native"] if options.thread else [options.capability] if options.capability else capabilities
    ):
        here = environment if options.thread else {**environment, "POINTCMT_CPU_CAPABILITY": name}
        commands = {}
        if suite:
            tests = re.sub(r"\btests/(ops/test_)?|\.py\b", "", suite)
            commands[f"{tests}, {name}"] = [
                *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT),
                *("-o", f"pythonpath={tree} .", *suite.split()),
            ]
        counts = tree / f"calls-{name}.json"
        if options.calls:
            commands[f"random calls, {name}"] = [
                *("tests/ops/random_calls.py", "--calls", str(options.calls), "--out", str(counts))
            ]
        for what, command in commands.items():
            row = step(
                what, [sys.executable, *command], here, tree / f"{re.sub(r'[^a-z0-9]+', '-', what)}.log"
            )
            if what.startswith("random") and counts.exists():
                calls = json.loads(counts.read_text()).values()
                row["refused"] = sum(count.get("refused", 0) for count in calls)
            wrong |= bool(row["exit code"] or row["reports"])
            keep(out, QUESTIONS[kind], [row], notes)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
