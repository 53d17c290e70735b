"""Our stand-ins under, or beside, the real Python code of the packages that they stand for."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from pointcmt import compat
from pointcmt.compat.pointnet2_ops import _ext, pointnet2_modules, pointnet2_utils
from tests.third_party.sandbox import checkout, load

OPS = [
    "furthest_point_sample",
    "gather_operation",
    "three_nn",
    "three_interpolate",
    "grouping_operation",
    "ball_query",
]


def find(repos, marker):
    for folder in [repos, *sorted(repos.iterdir())]:
        if (folder / marker).exists():
            return folder
    pytest.skip(f"no checkout in {repos} holds {marker}")


@pytest.fixture
def real(repos):
    """The real pointnet2_ops, its compiled part replaced by ours."""
    folder = find(repos, "pointnet2_ops_lib/pointnet2_ops/pointnet2_utils.py")
    with checkout(folder, "pointnet2_ops_lib"):
        compat.uninstall("pointnet2_ops")
        sys.modules["pointnet2_ops._ext"] = _ext
        yield load("pointnet2_ops.pointnet2_utils:__dict__"), load("pointnet2_ops.pointnet2_modules:__dict__")


def test_every_public_name_is_there(real):
    for theirs, ours in zip(real, (pointnet2_utils, pointnet2_modules), strict=True):
        public = {
            name
            for name, value in theirs.items()
            if not name.startswith("_")
            and (getattr(value, "__module__", None) or "").startswith("pointnet2_ops")
        }
        assert public - set(vars(ours)) == set()
        assert {name for name in OPS if name in theirs} <= set(vars(ours))


@pytest.mark.parametrize("use_xyz", [True, False])
def test_set_abstraction_and_propagation_agree(real, use_xyz):
    _, theirs = real
    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(2, 200, 3, generator=generator) * 2 - 1
    features = torch.randn(2, 5, 200, generator=generator)
    multi = {"npoint": 32, "radii": [0.3, 0.6], "nsamples": [8, 16], "mlps": [[5, 8, 16], [5, 8, 12]]}
    specs = [
        ("PointnetSAModuleMSG", {**multi, "use_xyz": use_xyz}),
        ("PointnetSAModule", {"mlp": [5, 16], "use_xyz": use_xyz}),
        ("PointnetSAModule", {"mlp": [5, 16], "npoint": 20, "radius": 0.4, "nsample": 9, "bn": False}),
    ]
    for name, options in specs:
        torch.manual_seed(1)
        original = theirs[name](**copy.deepcopy(options))
        ours = getattr(pointnet2_modules, name)(**copy.deepcopy(options))
        ours.load_state_dict(original.state_dict())
        results = []
        for module in (original, ours):
            inputs = features.clone().requires_grad_()
            centres, out = module(xyz, inputs)
            out.square().sum().backward()
            results.append((centres, out, inputs.grad, *[p.grad for p in module.parameters()]))
        for a, b in zip(*results, strict=True):
            assert (
                (a is None and b is None) or torch.equal(a, b) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
            )
    original = theirs["PointnetFPModule"](mlp=[16 + 5, 8])
    ours = pointnet2_modules.PointnetFPModule(mlp=[16 + 5, 8])
    ours.load_state_dict(original.state_dict())
    arguments = xyz, xyz[:, :40].contiguous(), features, torch.randn(2, 16, 40, generator=generator)
    torch.testing.assert_close(original(*arguments), ours(*arguments))


@pytest.mark.parametrize(
    ("marker", "path"), [("emd/emd_module.py", "emd"), ("emdloss/emd_module.py", "emdloss")]
)
def test_the_real_emd_module_runs_on_our_extension(repos, marker, path):
    folder = find(repos, marker)
    x = torch.rand(2, 1024, 3, generator=torch.Generator().manual_seed(2))
    y = torch.rand(2, 1024, 3, generator=torch.Generator().manual_seed(3))
    results = []
    with checkout(folder, path, cuda_on_cpu=True):
        real = load("emd_module:emdModule") if load("emd_module:__file__").startswith(str(folder)) else None
        if real is None:  # ours stands for it: take the real file, which imports `emd`
            del sys.modules["emd_module"]
            real = load("emd_module:emdModule")
        for module in (real(), compat_emd()):
            leaf = x.clone().requires_grad_()
            dist, assignment = module(leaf, y, 0.005, 50)
            torch.sqrt(dist).mean(1).sum().backward()
            results.append((dist.detach(), assignment, leaf.grad))
    assert sys.modules.get("emd_module") is None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def compat_emd():
    from pointcmt.compat.emd import emdModule

    return emdModule()
