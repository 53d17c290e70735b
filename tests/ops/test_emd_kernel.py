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

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """run(x, y, ...) -> distance, assignment, (rounds, bids, completed, bound_met)."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emd") / "emd_kernel.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{TESTS}", f"-I{CSRC}"]
    source = TESTS / "cuda_on_cpu" / "emd_kernel.cpp"
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    function = ctypes.CDLL(str(library)).emd_kernel_on_cpu

    def run(x, y, *, eps=0.002, max_rounds=10_000, initial=None, threads=64, seed=0):
        x, y = (np.ascontiguousarray(a, dtype=np.float64) for a in (x, y))
        n = len(x)
        distance, statistics = np.zeros(1), np.zeros(4, dtype=np.int64)
        assignment = np.full(n, -7, dtype=np.int64)

        def pointer(a):
            return None if a is None else ctypes.c_void_p(a.ctypes.data)

        function(
            pointer(x), pointer(y), pointer(initial), ctypes.c_int(n), ctypes.c_float(eps),
            ctypes.c_int64(max_rounds), ctypes.c_int(threads), ctypes.c_uint(seed),
            pointer(distance), pointer(assignment), pointer(statistics),
        )  # fmt: skip
        return distance[0], assignment, statistics

    return run


def check(x, y, distance, assignment):
    assert sorted(assignment) == list(range(len(x)))
    np.testing.assert_allclose(distance, np.linalg.norm(x - y[assignment], axis=1).mean(), rtol=1e-9)


def optimum(x, y):
    cost = cdist(x, y)
    return cost[linear_sum_assignment(cost)].mean()


CLOUDS = {
    "random": lambda r, n: r.random((n, 3)),
    "clusters": lambda r, n: r.integers(0, 3, (n, 3)) + 1e-3 * r.random((n, 3)),
    "duplicates": lambda r, n: r.integers(0, 2, (n, 3)) * 1.0,
    "collinear": lambda r, n: r.random((n, 1)) * np.array([1.0, 2.0, -0.5]),
    "identical": lambda r, n: np.ones((n, 3)) * 0.3,
    "huge": lambda r, n: r.standard_normal((n, 3)) * 1e200,
    "tiny": lambda r, n: r.standard_normal((n, 3)) * 1e-200,
    "far": lambda r, n: r.random((n, 3)) + r.integers(0, 2) * 2.0**20,
}


@pytest.mark.parametrize("kind", CLOUDS)
@pytest.mark.parametrize(("n", "threads"), [(1, 64), (2, 64), (33, 64), (70, 128)])
def test_near_the_optimum(kernel, kind, n, threads):
    random = np.random.default_rng([n, threads])
    x, y = CLOUDS[kind](random, n), CLOUDS[kind](random, n)
    distance, assignment, statistics = kernel(x, y, threads=threads, seed=n)
    unit = np.abs(np.concatenate([x, y])).max() or 1.0  # so that the checks themselves do not overflow
    x, y, distance = x / unit, y / unit, distance / unit
    check(x, y, distance, assignment)
    scale = max(np.ptp(x, axis=0).max(), np.ptp(y, axis=0).max())
    scale = max(scale, 1e-4 * np.ptp(np.concatenate([x, y]), axis=0).max())
    assert distance <= optimum(x, y) + 0.002 * scale * 1.01
    assert statistics[3] == 0 and statistics[2] == 0 and statistics[0] <= statistics[1]


@pytest.mark.parametrize("threads", [64, 128, 512])
def test_the_order_of_threads_does_not_matter(kernel, threads):
    random = np.random.default_rng(5)
    x, y = random.random((2, 100, 3))
    results = [kernel(x, y, threads=threads, seed=seed) for seed in range(3)]
    results.append(kernel(x, y, threads=64, seed=9))
    for distance, assignment, statistics in results[1:]:
        np.testing.assert_allclose(distance, results[0][0], rtol=1e-14)
        np.testing.assert_array_equal(assignment, results[0][1])
        np.testing.assert_array_equal(statistics, results[0][2])


@pytest.mark.parametrize("kind", ["random", "identical", "clusters"])
@pytest.mark.parametrize("max_rounds", [0, 1, 3, 12])
def test_the_bound_ends_in_a_permutation(kernel, kind, max_rounds):
    random = np.random.default_rng(max_rounds)
    x, y = CLOUDS[kind](random, 130), CLOUDS["random"](random, 130)
    distance, assignment, statistics = kernel(x, y, max_rounds=max_rounds)
    check(x, y, distance, assignment)
    assert statistics[0] == max_rounds and statistics[3] == 1
    if max_rounds == 0:
        assert statistics[2] == 130


def test_warm_start(kernel):
    random = np.random.default_rng(2)
    y = random.random((200, 3))
    x = y + 0.01 * random.standard_normal((200, 3))
    _, _, cold = kernel(x, y)
    identity = np.arange(200)
    warm_distance, assignment, warm = kernel(x, y, initial=identity)
    check(x, y, warm_distance, assignment)
    assert warm_distance <= np.linalg.norm(x - y, axis=1).mean()
    assert warm[1] < cold[1] / 2
    best = optimum(x, y)
    assert warm_distance <= best + 0.002 * np.ptp(x, axis=0).max()
    # entries that say nothing, or make no sense, count as unknown
    broken = identity.copy()
    broken[:50], broken[60], broken[61], broken[62] = -1, 200, 5, -9
    broken[70] = broken[71]
    distance, assignment, _ = kernel(x, y, initial=broken)
    check(x, y, distance, assignment)
    assert distance <= best + 0.002 * np.ptp(x, axis=0).max()
    # a start that is the optimum is kept, and one that is poor is left
    cost = cdist(x, y)
    _, optimal = linear_sum_assignment(cost)
    optimal = optimal.astype(np.int64)
    assert kernel(x, y, initial=optimal)[0] <= best * (1 + 1e-12)
    assert kernel(x, y, initial=np.roll(identity, 100))[0] <= best + 0.002 * np.ptp(x, axis=0).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_give_nan(kernel, bad):
    x, y = np.random.default_rng(0).random((2, 40, 3))
    y[7, 1] = bad
    distance, assignment, _ = kernel(x, y)
    assert np.isnan(distance) and sorted(assignment) == list(range(40))
