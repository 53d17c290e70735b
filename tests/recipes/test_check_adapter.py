"""The proof that `pointcmt adapters --check` gives: it passes what works, and names what does not."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pointcmt import compat
from pointcmt.adapters import Adapter, AdapterError
from pointcmt.recipes.check_adapter import CheckFailed, check_adapter, check_network

SMALL = {"points": 32, "batch": 4, "device": "cpu"}


class PointNetLike(nn.Module):
    """Two layers per point, the maximum over points, a head that ends in a linear layer."""

    def __init__(self, num_classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(channels, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 24, 1)
        )
        self.head = nn.Sequential(
            nn.Linear(24, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, num_classes)
        )

    def forward(self, points):
        return self.head(self.body(points.transpose(1, 2)).amax(-1))


class CutOff(PointNetLike):
    """The feature leaves the graph, so no image can teach what is in front of it."""

    def forward(self, points):
        return self.head(self.body(points.transpose(1, 2)).amax(-1).detach())


class Hoarder(PointNetLike):
    """Keeps its input from the second training pass on: the first one that has a teacher."""

    passes = 0

    def forward(self, points):
        self.passes += self.training
        if self.passes > 1:
            self.seen = points
        return super().forward(points)


class Forgetful(PointNetLike):
    """Two of them with the same weights disagree: part of it is not in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = torch.rand(1)

    def forward(self, points):
        return self.head(self.body(points.transpose(1, 2)).amax(-1) * self.secret)


def test_a_sound_network_passes_and_the_answer_says_what_was_done():
    check = check_network(PointNetLike, **SMALL)
    assert check.network == "PointNetLike" and check.device == "cpu"
    assert check.report.adapter.name == "generic" and check.report.feature_shape == (4, 12)
    assert check.losses[0] != check.losses[1]
    assert set(check.objectives) == {"feature_enhancement", "classifier_enhancement"}
    assert check.parameters == sum(p.numel() for p in PointNetLike().parameters())
    text = str(check)
    assert "proved" in text and "two steps under PointCMT" in text and "untouched twin" in text


def test_the_same_seed_gives_the_same_check():
    a, b = check_network(PointNetLike, **SMALL, seed=3), check_network(PointNetLike, **SMALL, seed=3)
    assert a.losses == b.losses != check_network(PointNetLike, **SMALL, seed=4).losses


def test_normals_and_another_layout():
    class ChannelsFirst(PointNetLike):
        def forward(self, points):
            return super().forward(points.transpose(1, 2))

    check = check_network(lambda: ChannelsFirst(channels=6), **SMALL, channels=6, layout="B3N")
    assert check.report.logits_shape == (4, 5)
    found = check_network(lambda: ChannelsFirst(channels=6), **SMALL)  # three channels are tried first
    assert found.channels == 6 and found.report.adapter.input_layout == "B3N"
    assert "layout   B3N, 6 channels" in str(found)
    with pytest.raises(AdapterError, match=r"\[4, 32, 6\] in none(.|\n)*With 3 channels: .*\[4, 32, 3\]"):
        check_network(lambda: ChannelsFirst(channels=7), **SMALL)


def test_a_wrong_adapter_is_named():
    wrong = Adapter(
        name="skips-a-layer",
        matches=lambda module: True,
        feature_module="head.2",
        feature_from="input",
        classify=lambda module, feature: module.head[3](feature),
    )
    with pytest.raises(AdapterError, match="skips-a-layer"):
        check_network(PointNetLike, adapter=wrong, **SMALL)


def test_a_feature_that_is_cut_off_fails():
    early = Adapter(
        name="pooled",
        matches=lambda module: True,
        feature_module="head.0",
        feature_from="input",
        classify=lambda module, feature: module.head(feature),
    )
    assert check_network(PointNetLike, adapter=early, **SMALL).report.feature_shape == (4, 24)
    with pytest.raises(CheckFailed, match="reaches no layer in front of the classifier"):
        check_network(CutOff, adapter=early, **SMALL)


