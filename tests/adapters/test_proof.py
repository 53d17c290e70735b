"""No mistake of an adapter gets past its check because a fresh network hides it; no trace is left."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointcmt import CrossModalTraining, training
from pointcmt.adapters import (
    Adapter,
    AdapterError,
    find_adapter,
    fit_adapter,
    register_adapter,
    registry,
    verify_adapter,
)
from pointcmt.objectives import FeatureL2
from tests.toys import BATCH, CLASSES, FEATURE, POINTS, Student, Teacher, batch, hooks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def registered():
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


class Net(nn.Module):
    """[B, N, 3] -> [B, K] with whatever is the identity, or next to it, on a fresh network."""

    def __init__(self, scores=None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, FEATURE), nn.ReLU(), nn.Linear(FEATURE, FEATURE))
        self.norm = nn.BatchNorm1d(FEATURE, eps=1e-12)
        self.residual = nn.Linear(FEATURE, FEATURE)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        self.drop, self.other = nn.Dropout(0.5), nn.Dropout(0.3)
        self.head = nn.Linear(FEATURE, CLASSES, bias=False)
        self.bias = nn.Parameter(torch.zeros(CLASSES))
        self.temperature = nn.Parameter(torch.ones(()))
        self.annealed = 1.0  # a number that the training script lowers
        self.scores = scores or (lambda net, feature: net.head(feature))

    def forward(self, points):
        self.seen = self.body(points).amax(1)
        return self.scores(self, self.tap(self.seen))

    def tap(self, feature):
        return self.norm.forward(feature) if self.training_only_norm else feature

    training_only_norm = False


class Tapped(Net):
    """With the place of the feature as a module, so that it can be tapped in front of what comes after."""

    def __init__(self, scores) -> None:
        super().__init__(scores)
        self.here = nn.Identity()

    def forward(self, points):
        return self.scores(self, self.here(self.body(points).amax(1)))


def claim(classify) -> Adapter:
    return Adapter(
        name="claim", matches=lambda m: False, feature_module="here", feature_from="output", classify=classify
    )


# what the network does after the feature, and what the adapter says that it does
MISTAKES = {
    "a batch normalisation forgotten": (lambda n, f: n.head(n.norm(f)), lambda n, f: n.head(f)),
    "a temperature forgotten": (lambda n, f: n.head(f) * n.temperature, lambda n, f: n.head(f)),
    "a bias of zero forgotten": (lambda n, f: n.head(f) + n.bias, lambda n, f: n.head(f)),
    "a residual branch of zeros forgotten": (
        lambda n, f: n.head(f + n.residual(f)),
        lambda n, f: n.head(f),
    ),
    "dropout forgotten": (lambda n, f: n.head(n.drop(f)), lambda n, f: n.head(f)),
    "dropout where there is none": (lambda n, f: n.head(f), lambda n, f: n.head(n.drop(f))),
    "dropout behind the layer in place of before it": (
        lambda n, f: n.head(n.drop(f)),
        lambda n, f: n.drop(n.head(f)),
    ),
    "one dropout for another": (lambda n, f: n.head(n.drop(f)), lambda n, f: n.head(n.other(f))),
    "functional dropout forgotten": (
        lambda n, f: n.head(F.dropout(f, 0.4, n.training)),
        lambda n, f: n.head(f),
    ),
    "a temperature put in": (lambda n, f: n.head(f), lambda n, f: n.head(f) / n.temperature),
    "normalisation after the layer in place of before it": (
        lambda n, f: n.head(n.norm(f)),
        lambda n, f: n.head(n.norm(f.detach()) * 0 + f),
    ),
    "a classifier of zeros with another feature": (
        lambda n, f: n.residual(f)[:, :CLASSES],
        lambda n, f: n.head(f) * 0,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_fresh_network_hides_is_refused_at_the_start(name):
    torch.manual_seed(0)
    network, wrong = MISTAKES[name]
    net = Tapped(network)
    points = batch(0)[0]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():  # hidden indeed: in eval mode, fresh, there is no difference to see
        net.eval()
        feature = net.body(points).amax(1)
        assert torch.allclose(net(points), wrong(net, feature), atol=1e-6)
        net.train()
    torch.set_rng_state(random)
    versions = {key: value._version for key, value in net.state_dict().items()}
    with pytest.raises(AdapterError, match="is wrong for Tapped"):
        verify_adapter(net, points, claim(wrong))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = verify_adapter(net, points, claim(network))
    assert report.conclusive and not report.unchecked
    assert net.training and hooks(net) == 0
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) and value._version == versions[key], key


def test_the_error_names_the_dropout_layers():
    network, wrong = MISTAKES["one dropout for another"]
    with pytest.raises(AdapterError, match=r"in the network: drop \(p=0.5.*in classify: other \(p=0.3"):
        verify_adapter(Tapped(network), batch(0)[0], claim(wrong))


def test_dropout_in_another_order_of_draws_is_no_mistake():
    def network(n, f):
        n.other(n.bias)  # an auxiliary branch that draws first
        return n.head(n.drop(f))

    report = verify_adapter(Tapped(network), batch(0)[0], claim(lambda n, f: n.head(n.drop(f))))
    assert not report.unchecked


def test_random_numbers_that_only_the_network_draws_are_said():
    def network(n, f):
        return n.head(f + (0.1 * torch.randn_like(f) if n.training else 0))

    with pytest.warns(RuntimeWarning, match="draws random numbers after the feature in its own way"):
        report = verify_adapter(Tapped(network), batch(0)[0], claim(lambda n, f: n.head(f)))
    assert "random numbers" in str(report)


def test_scores_that_cannot_be_compared_are_a_warning():
    def network(n, f):
        return n.head(f).where(n.bias == 0, torch.nan)  # as long as nothing moves

    with pytest.warns(RuntimeWarning, match="with its parameters moved: its class scores are not finite"):
        assert verify_adapter(Tapped(network), batch(0)[0], claim(lambda n, f: n.head(f)))


def train(net, adapter, steps, after=lambda step: None):
    """So many steps under an objective that touches the classifier's feature only."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    points, labels, views = batch(0)
    done = 0
    with CrossModalTraining(Teacher(), net, objectives=[FeatureL2()], adapter=adapter) as cmt:
        for done in range(steps):
            loss = F.cross_entropy(net(points), labels) + cmt.loss(views=views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(done)
    return done + 1


ANNEALED = (lambda n, f: n.head(f) * n.annealed, lambda n, f: n.head(f))


@pytest.mark.parametrize("steps", [4, 40])
def test_what_only_training_shows_is_refused_within_ten_steps_or_on_leaving(steps):
    net = Tapped(ANNEALED[0])
    seen = []

    def anneal(step):
        seen.append(step)
        net.annealed *= 0.99

    with pytest.raises(AdapterError, match="after some training, classify"):
        train(net, claim(ANNEALED[1]), steps, anneal)
    assert len(seen) == min(steps, 9)  # the tenth step is refused
    assert hooks(net) == 0


class Normalised(Tapped):
    """With dropout, batch statistics in the body and the head, and random numbers of its own."""

    def __init__(self) -> None:
        super().__init__(lambda n, f: n.head(n.drop(n.norm(f))))
        self.inner = nn.BatchNorm1d(FEATURE)

    def forward(self, points):
        hidden = self.body(points).amax(1)
        if self.training:
            hidden = hidden + 0.01 * torch.randn_like(hidden)
        return self.scores(self, self.here(self.inner(hidden)))


@pytest.mark.parametrize("steps", [4, 13])  # checked on leaving only, and in the middle
def test_the_check_in_the_middle_of_training_leaves_no_trace_in_it(monkeypatch, steps):
    def run(checks):
        torch.manual_seed(5)
        net = Normalised()
        seen, done = [], []
        again = training.verify_again

        def counted(*args, **kwargs):
            done.append(None)
            if checks:
                again(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(training, "verify_again", counted)
            train(
                net,
                claim(lambda n, f: n.head(n.drop(n.norm(f)))),
                steps,
                lambda _: seen.append(
                    [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
                ),
            )
        return net.state_dict(), seen, torch.get_rng_state(), len(done)

    (state, grads, random, count), (other, theirs, their_random, _) = run(True), run(False)
    assert count == (1 if steps < 10 else 2)
    assert torch.equal(random, their_random)
    assert int(state["norm.num_batches_tracked"]) == steps
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    for mine, yours in zip(grads, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))


# ---- networks with habits


class Habits(Tapped):
    """Puts another tensor in a buffer's place, resizes one, keeps attributes, counts in a list."""

    def __init__(self) -> None:
        super().__init__(lambda n, f: n.head(f))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("grows", torch.zeros(0))
        self.history: list[int] = []
        self.plain = torch.zeros(3)

    def forward(self, points):
        self.mean = points.mean()[None]
        self.grows.resize_(self.grows.numel() + 1)
        self.history.append(len(points))
        self.plain += 1
        self.last = points
        return super().forward(points)


def test_buffers_replaced_or_resized_and_attributes_come_back():
    """Case 23: a buffer re-assigned or resized in forward."""
    net = Habits()
    mean, keys = net.mean, set(vars(net))
    verify_adapter(net, batch(0)[0])
    assert net.mean is mean and not mean.any() and net.grows.shape == (0,)
    assert net.history == [] and not net.plain.any() and set(vars(net)) == keys


class Holder:
    def __init__(self, pos) -> None:
        self.pos, self.x, self.notes = pos, None, ["a"]


class WritesIntoItsInput(Student):
    def forward(self, data):
        if data.x is not None:
            raise RuntimeError("seen before")
        data.x = data.pos * 2
        data.pos += 1
        return super().forward(data.x)


def test_the_proof_runs_on_copies_of_any_input():
    """Case 14: a forward pass that writes into its input."""
    data = Holder(batch(0)[0])
    before = data.pos.clone()
    report = verify_adapter(WritesIntoItsInput(), data)
    assert report.logits_shape == (BATCH, CLASSES)
    assert data.x is None and torch.equal(data.pos, before)
    with CrossModalTraining(Teacher(), net := WritesIntoItsInput(), objectives=[FeatureL2()]) as cmt:
        net(data)
        assert torch.isfinite(cmt.loss(views=batch(0)[2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_input_is_named_and_not_the_adapter(value):
    """Case 16: a point that is not finite in the first batch, in any form of input."""
    points, _, views = batch(0)
    points[2, 3, 1] = value
    words = rf"input \[6, 12, 3\] has {value} at \[2, 3, 1\] \(shape 2 of the batch\)"
    with pytest.raises(ValueError, match=words):
        fit_adapter(Student(), points)
    with (
        pytest.raises(ValueError, match=words),
        CrossModalTraining(Teacher(), net := Student(), objectives=[FeatureL2()]) as cmt,
    ):
        net(points)
        cmt.loss(views=views)
    with pytest.raises(ValueError, match=words):
        verify_adapter(WritesIntoItsInput(), Holder(points))


def test_arguments_of_any_name():
    """Case 7: also such as student, adapter, module."""

    class Names(Student):
        def forward(self, student, adapter=None, *, module=None):
            return super().forward(student + adapter + module)

    points, _, views = batch(0)
    with CrossModalTraining(Teacher(), net := Names(), objectives=[FeatureL2()]) as cmt:
        net(student=points, adapter=points, module=points)
        assert torch.isfinite(cmt.loss(views=views))


def test_quantisation_aware_training_leaves_no_trace():
    """Case 23: observers are back where they were."""
    net = Student()
    net.train()
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(net, inplace=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = verify_adapter(net, batch(0)[0])
    assert report.feature_shape == (BATCH, FEATURE)
    for name, value in net.state_dict().items():
        assert value.shape == before[name].shape and torch.equal(value, before[name]), name


def test_double_precision_by_default():
    """Case 29: torch.set_default_dtype(torch.float64)."""
    torch.set_default_dtype(torch.float64)
    try:
        net, teacher = Student(), Teacher()
        points, labels, views = batch(0)
        with CrossModalTraining(teacher, net, objectives=[FeatureL2()]) as cmt:
            loss = F.cross_entropy(net(points.double()), labels) + cmt.loss(views=views.double())
            loss.backward()
        assert torch.isfinite(loss)
    finally:
        torch.set_default_dtype(torch.float32)


def test_lazy_layers_are_asked_to_be_run_first():
    net = Student()
    net.norm = nn.LazyBatchNorm1d()
    with pytest.raises(AdapterError, match=r"lazy layers that have no size yet \(norm"):
        verify_adapter(net, batch(0)[0])
    net(batch(0)[0])
    assert verify_adapter(net, batch(0)[0])


# ---- the generic adapter, networks inside others, layouts


class LowRank(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, base, zero) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})
        if zero:
            nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("zero", [True, False])
def test_low_rank_updates_of_the_classifier_are_part_of_it(zero):
    """Case 19: LoRA on the classifier."""
    net = Student()
    net.head = LowRank(net.head, zero)
    report = verify_adapter(net, batch(0)[0])
    assert report.feature_path == "head" and report.feature_shape == (BATCH, FEATURE)


def test_a_layer_in_a_list_that_is_never_called_is_that_layer():
    class Listed(Student):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(FEATURE, FEATURE), nn.Linear(FEATURE, CLASSES)])

        def forward(self, points):
            return self.layers[1](self.layers[0](self.feature(points)).relu())

    assert verify_adapter(Listed(), batch(0)[0]).feature_path == "layers.1"


class Own(nn.Module):
    """A linear layer of one's own class, as PyTorch Geometric's."""

    def __init__(self, in_channels, out_channels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))

    def forward(self, x):
        return x @ self.weight.T


class Ends(Student):
    def __init__(self, end, last) -> None:
        super().__init__()
        self.head, self.last = end, last

    def forward(self, points):
        return self.last(self.head, self.feature(points))


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (Own(FEATURE, CLASSES), lambda head, f: head(f)),
        (nn.Conv1d(FEATURE, CLASSES, 1), lambda head, f: head(f[..., None]).squeeze(-1)),
        (nn.Conv1d(FEATURE, CLASSES, 1), lambda head, f: head(f[..., None])),  # [B, K, 1]
        (nn.Conv2d(FEATURE, CLASSES, 1), lambda head, f: head(f[..., None, None]).flatten(1)),
        (nn.Linear(FEATURE, CLASSES), lambda head, f: head(f[:, None])),  # [B, 1, K]
        (nn.Conv1d(FEATURE, CLASSES, 1), lambda head, f: F.log_softmax(head(f[..., None]).squeeze(-1), -1)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(FEATURE, CLASSES)), lambda head, f: head(f)),
    ],
)
def test_ends_of_every_form_are_found_by_what_they_compute(end, last):
    net = Ends(end, last)
    report = verify_adapter(net, batch(0)[0])
    assert report.feature_path == "head" and report.feature_shape == (BATCH, FEATURE)
    points, _labels, views = batch(0)
    with CrossModalTraining(Teacher(), net, objectives=[FeatureL2()], adapter=report.adapter) as cmt:
        net(points)
        cmt.loss(views=views).backward()
        assert cmt.classify(cmt.feature).shape == (BATCH, CLASSES)


