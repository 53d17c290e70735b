"""How processes end: tests/recipes/test_processes.py is about how they are lost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit
import torch.distributed as dist
from pointcmt import distributed

class Late:
    def __del__(self):
        print("taken apart")

late = Late()
atexit.register(print, "at exit")
dist.init_process_group("gloo", init_method="file://STORE", rank=0, world_size=1)
print("worked", end=" ")  # not flushed
distributed.leave(3)
"""


def test_leaving_keeps_the_code_and_what_was_said_and_does_not_take_the_interpreter_apart(tmp_path):
    """There gloo's threads abort a process that has done its work."""
    command = [sys.executable, "-c", SCRIPT.replace("STORE", str(tmp_path / "store"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "worked at exit\n"


@pytest.mark.parametrize("processes", [None, "2"])
def test_the_command_line_leaves_by_it_where_it_is_one_of_several(tmp_path, processes):
    lines = ["import atexit", "class Late:", " def __del__(self): print('taken apart')", "late = Late()"]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "atexit.register(print, 'at exit')"]))
    command = [sys.executable, "-m", "pointcmt", "adapters", "--import", str(tmp_path / "mine.py")]
    environment = {**os.environ, **({"WORLD_SIZE": processes} if processes else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "at exit" in done.stdout, done.stderr
    assert ("taken apart" in done.stdout) == (processes is None)