@pytest.mark.parametrize(
    ("network", "message"),
    [(Hoarder, "a hook or an attribute remains"), (Forgetful, "not bit-equal")],
)
def test_what_remains_is_found(network, message):
    with pytest.raises(CheckFailed, match=message):
        check_network(network, **SMALL)


def test_a_network_is_found_by_module_and_by_file(tmp_path, monkeypatch):
    source = (
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width, classes=3):\n"
        "        super().__init__()\n"
        "        self.body, self.head = nn.Linear(3, width), nn.Linear(width, classes)\n"
        "    def forward(self, points):\n"
        "        return self.head(self.body(points).relu().amax(1))\n"
    )
    (tmp_path / "their_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        check = check_adapter("their_net:Net", "8, classes=4", **SMALL)
        assert check.report.feature_shape == (4, 8) and check.report.logits_shape == (4, 4)
        by_file = check_adapter(f"{tmp_path}/their_net.py:Net", ["6", "classes=2"], **SMALL)
        assert by_file.report.feature_shape == (4, 6) and by_file.report.logits_shape == (4, 2)
        with pytest.raises(ValueError, match=r"cannot be built as Net\(\).*--init"):
            check_adapter("their_net:Net", **SMALL)
        with pytest.raises(ValueError, match="has no 'Network'"):
            check_adapter("their_net:Network", **SMALL)
    finally:
        sys.modules.pop("their_net", None)
    assert sys.path == before and compat.installed() == []


def test_what_fails_on_import_or_when_built_is_said_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaks.py").write_text("x = 1\nraise OSError('CUDA_HOME environment variable is not set')\n")
    (tmp_path / "builds.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        raise FileNotFoundError('weights.pth')\n"
    )
    for spec in ("breaks:Net", "breaks.py:Net"):
        with pytest.raises(ValueError, match=r"while it is imported: OSError: CUDA_HOME.*breaks\.py, line 2"):
            check_adapter(spec, **SMALL)
    with pytest.raises(ValueError, match=r"as Net\(\): FileNotFoundError: weights\.pth.*builds\.py, line 6"):
        check_adapter("builds:Net", **SMALL)
    sys.modules.pop("builds")


def test_an_import_that_is_missing_leads_to_the_folder_that_has_it(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for path, text in {
        "code/models/net.py": "import their_layers\n",
        "code/models/other.py": "import nowhere_at_all\n",
        "code/layers/their_layers.py": "",
    }.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(text)
    monkeypatch.chdir(project / "code")
    with pytest.raises(ValueError, match=r"their_layers, which is not there but in .*code/layers: go there"):
        check_adapter("models.net:Net", **SMALL)
    monkeypatch.chdir(project / "code" / "layers")
    (project / "their_other.py").write_text("")
    (project / "code" / "layers" / "inner.py").write_text("import their_other\n")
    with pytest.raises(ValueError, match=r"which is not there but in .*/project: go there"):
        check_adapter("inner:Net", **SMALL)
    monkeypatch.chdir(project / "code")
    with pytest.raises(ValueError, match=r"imports nowhere_at_all, which is not there: install it$") as error:
        check_adapter("models.other:Net", **SMALL)
    assert "go there" not in str(error.value)  # it is where it should be already


def test_what_cannot_be_understood_is_said():
    with pytest.raises(ValueError, match="expected module:Class"):
        check_adapter("their_net", **SMALL)
    with pytest.raises(ValueError, match="no_such_module cannot be imported"):
        check_adapter("no_such_module:Net", **SMALL)
    with pytest.raises(ValueError, match="there is no file"):
        check_adapter("no/such/file.py:Net", **SMALL)
    with pytest.raises(ValueError, match="expected batch ≥ 2"):
        check_network(PointNetLike, points=32, batch=1)
    with pytest.raises(ValueError, match="layout is 'NB3'"):
        check_network(PointNetLike, **SMALL, layout="NB3")
    with pytest.raises(ValueError, match=r"makes a list; expected a torch\.nn\.Module"):
        check_network(list, **SMALL)  # type: ignore[arg-type]
