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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from pointcmt.data.loading import epoch_order
from pointcmt.recipes.progress import EpochProgress, say
from pointcmt.recipes.run import RunFolder


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
    # accelerate keeps its first device and precision for the whole process; a recipe may be one of several
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
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


class Batch(NamedTuple):
    """One batch on the device; ``inputs`` are points [B, N, 3], or views [B, V, C, H, W] of an image
    folder."""

    inputs: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody calls


class Batches:
    """Batches of a dataset, in an order that follows from (seed, epoch), shared among the processes.

    Args:
        dataset: items ``(input, label, index)``. One with ``points`` [n, N, 3] and ``labels`` [n] is put on
            the device whole; another is read through a ``DataLoader``.
        batch_size: over all processes.
        device: of the batches.
        seed: of the order; None keeps the dataset's order, and keeps a last batch that is not full.
        rank, world: this process and the number of them.
        workers: loading processes for a dataset without ``points``.
        what: the attribute that holds the clouds: ``points``, or ``view_points`` for views.

    Raises:
        ValueError: the dataset is empty, or too small for a training batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        what: str = "points",
    ) -> None:
        self.n = len(dataset)
        self.dataset, self.seed, self.rank, self.world, self.workers = dataset, seed, rank, world, workers
        self.device = torch.device(device)
        if batch_size < 1:
            raise ValueError(f"the batch size is {batch_size}; expected at least 1")
        if self.n == 0:
            raise ValueError("the dataset is empty: expected at least one shape")
        self.batch_size = min(batch_size, self.n)
        if seed is not None and self.batch_size < 2 * world:
            raise ValueError(
                f"a training batch of {self.batch_size} over {world} process(es) leaves fewer than two "
                f"shapes to "
                "each, and batch normalisation needs two: use a larger --batch-size or more shapes"
            )
        self.points: Tensor | None = None
        if getattr(dataset, what, None) is not None:
            self.points = torch.as_tensor(getattr(dataset, what), dtype=torch.float32, device=self.device)
            self.labels = torch.as_tensor(np.asarray(dataset.labels), dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        if self.seed is not None:
            return self.n // self.batch_size  # the order changes each epoch, so no shape is always left out
        return -(-self.n // self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """This process's part of every batch of one epoch. ``index`` are rows of the dataset."""
        order = epoch_order(self.n, self.seed or 0, epoch, self.seed is not None)
        size = self.batch_size
        whole = [torch.from_numpy(order[k * size : (k + 1) * size]) for k in range(len(self))]
        return self._take([piece[self.rank :: self.world] for piece in whole])

    def rows(self, rows: Tensor) -> Iterator[Batch]:
        """Batches of the given rows [m], in their order, all in this process."""
        return self._take(list(rows.split(self.batch_size)) if len(rows) else [])

    def _take(self, pieces: list[Tensor]) -> Iterator[Batch]:
        if self.points is not None:
            for piece in pieces:
                index = piece.to(self.device)
                yield Batch(self.points[index], self.labels[index], index)
            return
        loader = DataLoader(
            self.dataset, batch_sampler=[piece.tolist() for piece in pieces], num_workers=self.workers
        )
        for piece, (inputs, labels, _) in zip(pieces, loader, strict=True):
            yield Batch(inputs.to(self.device), labels.to(self.device), piece.to(self.device))


@dataclass
class Task:
    """What one stage brings to the loop."""

    model: nn.Module
    """What is trained."""
    batches: Batches
    """Training batches."""
    step: Callable[[nn.Module, Batch, float], dict[str, Tensor]]
    """(model, batch, fraction of the run that is done) → named scalar losses; ``loss`` is what is
    minimised."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Model in eval mode, without gradients → metrics."""
    save: Callable[[nn.Module, Any], object]
    """(model, path): writes the checkpoint."""
    watch: str
    """The metric that says which epoch was best."""
    watch_means: str
    """What choosing by that metric means, in words for results.json."""
    higher_is_better: bool = True
    extras: nn.Module | None = None
    """Further trained modules (parameters of objectives); never part of the checkpoint."""
    observe: Callable[[dict[str, float]], object] | None = None
    """Told the metrics of each evaluation, and on resuming those of the last one."""
    headline: tuple[str, ...] = field(default=())
    """Metrics that the progress bar shows."""


