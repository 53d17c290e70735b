"""The logic of the CUDA EMD, run on the CPU: a thread block as fibers, scheduled in random order."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks.exhaust import KINDS

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """run(x, y, ...) -> distance, bound, assignment, (rounds, rows, completed, bound_met, sweeps)."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emd") / "emd_kernel.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{TESTS}", f"-I{CSRC}"]
    source = TESTS / "cuda_on_cpu" / "emd_kernel.cpp"
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    function = ctypes.CDLL(str(library)).emd_kernel_on_cpu

    def run(x, y, *, tolerance=0.005, max_rounds=1000, threads=64, seed=0):
        x, y = (np.ascontiguousarray(a, dtype=np.float64) for a in (x, y))
        n = len(x)
        distance, bound, statistics = np.zeros(1), np.zeros(1), np.zeros(5, dtype=np.int64)
        assignment = np.full(n, -7, dtype=np.int64)

        def pointer(a):
            return ctypes.c_void_p(a.ctypes.data)

        function(
            pointer(x), pointer(y), ctypes.c_int(n), ctypes.c_double(tolerance),
            ctypes.c_int64(max_rounds * n), ctypes.c_int(threads), ctypes.c_uint(seed),
            pointer(distance), pointer(bound), pointer(assignment), pointer(statistics),
        )  # fmt: skip
        return distance[0], bound[0], assignment, statistics

    return run


def check(x, y, distance, assignment):
    assert sorted(assignment) == list(range(len(x)))
    np.testing.assert_allclose(distance, np.linalg.norm(x - y[assignment], axis=1).mean(), rtol=1e-9)


def optimum(x, y):
    cost = cdist(x, y)
    return cost[linear_sum_assignment(cost)].mean()


# what float32 prices cannot tell apart: clouds that lie within a millionth of their size of each other
UNRESOLVED = {"same cloud, noisy"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "threads"), [(1, 64), (2, 64), (33, 64), (70, 128)])
def test_near_the_optimum_with_a_certificate(kernel, kind, n, threads):
    x, y = KINDS[kind](np.random.default_rng([n, threads]), n)
    best = optimum(x, y)
    distance, bound, assignment, statistics = kernel(x, y, threads=threads, seed=n)
    check(x, y, distance, assignment)
    assert bound <= best * (1 + 1e-12) and distance <= best / (1 - 0.005) + 1e-7
    assert distance - bound <= 0.005 * distance + (1e-6 if kind in UNRESOLVED else 1e-12)
    assert statistics[3] == 0 and statistics[2] == 0 and statistics[0] <= 100


@pytest.mark.parametrize("unit", [1e200, 1e-200])
def test_any_unit(kernel, unit):
    x, y = np.random.default_rng(3).standard_normal((2, 50, 3))
    distance, bound, assignment, _ = kernel(x * unit, y * unit)
    check(x, y, distance / unit, assignment)
    assert bound / unit <= optimum(x, y) and distance - bound <= 0.005 * distance


@pytest.mark.parametrize("kind", ["uniform", "far clusters, unequal", "collinear"])
@pytest.mark.parametrize("threads", [64, 256])
def test_the_order_of_threads_does_not_matter(kernel, kind, threads):
    x, y = KINDS[kind](np.random.default_rng(5), 100)
    first, *others = (kernel(x, y, threads=threads, seed=seed) for seed in range(3))
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", ["uniform", "all equal", "lattice"])
@pytest.mark.parametrize("max_rounds", [0, 1, 3])
def test_the_bound_ends_in_a_permutation(kernel, kind, max_rounds):
    random = np.random.default_rng(max_rounds)
    x, y = KINDS[kind](random, 130)[0], KINDS["uniform"](random, 130)[1]
    distance, bound, assignment, statistics = kernel(x, y, max_rounds=max_rounds)
    check(x, y, distance, assignment)
    assert bound <= optimum(x, y)
    assert max_rounds <= statistics[0] <= max_rounds + 3 and statistics[3] == 1
    if max_rounds == 0:
        assert statistics[2] == 130


def test_a_war_of_bids_is_ended_by_sweeps(kernel):
    x, y = KINDS["collinear"](np.random.default_rng(1), 150)
    statistics = kernel(x, y, tolerance=0.001)[3]
    assert statistics[4] > 0 and statistics[0] < 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_give_nan(kernel, bad):
    x, y = np.random.default_rng(0).random((2, 40, 3))
    y[7, 1] = bad
    distance, bound, assignment, _ = kernel(x, y)
    assert np.isnan(distance) and np.isnan(bound) and sorted(assignment) == list(range(40))
