"""What a user relies on: the right adapter is found, and a wrong one never goes unnoticed."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointcmt.adapters import (
    Adapter,
    AdapterError,
    adapter_problems,
    find_adapter,
    first_tensor,
    get_adapter,
    list_adapters,
    module_tree,
    register_adapter,
    registry,
    unregister_adapter,
    unwrap,
    verify_adapter,
)
from tests.toys import (
    BATCH,
    CLASSES,
    FEATURE,
    DeepHead,
    DefinedFirst,
    Dictionary,
    LogProbabilities,
    NoLinearEnd,
    Student,
    batch,
    deep_head_adapter,
    hooks,
)


@pytest.fixture
def registered():
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.mark.parametrize("kind", [Student, LogProbabilities, Dictionary, DefinedFirst, DeepHead, NoLinearEnd])
def test_the_generic_adapter_is_proved_on_networks_that_end_in_a_linear_layer(kind):
    torch.manual_seed(1)
    student = kind()
    report = verify_adapter(student, batch(1)[0])
    assert report
    assert report.adapter.name == "generic"
    assert report.logits_shape == (BATCH, CLASSES)
    assert report.max_difference <= report.tolerance
    assert report.conclusive
    if kind is not DeepHead:
        assert report.feature_shape == (BATCH, FEATURE)


def test_the_generic_adapter_takes_the_layer_that_runs_last_not_the_one_defined_last():
    student = DefinedFirst()
    assert find_adapter(student).feature_path(student) == "unused"
    assert find_adapter(student, points=batch(2)[0]).feature_path(student) == "head"


class Cosine(Student):
    """Scores by the angle to each class: no linear layer gives them."""

    def forward(self, points):
        return F.normalize(self.feature(points), dim=-1) @ F.normalize(self.head.weight, dim=-1).T


def test_a_network_without_a_linear_end_gets_instructions_and_its_tree():
    with pytest.raises(AdapterError) as error:
        verify_adapter(Cosine(), batch(3)[0])
    text = str(error.value)
    assert "none of its linear layers has the class scores [6, 5] as its result" in text
    for part in ("Adapter(", "classify=", "head: Linear(in_features=16", "verify_adapter"):
        assert part in text


def test_a_network_without_any_linear_layer_gets_instructions():
    with pytest.raises(AdapterError, match="no linear layer at all"):
        find_adapter(nn.Sequential(nn.Conv1d(3, 4, 3)))


def test_in_place_layers_after_the_feature_do_no_harm():
    torch.manual_seed(2)
    report = verify_adapter(DeepHead(), batch(4)[0], deep_head_adapter())
    assert report.feature_shape == (BATCH, FEATURE)
    assert report.max_difference == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classify": lambda module, feature: module.head(feature) + 0.1},
            "differs from the network's output",
        ),
        ({"classify": lambda module, feature: feature}, r"network's class scores are \[6, 5\]"),
        ({"classify": lambda module, feature: module.nowhere(feature)}, "classify failed"),
        ({"feature_module": "encoder.1"}, r"shape \[6, 12, 32\]; expected \[B, D\]"),
        ({"feature_module": "body"}, "no such submodule"),
        ({"logits": lambda output: output.mean()}, "class scores have shape"),
        ({"feature_module": "unused"}, "never runs"),
    ],
)
def test_a_wrong_adapter_is_an_error_that_says_what_is_wrong(change, message):
    torch.manual_seed(3)
    student = DefinedFirst()
    right = Adapter(
        name="toy",
        matches=lambda module: True,
        feature_module="head",
        feature_from="input",
        classify=lambda module, feature: module.head(feature),
    )
    verify_adapter(student, batch(5)[0], right)
    with pytest.raises(AdapterError, match=message) as error:
        verify_adapter(student, batch(5)[0], replace(right, **change))
    assert "head: Linear(in_features=16" in str(error.value)  # the tree, to choose from


def test_a_classifier_that_gives_nan_is_wrong():
    adapter = replace(
        deep_head_adapter(), classify=lambda module, feature: module.head(feature.clone()) * torch.nan
    )
    with pytest.raises(AdapterError, match="differs"):
        verify_adapter(DeepHead(), batch(6)[0], adapter)


def test_a_classifier_of_zeros_is_proved_with_its_weights_moved():
    student = Student()
    nn.init.zeros_(student.head.weight)
    assert verify_adapter(student, batch(7)[0]).conclusive
    assert not student.head.weight.any()


def test_verifying_changes_nothing():
    torch.manual_seed(4)
    student = DeepHead()
    student.train()
    student.norm.eval()  # a frozen part stays frozen
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attributes = [sorted(module.__dict__) for module in student.modules()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verify_adapter(student, batch(8)[0])
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert modes == [module.training for module in student.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert (np.random.get_state()[1] == random_states[2]).all()
    assert hooks(student) == 0
    assert attributes == [sorted(module.__dict__) for module in student.modules()]
    assert all(parameter.grad is None for parameter in student.parameters())


def test_verifying_leaves_no_trace_of_a_failure():
    student = DeepHead()
    with pytest.raises(AdapterError):
        verify_adapter(
            student, batch(9)[0], replace(deep_head_adapter(), classify=lambda module, feature: feature)
        )
    assert hooks(student) == 0
    assert student.training


def test_registering_by_call_and_by_decorator(registered):
    class Renamed(Student):
        pass

    by_call = register_adapter(replace(find_adapter(Student()), name="by call", matches=lambda m: False))
    assert by_call in list_adapters()

    @register_adapter(
        name="by decorator",
        matches=lambda module: type(module).__name__ == "Renamed",
        feature_module="neck",
        feature_from="output",
    )
    def renamed(module, feature):
        return module.head(feature)

    assert isinstance(renamed, Adapter)
    assert find_adapter(Renamed()) is renamed
    assert find_adapter(Student()).name == "generic"
    # the tap is before the activation, so this one is wrong, and that shows
    with pytest.raises(AdapterError, match="by decorator"):
        verify_adapter(Renamed(), batch(10)[0], "by decorator")
    # it was not asked for by name, and the generic one is right
    with pytest.warns(RuntimeWarning, match="'by decorator' matches, but is wrong for this Renamed"):
        assert verify_adapter(Renamed(), batch(10)[0]).adapter.name == "generic"
    unregister_adapter("by decorator")
    assert find_adapter(Renamed()).name == "generic"
    with pytest.raises(ValueError, match="by call"):
        unregister_adapter("by decorator")


def test_names_are_unique_unless_replaced(registered):
    first = replace(find_adapter(Student()), name="twice", matches=lambda m: False)
    second = replace(first, feature_module="neck")
    register_adapter(first)
    register_adapter(first)  # the same again is no mistake
    with pytest.raises(ValueError, match="replace=True"):
        register_adapter(second)
    register_adapter(second, replace=True)
    assert get_adapter("twice") is second
    assert [adapter.name for adapter in list_adapters()].count("twice") == 1


def test_the_latest_match_wins_and_the_explicit_one_wins_over_all(registered):
    student = Student()
    early = register_adapter(
        replace(find_adapter(student), name="early", matches=lambda m: isinstance(m, Student))
    )
    late = register_adapter(replace(early, name="late"))
    assert find_adapter(student) is late
    assert find_adapter(student, "early") is early
    assert find_adapter(student, deep := deep_head_adapter()) is deep


def test_a_rule_that_fails_on_other_networks_does_not_match_them(registered):
    register_adapter(replace(deep_head_adapter(), name="fails", matches=lambda module: module.head[3].p > 2))
    assert find_adapter(Student()).name == "generic"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: register_adapter(), "needs an Adapter"),
        (lambda: register_adapter(Student()), "takes an Adapter"),
        (lambda: get_adapter("no such"), "no adapter named 'no such'"),
        (lambda: find_adapter(Student(), 3), "expected an Adapter or the name"),
        (lambda: replace(deep_head_adapter(), feature_from="middle"), "'input' or 'output'"),
        (lambda: replace(deep_head_adapter(), input_layout="NB3"), "expected one of"),
        (lambda: replace(deep_head_adapter(), name=""), "needs a name"),
    ],
)
def test_misuse_is_explained(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_wrappers_are_seen_through():
    student = Student()
    assert unwrap(student) is student
    assert unwrap(nn.DataParallel(student)) is student
    assert unwrap(torch.compile(student)) is student
    assert unwrap(torch.compile(nn.DataParallel(student))) is student

    class HasAModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = student

    assert isinstance(unwrap(HasAModule()), HasAModule)
    report = verify_adapter(torch.compile(nn.DataParallel(student), backend="eager"), batch(11)[0])
    assert report.feature_path == "head"


def test_layouts():
    points = batch(12)[0]
    adapter = deep_head_adapter()
    assert adapter.arrange(points) is points
    assert torch.equal(replace(adapter, input_layout="B3N").arrange(points), points.mT)
    both = replace(adapter, input_layout="pos_x").arrange(points)
    assert torch.equal(both["pos"], points)
    assert torch.equal(both["x"], points.mT)


def test_the_scores_are_found_in_any_usual_output():
    scores, other = torch.zeros(2, 3), torch.ones(2, 4)

    class Named:
        logits = scores

    for output in (
        scores,
        (scores, other),
        [None, scores],
        {"logits": scores, "x": other},
        {"a": scores},
        Named(),
    ):
        assert first_tensor(output) is scores
    for output in ({"a": scores, "b": other}, (), None, "scores"):
        with pytest.raises(AdapterError, match="logits="):
            first_tensor(output)


def test_an_entry_point_registers_and_a_broken_one_only_warns(monkeypatch):
    adapter = replace(deep_head_adapter(), name="from a package")

    class Entry:
        def __init__(self, name, target):
            self.name, self.value, self._target = name, f"package:{name}", target

        def load(self):
            if isinstance(self._target, Exception):
                raise self._target
            return self._target

    entries = [Entry("good", adapter), Entry("bad", ImportError("no module named missing"))]
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: entries)
    for shelf in ("_builtin", "_installed", "_problems"):
        monkeypatch.setattr(registry, shelf, {})
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: [])
    with pytest.warns(RuntimeWarning, match="'bad'"):
        found = list_adapters()
    assert adapter in found
    assert "no module named missing" in adapter_problems()["bad"]
    assert find_adapter(DeepHead()) is adapter


def test_adapters_import_neither_pointcmt_nor_any_codebase():
    script = (
        "import sys; import pointcmt.adapters as a; a.list_adapters(); "
        "ours = [m for m in sys.modules if m.startswith('pointcmt.') and not "
        "m.startswith('pointcmt.adapters')]; print(sorted(set(ours) - {'pointcmt._version'})); "
        "print([m for m in ('openpoints', 'pointnet2_ops', 'timm', 'lightning') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "[]"]


def test_a_long_tree_is_cut_to_what_helps():
    tree = module_tree(nn.Sequential(*[Student() for _ in range(200)]), limit=20)
    assert len(tree.splitlines()) <= 23
    assert "199: Student" in tree  # the end is where the classifier is
    assert "more" in tree
