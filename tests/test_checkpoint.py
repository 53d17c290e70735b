import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pointcmt.checkpoint import (
    atomic_write,
    fingerprint,
    kind_of,
    load_module,
    names_digest,
    read_about,
    read_config,
    save_module,
    seen_before,
)
from pointcmt.teacher import ImageTeacher


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


# a checkpoint is data


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pretrained": True}, "pretrained=True, which would read another file or open the network"),
        ({"backbone_options": {"checkpoint_path": "x.pth"}}, "checkpoint_path='x.pth', which would read"),
        ({"backbone_options": {"pretrained_cfg": {"url": "http://x"}}}, "pretrained_cfg="),
        ({"backbone": "hf-hub:somebody/network"}, "an address or a path"),
        ({"backbone": "hf_hub:somebody/network"}, "an address or a path"),
        ({"backbone": "local-dir:/etc"}, "an address or a path"),
        ({"backbone_options": {"a": ["https://x/y.pth"]}}, "an address or a path"),
        ({"backbone": "/etc/passwd"}, "an address or a path"),
        ({"feature_dim": 10**12}, "expected a number below a million"),
        ({"feature_dim": 1e300}, "expected a number below a million"),
        ({"feature_dim": float("nan")}, "expected a number below a million"),
        ({"backbone_options": {"layers": [1, 99999999]}}, "expected a number below a million"),
        ({"backbone_options": {"depth": "9999999999"}}, "expected numbers below a million"),
        ({"backbone_options": {"layers": [900000, 1, 1, 1]}}, "far larger than the weights in the file"),
        ({"backbone_options": {"width": 300.0}}, "far larger than the weights in the file"),
        ({"feature_dim": 1000000}, "far larger than the weights in the file"),
    ],
)
def test_a_teacher_s_file_opens_nothing_and_builds_nothing_huge(config, words, tmp_path, monkeypatch):
    teacher = ImageTeacher(
        2, "simpleview_resnet", 1, 8, backbone_options={"width": 0.1, "layers": [1]}, mean=None, std=None
    )
    changed = {**teacher.config, **config}
    path = save_module(tmp_path / "t.safetensors", teacher, "teacher", changed)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    began = time.monotonic()
    with pytest.raises(ValueError, match=words) as error:
        ImageTeacher.load(path)
    assert "t.safetensors" in str(error.value) and time.monotonic() - began < 20
    module = torch.nn.modules.module
    assert not module._global_parameter_registration_hooks and not module._global_buffer_registration_hooks


def test_weights_that_are_not_finite_are_refused(tmp_path):
    module = Small(5)
    with torch.no_grad():
        module.linear.weight[1, 2] = float("nan")
    path = save_module(tmp_path / "n.safetensors", module, "teacher", {"width": 5})
    with pytest.raises(ValueError, match=r"n\.safetensors: the weights linear\.weight are not finite"):
        load_module(path, "teacher", Small)


def test_what_a_file_says_of_itself(saved, tmp_path):
    assert read_about(saved[1]) == {} and kind_of(saved[1]) == "teacher"
    about = {"classes": ["a:b", "http://c", "02691156"], "n": 1}
    path = save_module(tmp_path / "a.safetensors", Small(5), "teacher", {"width": 5}, about)
    assert read_about(path) == about
    load_module(path, "teacher", Small)  # names of classes are names


@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 50_000])
def test_metadata_that_is_no_object_names_the_file(text, tmp_path):
    for name in ("config", "about"):
        metadata = {"kind": "teacher", "config": "{}"} | {name: text}
        save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=rf"x\.safetensors: its {name} is"):
            read_config(tmp_path / "x.safetensors", "teacher")


def test_names_are_known_again_by_their_digest():
    names = [f"chair/{k:04d}" for k in range(1000)]
    digest = names_digest(names[::2])
    assert len(digest) == 500 * 8 and seen_before(names, digest) == names[::2]


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for the disk, in a process of its own."""
    code = (
        "import resource, signal, sys, torch; from safetensors.torch import save_file\n"
        "from pointcmt.checkpoint import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "x = torch.zeros(100_000)\n"
        "ways = [lambda p: p.write_text('x' * 10**6), lambda p: torch.save(x, p)]\n"
        "for how in [*ways, lambda p: save_file({'x': x}, p)]:\n"
        "    try:\n"
        "        with atomic_write(sys.argv[1]) as temporary:\n"
        "            how(temporary)\n"
        "    except OSError as error:\n"
        "        print(str(error).replace(chr(10), ' '))\n"
    )
    path = tmp_path / "file.pt"
    path.write_text("before")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert line.startswith(f"{path} cannot be written (") and "is full" in line
    assert path.read_text() == "before" and os.listdir(tmp_path) == [path.name]


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    refused = pytest.raises(OSError, match=r"c\.json cannot be written .*may not be written to")
    with refused, atomic_write(tmp_path / "c.json"):
        pass


def test_a_path_that_cannot_be_a_file_is_said(tmp_path):
    """The system's words alone ("File exists") say neither what was to be done nor what to do."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "b" / "a.json"):
        with (
            pytest.raises(OSError, match=r"a\.json cannot be written .*a file is where a folder is needed"),
            atomic_write(path) as temporary,
        ):
            temporary.write_text("{}")
    with (
        pytest.raises(OSError, match=r"a\.json cannot be written .*its folder was deleted or renamed"),
        atomic_write(tmp_path / "gone" / "a.json") as temporary,
    ):
        shutil.rmtree(temporary.parent)
