"""Work for the processes of ``pointcmt.recipes.workers``, which import it by name."""

from __future__ import annotations

import os
import sys
import time

import torch

from pointcmt.recipes.engine import MachineOptions, OutOfTime, out_of_time


def facts(number: int) -> dict[str, object]:
    print(f"job {number} speaks")
    return {"pid": os.getpid(), "threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"]}


def fail() -> None:
    raise ValueError("this cell is broken\nand says more")


def die() -> None:
    os._exit(7)


def until_time_is_over(minutes: float) -> None:
    while not out_of_time(MachineOptions(minutes=minutes)):
        time.sleep(0.05)
    raise OutOfTime("stopped")


def sleep(path: str) -> None:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)
    sys.exit(1)
