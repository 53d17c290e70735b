"""Several processes: equal buffers, and an error with a name where one of them is lost.

What is private in torch or accelerate stands here, one function each, and tests/recipes/test_processes.py
says what breaks where it goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch import nn


def forget_accelerator() -> None:
    """Let the next ``Accelerator`` of this process have another device and precision; a recipe may be one of
    several in a process, and accelerate keeps the first one's for good."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


def set_timeout(seconds: float) -> None:
    """How long collectives of all groups wait for a process that does not come."""
    span = timedelta(seconds=seconds)
    change = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # older torch has the other
    for group in list(dist.distributed_c10d._world.pg_map):
        change(span, group)


def default_store() -> Any:
    """The key-value store that the processes met by; under torchrun it outlives each of them."""
    return dist.distributed_c10d._get_default_store()


def several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, which are those that are saved.

    Each updates BatchNorm's running statistics by its own part of the last batch, and DistributedDataParallel
    makes them equal again only before the next step.
    """
    if several():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


LOST, SAID = "pointcmt/lost", "pointcmt/said"
_PATIENT = 1800.0  # torch's own default for gloo; outside training a process may build features for all


class LostError(RuntimeError):
    """One of several processes died, ended with an error, or does not answer; the message names it."""


@contextlib.contextmanager
def answering(seconds: float | None = None, grace: float = 5.0) -> Iterator[None]:
    """Inside, a process that dies, ends with an error or stops answering ends the others, with its name.

    Args:
        seconds: how long the others wait for one in training; 0: as long as torch does; None: no training.
        grace: how long the others have to say that they are there, once one has noticed.

    Raises:
        LostError: a process is lost. One that ended with an error has told the others what it was.
    """
    limited = (several() and seconds) or 0.0
    if limited:
        set_timeout(limited)
    try:
        yield
    except LostError:
        raise
    except Exception as error:
        if not several():
            raise
        if not _is_of_collectives(error):
            with contextlib.suppress(Exception):  # the store went with another process
                words = str(error).strip() or type(error).__name__
                default_store().set(f"{SAID}/{dist.get_rank()}", words[:500])
            raise
        what = f"{_missing(grace)}: {str(error).splitlines()[0][:200]}"
        if seconds is not None:
            what += (
                ". The last whole epoch is in the run folder: start all again with --resume (--timeout says "
                "how long they wait)"
            )
        raise LostError(what) from error
    finally:
        if limited:
            with contextlib.suppress(RuntimeError, ValueError):
                set_timeout(_PATIENT)


def _is_of_collectives(error: BaseException) -> bool:
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "timed out", "timeout", "connection closed", "nccl", "disterror")
    )


def _missing(grace: float) -> str:
    """Which processes do not say that they are there, in words, and what they said before they ended."""
    rank, world = dist.get_rank(), dist.get_world_size()
    others = [other for other in range(world) if other != rank]
    said: dict[int, str] = {}
    try:
        store = default_store()
        store.set(f"{LOST}/{rank}", "here")
        until = time.monotonic() + grace
        absent = list(others)
        while absent and time.monotonic() < until:
            said = {k: store.get(f"{SAID}/{k}").decode() for k in others if store.check([f"{SAID}/{k}"])}
            if said:
                break
            absent = [other for other in absent if not store.check([f"{LOST}/{other}"])]
            time.sleep(0.05)
    except Exception:  # the store went with the process that held it
        absent = [0]
    here = f"of {world} processes"
    if said:
        errors = "; ".join(f"rank {k} {here} ended with an error: {words}" for k, words in said.items())
        return f"{errors} (this is rank {rank})"
    if not absent:
        return f"the {world} processes lost each other (this is rank {rank})"
    names = ", ".join(f"rank {other}" for other in absent)
    return f"{names} {here} died or does not answer (this is rank {rank})"
