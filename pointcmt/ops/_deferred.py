"""Errors that are found on a GPU, and of which the host hears later, without ever waiting for it.

To look at a value on a GPU the host has to wait until all work before it is done, which would stall every
training step. So the finding is copied to the host in the background, and looked at when the next call comes
by.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """Tells when a copy is there: a CUDA event."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class _Finding:
    count: Tensor  # on the host, valid once it has arrived
    arrival: Arrival
    message: str
    tolerated: bool


def _send(count: Tensor) -> tuple[Tensor, Arrival]:
    host = torch.empty((), dtype=count.dtype, pin_memory=True)
    with torch.cuda.device(count.device):
        host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


class DeferredErrors:
    """Counts of what is wrong, on their way from the device.

    Args:
        send: starts the copy of a scalar to the host: (its copy, when it is there).
    """

    def __init__(self, send: Callable[[Tensor], tuple[Tensor, Arrival]] = _send) -> None:
        self._send = send
        self._pending: deque[_Finding] = deque()
        self._tolerant: ContextVar[bool] = ContextVar("tolerant", default=False)

    def tolerated(self, tolerant: bool) -> AbstractContextManager[None]:
        """What is watched inside becomes a ``RuntimeWarning`` where ``tolerant``, and not an error."""
        # nothing is watched in a graph, and a context variable cannot be set in one
        return self._tolerating() if tolerant and not torch.compiler.is_compiling() else nullcontext()

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        token = self._tolerant.set(True)
        try:
            yield
        finally:
            self._tolerant.reset(token)

    def watch(self, count: Tensor, message: str) -> None:
        """An error, with ``{count}`` filled in, should the scalar ``count`` turn out not to be 0."""
        host, arrival = self._send(count)
        self._pending.append(_Finding(host, arrival, message, self._tolerant.get()))

    def look(self, wait: bool = False) -> None:
        """Raises what has arrived; with ``wait``, what is still on its way as well.

        Raises:
            ValueError: something was wrong. What else was watched is forgotten: mostly it follows from it.
        """
        waiting: list[_Finding] = []
        while self._pending:
            finding = self._pending.popleft()
            if wait:
                finding.arrival.synchronize()
            elif not finding.arrival.query():
                waiting.append(finding)
                continue
            count = int(finding.count)
            if count and finding.tolerated:
                warnings.warn(finding.message.format(count=count), RuntimeWarning, stacklevel=3)
            elif count:
                self._pending.clear()
                raise ValueError(finding.message.format(count=count))
        self._pending.extend(waiting)

    def forget(self) -> None:
        """Drops what is on its way."""
        self._pending.clear()


deferred = DeferredErrors()


def check_deferred() -> None:
    """Waits for the GPU and raises what earlier calls of :mod:`pointcmt.ops` found there.

    For loops of your own, where ``emd`` may be the last call: at the end, or once an epoch. ``PointCMT`` does
    it when it is left. Does nothing where nothing ran on a GPU.

    Raises:
        ValueError: a call was given what it cannot work on; the message says which and what to do.
    """
    deferred.look(wait=True)


def can_watch(tensor: Tensor) -> bool:
    """Whether a call on this tensor is one to watch: on a GPU, run now, not traced or captured in a graph."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()
