"""The shared training loop: resuming is exact, order and learning rate are as said, errors explain."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pointcmt.data import PointDataset
from pointcmt.recipes.batches import Batches
from pointcmt.recipes.engine import (
    LoopOptions,
    MachineOptions,
    fit,
    learning_rate,
    make_accelerator,
    make_optimizer,
    seed_everything,
)
from pointcmt.recipes.run import RunFolder, read_metrics
from pointcmt.tasks import Figure, Task, predict


@dataclass
class Config:
    loop: LoopOptions = field(default_factory=LoopOptions)


class Small(nn.Module):
    """Dropout and batch normalisation: what goes wrong when a run is resumed carelessly."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        )

    def forward(self, points):
        return self.mlp(points.amax(1) + 0.5 * points.mean(1))


def clouds(n: int = 37, seed: int = 0) -> PointDataset:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    points = rng.normal(size=(n, 20, 3)) * (1 + labels[:, None, None] * np.array([0.3, 0.0, 0.1]))
    return PointDataset(points.astype(np.float32), labels, list("abcd"), [f"a_{k:04d}" for k in range(n)])


def test_parameters_with_a_rate_of_their_own_follow_the_same_schedule():
    model = Small()
    head = model.mlp[4]
    optimizer = make_optimizer(
        LoopOptions(lr=1e-2), model.parameters(), dict.fromkeys(head.parameters(), 1e-3)
    )
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert [group["factor"] for group in optimizer.param_groups] == [1.0, pytest.approx(0.1)]
    assert len(make_optimizer(LoopOptions(), model.parameters()).param_groups) == 1


def run_toy(
    folder: Path, loop: LoopOptions, resume: bool = False, delay: float = 0.0, stop_after: int | None = None
) -> dict:
    """Train a small network as the recipes do; ``stop_after`` raises in that epoch, as a crash would."""
    accelerator = make_accelerator(MachineOptions(device="cpu"))
    run = RunFolder.start(accelerator, folder, Config(loop), command="train", resume=resume)
    seed_everything(loop.seed)
    data, test = clouds(), clouds(24, seed=1)
    tests = Batches(test, 8, accelerator.device)

    def step(model, batch, done):
        time.sleep(delay)
        if stop_after is not None and done * loop.epochs >= stop_after:
            raise KeyboardInterrupt
        noisy = batch.inputs + 0.1 * torch.randn_like(batch.inputs)
        noisy = noisy * float(np.random.uniform(0.9, 1.1))
        return {"loss": F.cross_entropy(model(noisy), batch.labels)}

    def evaluate(model):
        logits, labels = predict(lambda batch: model(batch.inputs), tests.epoch())
        return {"test_oa": 100 * float((logits.argmax(1) == labels).mean())}

    outcome = fit(
        Small(),
        Task(step, evaluate, Figure("test_oa", "highest", "test"), ("test_oa",)),
        Batches(data, loop.batch_size, accelerator.device, loop.seed),
        lambda model, path: save_file(model.state_dict(), path),
        loop,
        MachineOptions(device="cpu", tensorboard=False),
        accelerator,
        run,
    )
    return run.finish(outcome)


def same_result(a: Path, b: Path) -> None:
    """The two run folders hold the same weights, metrics and results; times may differ."""

    def without_times(record):
        return {name: value for name, value in record.items() if name != "seconds"}

    first, second = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    assert without_times(first) == without_times(second)
    assert [without_times(r) for r in read_metrics(a)] == [without_times(r) for r in read_metrics(b)]
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)


