"""Every student and every method in DistributedDataParallel with two processes, three steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_three_steps_leave_both_processes_equal(tmp_path):
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            str(Path(__file__).with_name("students_ddp_worker.py")), str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert {name.split()[0] for name in one} == {"pointnet2", "dgcnn", "rscnn", "pointmlp", "pointnext"}
    assert {name.split()[1] for name in one} == {"pointcmt", "pic_at_point", "mm_point", "crosspoint"}
    for name, result in {**one, **two}.items():
        assert math.isfinite(result["loss"]) and result["apart"] == 0, (name, result)
