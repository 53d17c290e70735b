"""PointCMT under the wrappers that training scripts use: the losses and gradients of the unwrapped run."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pointcmt.methods import PointCMT
from pointcmt.objectives import FeatureL2
from pointcmt.training import CrossModalTraining
from tests.toys import BATCH, DeepHead, Generator, Student, Teacher, batch, deep_head_adapter, hooks

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(200)
    return Teacher()


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(201)
    return Generator()


def make(kind=Student, **options) -> nn.Module:
    torch.manual_seed(202)
    return kind(**options)


def train(student, call, teacher, generator, steps: int = 2, given=None, **options):
    """Two steps of SGD: losses and gradients of each. ``call`` wraps inside the context."""
    given = student if given is None else given
    record = []
    with PointCMT(teacher, given, generator=generator, **options) as cmt:
        wrapped = call(given)
        for step in range(steps):
            points, labels, views = batch(300 + step)
            student.zero_grad()
            loss = F.cross_entropy(wrapped(points), labels) + cmt.loss(views=views)
            loss.backward()
            record.append((loss.item(), {n: p.grad.clone() for n, p in student.named_parameters()}))
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter -= 0.1 * parameter.grad
        assert cmt.report is not None
    return record


def assert_equal(ours, theirs, tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for (loss, gradients), (expected_loss, expected) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=tolerance, msg=name)


# ---- nn.DataParallel


class _Broadcast(torch.autograd.Function):
    """What torch's broadcast does on GPUs: all copies of all tensors of one node, replica by replica."""

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.count, ctx.tensors = count, len(tensors)
        return tuple(tensor.clone() for _ in range(count) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        n = ctx.tensors
        return (None, *[sum(gradients[i] for i in range(k, n * ctx.count, n)) for k in range(n)])


class ReplicasOnCPU(nn.DataParallel):
    """nn.DataParallel over replicas on the CPU, made and run as torch does it on GPUs, last replica first."""

    def __init__(self, module: nn.Module, replicas: int) -> None:
        nn.Module.__init__(self)
        self.module, self.replicas, self.device_ids = module, replicas, []

    def forward(self, points):
        import threading

        parameters = list(self.module.parameters())
        copies = _Broadcast.apply(self.replicas, *parameters)
        chunks = points.chunk(self.replicas)
        outputs: dict[int, torch.Tensor] = {}
        replicas = [
            _replicate(self.module, copies[k * len(parameters) : (k + 1) * len(parameters)])
            for k in range(self.replicas)
        ]

        def run(k: int) -> None:
            with torch.enable_grad():
                outputs[k] = replicas[k](chunks[k])

        threads = [threading.Thread(target=run, args=(k,)) for k in range(len(chunks))]
        for thread in reversed(threads):
            thread.start()
            thread.join()
        return torch.cat([outputs[k] for k in range(len(chunks))])


def _replicate(module: nn.Module, copies) -> nn.Module:
    place = {id(parameter): k for k, parameter in enumerate(module.parameters())}
    replicas = {id(child): child._replicate_for_data_parallel() for child in module.modules()}
    for child in module.modules():
        replica = replicas[id(child)]
        for name, grandchild in child._modules.items():
            setattr(replica, name, replicas[id(grandchild)])
        replica._former_parameters = {}
        for name, parameter in child._parameters.items():
            if parameter is not None:
                setattr(replica, name, copies[place[id(parameter)]])
                replica._former_parameters[name] = copies[place[id(parameter)]]
    return replicas[id(module)]


@pytest.mark.parametrize("wrapper_given", [True, False])
@pytest.mark.parametrize("replicas", [2, 4])
def test_data_parallel_puts_the_features_in_batch_order(wrapper_given, replicas, teacher, generator):
    plain = make(norm=False)
    expected = train(plain, lambda student: student, teacher, generator)
    student = make(norm=False)
    wrapped = ReplicasOnCPU(student, replicas)
    given = wrapped if wrapper_given else student
    record = train(student, lambda _: wrapped, teacher, generator, given=given)
    assert_equal(record, expected)
    assert hooks(wrapped) == 0


def test_data_parallel_does_not_mix_two_passes(teacher, generator):
    student = make(norm=False)
    wrapped = ReplicasOnCPU(student, 3)
    points, _, views = batch(310)
    with PointCMT(teacher, wrapped, generator=generator) as cmt:
        wrapped(points + 1)
        wrapped(points[:2])  # fewer replicas than before
        assert cmt.feature.shape[0] == 2
        torch.testing.assert_close(cmt.feature, student.feature(points[:2]))
        cmt.loss(views=views[:2])
        student(points)  # and without the wrapper
        assert cmt.feature.shape[0] == BATCH


@pytest.mark.cuda
def test_data_parallel_on_gpus(cuda, teacher, generator):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    expected = train(make(norm=False).to(cuda), lambda s: lambda x: s(x.to(cuda)).cpu(), teacher, generator)
    student = make(norm=False).to(cuda)
    wrapped = nn.DataParallel(student)
    record = train(student, lambda _: lambda x: wrapped(x).cpu(), teacher, generator, given=wrapped)
    assert_equal(record, expected, 1e-3)


# ---- DistributedDataParallel, accelerate


@pytest.mark.slow
def test_two_processes_under_ddp_and_accelerate(teacher, generator, tmp_path):
    """Half of the batch each, under DDP bare, DDP with unused-parameter search, and accelerate; and under DDP
    with batch normalisation on both sides of the feature, where each process has its own statistics."""
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            str(Path(__file__).with_name("ddp_worker.py")), str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    # the whole batch in one process; the task loss and FE are means over the batch, CE is a sum, which DDP
    # halves
    student = make(norm=False)
    points, labels, views = batch(320)
    with PointCMT(teacher, student, generator=generator) as cmt:
        cmt.objectives[1].weight /= 2
        (F.cross_entropy(student(points), labels) + cmt.loss(views=views)).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    results = torch.load(tmp_path / "gradients.pt", weights_only=True)
    deep = results.pop("ddp_deep")
    assert set(results) == {"ddp", "ddp_unused", "accelerate"}
    for way, gradients in results.items():
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{way} {name}")
    # the mean of what the halves give unwrapped
    student = make(DeepHead, dropout=0.0)
    for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        points, labels, views = (tensor[half] for tensor in batch(320))
        with PointCMT(teacher, student, generator=generator, adapter=deep_head_adapter()) as cmt:
            ((F.cross_entropy(student(points), labels) + cmt.loss(views=views)) / 2).backward()
    # rounding in another order may give FE's matching, which is good to its tolerance, other pairs
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        if name in ("encoder.2.bias", "head.1.bias"):  # before a normalisation: nothing but rounding
            continue
        apart = (deep[name] - parameter.grad).abs().max().item()
        assert apart <= 0.02 * parameter.grad.abs().max().item() + 1e-6, (name, apart)


def test_accelerate_with_mixed_precision(teacher, generator):
    """As the unwrapped student whose forward pass alone is under the same autocast."""
    accelerate = pytest.importorskip("accelerate")

    def steps(student, given, call, backward, optimizer):
        record = []
        with PointCMT(teacher, given, generator=generator, adapter=deep_head_adapter()) as cmt:
            for step in range(3):
                points, labels, views = batch(330 + step)
                loss = F.cross_entropy(call(points), labels) + cmt.loss(views=views)
                backward(loss)
                record.append((loss.item(), {n: p.grad.clone() for n, p in student.named_parameters()}))
                optimizer.step()
                optimizer.zero_grad()
        return record

    plain = make(DeepHead, dropout=0.0)

    def forward(points):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(points).float()

    expected = steps(plain, plain, forward, torch.Tensor.backward, torch.optim.SGD(plain.parameters(), 0.05))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    student = make(DeepHead, dropout=0.0)
    prepared, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 0.05))
    record = steps(student, prepared, prepared, accelerator.backward, optimizer)
    assert record[0][0] == pytest.approx(expected[0][0], rel=1e-6)
    # in bfloat16 the two weights part with every step, and with them the matching of FE
    assert [loss for loss, _ in record] == pytest.approx([loss for loss, _ in expected], rel=5e-2)
    # gradients are summed in bfloat16, in another order; those of biases before a normalisation are rounding
    for name in sorted(set(record[0][1]) - {"encoder.2.bias", "head.1.bias"}):
        ours, theirs = record[0][1][name], expected[0][1][name]
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max(), name
    assert hooks(student) == 0


