"""The training loop that all stages share: epochs, checkpoints, evaluation, resuming, several processes.

What makes a resumed run equal to an uninterrupted one: all randomness of an epoch (order of the shapes,
augmentation, dropout) follows from (seed, epoch, process); the learning rate follows from the step number;
and everything else that an epoch starts from is in the run folder's ``state.pt``.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pointcmt.recipes.batches import Batch, Batches
from pointcmt.recipes.processes import answering, forget_accelerator, share_buffers
from pointcmt.recipes.progress import EpochProgress, say
from pointcmt.recipes.run import RunFolder
from pointcmt.tasks import Task

__all__ = ["Batch", "Batches", "LoopOptions", "MachineOptions", "fit", "make_accelerator", "seed_everything"]


@dataclass
class LoopOptions:
    """How long and how fast to train."""

    epochs: int = 50
    """Passes over the training shapes."""
    batch_size: int = 32
    """Shapes per step, over all devices together."""
    accumulate: int = 1
    """Steps whose gradients are summed before the optimizer moves."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    """adam and adamw as in the paper's stages; sgd uses momentum 0.9 (Nesterov)."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 5e-2
    """Weight decay (decoupled for adamw, L2 for the others)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the run: cosine to zero, or constant."""
    warmup: float = 0.0
    """Epochs of linear warm-up."""
    clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    average: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated and saved;
    0: none."""
    eval_every: int = 1
    """Evaluate after every so many epochs, and always after the last."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and dropout."""


@dataclass
class MachineOptions:
    """Where to run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one. Several: torchrun --nproc-per-node N -m pointcmt …"""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    workers: int = 0
    """Processes that load images or files; point clouds held in memory need none."""
    tensorboard: bool = True
    """Also write TensorBoard event files, where tensorboard is installed."""
    progress: bool = True
    """Show progress: bars on a terminal, one line per evaluation elsewhere."""
    minutes: float = 0.0
    """Stop after the epoch in which this command has run for so many minutes; --resume goes on. 0: never."""
    timeout: float = 50.0
    """Seconds that several processes wait for one of them while training, before they end with its name; 0:
    as long as torch does."""


STARTED = time.monotonic()


class OutOfTime(RuntimeError):
    """A run stopped because its --minutes were over; its folder can be resumed."""


def out_of_time(machine: MachineOptions) -> bool:
    """Whether this process has run for ``machine.minutes``."""
    return machine.minutes > 0 and time.monotonic() - STARTED > 60 * machine.minutes


def make_accelerator(machine: MachineOptions) -> Accelerator:
    """The accelerator for these options.

    Raises:
        RuntimeError: CUDA was asked for and is not there.
        ValueError: fp16 was asked for on a CPU.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        raise RuntimeError(
            "--device cuda was asked for, but torch.cuda.is_available() is False: "
            + (
                f"torch {torch.__version__} is built for CUDA {built}, so no GPU or no driver is visible "
                f"(see nvidia-smi)"
                if built
                else f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
            )
            + ". Use --device cpu to run on the CPU."
        )
    cpu = machine.device == "cpu" or (machine.device == "auto" and not torch.cuda.is_available())
    if cpu and machine.precision == "fp16":
        raise ValueError("--precision fp16 needs a GPU; use --precision bf16 or no on a CPU")
    forget_accelerator()
    if cpu:
        keep_freed_memory()
    return Accelerator(cpu=cpu, mixed_precision=machine.precision)


def keep_freed_memory() -> bool:
    """Have the C library keep large freed blocks for the next allocation; returns whether it can (glibc).

    By default glibc gives them back to the system, which hands out zeroed pages one fault at a time when the
    next step asks for the same again: on a CPU a tenth to a quarter of a small student's step. The process
    stays as large as it ever was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1) and mallopt(m_top_pad, 2**26))


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch (all devices) from several numbers."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state % 2**63)


class Trained(Protocol):
    """What is trained beside the model, such as a training context with connectors in its objectives."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> Any: ...


def learning_rate(options: LoopOptions, step: int, steps: int, per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` of ``steps``."""
    warm = options.warmup * per_epoch
    if step < warm:
        return options.lr * (step + 1) / (warm + 1)
    if options.schedule == "constant":
        return options.lr
    done = (step - warm) / max(1.0, steps - warm)
    return options.lr * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))


