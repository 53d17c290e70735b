"""docs/adapters.md, tried as a new user would: every example runs, and says what the errors say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import nn

from pointcmt import cli, compat
from pointcmt.adapters import INPUT_LAYOUTS, AdapterError, registry, verify_adapter
from tests.adapters.test_shipping import NETWORK
from tests.toys import batch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def clean():
    before, layouts = dict(registry._registered), dict(INPUT_LAYOUTS)
    yield
    compat.uninstall()
    for kept, now in ((before, registry._registered), (layouts, INPUT_LAYOUTS)):
        now.clear()
        now.update(kept)


def test_every_example_runs():
    assert len(EXAMPLES) >= 9
    names: dict[str, object] = {"__name__": "page"}
    checked = 0
    for example in EXAMPLES:
        exec(compile(example, "docs/adapters.md", "exec"), names)
        checked += example.count("verify_adapter(")
    assert checked >= 7  # feature=, a convolution, a wrapper, tokens, several inputs, losses


def test_the_examples_are_refused_with_a_mistake_in_them():
    """None of them passes because nothing is looked at."""
    names: dict[str, object] = {"__name__": "page"}
    refused = 0
    for example in EXAMPLES:
        wrong = re.sub(r"(classify=lambda module, feature: )", r"\1 0.5 * ", example)
        try:
            exec(compile(wrong, "docs/adapters.md", "exec"), names)
        except AdapterError as error:
            assert "differs from the network's output" in str(error)
            refused += 1
    assert refused == sum("classify=lambda" in example for example in EXAMPLES)


def test_the_page_shows_the_template_of_the_error():
    class CosineNet(nn.Module):
        def forward(self, points):
            return points.amax(1)

    with pytest.raises(AdapterError) as error:
        verify_adapter(CosineNet(), batch(0)[0])
    lines = [line[4:] for line in str(error.value).splitlines() if line.startswith("    ")]
    assert lines[0].startswith("from pointcmt.adapters import") and lines[-1].startswith("verify_adapter(")
    assert "```\n" + "\n".join(lines) + "\n```" in PAGE


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mynet.py").write_text(NETWORK)
    (tmp_path / "mynet_pointcmt.py").write_text(
        next(example for example in EXAMPLES if example.startswith("# mynet_pointcmt.py"))
    )
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^pointcmt (adapters --check .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    said = []
    for command in commands:
        try:
            arguments = [part.strip("'") for part in command.split()]
            assert cli.main([*arguments, "--num-points", "64", "--device", "cpu"]) == 0
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] in ("models", "mynet_pointcmt")]:
                del sys.modules[name]
        said.append(capsys.readouterr().out)
    generic, own = said
    assert "proved   generic" in generic and "train-teacher --feature-dim 16" in generic
    assert "layout   B3N, 3 channels" in generic
    assert "proved   mynet: feature [4, 24]" in own and "train-teacher --feature-dim 24" in own
