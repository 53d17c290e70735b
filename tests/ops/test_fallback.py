"""Without compiled kernels everything still works, and one warning says how to build them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pointcmt.ops import _extension

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, warnings
sys.modules["pointcmt._C"] = None  # importing it is an ImportError from here on
import torch
from pointcmt import ops
from pointcmt.ops import _extension

assert not _extension.has_cpu_kernels() and not _extension.has_cuda_kernels()
torch.manual_seed(0)
xyz, features = torch.randn(2, 60, 3), torch.randn(2, 5, 60, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = ops.furthest_point_sample(xyz, 12)
    centres = ops.gather_points(xyz.transpose(1, 2), first).transpose(1, 2)
    hits = ops.ball_query(0.8, 6, xyz, centres)
    grouped = ops.group_points(features, hits.int())
    distance, idx = ops.knn(xyz, xyz, 4)
    near, three = ops.three_nn(xyz, centres)
    spread = ops.three_interpolate(features[..., :12], three, near)
    (grouped.sum() + spread.sum()).backward()
found = [w for w in caught if "compiled kernels" in str(w.message)]
assert len(found) == 1, [str(w.message) for w in caught]
assert found[0].category is RuntimeWarning
assert "pip install" in str(found[0].message)
assert found[0].filename == "<string>", found[0].filename  # it points at the caller
whole = torch.compile(lambda x: ops.knn(x, x, 4)[1], fullgraph=True, backend="eager")
assert torch.equal(whole(xyz), idx)
results = [first, hits, grouped.detach(), distance, idx, near, three, spread.detach(), features.grad]
torch.save(results, sys.argv[1])
"""


def test_importing_does_not_wait_for_the_compiler() -> None:
    """torch._dynamo takes longer to import than torch itself; only those who compile should wait for it."""
    names = "pointcmt.ops, pointcmt.objectives, pointcmt.students, pointcmt.training"
    code = f"import sys, {names}; sys.exit('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.slow
def test_twins_serve_with_one_warning(tmp_path: Path) -> None:
    import torch

    from pointcmt import ops

    saved = tmp_path / "results.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(saved)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    torch.manual_seed(0)
    xyz, features = torch.randn(2, 60, 3), torch.randn(2, 5, 60, requires_grad=True)
    first = ops.furthest_point_sample(xyz, 12)
    centres = ops.gather_points(xyz.transpose(1, 2), first).transpose(1, 2)
    hits = ops.ball_query(0.8, 6, xyz, centres)
    grouped = ops.group_points(features, hits.int())
    distance, idx = ops.knn(xyz, xyz, 4)
    near, three = ops.three_nn(xyz, centres)
    spread = ops.three_interpolate(features[..., :12], three, near)
    (grouped.sum() + spread.sum()).backward()
    here = [first, hits, grouped, distance, idx, near, three, spread, features.grad]
    for one, two in zip(here, torch.load(saved, weights_only=True), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_a_missing_compiler_is_a_warning_and_not_a_failed_install(tmp_path: Path) -> None:
    """setup.py with a compiler that does not exist: it ends well, says so, and builds nothing."""
    environment = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++", "FORCE_CUDA": "0"}
    environment.pop("POINTCMT_REQUIRE_EXT", None)
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "pure-PyTorch twins" in run.stderr
    assert not list((tmp_path).rglob("*.so"))
    strict = {**environment, "POINTCMT_REQUIRE_EXT": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=strict, check=False)
    assert run.returncode != 0


STALE = """
import warnings
import torch
from pointcmt import ops
from pointcmt.ops import _extension
from pointcmt.recipes.doctor import trouble

_extension._COMPILED["cpu"] -= {"knn", "norm_act_max"}
xyz = torch.rand(1, 9, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ops.knn(xyz, xyz, 2), ops.knn(xyz, xyz, 2)
    ops.furthest_point_sample(xyz, 3)
[found] = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert "older than its sources and lack knn, norm_act_max" in found and "pip install" in found, found
assert any("lack knn, norm_act_max" in error for error in trouble()[0])
"""


@pytest.mark.skipif(not _extension.has_cpu_kernels(), reason="the kernels are not compiled here")
def test_a_library_older_than_the_sources_is_told_of() -> None:
    assert _extension.missing_ops() == []
    assert _extension.compiled_ops("cpu") == _extension.COMPILED_OPS  # the list is csrc's
    assert _extension._declared() == _extension.SCHEMAS
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STALE], env=environment, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


OTHER_VERSION = """
import sys, types
import torch

older = types.ModuleType("pointcmt._C")
older.__file__ = "/built/_C.so"
older.cpu_features = lambda: []
sys.modules["pointcmt._C"] = older
library = torch.library.Library("pointcmt", "DEF")
library.define("knn(Tensor queries, Tensor points, SymInt k) -> Tensor")
library.define("emd(Tensor x, Tensor y, float eps, int iters) -> (Tensor, Tensor)")
try:
    import pointcmt.ops
except ImportError as error:
    print(error)
from pointcmt.cli import main
sys.exit(main(["doctor"]))
"""


