"""The kernels with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`), or ThreadSanitizer
(`make sanitize THREAD=1`).

Builds csrc/ with them into build/sanitize/, beside links to the package's own files, so that what is
installed stays as it is; then runs the ops' suite there, and random calls (tests/ops/random_calls.py), with
each library of CPU kernels that this CPU can run. The CUDA kernels are checked too, as the suite runs them on
a CPU. Every step that does not end well is printed, and counted in the record.

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

from benchmarks._harness import RESULTS, ROOT, record
from pointcmt.ops import _extension

QUESTION = "Do the kernels touch memory that is not theirs, or do what C++ leaves undefined?"
# the last is libstdc++'s: a broken precondition, or an index outside of a vector
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer|Assertion '")
RUNTIME = {"address": "asan", "thread": "tsan"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1",
}
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
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--thread", action="store_true", help="ThreadSanitizer, over random calls on four threads"
    )
    parser.add_argument("--calls", type=int, default=100_000, help="random calls for each library")
    parser.add_argument("--suite", default="tests/ops", help="the tests to run, as pytest takes them")
    parser.add_argument("--skip-suite", action="store_true", help="random calls alone")
    options = parser.parse_args()
    sanitizers = "thread" if options.thread else "address,undefined"
    tree = build(sanitizers)
    environment = {
        **os.environ,
        **OPTIONS,
        "PYTHONUNBUFFERED": "1",
        "POINTCMT_SANITIZE": sanitizers,
        "LD_PRELOAD": preloads(sanitizers),
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "4" if options.thread else "1",
    }
    built = {path.name.partition(".")[0] for path in (tree / "pointcmt").glob("_cpu_*.so")}
    capabilities = [name for name in _extension.CAPABILITIES if f"_cpu_{name}" in built]
    rows = []
    for name in ["native"] if options.thread else capabilities:
        here = environment if options.thread else {**environment, "POINTCMT_CPU_CAPABILITY": name}
        if not options.thread and not options.skip_suite:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT]
            command += ["-o", f"pythonpath={tree} .", *options.suite.split()]
            rows.append(step(f"{options.suite}, {name}", command, here, tree / f"suite-{name}.log"))
        counts = tree / f"calls-{name}.json"
        command = [sys.executable, "tests/ops/random_calls.py", "--calls", str(options.calls)]
        row = step(
            f"random calls, {name}", [*command, "--out", str(counts)], here, tree / f"calls-{name}.log"
        )
        rows.append(row)
        if counts.exists():
            row["refused"] = sum(count.get("refused", 0) for count in json.loads(counts.read_text()).values())
    notes = {
        "sanitizers": sanitizers,
        "compiler": subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[
            0
        ],
        "tests left out": f"-k '{LEFT_OUT}'",
        "command": "make sanitize" + (" THREAD=1" if options.thread else ""),
    }
    record(
        RESULTS / "reliability" / f"sanitize-{sanitizers.partition(',')[0]}.json", QUESTION, rows, notes=notes
    )
    return 1 if any(row["exit code"] or row["reports"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
