"""The command line: help, exit codes, errors without tracebacks, and that each command takes its options."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import itertools
import re
import sys
import typing

import pytest
import torch

from pointcmt.cli import COMMANDS, SUMMARY, main


def test_every_command_has_a_summary_and_an_entry():
    assert set(COMMANDS) == set(SUMMARY)
    for module, options, function in COMMANDS.values():
        loaded = importlib.import_module(f"pointcmt.{module}")
        assert getattr(loaded, options).__doc__ and callable(getattr(loaded, function))


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", printed, re.MULTILINE)
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0


def option_fields(cls: type) -> list[tuple[str, bool]]:
    """(name, has words of explanation) of every option of a dataclass and of those inside it."""
    found = []
    hints = typing.get_type_hints(cls)
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for statement, following in itertools.zip_longest(body, body[1:]):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = statement.target.id
        if dataclasses.is_dataclass(hints[name]):
            found += option_fields(hints[name])
        else:
            explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found.append((name, explained and len(following.value.value) > 5))
    return found


def positional(cls: type, name: str) -> bool:
    """Whether an argument is given by its place (help shows it as PATH)."""
    hint = typing.get_type_hints(cls, include_extras=True).get(name)
    return typing.get_origin(hint) is typing.Annotated


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option(command, capsys):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: pointcmt {command}" in printed
    module, options, _ = COMMANDS[command]
    options_type = getattr(importlib.import_module(f"pointcmt.{module}"), options)
    fields = option_fields(options_type)
    for name, explained in fields:
        assert explained, f"{options}.{name} has no words below it"
        option = re.search(rf"--{name.replace('_', '-')}[ ,]", printed)
        assert option or positional(options_type, name)
    assert len({name for name, _ in fields}) == len(fields), "two options of one name"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "×".encode()), ("latin-1", b"\xd7"), ("cp1252", b"\xd7")]
)
def test_it_prints_in_any_locale(encoding, shown, monkeypatch):
    """Case 22: help and messages where the locale has no letters but ASCII's, or Latin-1's."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(["--help"]) == 0
    assert main(["train", "--help"]) == 0
    assert main(["report", "/nirgends/größe/łódź"]) == 1
    printed, said = (stream.flush() or stream.buffer.getvalue() for stream in streams)
    assert shown in printed and b"pointcmt report: " in said


def test_unknown_options_exit_with_2(capsys):
    assert main(["train", "--out", "x", "--learning-speed", "3"]) == 2
    assert "--learning-speed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--out", "{}/r", "--teacher", "{}/t"], "FE needs --generator"),
        (["train", "--out", "{}/r"], "--method pointcmt needs --teacher"),
        (["train", "--out", "{}/r", "--method", "none", "--student", "pointnet3"], "student 'pointnet3'"),
        (["train", "--out", "{}/r", "--method", "none", "--data", "{}/nowhere"], "there is no such folder"),
        (["train", "--out", "{}/r", "--method", "none", "--data", "{}"], "and no known data set"),
        (["train", "--out", "{}/r", "--method", "none", "--device", "cuda"], "--device cpu"),
        (["train-generator", "--out", "{}/g", "--teacher", "{}/t"], "Make one with: pointcmt train-teacher"),
        (["evaluate", "{}/r"], "is no run folder"),
        (["report", "{}"], "no finished run"),
        (["adapters", "--init", "40"], "belong to --check"),
        (["ablate", "{}/none.yaml"], "--config"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_without_a_traceback(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = ["--num-points", "16", "--per-class", "3", "--test-per-class", "1"]
    if arguments[0].startswith("train") and "{}" not in arguments:
        arguments = [*arguments, *small]
    assert main([argument.replace("{}", str(tmp_path)) for argument in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words.replace("{}", str(tmp_path)) in re.sub(r"\s*[│\n]+\s*", " ", error)
    assert "Traceback" not in error
    assert not (tmp_path / "r").exists() or not list((tmp_path / "r").iterdir())


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_code_of_the_user_that_exits_is_no_success(tmp_path, capsys):
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    assert main(["doctor", "--import", str(tmp_path / "quits.py")]) == 1
    assert "cannot import" in capsys.readouterr().err
    (tmp_path / "late.py").write_text("import sys\ndef Net(num_classes):\n    sys.exit(0)\n")
    small = ["--num-points", "16", "--per-class", "3", "--test-per-class", "1", "--method", "none"]
    assert main(["train", "--out", str(tmp_path / "r"), "--student", f"{tmp_path}/late.py:Net", *small]) == 1
    assert "ended by sys.exit(0) in imported code" in capsys.readouterr().err


def test_doctor_and_adapters_say_what_is_there(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed and "compiled kernels" in printed
    assert main(["adapters"]) == 0
    assert "dgcnn" in capsys.readouterr().out


def test_doctor_reports_a_broken_adapter_package_and_a_broken_build(capsys, monkeypatch):
    from pointcmt.ops import _extension
    from pointcmt.recipes import doctor

    monkeypatch.setattr(doctor, "adapter_problems", lambda: {"theirs": "pkg:adapter: ImportError: no pkg"})
    monkeypatch.setattr(_extension, "has_cpu_kernels", lambda: False)
    monkeypatch.setattr(_extension, "load_error", lambda: OSError("undefined symbol"))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert (
        "'theirs' does not load" in printed
        and "undefined symbol" in printed
        and "Build them again" in printed
    )


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--out", "x", "--seed", "-1"),
        ("train", "--out", "x", "--data-seed", str(2**32)),
        ("few-shot", "--seed", "-1"),
        ("demo", "--first-seed", "-3"),
    ],
)
def test_seeds_that_no_generator_takes_are_named(words, capsys):
    assert main(list(words)) == 1
    assert f"{words[-2]} is {words[-1]}; expected at least 0, and less than 2**32" in capsys.readouterr().err


def test_want_of_memory_says_what_to_make_smaller(monkeypatch, capsys):
    from pointcmt.recipes import doctor

    def full(options):
        torch.empty(2**50)

    monkeypatch.setattr(doctor, "doctor", full)
    assert main(["doctor"]) == 1
    assert "There is not memory enough: use smaller batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cache-features", "--teacher", "x", "--draws", "-1"), "--draws is -1; expected 0 or more"),
        (
            ("cache-features", "--teacher", "x", "--augment-shift", "-1"),
            "--augment-shift is -1.0; expected 0",
        ),
        (("train", "--out", "x", "--method", "none", "--augment-shift", "-1"), "--augment-shift is -1.0"),
        (("train-teacher", "--out", "x", "--augment-scale", "0.5"), "--augment-scale is 0.5; expected 1 or"),
        (("train-teacher", "--out", "x", "--white", "70000"), "--white is 70000; expected 0, or 1 to 65535"),
    ],
)
def test_numbers_out_of_range_are_named_by_their_option(words, said, capsys):
    assert main(list(words)) == 1
    assert said in capsys.readouterr().err