@pytest.mark.parametrize(
    "loop",
    [
        LoopOptions(epochs=5, batch_size=8, seed=3),
        LoopOptions(
            epochs=5, batch_size=8, accumulate=3, optimizer="sgd", lr=0.05, warmup=1, clip=1.0, seed=4
        ),
        LoopOptions(epochs=5, batch_size=8, optimizer="adam", average=0.9, eval_every=2, seed=5),
    ],
    ids=["adamw", "sgd-accumulate-warmup-clip", "adam-average"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, loop):
    run_toy(tmp_path / "whole", loop)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "broken", loop, stop_after=3)
    torch.manual_seed(99)  # whatever the new process has drawn before it resumes
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "broken", loop, resume=True, stop_after=4)
    assert [r["epoch"] for r in read_metrics(tmp_path / "broken")][:3] == [1, 2, 3]
    run_toy(tmp_path / "broken", loop, resume=True)
    same_result(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 9}, "is of epoch 9, and the run has 2"),
        ({"model": {}}, r"does not fit this run \(RuntimeError: Error\(s\) in loading"),
        ({"model": 3}, "does not fit this run"),
        ({"optimizer": {}}, "does not fit this run"),
        ({"best": 3}, "does not fit this run"),
        ({"best": {"epoch": 1}}, r"does not fit this run \(KeyError: 'test_oa'\)"),
        ({"seconds": "x"}, "does not fit this run"),
        ({"metrics": 3}, "does not fit this run"),
        ({"best": None, "nan": True}, "holds weights that are not finite"),
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path, change, words):
    folder = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run_toy(folder, LoopOptions(epochs=2, batch_size=8), stop_after=1)
    state = torch.load(folder / "state.pt", weights_only=True)
    if change.pop("nan", False):
        next(iter(state["model"].values())).fill_(float("nan"))
    torch.save(state | change, folder / "state.pt")
    with pytest.raises(ValueError, match=rf"state\.pt {words}.*Copy it again, or delete"):
        run_toy(folder, LoopOptions(epochs=2, batch_size=8), resume=True)