def test_the_layer_is_chosen_by_value_not_by_what_runs_last():
    class Auxiliary(Student):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(FEATURE, CLASSES)

        def forward(self, points):
            feature = self.feature(points)
            logits = self.head(feature)
            return logits, self.aux(feature)

    assert verify_adapter(Auxiliary(), batch(0)[0]).feature_path == "head"


class Known(Student):
    """What an adapter is registered for: it taps in front of the neck's activation."""


KNOWN = Adapter(
    name="known",
    matches=lambda module: isinstance(module, Known),
    feature_module="neck",
    feature_from="output",
    classify=lambda module, feature: module.head(F.leaky_relu(feature, 0.2)),
)


class Around(nn.Module):
    def __init__(self, scale) -> None:
        super().__init__()
        self.backbone, self.scale = Known(), scale

    def forward(self, points):
        return self.backbone(points / points.norm(dim=-1, keepdim=True)) * self.scale


def test_a_known_network_is_found_inside_ones_own_module_or_that_is_said():
    """Case 19: a known network inside one's own."""
    register_adapter(KNOWN)
    report = verify_adapter(Around(1.0), batch(0)[0])
    assert report.adapter.name == "known (in backbone)" and report.feature_path == "backbone.neck"
    assert find_adapter(Around(1.0)).name == "known (in backbone)"
    with pytest.raises(AdapterError, match=r"known \(in backbone\)"):
        verify_adapter(Around(2.0), batch(0)[0])  # neither that one nor the generic adapter is true of it

    class Longer(Around):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.more = nn.Linear(CLASSES, CLASSES)

        def forward(self, points):
            return self.more(super().forward(points).relu())

    with pytest.warns(RuntimeWarning, match="knows a part of this Longer"):
        assert verify_adapter(Longer(), batch(0)[0]).feature_path == "more"


