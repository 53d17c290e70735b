"""Every benchmark in turn, then the tables: what ``make bench`` runs.

Peers that are not there are skipped by name. Checkouts of public repositories are looked for in ``--repos``,
ModelNet40 in ``--modelnet40`` or the variable POINTCMT_MODELNET40.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks._harness import ROOT

SCRIPTS = ("emd", "neighbors", "students", "training_step", "pretraining_step", "memory")


def arguments(script: str, repos: Path | None, modelnet40: str | None) -> list[str]:
    """The options of one script for the peers and data that there are."""
    given: list[str] = []
    if repos is not None and script == "neighbors":
        for flag, pattern in (("--yanx27", "*ointnet_Pointnet2_pytorch"), ("--antao97", "*dgcnn.pytorch")):
            found = sorted(repos.glob(pattern))
            given += [flag, str(found[0])] if found else []
    if script == "students":
        given += ["--repos", str(repos)] if repos is not None else []
        given += ["--modelnet40", modelnet40] if modelnet40 else []
    return given


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--repos", type=Path, help="folder that holds checkouts of the public repositories")
    parser.add_argument(
        "--modelnet40", default=os.environ.get("POINTCMT_MODELNET40"), help="ModelNet40's folder"
    )
    options = parser.parse_args(argv)
    environment = dict(os.environ)
    if options.modelnet40:
        environment["POINTCMT_MODELNET40"] = options.modelnet40
    failed = []
    for script in options.only:
        print(f"\n== benchmarks.{script}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{script}"]
        command += arguments(script, options.repos, options.modelnet40)
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(script)
    subprocess.run([sys.executable, "-m", "benchmarks.tables"], cwd=ROOT, check=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