def test_a_step_that_the_grad_scaler_skips_is_only_skipped(teacher, generator, expected):
    """Scaled beyond float32: the gradients overflow, the scaler halves the scale and goes on."""
    student = make()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    record, skipped = [], 0
    with PointCMT(teacher, student, generator=generator) as cmt:
        while len(record) < 2:
            points, labels, views = batch(300 + len(record))
            loss = F.cross_entropy(student(points), labels) + cmt.loss(views=views)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scale = scaler.get_scale()
            gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                skipped += 1
                with torch.no_grad():
                    student.norm.reset_running_stats()
                continue
            record.append((loss.item(), gradients))
    assert skipped > 0
    assert_equal(record, expected)


# ---- torch.compile


def compiled(student):
    return torch.compile(student, backend="eager")


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    yield
    if "compile" in request.node.name:
        torch.compiler.reset()


@pytest.fixture
def expected(teacher, generator):
    return train(make(), lambda student: student, teacher, generator)


@pytest.mark.parametrize(
    "way", ["wrapper given", "inside", "fullgraph inside", "run before", "module.compile, run before"]
)
def test_compile_before_and_after_entering(way, teacher, generator, expected):
    student = make()
    untouched = copy.deepcopy(student)
    given, call = student, lambda s: s
    if way == "wrapper given":
        given = compiled(student)
    elif way == "inside":
        call = compiled
    elif way == "fullgraph inside":
        call = lambda s: torch.compile(s, backend="aot_eager", fullgraph=True)  # noqa: E731
    else:
        if way == "run before":
            wrapped = compiled(student)
            call = lambda _: wrapped  # noqa: E731
        else:
            student.compile(backend="eager")
        state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        for _ in range(2):
            call(student)(batch(340)[0]).sum().backward()  # compiled, without hooks, and run
        student.load_state_dict(state)
    assert_equal(train(student, call, teacher, generator, given=given), expected)
    # what was compiled with the hooks on is compiled again without them
    assert hooks(student) == 0
    untouched.load_state_dict(student.state_dict())
    points = batch(341)[0]
    untouched.eval(), student.eval()
    torch.testing.assert_close(call(given)(points), untouched(points))


