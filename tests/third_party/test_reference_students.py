"""Our students against the public classes they rebuild: ``pytest tests/third_party --repos DIR``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def _catalogue():
    name = "pointcmt_benchmarks_public_students"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "_public_students.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name].PUBLIC_STUDENTS


@pytest.fixture(params=_catalogue(), ids=lambda public: public.name)
def pair(request, double):
    """The public class and ours with the same weights and without dropout; in float64 with BatchNorm as
    after training, so that clouds are told apart and outputs are of order one."""
    root = request.config.getoption("--repos", default=None)
    if not root:
        pytest.skip("needs checkouts of the public repositories: pytest tests/third_party --repos DIR")
    public = request.param
    checkout = public.find(Path(root).expanduser().resolve())
    if checkout is None:
        pytest.skip(f"no checkout of {public.repository} in {root} (looked for {public.marker})")
    torch.manual_seed(0)
    theirs, ours = public.build(checkout, 40), public.ours(40)
    norms = [m for m in theirs.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, -0.5, 1.5)  # trained weights have either sign
        nn.init.normal_(norm.bias, std=0.1)
    if double:
        with torch.no_grad():
            public.run(theirs.train(), clouds(4, 512, 0))
    else:
        for norm in norms:  # near what they are at the start: nothing magnifies rounding
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    for norm in norms:
        norm.momentum = 0.1
    if not double:
        public.share_search(theirs)
    ours.load_state_dict(theirs.state_dict())
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return public, theirs, ours


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def double(request):
    torch.set_default_dtype(torch.float64 if request.param else torch.float32)
    yield request.param
    torch.set_default_dtype(torch.float32)


def clouds(batch: int, points: int, seed: int) -> torch.Tensor:
    """Clouds of different shapes in a shell: furthest point sampling ignores points at the origin in
    pointnet2_ops and in ours, and does not in yanx27's code."""
    generator = torch.Generator().manual_seed(seed)
    stretch = 0.2 + torch.rand(batch, 1, 3, generator=generator, dtype=torch.float32)
    xyz = torch.randn(batch, points, 3, generator=generator, dtype=torch.float32) * stretch
    radii = 0.4 + 0.6 * torch.rand(batch, points, 1, generator=generator, dtype=torch.float32)
    xyz = xyz / xyz.norm(dim=-1, keepdim=True) * radii
    return xyz.to(torch.get_default_dtype())


def scores(public, output: torch.Tensor) -> torch.Tensor:
    """yanx27's classes return log-probabilities."""
    return output.log_softmax(-1) if public.repository.startswith("yanx27/") else output


@pytest.mark.slow
def test_eval_outputs_are_equal(pair, double):
    """In float64 against the public code with its own search, in float32 with the same neighbours."""
    public, theirs, ours = pair
    points = clouds(2, 1024, 1)
    with torch.no_grad():
        expected = public.run(theirs.eval(), points)
        got = scores(public, ours.eval()(points))
    if double:
        assert (expected[0] - expected[1]).abs().max() > 1e-2, "the clouds cannot be told apart"
    assert (got - expected).abs().max() <= (1e-10 if double else 1e-5)


@pytest.mark.slow
def test_eval_outputs_are_equal_on_real_clouds(pair, double, modelnet40_root):
    """With the same neighbours: real clouds have points at exactly the same distance, of which either code
    takes one."""
    from pointcmt.data import ModelNet40

    public, theirs, ours = pair
    shapes = ModelNet40(modelnet40_root, "test", num_points=1024)
    points = torch.stack([torch.as_tensor(shapes[row][0]) for row in (0, 700, 1400, 2100)])
    points = points.to(torch.get_default_dtype())
    with torch.no_grad(), public.sharing_search(theirs):
        expected = public.run(theirs.eval(), points)
        got = scores(public, ours.eval()(points))
    assert (got - expected).abs().max() <= (1e-10 if double else 1e-5)


@pytest.mark.slow
def test_training_step_is_equal(pair, double):
    """Output, gradients and running statistics of one step; in float64, where it is not a matter of luck
    which of two nearly equal neighbours or maxima comes first."""
    if not double:
        pytest.skip("compared in float64")
    public, theirs, ours = pair
    points = clouds(4, 1024, 2)
    expected = public.run(theirs.train(), points)
    got = scores(public, ours.train()(points))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * toward).sum().backward()
    (got * toward).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if gradients[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-6, atol=1e-7, msg=name)
    statistics = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "running_" in name or name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, statistics[name], rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.slow
def test_checkpoint_of_the_public_class_loads(pair, tmp_path):
    from pointcmt.students import load_released_checkpoint

    _, theirs, ours = pair
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    torch.save({"net": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "model.pth")
    load_released_checkpoint(ours, tmp_path / "model.pth")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, dict(theirs.named_parameters())[name]), name