def make_optimizer(
    options: LoopOptions,
    parameters: Iterable[nn.Parameter],
    rates: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer, with a group of parameters for each peak learning rate in ``rates``; the first is of
    those that are not in it and have ``options.lr``."""
    by_rate: dict[float, list[nn.Parameter]] = {options.lr: []}
    for parameter in parameters:
        by_rate.setdefault((rates or {}).get(parameter, options.lr), []).append(parameter)
    groups = [{"params": some, "lr": lr, "factor": lr / options.lr} for lr, some in by_rate.items() if some]
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, lr=options.lr, weight_decay=options.weight_decay)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        groups, lr=options.lr, weight_decay=options.weight_decay, momentum=0.9, nesterov=True
    )


def _moving_average(decay: float) -> Callable[..., None]:
    """Exponential moving average whose decay grows from 0 to ``decay``, so that it forgets the initial
    weights."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        if torch.is_floating_point(averaged[0]):
            torch._foreach_lerp_(averaged, current, 1 - now)
        else:  # BatchNorm's counters
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return update


def check_loop(options: LoopOptions) -> None:
    """Raise a ValueError for an option that makes no sense."""
    for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("eval_every", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least {least}"
            )
    if not 0 <= options.average < 1:
        raise ValueError(f"--average is {options.average}; expected a decay in [0, 1), such as 0.999")
    if not options.lr > 0:
        raise ValueError(f"--lr is {options.lr}; expected a positive learning rate")
    for name in ("weight_decay", "warmup", "clip"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected 0 or more")


def fit(
    model: nn.Module,
    task: Task,
    batches: Batches,
    save: Callable[[nn.Module, Any], object],
    options: LoopOptions,
    machine: MachineOptions,
    accelerator: Accelerator,
    run: RunFolder,
    *,
    extras: Trained | None = None,
    rates: Mapping[nn.Parameter, float] | None = None,
    observe: Callable[[dict[str, float]], object] | None = None,
) -> dict[str, Any]:
    """Train ``model`` to the end, from the beginning or from where the run folder stands.

    Args:
        model: what is trained; afterwards it holds the weights that the last evaluation was of.
        task: loss, metrics and the figure to watch.
        batches: of training.
        save: (model, path): writes a checkpoint.
        options: of the loop.
        machine: where it runs.
        accelerator: of :func:`make_accelerator`.
        run: the folder that is written: state.pt, metrics.jsonl, last.safetensors, best.safetensors.
        extras: what else is trained and resumed; never part of the checkpoint. Where there are several
            processes it keeps its own parameters equal on them.
        rates: peak learning rate of parameters that have another than ``options.lr``; the schedule is one.
        observe: told the metrics of each evaluation, and on resuming those of the last one.

    Returns:
        ``last`` and ``best`` metrics with their epochs, what best was chosen by, epochs and seconds.

    Raises:
        RuntimeError: the loss, or a weight, is not finite any more, or one of several processes is lost; the
            message says on which.
    """
    check_loop(options)
    with answering(machine.timeout):
        loop = _Loop(model, task, batches, save, options, machine, accelerator, run, extras, rates, observe)
        try:
            return loop.go()
        finally:
            loop.finite.close()


@dataclass
class _Loop:
    model: nn.Module
    task: Task
    batches: Batches
    save: Callable[[nn.Module, Any], object]
    options: LoopOptions
    machine: MachineOptions
    accelerator: Accelerator
    run: RunFolder
    extras: Trained | None
    rates: Mapping[nn.Parameter, float] | None
    observe: Callable[[dict[str, float]], object] | None

    def __post_init__(self) -> None:
        options, accelerator = self.options, self.accelerator
        self.per_epoch = len(self.batches) // options.accumulate or 1
        self.steps = self.per_epoch * options.epochs
        self.model.to(accelerator.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.extras is not None:
            self.parameters += list(self.extras.parameters())
        self.average = (
            AveragedModel(self.model, multi_avg_fn=_moving_average(options.average), use_buffers=True)
            if options.average
            else None
        )
        self.wrapped, self.optimizer = accelerator.prepare(
            self.model, make_optimizer(options, self.parameters, self.rates)
        )
        self.finite = _Finite(self.parameters, accelerator)
        self.first, self.spent = 0, 0.0
        self.best: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}

    @property
    def shown(self) -> nn.Module:
        """The model that is evaluated and saved."""
        return self.model if self.average is None else self.average.module

    def state(self, epoch: int) -> dict[str, Any]:
        """All that an epoch starts from.

        accelerate's save_state writes a folder of files one after another, so that a kill can leave those of
        two epochs, and through pickle: one file, written atomically, is shorter and is resumed exactly.
        """
        scaler = self.accelerator.scaler
        return {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "extras": None if self.extras is None else self.extras.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "best": self.best,
            "metrics": self.metrics,
            "seconds": self.spent,
        }

    def resume(self) -> None:
        """Go back to where the run folder stands."""
        state, scaler = self.run.load_state(), self.accelerator.scaler
        if state is None:
            self.run.forget_metrics_after(0)
            return
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.extras is not None and state["extras"] is not None:
            self.extras.load_state_dict(state["extras"])
        self.optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        self.first, self.best, self.spent = state["epoch"], state["best"], state["seconds"]
        self.metrics = state["metrics"]
        if self.observe is not None and self.metrics:
            self.observe(self.metrics)
        if self.first < self.options.epochs:
            say(
                f"resuming {self.run.path} after epoch {self.first} of {self.options.epochs}",
                self.accelerator.is_main_process,
            )
        self.run.forget_metrics_after(self.first)

    def go(self) -> dict[str, Any]:
        options, accelerator, run = self.options, self.accelerator, self.run
        self.resume()
        accelerator.wait_for_everyone()
        board = _tensorboard(run, self.first, self.machine)
        show = accelerator.is_main_process and self.machine.progress
        with EpochProgress(run.path.name, options.epochs, len(self.batches), self.first, show) as progress:
            for epoch in range(self.first, options.epochs):
                self.epoch(epoch, progress, board)
                if epoch + 1 < options.epochs and out_of_time(self.machine):
                    raise OutOfTime(
                        f"{run.path}: stopped after epoch {epoch + 1} of {options.epochs}, because "
                        f"{self.machine.minutes:g} minutes are over; --resume goes on"
                    )
        if board is not None:
            board.close()
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.model.eval()
        assert self.best is not None
        return {
            "last": {"epoch": options.epochs, **self.metrics},
            "best": {**self.best, "chosen_by": self.task.watch.means},
            "epochs": options.epochs,
            "steps": self.steps,
            "seconds": round(self.spent, 1),
        }

    def epoch(self, epoch: int, progress: EpochProgress, board: Any) -> None:
        options, task, main = self.options, self.task, self.accelerator.is_main_process
        began = time.perf_counter()
        seed_everything(options.seed, epoch, self.accelerator.process_index)
        self.wrapped.train()
        losses = self.train(epoch, progress)
        record: dict[str, Any] = {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], **losses}
        if (epoch + 1) % options.eval_every == 0 or epoch + 1 == options.epochs:
            share_buffers(self.shown)
            self.metrics = self.evaluate()
            if self.observe is not None:
                self.observe(self.metrics)
            record |= self.metrics
            watched = task.watch.name
            if self.best is None or task.watch.improves(self.metrics[watched], self.best[watched]):
                self.best = {"epoch": epoch + 1, **self.metrics}
                if main:
                    self.save(self.shown, self.run.path / "best.safetensors")
            progress.evaluated(epoch + 1, losses, {name: self.metrics[name] for name in task.headline})
        seconds = time.perf_counter() - began
        self.spent += seconds
        record["seconds"] = round(seconds, 3)
        self.run.log(record)
        if board is not None:
            for name, value in record.items():
                if name != "epoch":
                    board.add_scalar(name, value, epoch + 1)
        if main:
            self.save(self.shown, self.run.path / "last.safetensors")
        self.run.save_state(self.state(epoch + 1))
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The task's metrics in eval mode and under autocast; the model's mode is put back."""
        model = self.shown
        was = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return self.task.evaluate(model)
        finally:
            model.train(was)

    def train(self, epoch: int, progress: EpochProgress) -> dict[str, float]:
        """One epoch of steps; returns the mean of each loss."""
        options, accelerator, optimizer = self.options, self.accelerator, self.optimizer
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        self.finite.begin(epoch)
        # a group of steps that is not complete at the end of the epoch joins no next epoch: it is left out
        usable = min(len(self.batches), self.per_epoch * options.accumulate)
        for number, batch in enumerate(itertools.islice(self.batches.epoch(epoch), usable)):
            step = epoch * self.per_epoch + number // options.accumulate
            moves = (number + 1) % options.accumulate == 0 or number + 1 == usable
            rate = learning_rate(options, step, self.steps, self.per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)  # runs of before have no factor
            # gradients cross processes only on the step that moves the optimizer
            with contextlib.nullcontext() if moves else accelerator.no_sync(self.wrapped):
                with accelerator.autocast():
                    losses = self.task.step(self.wrapped, batch, step / self.steps)
                self.finite.see(number, losses)
                accelerator.backward(losses["loss"] / options.accumulate)
            self.finite.judge_now_and_then()
            if moves:
                if options.clip:
                    accelerator.clip_grad_norm_(self.parameters, options.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if self.average is not None:
                    self.average.update_parameters(self.model)
            for name, value in losses.items():
                value = value.detach().double()
                sums[name] = sums.get(name, 0) + value
                counts[name] += 1  # an objective may be off for a part of the epoch
            progress.step(number, sums)
        self.finite.end()
        means = {name: float(value) / counts[name] for name, value in sums.items()}
        everyone = gather_object([means]) if accelerator.num_processes > 1 else [means]
        means = {name: float(np.mean([one[name] for one in everyone])) for name in means}
        return means


_NEVER = 2**62


class _Finite:
    """Ends a run that diverged before more of it is kept, with the step and the process where that began.

    Gradients are averaged over the processes: one step after one of them had a gradient that is not finite,
    all have losses that are not. So each notes the first step in which its own loss, or its own part of a
    gradient, was not finite; the earliest is the cause. The notes are read in each step on a CPU, on a GPU
    in every 20th, because reading waits for it.
    """

    def __init__(self, parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
        self.parameters, self.accelerator = parameters, accelerator
        self.every = 1 if accelerator.device.type == "cpu" else 20
        # of a scaled loss (fp16) a gradient may be infinite: the scaler leaves that step out
        watched = parameters if accelerator.num_processes > 1 and accelerator.scaler is None else []
        # hooks of tensors see a gradient before it is averaged
        self.hooks = [one.register_hook(lambda gradient: self._note("gradient", gradient)) for one in watched]
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """What follows are steps of this epoch."""
        self.epoch, self.step = epoch, 0
        self.losses: dict[str, Tensor] = {}
        # the first step, counted from 0, in which each was not finite
        never = torch.full((), _NEVER, device=self.accelerator.device)
        self.bad = {"loss": never, "gradient": never, "weights": never}

    def _note(self, what: str, value: Tensor) -> None:
        now = torch.where(torch.isfinite(value.detach()).all(), _NEVER, self.step)
        self.bad[what] = torch.minimum(self.bad[what], now)

    def see(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """The losses of a step, before its backward pass."""
        self.step = step
        self.losses = {name: value.detach() for name, value in losses.items()}
        self._note("loss", losses["loss"])

    def judge_now_and_then(self) -> None:
        """After a backward pass, before the weights move."""
        if (self.step + 1) % self.every == 0:
            self._judge()

    def end(self) -> None:
        """Of an epoch, before its weights are kept."""
        self.step += 1
        for parameter in self.parameters:
            self._note("weights", parameter)
        self._judge()

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self.hooks:
            hook.remove()

    def _judge(self) -> None:
        accelerator, world = self.accelerator, self.accelerator.num_processes
        mine = torch.stack(list(self.bad.values()))[None]
        everyone = [
            dict(zip(self.bad, row, strict=True))
            for row in (accelerator.gather(mine) if world > 1 else mine).tolist()
        ]
        first = min(min(one.values()) for one in everyone)
        if first == _NEVER:
            return
        what = next(name for name in self.bad if first in (one[name] for one in everyone))
        # of a loss over all processes' features, the gradients of all have what one brought in
        ranks = [rank for rank, one in enumerate(everyone) if one[what] == first]
        losses = {name: float(value) for name, value in self.losses.items()}
        theirs = (gather_object([losses]) if world > 1 else [losses])[ranks[0]]
        words = {
            "loss": f"the loss is {theirs['loss']} in step {first + 1}",
            "gradient": f"the gradient is not finite in step {first + 1}",
            "weights": f"the weights are not finite after step {first}",
        }[what]
        parts = ", ".join(f"{name} {value:.4g}" for name, value in theirs.items())
        where = f", first on rank {', '.join(map(str, ranks))} of {world}" if world > 1 else ""
        raise RuntimeError(
            f"{words} of epoch {self.epoch + 1} ({parts}){where}: the run diverged, on input that is finite. "
            "Lower --lr or the objectives' weights, set --clip 1, or use --precision no. What was kept is of "
            "the epoch before."
        )


def _tensorboard(run: RunFolder, first: int, machine: MachineOptions) -> Any:
    if not (machine.tensorboard and run.main):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path / "tensorboard"), purge_step=first + 1)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
