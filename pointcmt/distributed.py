"""Keeping what a method trains equal on all processes, whatever wraps the user's own network."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn


class KeptEqual:
    """Modules that start equal on all ranks of ``torch.distributed``, and whose gradients are averaged.

    What ``DistributedDataParallel`` does for a network, for modules that have no forward pass of their own:
    on making, parameters and buffers are rank 0's; each backward pass leaves the mean over the ranks in
    ``grad`` (with gradients accumulated over several passes too); :meth:`share_buffers` makes running
    statistics rank 0's again. It has a process group of its own, so that its exchanges do not mix with
    others. In one process it does nothing.

    Args:
        modules: by name; those with parameters to train, the same on every rank.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = list(modules.values())
        self._handles: list[Any] = []
        self._group: Any = None
        parameters = [p for module in self._modules for p in module.parameters() if p.requires_grad]
        if not parameters or not dist.is_available() or not dist.is_initialized():
            return
        if dist.get_world_size() == 1:
            return
        self._group = dist.new_group()
        for module in self._modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0, group=self._group)
        self._handles = [p.register_post_accumulate_grad_hook(self._average) for p in parameters]

    def _average(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # the sum, then divided: gloo has no mean
        dist.all_reduce(parameter.grad, group=self._group)
        parameter.grad.div_(dist.get_world_size())

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Gives every rank rank 0's buffers (running statistics): before a forward pass, as DDP does."""
        if self._group is None:
            return
        for module in self._modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0, group=self._group)

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._handles, self._group = [], None


def leave(code: int) -> NoReturn:
    """Ends one of several processes with ``code``, without taking its interpreter apart.

    gloo's threads outlive ``destroy_process_group`` where a ``DistributedDataParallel`` was made, and abort
    the process ("terminate called without an active exception") when one of them lets go of a tensor while
    Python is being taken apart: a finished run then counts as failed
    (https://github.com/pytorch/pytorch/pull/179291). What is registered with ``atexit`` is still called.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