class WithPartsOfYanx27(nn.Module):
    """Named as the parts of a public PointNet++, but raw class scores, and stages of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.normal_channel = False
        self.sa1, self.sa2, self.sa3 = nn.Linear(3, 32), nn.Linear(32, 32), nn.Identity()
        self.fc1, self.bn1, self.drop1 = nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Dropout(0.4)
        self.fc2, self.bn2, self.drop2 = nn.Linear(24, FEATURE), nn.BatchNorm1d(FEATURE), nn.Dropout(0.4)
        self.fc3 = nn.Linear(FEATURE, CLASSES)

    def forward(self, points):
        whole = self.sa3(self.sa2(self.sa1(points.transpose(1, 2)).relu()).amax(1))
        hidden = self.drop1(self.bn1(self.fc1(whole)).relu())
        return self.fc3(self.drop2(self.bn2(self.fc2(hidden)).relu()))


class WithPartsOfDGCNN(nn.Module):
    """Named as the parts of DGCNN, but another slope in the head."""

    def __init__(self) -> None:
        super().__init__()
        for i, (a, b) in enumerate([(3, 8), (8, 8), (8, 8), (8, 8), (8, 32)], 1):
            setattr(self, f"conv{i}", nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.LeakyReLU(0.2)))
        self.linear1, self.bn6, self.dp1 = nn.Linear(32, 24, bias=False), nn.BatchNorm1d(24), nn.Dropout()
        self.linear2, self.bn7, self.dp2 = nn.Linear(24, FEATURE), nn.BatchNorm1d(FEATURE), nn.Dropout()
        self.linear3 = nn.Linear(FEATURE, CLASSES)

    def forward(self, points):
        for i in range(1, 6):
            points = getattr(self, f"conv{i}")(points)
        hidden = self.dp1(F.leaky_relu(self.bn6(self.linear1(points.amax(2))), 0.1))
        return self.linear3(self.dp2(F.leaky_relu(self.bn7(self.linear2(hidden)), 0.1)))


@pytest.mark.parametrize(
    ("kind", "known", "end"),
    [(WithPartsOfYanx27, "yanx27-pointnet2", "fc3"), (WithPartsOfDGCNN, "dgcnn", "linear3")],
)
def test_a_known_adapter_that_is_wrong_gives_way_to_the_generic_one_with_a_warning(kind, known, end):
    """Case 6: parts of public networks in another network."""
    torch.manual_seed(3)
    with pytest.warns(RuntimeWarning, match=f"'{known}' matches, but is wrong for this {kind.__name__}"):
        report = fit_adapter(kind(), batch(0)[0])
    assert report.adapter.name == "generic" and report.feature_path == end
    assert report.adapter.input_layout == "B3N"


def test_the_generic_adapter_has_a_name():
    """Case 6: it can be asked for."""
    register_adapter(KNOWN)
    assert verify_adapter(Known(), batch(0)[0]).adapter.name == "known"
    assert verify_adapter(Known(), batch(0)[0], "generic").feature_path == "head"


def test_features_per_point_are_found_where_they_follow_the_points():
    report = verify_adapter(Student(), batch(0)[0])
    assert report.local_shape == (BATCH, POINTS, 32)

    class Sorted(Student):
        def forward(self, points):
            return super().forward(points.sort(dim=1).values)

    assert verify_adapter(Sorted(), batch(0)[0]).local_shape is None

    class Mixing(Student):
        def forward(self, points):
            return super().forward(points - points.mean((0, 1)))

    assert verify_adapter(Mixing(), batch(0)[0]).local_shape is None


def test_logits_is_for_the_output_only():
    class Wrapped(Student):
        def forward(self, points):
            return {"a": super().forward(points)[:, None], "b": points}

    adapter = Adapter(
        name="wrapped",
        matches=lambda module: False,
        feature_module="head",
        feature_from="input",
        classify=lambda module, feature: module.head(feature),
        logits=lambda output: output["a"][:, 0],
    )
    points, _, _views = batch(0)
    with CrossModalTraining(Teacher(), net := Wrapped(), objectives=[FeatureL2()], adapter=adapter) as cmt:
        net(points)
        assert cmt.classify(cmt.feature).shape == (BATCH, CLASSES)


CALLS = {
    "BN3": lambda self, p: Student.forward(self, p),
    "B3N": lambda self, p: Student.forward(self, p.transpose(1, 2)),
    "pos_x": lambda self, p: Student.forward(self, p["pos"]),
    "xyz,f:B3N": lambda self, xyz, f: Student.forward(self, (xyz + f).transpose(1, 2)),
    "(xyz,f):BN3": lambda self, both: Student.forward(self, both[0] + both[1]),
    "B3N1": lambda self, p: Student.forward(self, p.squeeze(3).transpose(1, 2)),
    "data": lambda self, data: Student.forward(self, data.pos.view(int(data.batch.max()) + 1, -1, 3)),
    "pos,batch": lambda self, pos, batch: Student.forward(self, pos.view(int(batch.max()) + 1, -1, 3)),
}


@pytest.mark.parametrize("layout", CALLS)
def test_layouts_are_tried_until_one_runs(layout):
    """Case 5: dictionaries, tuples, channels first."""

    class Called(Student):
        def forward(self, *inputs):
            return CALLS[layout](self, *inputs)

    clouds = batch(0)[0]
    report = fit_adapter(Called(), clouds)
    assert report.adapter.input_layout == layout
    assert report.logits_shape == (BATCH, CLASSES)
    assert report.adapter.call(Called(), clouds).shape == (BATCH, CLASSES)


def test_no_layout_that_runs_is_an_error_with_what_each_gave():
    """Case 5: the message says which were tried."""

    class Picky(Student):
        def forward(self, points):
            raise TypeError("I take voxels")

    with pytest.raises(AdapterError, match=r"none of the layouts(.|\n)*B3N: TypeError: I take voxels"):
        fit_adapter(Picky(), batch(0)[0])


SHARDED = """
import torch, torch.distributed as dist, warnings
from torch.distributed.fsdp import fully_shard
from pointcmt import CrossModalTraining
from pointcmt.objectives import ClassifierEnhancement, FeatureL2
from tests.toys import Student, Teacher, batch

