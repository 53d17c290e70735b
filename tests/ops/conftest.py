"""The CUDA kernels, compiled for a CPU: see csrc/cuda.cuh and tests/cuda_on_cpu/."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _build(compiler: str) -> Path:
    """The library with torch.ops.pointcmt_cuda_on_cpu; kept under build/ for as long as nothing changes."""
    # not from torch.utils.cpp_extension: its setuptools will not be imported after distutils
    home = Path(torch.__file__).parent
    include = home / "include"
    sources = [*sorted((ROOT / "csrc").glob("*_cuda.cu")), ROOT / "tests/cuda_on_cpu/library.cpp"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-DPOINTCMT_CUDA_ON_CPU"]
    flags += [f"-I{ROOT / folder}" for folder in ("csrc", "tests")]
    flags += [f"-isystem{path}" for path in (include, include / "torch/csrc/api/include")]
    if sanitizers := os.environ.get("POINTCMT_SANITIZE"):  # stacks apart: fibers switch them
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g1"]
        flags += ["--param=asan-stack=0"] * ("address" in sanitizers)
    content = hashlib.sha256(f"{compiler} {torch.__version__} {flags}".encode())
    for folder in ("csrc", "tests/cuda_on_cpu"):
        for file in sorted((ROOT / folder).iterdir()):
            content.update(file.read_bytes())
    out = ROOT / "build" / "cuda-on-cpu" / content.hexdigest()[:16]
    library = out / "cuda_on_cpu.so"
    if library.exists():
        return library
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not the compiler

    def compile_one(source: Path) -> str:
        target = out / f"{source.stem}.o"
        subprocess.run(
            [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], env=plain, check=True
        )
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = out / f"{os.getpid()}.so"
    link = [flag for flag in flags if flag.startswith("-fsanitize")]
    link += [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", "-o", str(linked), *objects, *link], env=plain, check=True)
    os.replace(linked, library)
    return library


@pytest.fixture(scope="session")
def cuda_on_cpu():
    """``torch.ops.pointcmt_cuda_on_cpu``: every CUDA operator, its kernels run on a CPU thread by thread."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    torch.ops.load_library(str(_build(compiler)))
    return torch.ops.pointcmt_cuda_on_cpu
