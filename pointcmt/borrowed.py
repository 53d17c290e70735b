"""Running a part of somebody's network without leaving anything in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class UntouchedStatistics:
    """Keeps a network's running statistics as they are while something extra passes through it.

    Batch normalisation in training mode goes on using the statistics of the batch, but neither its running
    mean and variance nor ``num_batches_tracked`` see it. Other modules that change a buffer when they run are
    found out on first use, and from then on their buffers are put back each time.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
        self._changing: list[str] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        tracking = [norm for norm in self._norms if norm.training and norm.track_running_stats]
        before = self._snapshot()
        for norm in tracking:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in tracking:
                norm.track_running_stats = True
            self._put_back(before)

    def _snapshot(self) -> dict[str, Tensor]:
        names = self._changing
        if names is None:
            return {name: buffer.detach().clone() for name, buffer in self._module.named_buffers()}
        return {name: self._module.get_buffer(name).detach().clone() for name in names}

    def _put_back(self, before: dict[str, Tensor]) -> None:
        changed = []
        with torch.no_grad():
            for name, old in before.items():
                now = self._module.get_buffer(name)
                if self._changing is not None:
                    now.copy_(old)
                elif not torch.equal(now, old):
                    now.copy_(old)
                    changed.append(name)
        if self._changing is None:
            self._changing = changed


class Lent:
    """A network that training borrows: in eval mode, without gradients to its parameters, until given back.

    Mode, ``requires_grad`` and device come back as they were, submodule by submodule.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modes = [(child, child.training) for child in module.modules()]
        self._grads = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._home = device_of(module)
        module.eval()
        module.requires_grad_(False)

    def at(self, device: torch.device) -> nn.Module:
        """The network on ``device``, in eval mode."""
        here = device_of(self._module)
        if here is not None and here != device:
            self._module.to(device)
        if self._module.training:
            self._module.eval()
        return self._module

    def give_back(self) -> None:
        if self._home is not None and device_of(self._module) != self._home:
            self._module.to(self._home)
        for child, mode in self._modes:
            child.training = mode
        for parameter, wanted in self._grads:
            parameter.requires_grad_(wanted)


def device_of(module: nn.Module) -> torch.device | None:
    """Where the first parameter or buffer is; None without any."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if tensor is None else tensor.device