def test_the_first_step_that_is_not_finite_ends_the_run_before_it_is_kept(tmp_path):
    """A gradient that is not finite in the last step of an epoch went into the checkpoint."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, bad):
            ctx.bad = bad
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (float("nan") if ctx.bad else 1.0), None

    accelerator = make_accelerator(MachineOptions(device="cpu"))
    for loss_bad, words in (
        (True, "the loss is nan in step 3 of epoch 2"),
        (False, "weights .* after step 4"),
    ):
        loop = LoopOptions(epochs=3, batch_size=8, seed=0)
        run = RunFolder.start(accelerator, tmp_path / words[:11], Config(loop), command="train")
        steps = itertools.count()

        def step(model, batch, done, steps=steps, loss_bad=loss_bad):
            number = next(steps)
            loss = F.cross_entropy(model(batch.inputs), batch.labels)
            if loss_bad:
                return {"loss": loss * (float("nan") if number == 6 else 1)}
            return {"loss": Loss.apply(loss, number == 7)}

        task = Task(step, lambda model: {"x": 0.0}, Figure("x", "highest", ""))
        batches = Batches(clouds(), 8, accelerator.device, 0)
        machine = MachineOptions(device="cpu", tensorboard=False, progress=False)
        model = Small()
        with pytest.raises(RuntimeError, match=words):
            fit(model, task, batches, lambda m, p: None, loop, machine, accelerator, run)
        state = run.load_state()
        assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
        assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_another_seed_gives_another_result(tmp_path):
    """Else the comparison above could not fail."""
    run_toy(tmp_path / "a", LoopOptions(epochs=2, batch_size=8, seed=1))
    run_toy(tmp_path / "b", LoopOptions(epochs=2, batch_size=8, seed=2))
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert not torch.equal(a["mlp.0.weight"], b["mlp.0.weight"])


@pytest.mark.slow
def test_killed_at_any_point_and_resumed_equals_never_killed(tmp_path):
    loop = LoopOptions(epochs=6, batch_size=8, average=0.9, seed=7)
    run_toy(tmp_path / "whole", loop)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from pointcmt.recipes.engine import LoopOptions\n"
        "from test_engine import run_toy\n"
        "run_toy(Path(sys.argv[2]), LoopOptions(epochs=6, batch_size=8, average=0.9, seed=7), resume=True, "
        "delay=float(sys.argv[3]))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    rng = np.random.default_rng(int(time.time()))
    state = tmp_path / "killed/state.pt"
    process = subprocess.Popen([*command, "0.05"], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        wait = rng.uniform(0, 0.6)  # somewhere in the next epochs: in a step, an evaluation, a write
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed/results.json").exists()
    done = subprocess.run([*command, "0"], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    same_result(tmp_path / "whole", tmp_path / "killed")


def test_a_diverged_run_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is .*Lower --lr"):
        run_toy(tmp_path / "run", LoopOptions(epochs=3, batch_size=8, optimizer="sgd", lr=1e30))


def test_options_out_of_range_are_named(tmp_path):
    for options, words in (
        ({"epochs": 0}, "--epochs is 0"),
        ({"accumulate": 0}, "--accumulate is 0"),
        ({"average": 1.0}, "--average is 1.0"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"warmup": 60.0}, "--warmup is 60 and --epochs 50"),
    ):
        with pytest.raises(ValueError, match=words):
            run_toy(tmp_path / words, LoopOptions(**options))


def test_machine_options_below_zero_are_named():
    for name in ("workers", "minutes", "timeout"):
        with pytest.raises(ValueError, match=rf"--{name} is -1; expected 0 or more"):
            make_accelerator(MachineOptions(device="cpu", **{name: -1}))


def test_cuda_without_cuda_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"--device cuda was asked for.*--device cpu"):
        make_accelerator(MachineOptions(device="cuda"))
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        make_accelerator(MachineOptions(precision="fp16"))


def test_bf16_trains_on_a_cpu(tmp_path):
    accelerator = make_accelerator(MachineOptions(device="cpu", precision="bf16"))
    assert accelerator.mixed_precision == "bf16"
    # and the next recipe of the same process gets what it asks for
    assert make_accelerator(MachineOptions(device="cpu")).mixed_precision == "no"


def test_batches_follow_seed_and_epoch_and_share_out_whole():
    data, device = clouds(21), torch.device("cpu")

    def order(epoch, seed=0, rank=0, world=1):
        return [b.index.tolist() for b in Batches(data, 6, device, seed, rank, world).epoch(epoch)]

    assert order(0) == order(0) != order(1) and order(0) != order(0, seed=1)
    flat = list(itertools.chain.from_iterable(order(4)))
    assert len(flat) == len(set(flat)) == 18  # the rest of an epoch is dropped, another rest in each
    for whole, *parts in zip(order(2), order(2, rank=0, world=2), order(2, rank=1, world=2), strict=True):
        assert sorted(itertools.chain.from_iterable(parts)) == sorted(whole)
    in_turn = list(Batches(data, 6, device).epoch())
    assert torch.cat([b.index for b in in_turn]).tolist() == list(range(21))
    assert torch.equal(in_turn[-1].inputs, torch.from_numpy(data.points[18:]))
    assert torch.cat([b.labels for b in in_turn]).tolist() == data.labels.tolist()


def test_a_dataset_that_is_not_in_memory_gives_the_same_batches():
    data, device = clouds(10), torch.device("cpu")

    class OnDisk(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            return data[index]

    for ours, theirs in zip(
        Batches(data, 4, device, 5).epoch(3), Batches(OnDisk(), 4, device, 5).epoch(3), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_batches_too_small_for_batch_normalisation_are_refused():
    with pytest.raises(ValueError, match="fewer than two shapes"):
        Batches(clouds(20), 2, torch.device("cpu"), seed=0, world=2)
    with pytest.raises(ValueError, match="the dataset is empty"):
        Batches(clouds(0), 2, torch.device("cpu"))


def test_data_that_cannot_be_trained_on_is_named_before_training():
    """Not a wrong adapter, not a learning rate: the shape and its point."""
    device, data = torch.device("cpu"), clouds(20)
    data.points[13, 4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"shape 13 \(a_0013\) holds nan in point 4"):
        Batches(data, 4, device, 0)

    class OnDisk(torch.utils.data.Dataset):
        shape_ids = data.shape_ids

        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            return data[index]

    with pytest.raises(ValueError, match=r"shape 13 \(a_0013\) holds nan in point 4"):
        list(Batches(OnDisk(), 4, device).epoch())
    for label in (-1, 4):
        data = clouds(20)
        data.labels[7] = label
        with pytest.raises(ValueError, match=rf"shape 7 \(a_0007\) has the label {label}; .* from 0 to 3"):
            Batches(data, 4, device)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    options = LoopOptions(lr=0.1, warmup=2, epochs=10)
    rates = [learning_rate(options, step, 100, 10) for step in range(101)]
    assert rates[0] < 0.01 and max(rates) == pytest.approx(0.1) and rates.index(max(rates)) == 20
    assert np.all(np.diff(rates[:20]) > 0) and np.all(np.diff(rates[20:]) < 0)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    # half-way between the end of the warm-up and the end of the run: half of the peak (Loshchilov & Hutter)
    assert rates[60] == pytest.approx(0.05)
    assert learning_rate(LoopOptions(lr=0.1, schedule="constant"), 99, 100, 10) == 0.1


def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4, dtype=torch.float64)

        def forward(self, points):
            return self.linear(points.double().mean(1))

    weights = []
    for size, accumulate in ((16, 1), (4, 4)):
        accelerator = make_accelerator(MachineOptions(device="cpu"))
        loop = LoopOptions(epochs=2, batch_size=size, accumulate=accumulate, optimizer="sgd", lr=0.1, seed=0)
        run = RunFolder.start(accelerator, tmp_path / str(size), Config(loop), command="train")
        torch.manual_seed(0)
        model = Linear()
        task = Task(
            step=lambda model, batch, done: {"loss": F.cross_entropy(model(batch.inputs), batch.labels)},
            evaluate=lambda model: {"test_oa": 0.0},
            watch=Figure("test_oa", "highest", ""),
        )
        batches = Batches(clouds(32), size, accelerator.device, 0)
        machine = MachineOptions(device="cpu", tensorboard=False)
        fit(model, task, batches, lambda model, path: None, loop, machine, accelerator, run)
        weights.append(model.linear.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


def test_freed_memory_is_kept_for_the_next_step():
    """Page faults of a loop that allocates and frees 8 MiB, in a process of its own."""
    code = """
