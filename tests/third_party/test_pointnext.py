"""Our PointNeXt-S beside OpenPoints' own class, from the installed package."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn

from pointcmt import students
from tests.third_party.catalogue import openpoints_pointnext
from tests.third_party.sandbox import checkout


def test_names_outputs_and_a_training_step_are_those_of_openpoints(tmp_path):
    if importlib.util.find_spec("openpoints") is None:
        pytest.skip("openpoints is not installed: pip install openpoints (a development dependency)")
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(4, 256, 3, generator=generator), dim=-1)
    points = points * (0.4 + 0.6 * torch.rand(4, 256, 1, generator=generator))
    torch.manual_seed(1)
    ours = students.pointnext(40, dropout=0.0)
    with checkout(tmp_path, cuda_on_cpu=True):
        theirs = openpoints_pointnext()
        for module in theirs.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -0.5, 1.5)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        given = {"pos": points, "x": points.transpose(1, 2).contiguous()}
        expected = theirs.train()(copy.deepcopy(given))
        expected.square().sum().backward()
        with torch.no_grad():
            evaluated = theirs.eval()(given)
    got = ours.train()(points)
    got.square().sum().backward()
    # rounding grows with each of a few clouds' own statistics
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3 * expected.abs().max().item())
    for name, parameter in theirs.named_parameters():
        difference = (ours.get_parameter(name).grad - parameter.grad).norm()
        # of two nearly equal samples either may be the highest, so not element by element
        assert difference <= 0.03 * parameter.grad.norm() + 1e-4, name
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(points), evaluated, rtol=1e-3, atol=1e-4)
