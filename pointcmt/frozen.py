"""Using a network, or a part of one, without leaving anything in it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class UntouchedStatistics:
    """Keeps a network's buffers as they are while something extra passes through it.

    Batch normalisation in training mode goes on using the statistics of the batch, but neither its running
    mean and variance nor ``num_batches_tracked`` see it. Other modules that change a buffer when they run, in
    place, by resizing it or by putting another tensor in its place, are found out on first use, and from then
    on their buffers are put back each time.

    Args:
        module: the network.

    Raises:
        RuntimeError: it has lazy modules that were never run.
    """

    def __init__(self, module: nn.Module) -> None:
        lazy = [
            name
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
            if nn.parameter.is_lazy(tensor)
        ]
        if lazy:
            raise RuntimeError(
                f"{type(module).__name__} has lazy layers that have no size yet ({', '.join(lazy[:3])}): run "
                "it once on a batch before training it in this context"
            )
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

    def _snapshot(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of each buffer that may change -> the tensor itself, and a copy of its values."""
        names = self._changing
        buffers = dict(self._module.named_buffers())
        return {
            name: (buffer, buffer.detach().clone())
            for name, buffer in buffers.items()
            if names is None or name in names
        }

    def _put_back(self, before: dict[str, tuple[Tensor, Tensor]]) -> None:
        changed = []
        with torch.no_grad():
            for name, (tensor, old) in before.items():
                owner, _, leaf = name.rpartition(".")
                holder = self._module.get_submodule(owner)
                if holder._buffers.get(leaf) is tensor and tensor.shape == old.shape:
                    if self._changing is None and torch.equal(tensor, old):
                        continue
                else:
                    if tensor.shape != old.shape:
                        tensor.resize_(old.shape)
                    holder._buffers[leaf] = tensor
                tensor.copy_(old)
                changed.append(name)
        if self._changing is None:
            self._changing = changed


class _Was(NamedTuple):
    modes: list[tuple[nn.Module, bool]]
    gradients: list[tuple[nn.Parameter, bool]]
    device: torch.device | None


class Frozen:
    """A network that training uses: in eval mode, without gradients to its parameters, until restored.

    Mode, ``requires_grad`` and device come back as they were, submodule by submodule, when the last of those
    that froze it restores it, in whatever order they do.

    Args:
        module: the network.
    """

    _users: ClassVar[weakref.WeakKeyDictionary[nn.Module, tuple[int, _Was]]] = weakref.WeakKeyDictionary()

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        count, was = self._users.get(
            module,
            (
                0,
                _Was(
                    [(child, child.training) for child in module.modules()],
                    [(parameter, parameter.requires_grad) for parameter in module.parameters()],
                    device_of(module),
                ),
            ),
        )
        self._users[module] = (count + 1, was)
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

    def restore(self) -> None:
        """Undoes it, where nobody else still uses the network."""
        count, was = self._users.pop(self._module)
        if count > 1:
            self._users[self._module] = (count - 1, was)
            return
        if was.device is not None and device_of(self._module) != was.device:
            self._module.to(was.device)
        for child, mode in was.modes:
            child.training = mode
        for parameter, wanted in was.gradients:
            parameter.requires_grad_(wanted)


def device_of(module: nn.Module) -> torch.device | None:
    """Where the first parameter or buffer is; None without any."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if tensor is None else tensor.device
