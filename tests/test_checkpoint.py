import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pointcmt.checkpoint import atomic_write, fingerprint, load_module, read_config, save_module


class Small(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)


class Other(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.other = nn.Linear(3, width)


@pytest.fixture
def saved(tmp_path):
    module = Small(5)
    path = save_module(tmp_path / "a" / "b.safetensors", module, "teacher", {"width": 5})
    return module, path


def test_atomic_write_replaces_only_when_whole(tmp_path):
    path = tmp_path / "folder" / "config.json"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".json"
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half of tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["config.json"]


def test_atomic_write_has_the_users_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_round_trip(saved):
    module, path = saved
    assert read_config(path, "teacher") == {"width": 5}
    loaded = load_module(path, "teacher", Small)
    assert not loaded.training
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_loading_draws_no_random_numbers(saved):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_module(saved[1], "teacher", Small)
    assert torch.equal(torch.rand(3), expected)


def test_tied_weights_and_transposed_views_are_saved(tmp_path):
    module = Small(3)
    module.other = nn.Linear(3, 3)
    module.other.weight = module.linear.weight
    module.register_buffer("view", torch.arange(6.0).view(2, 3).t())
    save_module(tmp_path / "m.safetensors", module, "student", {})

    def build():
        fresh = Small(3)
        fresh.other = nn.Linear(3, 3)
        fresh.register_buffer("view", torch.zeros(3, 2))
        return fresh

    loaded = load_module(tmp_path / "m.safetensors", "student", build)
    assert torch.equal(loaded.other.weight, module.linear.weight)
    assert torch.equal(loaded.view, module.view)


def test_fingerprint_follows_weights_and_config():
    torch.manual_seed(0)
    module = Small()
    first = fingerprint(module, {"a": 1, "b": 2})
    assert first == fingerprint(module, {"b": 2, "a": 1})
    assert first != fingerprint(module, {"a": 1, "b": 3})
    with torch.no_grad():
        module.linear.weight[0, 0] += 1e-6
    assert first != fingerprint(module, {"a": 1, "b": 2})
    assert len(fingerprint(module.bfloat16(), {})) == 64


def test_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no generator checkpoint at .*x\.safetensors.*train-generator"
    ):
        load_module(tmp_path / "x.safetensors", "generator", Small)


def test_a_folder_lists_what_it_holds(saved):
    with pytest.raises(ValueError, match=r"is a folder.*b\.safetensors"):
        read_config(saved[1].parent, "teacher")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(saved, keep):
    path = saved[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(
        ValueError, match=r"b\.safetensors is not a whole safetensors file.*teacher.*train-teacher"
    ):
        load_module(path, "teacher", Small)


def test_not_safetensors(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_config(tmp_path / "x.pt", "teacher")


def test_somebody_elses_safetensors(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="without pointcmt's metadata; expected a teacher"):
        read_config(tmp_path / "x.safetensors", "teacher")


def test_wrong_kind(saved):
    with pytest.raises(ValueError, match=r"holds a teacher, expected a generator.*train-generator"):
        read_config(saved[1], "generator")


def test_weights_that_do_not_fit(saved, tmp_path):
    with pytest.raises(
        ValueError, match=r"missing: other\.bias, other\.weight; not known: linear\.bias.* more"
    ):
        load_module(saved[1], "teacher", Other)
    save_module(tmp_path / "c.safetensors", Small(5), "teacher", {"width": 6})
    with pytest.raises(ValueError, match=r"of another shape: linear\.bias \[5\] instead of \[6\]"):
        load_module(tmp_path / "c.safetensors", "teacher", Small)
    save_module(tmp_path / "d.safetensors", Small(5), "teacher", {"depth": 6})
    with pytest.raises(ValueError, match=r"Small does not take the configuration .*depth"):
        load_module(tmp_path / "d.safetensors", "teacher", Small)