def learning_rate(options: LoopOptions, step: int, steps: int, per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` of ``steps``."""
    warm = options.warmup * per_epoch
    if step < warm:
        return options.lr * (step + 1) / (warm + 1)
    if options.schedule == "constant":
        return options.lr
    done = (step - warm) / max(1.0, steps - warm)
    return options.lr * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))


def make_optimizer(options: LoopOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=options.lr, weight_decay=options.weight_decay)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        parameters, lr=options.lr, weight_decay=options.weight_decay, momentum=0.9, nesterov=True
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


def check_options(options: LoopOptions) -> None:
    """Raise a ValueError for an option that makes no sense."""
    for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("eval_every", 1)):
        if getattr(options, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least {least}"
            )
    if not 0 <= options.average < 1:
        raise ValueError(f"--average is {options.average}; expected a decay in [0, 1), such as 0.999")
    if options.lr <= 0:
        raise ValueError(f"--lr is {options.lr}; expected a positive learning rate")


def fit(
    task: Task, options: LoopOptions, machine: MachineOptions, accelerator: Accelerator, run: RunFolder
) -> dict[str, Any]:
    """Train ``task.model`` to the end, from the beginning or from where the run folder stands.

    Returns:
        ``last`` and ``best`` metrics with their epochs, what best was chosen by, epochs and seconds.
        In the folder: state.pt, metrics.jsonl, last.safetensors, best.safetensors.

    Raises:
        RuntimeError: the loss is not finite any more.
    """
    check_options(options)
    per_epoch = len(task.batches) // options.accumulate or 1
    steps = per_epoch * options.epochs
    model = task.model.to(accelerator.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if task.extras is not None:
        task.extras.to(accelerator.device)
        parameters += [p for p in task.extras.parameters() if p.requires_grad]
    average = (
        AveragedModel(model, multi_avg_fn=_moving_average(options.average), use_buffers=True)
        if options.average
        else None
    )
    optimizer = make_optimizer(options, parameters)
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    first, best, spent = 0, None, 0.0
    state = run.load_state()
    if state is not None:
        model.load_state_dict(state["model"])
        if average is not None:
            average.load_state_dict(state["average"])
        if task.extras is not None:
            task.extras.load_state_dict(state["extras"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        first, best, spent = state["epoch"], state["best"], state["seconds"]
        if task.observe is not None and state["metrics"]:
            task.observe(state["metrics"])
        say(f"resuming {run.path} after epoch {first} of {options.epochs}", accelerator.is_main_process)
    run.forget_metrics_after(first)
    accelerator.wait_for_everyone()

    board = _tensorboard(run, first, machine)
    show = accelerator.is_main_process and machine.progress
    metrics: dict[str, float] = state["metrics"] if state is not None else {}
    with EpochProgress(run.path.name, options.epochs, len(task.batches), first, show) as progress:
        for epoch in range(first, options.epochs):
            began = time.perf_counter()
            seed_everything(options.seed, epoch, accelerator.process_index)
            wrapped.train()
            losses = _one_epoch(
                task, options, accelerator, wrapped, optimizer, average, epoch, steps, per_epoch, progress
            )
            record: dict[str, Any] = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **losses}
            if (epoch + 1) % options.eval_every == 0 or epoch + 1 == options.epochs:
                shown = average.module if average is not None else model
                share_buffers(shown, accelerator)
                metrics = evaluate(task, shown, accelerator)
                if task.observe is not None:
                    task.observe(metrics)
                record |= metrics
                if best is None or _better(metrics[task.watch], best[task.watch], task.higher_is_better):
                    best = {"epoch": epoch + 1, **metrics}
                    if accelerator.is_main_process:
                        task.save(shown, run.path / "best.safetensors")
                progress.evaluated(epoch + 1, losses, {k: metrics[k] for k in task.headline})
            seconds = time.perf_counter() - began
            spent += seconds
            record["seconds"] = round(seconds, 3)
            run.log(record)
            if board is not None:
                for name, value in record.items():
                    if name != "epoch":
                        board.add_scalar(name, value, epoch + 1)
            if accelerator.is_main_process:
                task.save(average.module if average is not None else model, run.path / "last.safetensors")
            run.save_state(
                {
                    "epoch": epoch + 1,
                    "model": model.state_dict(),
                    "average": None if average is None else average.state_dict(),
                    "extras": None if task.extras is None else task.extras.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                    "best": best,
                    "metrics": metrics,
                    "seconds": spent,
                }
            )
            accelerator.wait_for_everyone()
            if epoch + 1 < options.epochs and out_of_time(machine):
                raise OutOfTime(
                    f"{run.path}: stopped after epoch {epoch + 1} of {options.epochs}, because "
                    f"{machine.minutes:g} "
                    "minutes are over; --resume goes on"
                )
    if board is not None:
        board.close()
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    task.model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    task.model.eval()
    assert best is not None
    return {
        "last": {"epoch": options.epochs, **metrics},
        "best": {**best, "chosen_by": task.watch_means},
        "epochs": options.epochs,
        "steps": steps,
        "seconds": round(spent, 1),
    }


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the first one's buffers, which are those that are saved.

    Each updates BatchNorm's running statistics by its own part of the last batch, and DistributedDataParallel
    makes them equal again only before the next step.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _one_epoch(
    task: Task,
    options: LoopOptions,
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: Any,
    average: AveragedModel | None,
    epoch: int,
    steps: int,
    per_epoch: int,
    progress: EpochProgress,
) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    # a group of steps that is not complete at the end of the epoch joins no next epoch: it is left out
    usable = min(len(task.batches), per_epoch * options.accumulate)
    for number, batch in enumerate(itertools.islice(task.batches.epoch(epoch), usable)):
        step = epoch * per_epoch + number // options.accumulate
        moves = (number + 1) % options.accumulate == 0 or number + 1 == usable
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, steps, per_epoch)
        # gradients cross processes only on the step that moves the optimizer
        with contextlib.nullcontext() if moves else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                losses = task.step(wrapped, batch, step / steps)
            accelerator.backward(losses["loss"] / options.accumulate)
        if moves:
            if task.extras is not None and accelerator.num_processes > 1:
                # not wrapped for several processes, because they have no forward pass of their own
                for parameter in task.extras.parameters():
                    if parameter.grad is not None:
                        parameter.grad = accelerator.reduce(parameter.grad, "mean")
            if options.clip:
                accelerator.clip_grad_norm_(
                    [p for group in optimizer.param_groups for p in group["params"]], options.clip
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update_parameters(accelerator.unwrap_model(wrapped))
        for name, value in losses.items():
            value = value.detach().double()
            sums[name] = sums.get(name, 0) + value
            counts[name] += 1  # an objective may be off for a part of the epoch
        progress.step(number, sums)
    means = {name: float(value) / counts[name] for name, value in sums.items()}
    if accelerator.num_processes > 1:
        everyone = gather_object([means])
        means = {name: float(np.mean([one[name] for one in everyone])) for name in means}
    if not np.isfinite(means["loss"]):
        raise RuntimeError(
            f"the loss is {means['loss']} in epoch {epoch + 1} "
            f"({', '.join(f'{name} {value:.4g}' for name, value in means.items())}): the run diverged. "
            f"Lower --lr "
            "or the objectives' weights, set --clip 1, or use --precision no."
        )
    return means


def _better(value: float, best: float, higher: bool) -> bool:
    return value > best if higher else value < best


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    """``task.evaluate`` in eval mode and under autocast; the model's mode is put back."""
    was = model.training
    model.eval()
    try:
        with accelerator.autocast():
            return task.evaluate(model)
    finally:
        model.train(was)


def predict(
    forward: Callable[[Batch], Tensor], batches: Batches, accelerator: Accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """``forward`` over all batches, gathered over the processes in the dataset's order.

    Returns:
        outputs [n, …] float32 and labels [n] int64.
    """
    outputs, labels, index = [], [], []
    with torch.no_grad():
        for batch in batches.epoch():
            if len(batch.labels) == 0:
                continue
            outputs.append(forward(batch).float().cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
            index.append(batch.index.cpu().numpy())
    pieces = list(zip(outputs, labels, index, strict=True))
    if accelerator.num_processes > 1:
        pieces = gather_object(pieces)
    order = np.argsort(np.concatenate([piece[2] for piece in pieces]))
    return np.concatenate([p[0] for p in pieces])[order], np.concatenate([p[1] for p in pieces])[order]


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