def test_a_compiled_step_function(teacher, generator, expected):
    student = make()
    step = torch.compile(lambda points: student(points), backend="eager", fullgraph=True)
    # compiled and run before entering, where nothing tells that the student is in it: that is said
    step(batch(342)[0])
    points, _, views = batch(343)
    with PointCMT(teacher, student, generator=generator) as cmt:
        step(points)
        with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"):
            cmt.loss(views=views)
        torch.compiler.reset()  # what the message says helps
        step(points)
        cmt.loss(views=views)
    twin = make()
    step = torch.compile(lambda points: twin(points), backend="eager", fullgraph=True)
    assert_equal(train(twin, lambda _: step, teacher, generator), expected)


def test_nothing_is_captured_by_compiled_code_after_leaving(teacher, generator):
    student = make()
    step = torch.compile(lambda points: student(points), backend="eager")
    points, _, views = batch(344)
    with PointCMT(teacher, student, generator=generator) as cmt:
        capture = cmt._capture
        step(points)
        cmt.loss(views=views)
    step(points)
    assert capture.captured is None
    assert capture.inputs is None


# ---- copies, checkpointing


def test_an_ema_copy_made_before_or_inside_does_not_disturb(teacher, generator, expected):
    from timm.utils import ModelEmaV3

    student = make()
    averages = [torch.optim.swa_utils.AveragedModel(student), ModelEmaV3(student, decay=0.5)]
    record = []
    with PointCMT(teacher, student, generator=generator) as cmt:
        averages += [torch.optim.swa_utils.AveragedModel(student), ModelEmaV3(student, decay=0.5)]
        for step in range(2):
            points, labels, views = batch(300 + step)
            student.zero_grad()
            logits = student(points)
            for average in averages:
                average.module(points + 1)  # in training mode, with gradients
            loss = F.cross_entropy(logits, labels) + cmt.loss(views=views)
            loss.backward()
            record.append((loss.item(), {n: p.grad.clone() for n, p in student.named_parameters()}))
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter -= 0.1 * parameter.grad
            averages[0].update_parameters(student)
            averages[1].update(student)
            averages[2].update_parameters(student)
            averages[3].update(student)
    assert_equal(record, expected)
    for average in averages:
        assert hooks(average.module) == 0
        assert average.module.state_dict().keys() == student.state_dict().keys()


