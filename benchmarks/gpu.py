"""Builds, checks and times everything on a GPU in one call of under ten minutes.

    python -m benchmarks.gpu --out DIR [--repos DIR] [--modelnet40 DIR] [--msn-emd DIR] [--pytorch-emd DIR]

Compiles csrc/ for the GPU at hand, runs the tests marked ``cuda``, then the benchmarks in the order of their
worth, each within what is left of the time. Records and logs are written to DIR as they come, so that a call
that is cut short keeps what it has. Without a GPU it says so and does nothing.

The floor of the EMD is written beside its times. A bid looks at all N points, and a look takes one square
root and about ten other operations in float32. A multiprocessor starts 16 square roots in a clock and 128 of
the others; whichever takes longer is the floor. Each pair has one thread block, so that B pairs keep min(B,
multiprocessors) of them at work. Bytes do not bound it: a pair reads 24 N bytes and writes 8 N once, and bids
from shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import ROOT, record

SQUARE_ROOTS_PER_CLOCK = 16  # of a multiprocessor: the special-function units of compute capability 7 to 9
OTHERS_PER_CLOCK = 128
OTHERS_PER_LOOK = 10  # three differences, three products and sums, the price, two comparisons, the index
QUESTION = "How near is the EMD on this GPU to its floor?"


def run(name: str, command: list[str], out: Path, seconds: float, **environment: str) -> dict[str, Any]:
    """One step with a limit; its output goes to a log."""
    began = time.perf_counter()
    log = out / f"{name}.log"
    print(f"== {name} (at most {seconds:.0f} s)", flush=True)
    with log.open("w") as stream:
        try:
            code: int | None = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    took = time.perf_counter() - began
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    print(f"   {'cut short' if code is None else f'exit {code}'} after {took:.0f} s", flush=True)
    return {"step": name, "exit": code, "seconds": round(took, 1)}


def floors(emd: Path, clock_hz: float, multiprocessors: int) -> list[dict[str, Any]]:
    """The EMD's rows with the least time that their bids could take on this GPU.

    Args:
        emd: the record of ``benchmarks.emd --device cuda``.
        clock_hz: the multiprocessors' highest clock.
        multiprocessors: how many there are.
    """
    rows = []
    for row in json.loads(emd.read_text())["rows"]:
        if "bids" not in row:
            continue
        pairs, n = row["pairs"], row["points"]
        clocks = n * row["bids"] * max(1 / SQUARE_ROOTS_PER_CLOCK, OTHERS_PER_LOOK / OTHERS_PER_CLOCK)
        batch = clocks / clock_hz * -(-pairs // multiprocessors)
        measured = row["per pair"]["median"] * pairs
        rows.append(
            {
                "case": row["case"],
                "points": n,
                "pairs": pairs,
                "candidate": row["candidate"],
                "looks per pair": float(n * row["bids"]),
                "bytes per pair": 32 * n,
                "floor of the batch, s": batch,
                "measured / floor": measured / batch,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for records and logs")
    parser.add_argument("--repos", type=Path, help="folder of checkouts of the public repositories")
    parser.add_argument("--modelnet40", default=os.environ.get("POINTCMT_MODELNET40"))
    parser.add_argument("--msn-emd", help="a built folder of the MSN EMD (module emd_module)")
    parser.add_argument("--pytorch-emd", help="a built folder of PyTorchEMD (module emd)")
    parser.add_argument("--seconds", type=float, default=560, help="for the whole call")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU is visible to PyTorch: nothing was built, checked or timed")
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = time.perf_counter() + options.seconds
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = {"POINTCMT_MODELNET40": options.modelnet40} if options.modelnet40 else {}

    def left(part: float) -> float:
        return part * (ends - time.perf_counter())

    python, steps = sys.executable, []
    build = [python, "setup.py", "build_ext", "--inplace"]
    forced = {"FORCE_CUDA": "1", "POINTCMT_REQUIRE_EXT": "1", "TORCH_CUDA_ARCH_LIST": capability}
    steps.append(run("build", build, out, left(0.6), **forced))
    if steps[-1]["exit"] == 0:
        tests = [python, "-m", "pytest", "-q", "-m", "cuda", "tests"]
        steps.append(run("tests", tests, out, left(0.3), **environment))

        def bench(script: str, part: float, *arguments: str) -> None:
            command = [python, "-m", f"benchmarks.{script}", "--device", "cuda", *arguments]
            command += ["--out", str(out / f"{script}-cuda.json")]
            steps.append(run(script, command, out, left(part), **environment))

        built = [("--msn-emd", options.msn_emd), ("--pytorch-emd", options.pytorch_emd)]
        peers = [text for flag, folder in built if folder for text in (flag, folder)]
        sizes = ["--points", "1024", "256", "2048", "4096", "8192"]
        bench("emd", 0.45, "--seconds", "8", "--twin-points", "0", *sizes, *peers)
        if (out / "emd-cuda.json").exists():
            device = torch.cuda.get_device_properties(0)
            clock = float(getattr(device, "clock_rate", 0)) * 1e3 or 1.98e9
            rows = floors(out / "emd-cuda.json", clock, device.multi_processor_count)
            notes = {"clock, GHz": clock / 1e9, "multiprocessors": device.multi_processor_count}
            record(out / "emd_floor-cuda.json", QUESTION, rows, notes=notes)
        from benchmarks.__main__ import arguments

        bench("neighbors", 0.4, "--seconds", "3", *arguments("neighbors", options.repos, None))
        bench("training_step", 0.5, "--repeats", "5")
        if options.repos is not None:
            bench("students", 0.95, *arguments("students", options.repos, options.modelnet40))
    (out / "steps.json").write_text(json.dumps(steps, indent=2) + "\n")
    failed = [step["step"] for step in steps if step["exit"] != 0]
    print(f"records in {out}" + (f"; failed or cut short: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