def trained(shard):
    torch.manual_seed(0)
    net = shard(Student())
    teacher, optimizer = Teacher(), torch.optim.SGD(net.parameters(), lr=1e-3)
    points, labels, views = batch(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objectives = [FeatureL2(), ClassifierEnhancement()]
        with CrossModalTraining(teacher, net, objectives=objectives) as cmt:
            for _ in range(12):
                loss = torch.nn.functional.cross_entropy(net(points), labels) + cmt.loss(views=views)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    said = any("sharded" in str(w.message) for w in caught)
    state = net.state_dict().items()
    return {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in state}, said

dist.init_process_group("gloo", init_method="file://FILE", rank=0, world_size=1)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))

def whole(net):
    fully_shard(net, mesh=mesh)
    return net

def parts(net):
    fully_shard(net.head, mesh=mesh)
    return whole(net)

plain, said = trained(lambda net: net)
assert not said and all(torch.isfinite(value).all() for value in plain.values())
for shard in (whole, parts):
    state, said = trained(shard)
    assert said and state.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(state[name], plain[name])
print("equal")
"""


@pytest.mark.skipif(
    torch.__version__ < "2.7" and not torch.cuda.is_available(), reason="torch 2.6 shards on GPUs alone"
)
def test_a_student_under_fully_shard_trains_as_without_and_what_is_not_checked_is_said(tmp_path):
    """Case 24: FSDP2, of the root and of parts."""
    script = SHARDED.replace("FILE", str(tmp_path / "rendezvous"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["equal"]
