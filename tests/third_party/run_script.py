"""Runs a third-party training script as its author would, and writes down what it trained.

For tests only, a program of its own: ``python run_script.py REPORT OPTIONS SCRIPT ARGUMENTS…``, in the
checkout. The script's source is not touched; around it

* random generators are seeded, and data loaders load in the process itself;
* where there is no GPU, what the script asks of CUDA happens on the CPU, as by
  ``pointcmt.compat.install(cuda_on_cpu=True)``, and ``torch.cuda.is_available()`` is answered with yes to
  the script's own files (some refuse to run otherwise);
* packages that it imports without needing them here are stubs.

REPORT gets, as JSON, the total loss of every backward pass and, of every :meth:`CrossModalTraining.loss`,
what it returned and the objectives in it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import random
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import pointcmt
from pointcmt.compat import _cuda_on_cpu


class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A module, and all modules in it, whose every attribute is a mock."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in self.names else None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__spec__, module.__path__ = spec, []
        return module

    def exec_module(self, module: Any) -> None:
        pass


def spied(report: dict[str, Any], stack: ExitStack) -> None:
    backward, loss = torch.Tensor.backward, pointcmt.CrossModalTraining.loss
    leave = pointcmt.CrossModalTraining.__exit__

    def spy_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        report["totals"].append(self.item())
        backward(self, *args, **kwargs)

    def spy_loss(self: pointcmt.CrossModalTraining, **kwargs: Any) -> torch.Tensor:
        value = loss(self, **kwargs)
        report["taught"].append(value.item())
        report["objectives"].append(self.losses)
        report["adapter"] = self.adapter.name
        return value

    def spy_leave(self: pointcmt.CrossModalTraining, *args: Any) -> None:
        leave(self, *args)
        report["left"] += 1

    stack.enter_context(mock.patch.object(torch.Tensor, "backward", spy_backward))
    stack.enter_context(mock.patch.object(pointcmt.CrossModalTraining, "loss", spy_loss))
    stack.enter_context(mock.patch.object(pointcmt.CrossModalTraining, "__exit__", spy_leave))


def in_this_process(stack: ExitStack) -> None:
    loader = torch.utils.data.DataLoader.__init__

    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        loader(self, *args, **{**kwargs, "num_workers": 0})

    stack.enter_context(mock.patch.object(torch.utils.data.DataLoader, "__init__", alone))


def cuda_there_for(folder: Path, stack: ExitStack) -> None:
    really = torch.cuda.is_available

    def is_available() -> bool:
        asked_by = sys._getframe(1).f_globals.get("__file__") or ""
        return really() or Path(asked_by).resolve().is_relative_to(folder)

    stack.enter_context(mock.patch.object(torch.cuda, "is_available", is_available))


def main(report_path: str, options: str, script: str, *arguments: str) -> None:
    chosen = json.loads(options)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    report: dict[str, Any] = {"totals": [], "taught": [], "objectives": [], "left": 0, "adapter": None}
    sys.meta_path.insert(0, Stub(chosen["stubs"]))
    if chosen["stand_ins"]:  # the script as it is needs the extensions that a diff brings
        import pointcmt.compat

        pointcmt.compat.install()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    with ExitStack() as stack:
        spied(report, stack)
        in_this_process(stack)
        if chosen["redirect"]:
            _cuda_on_cpu.turn_on()
            cuda_there_for(Path.cwd().resolve(), stack)
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            Path(report_path).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