def test_a_library_of_another_version_is_an_error_that_says_how_to_build_again() -> None:
    """Kernels built before an operator's arguments changed: not torch's message at the first call, if any."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OTHER_VERSION]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    for said in (done.stdout, done.stderr):  # of the import, and of a command
        assert "(/built/_C.so) are of another version" in said and "emd, knn changed" in said, done
        assert "emd there is (Tensor x, Tensor y, float eps, int iters) -> (Tensor, Tensor), expected" in said
        assert f"Build again: {_extension.BUILD_COMMAND}" in said
    assert done.returncode == 1 and "Traceback" not in done.stderr
    csrc = (ROOT / "csrc" / "schemas.h").read_text()
    declared = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', csrc)
    texts = {"".join(re.findall(r'"([^"]*)"', words)) for words in declared}
    assert texts == {name + schema for name, schema in _extension.SCHEMAS.items()}


# ------------------------------------------------------------------------ kernels for several CPUs


AVX2_CPU = ["sse4.2", "popcnt", "avx", "avx2", "fma", "bmi", "bmi2"]


def test_the_best_library_that_the_cpu_can_run_is_chosen() -> None:
    both = ["default", "avx2"]
    assert _extension.choose_capability([*AVX2_CPU, "avx512f"], both) == "avx2"
    assert _extension.choose_capability(["sse4.2", "avx", "avx2"], both) == "default"  # AVX2 without FMA
    assert _extension.choose_capability([], ["default"]) == "default"  # not x86-64
    assert _extension.choose_capability(AVX2_CPU, both, forced="default") == "default"
    native = "avx2 fma avx512f"
    assert _extension.choose_capability([*AVX2_CPU, "avx512f"], ["native", *both], native) == "native"


def test_a_library_that_would_end_the_process_is_not_loaded() -> None:
    with pytest.raises(
        _extension.UnsuitableCpuError, match=r"compiled for native, .* lacks avx512f; build again"
    ):
        _extension.choose_capability(AVX2_CPU, ["native"], "avx2 fma avx512f")
    with pytest.raises(_extension.UnsuitableCpuError, match=r"compiled for avx2, .* lacks .*fma"):
        _extension.choose_capability(["avx", "avx2"], ["default", "avx2"], forced="avx2")
    with pytest.raises(ValueError, match=r"'sse'.* default, avx2"):
        _extension.choose_capability(AVX2_CPU, ["default", "avx2"], forced="sse")
    with pytest.raises(ModuleNotFoundError, match="for avx2 was built"):
        _extension.choose_capability(AVX2_CPU, ["default"], forced="avx2")


UNSUITABLE = """
import warnings
import torch
import pointcmt._C as library
library.native = "avx2 telepathy"  # as a build with POINTCMT_ARCH for another CPU says it
from pointcmt import ops
from pointcmt.ops import _extension
from pointcmt.recipes.doctor import trouble

assert isinstance(_extension.load_error(), _extension.UnsuitableCpuError)
assert not _extension.has_cpu_kernels() and _extension.cpu_capability() is None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert ops.knn(torch.rand(1, 9, 3), torch.rand(1, 9, 3), 2)[1].shape == (1, 9, 2)
[found] = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert "this CPU lacks telepathy" in found, found
assert any("this CPU lacks telepathy" in error for error in trouble()[0])
"""

CAPABLE = """
import sys
import torch
from pointcmt import ops
from pointcmt.ops import _extension

random = torch.Generator().manual_seed(0)
results = [_extension.cpu_capability()]
for n in (200, 2500):  # among all points, and through a tree
    cloud, wide = torch.randn(2, n, 3, generator=random), torch.randn(2, n, 70, generator=random)
    chosen = ops.furthest_point_sample(cloud, n // 4)
    results += [chosen, ops.ball_query(0.3, 16, cloud, cloud), *ops.knn(cloud, cloud, 9)]
    results += [*ops.knn(wide[:, :200], wide, 20), *ops.three_nn(cloud, cloud[:, : n // 2])]
    results += [*ops.voxel_subsample(cloud[0], 0.1), ops.gather_points(wide.mT, chosen)]
    results.append(ops.query_and_group(0.3, 8, cloud, cloud[:, :50].contiguous(), wide.mT.contiguous()))
results += ops.emd(torch.rand(2, 300, 3, generator=random), torch.rand(2, 300, 3, generator=random))
torch.save(results, sys.argv[1])
"""


@pytest.mark.skipif(not _extension.has_cpu_kernels(), reason="the kernels are not compiled here")
def test_unsuitable_kernels_are_told_of_and_the_twins_serve() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("POINTCMT_CPU_CAPABILITY", None)
    done = subprocess.run(
        [sys.executable, "-c", UNSUITABLE], env=environment, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(
    _extension.cpu_capability() in (None, "native", "default"), reason="there is one library of kernels here"
)
def test_every_capability_gives_the_same_bits(tmp_path: Path) -> None:
    import torch

    results = {}
    for name in ("default", _extension.cpu_capability()):
        saved = tmp_path / f"{name}.pt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "POINTCMT_CPU_CAPABILITY": str(name)}
        command = [sys.executable, "-c", CAPABLE, str(saved)]
        run = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert run.returncode == 0, run.stderr.decode()
        results[name] = torch.load(saved, weights_only=True)
    (least, *one), (most, *two) = results.values()
    assert least == "default" and most == _extension.cpu_capability()
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(
    _extension.cpu_capability() in (None, "native") or platform.machine() != "x86_64",
    reason="not a portable build for x86-64",
)
def test_what_every_cpu_loads_has_no_avx() -> None:
    for name in ("_C", "_cpu_default"):
        [library] = (ROOT / "pointcmt").glob(f"{name}.*.so")
        code = subprocess.run(
            ["objdump", "-d", str(library)], capture_output=True, text=True, check=True
        ).stdout
        assert "%xmm0" in code and "%ymm" not in code and "%zmm" not in code, name