class Checkpointed(Student):
    """Recomputes its neck, where the tap is, in the backward pass."""

    def __init__(self, reentrant: bool, feature_inside: bool) -> None:
        super().__init__()
        self.reentrant, self.feature_inside = reentrant, feature_inside
        self.activation = nn.LeakyReLU(0.2)

    def body(self, points):
        return self.activation(self.neck(self.norm(self.encoder(points).amax(1))))

    def forward(self, points):
        if self.feature_inside:
            feature = checkpoint(self.body, points, use_reentrant=self.reentrant)
            return self.head(feature)
        pooled = checkpoint(lambda x: self.encoder(x).amax(1), points, use_reentrant=self.reentrant)
        return self.head(F.leaky_relu(self.neck(self.norm(pooled)), 0.2))


def checkpointed_adapter():
    from pointcmt.adapters import Adapter

    return Adapter(
        name="checkpointed",
        matches=lambda module: isinstance(module, Checkpointed),
        feature_module="activation",
        feature_from="output",
        classify=lambda module, feature: module.head(feature),
    )


def test_activation_checkpointing_around_the_tap(teacher, generator):
    plain = make()
    student = make(Checkpointed, reentrant=False, feature_inside=True)
    student.load_state_dict(plain.state_dict())
    points, labels, views = batch(350)
    results = []
    for network, adapter in ((plain, None), (student, checkpointed_adapter())):
        network.norm.momentum = (
            0.0  # recomputation updates running statistics twice; that is not the matter here
        )
        with PointCMT(teacher, network, generator=generator, adapter=adapter) as cmt:
            loss = F.cross_entropy(network(points), labels) + cmt.loss(views=views)
            loss.backward()
            # what backward ran again is not a pass
            with pytest.raises(RuntimeError, match="already called"):
                cmt.loss(views=views)
        results.append((loss.item(), {n: p.grad.clone() for n, p in network.named_parameters()}))
    assert_equal(results[1:], results[:1])


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_elsewhere_or_of_everything(whole, teacher, generator):
    plain, student = make(), make(Checkpointed, reentrant=False, feature_inside=False)
    student.load_state_dict(plain.state_dict())
    points, labels, views = batch(351)
    results = []
    for network in (plain, student):
        with PointCMT(teacher, network, generator=generator) as cmt:
            logits = checkpoint(network, points, use_reentrant=False) if whole else network(points)
            loss = F.cross_entropy(logits, labels) + cmt.loss(views=views)
            loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in network.named_parameters()}))
    assert_equal(results[1:], results[:1])


def test_reentrant_checkpointing_around_the_tap_is_explained(teacher, generator):
    student = make(Checkpointed, reentrant=True, feature_inside=True)
    points, _, views = batch(352)
    points.requires_grad_()
    with PointCMT(teacher, student, generator=generator, adapter=checkpointed_adapter()) as cmt:
        student(points)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            cmt.loss(views=views)


def test_reentrant_checkpointing_before_the_tap_works(teacher):
    student = make(Checkpointed, reentrant=True, feature_inside=False)
    points, labels, views = batch(353)
    points.requires_grad_()
    with CrossModalTraining(teacher, student, objectives=[FeatureL2()]) as cmt:
        (F.cross_entropy(student(points), labels) + cmt.loss(views=views)).backward()
        with pytest.raises(RuntimeError, match="already called"):
            cmt.loss(views=views)
    assert student.encoder[0].weight.grad.abs().sum() > 0