import resource, sys, torch
from pointcmt.recipes.engine import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
if not keep_freed_memory():
    sys.exit(77)
faults()
print(plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    plain, kept = map(int, done.stdout.split())
    if plain < 20 * 100:
        pytest.skip(f"the C library keeps freed memory as it is: {plain} page faults")
    assert kept < plain / 10


def test_parts_of_a_network_have_rates_of_their_own(tmp_path):
    accelerator = make_accelerator(MachineOptions(device="cpu"))
    loop = LoopOptions(epochs=2, batch_size=12, optimizer="sgd", lr=0.1, weight_decay=0, schedule="constant")
    run = RunFolder.start(accelerator, tmp_path, Config(loop), command="train", resume=False)
    seed_everything(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    before = [layer.weight.detach().clone() for layer in model]

    def step(model, batch, done):
        return {"loss": sum(layer.weight.sum() for layer in model)}  # a gradient of one everywhere

    task = Task(step, lambda model: {"x": 0.0}, Figure("x", "highest", "x"))
    batches = Batches(clouds(), 12, accelerator.device, 0)
    machine = MachineOptions(device="cpu", tensorboard=False, progress=False)
    fit(
        model,
        task,
        batches,
        lambda m, p: None,
        loop,
        machine,
        accelerator,
        run,
        rates={model[0].weight: 0.25 * loop.lr},
    )
    moved = [(old - layer.weight).detach() for old, layer in zip(before, model, strict=True)]
    assert (moved[1] > 0.1).all()
    torch.testing.assert_close(moved[0], 0.25 * moved[1])
    assert [record["lr"] for record in read_metrics(tmp_path)] == [0.1, 0.1]
