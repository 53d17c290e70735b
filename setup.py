"""Builds pointcmt._C from csrc/, with the CUDA kernels where they can run, and the libraries of CPU kernels.

On x86-64 the CPU kernels are compiled twice, for any CPU and for those with AVX2, and chosen from when
pointcmt is imported: what is built on one machine runs on another (see pointcmt/ops/_extension.py).

Environment:
    FORCE_CUDA=1           compile the CUDA kernels though no GPU is visible
    FORCE_CUDA=0           never compile them
    POINTCMT_ARCH=native   compile the CPU kernels once, for one CPU (a -march value)
    POINTCMT_SANITIZE=…    compile with these sanitizers (`make sanitize`); their runtime must be preloaded
    POINTCMT_REQUIRE_EXT=1 fail, instead of falling back to the PyTorch twins, when nothing compiles
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def cuda_home() -> str | None:
    """The toolkit's own folder: the one whose include/ holds cuda_runtime.h."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), CUDA_HOME, "/usr/local/cuda"]
    if nvcc:
        guesses.insert(2, str(Path(nvcc).resolve().parents[1]))
        guesses += sorted((str(p) for p in Path(nvcc).resolve().parents[1].glob("cuda-*")), reverse=True)
    for guess in guesses:
        if (
            guess
            and (Path(guess) / "bin/nvcc").exists()
            and (Path(guess) / "include/cuda_runtime.h").exists()
        ):
            return guess
    return None


def want_cuda() -> bool:
    import torch

    forced = os.environ.get("FORCE_CUDA")
    if forced is not None:
        return forced == "1"
    return torch.version.cuda is not None and torch.cuda.is_available() and cuda_home() is not None


def cpu_variants() -> dict[str, list[str]]:
    """What the CPU kernels are compiled for: a name as _extension.py knows it → the compiler's flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if arch := os.environ.get("POINTCMT_ARCH"):
        return {
            "native": [f"-mcpu={arch}" if platform.machine() in ("arm64", "aarch64") else f"-march={arch}"]
        }
    if not x86:
        return {"default": []}
    features = runpy.run_path(str(ROOT / "pointcmt" / "ops" / "_capabilities.py"))["CAPABILITIES"]
    return {name: [f"-m{feature}" for feature in needed] for name, needed in features.items()}


def native_features(flags: list[str]) -> list[str]:
    """The extensions of a CPU that code compiled with these flags may use, as the compiler's macros tell."""
    known = runpy.run_path(str(ROOT / "pointcmt" / "ops" / "_capabilities.py"))["FEATURES"]
    command = [*shlex.split(os.environ.get("CXX", "c++")), *flags, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [name for name in known if f"#define __{name.replace('.', '_').upper()}__ 1" in macros]


def extension() -> tuple[list, dict]:
    try:
        import torch.utils.cpp_extension as cpp
    except ImportError:
        warnings.warn(
            "torch is not importable while building: install it first and build with "
            "--no-build-isolation to get the compiled kernels",
            stacklevel=1,
        )
        return [], {}

    # older torch adds C++17 by itself; math-errno would keep every square root from being vectorised
    flags = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    # a·b + c is two roundings unless the code says fma: kernels then equal their twins bit by bit
    flags.append("-ffp-contract=off")
    link: list[str] = []
    sanitizers = os.environ.get("POINTCMT_SANITIZE", "")
    if sys.platform != "darwin" and "thread" not in sanitizers:
        flags.append("-fopenmp")  # at::parallel_for runs serially in a translation unit without it
        link.append("-fopenmp")
    if sanitizers:
        # the optimiser stays on, or the suite would take hours; vptr needs type information that torch hides
        extra = [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        if "undefined" in sanitizers:
            extra.append("-fsanitize=float-cast-overflow")
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", *extra]
        link += extra

    csrc = ROOT / "csrc"
    sources = ["csrc/bindings.cpp"]
    kernels = ["csrc/cpu_module.cpp", *sorted(str(p.relative_to(ROOT)) for p in csrc.glob("*_cpu.cpp"))]
    compile_args: dict[str, list[str]] = {"cxx": flags}
    kind, include = cpp.CppExtension, [str(csrc)]
    if want_cuda():
        home = cuda_home()
        if home is None:
            raise SystemExit(
                "FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to the folder that "
                "holds bin/nvcc and include/cuda_runtime.h"
            )
        os.environ["CUDA_HOME"] = cpp.CUDA_HOME = home
        kind = cpp.CUDAExtension
        sources += sorted(str(p.relative_to(ROOT)) for p in csrc.glob("*_cuda.cu"))
        compile_args["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]
        # the toolkit's headers first: those of torch's wheels may be of a later version than its nvcc
        include.append(str(Path(home) / "include"))
        # torch's headers include cuBLAS's, which a bare toolkit may lack and torch's wheels bring
        site = Path(sysconfig.get_paths()["purelib"])
        include += [str(p) for p in sorted(site.glob("nvidia/cu*/include"))]
        import torch

        torch_site = Path(torch.__file__).resolve().parents[1]
        include += [str(p) for p in sorted(torch_site.glob("nvidia/cu*/include")) if str(p) not in include]

    class BuildOrFallBack(cpp.BuildExtension):
        """Without a working compiler the package still installs: the PyTorch twins serve."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("POINTCMT_REQUIRE_EXT") == "1":
                    raise
                warnings.warn(
                    f"pointcmt's kernels could not be compiled ({error}); the slower pure-PyTorch twins "
                    "will serve. Install a C++20 compiler and install again.",
                    stacklevel=1,
                )
                self.extensions = []

        def build_extension(self, ext: setuptools.Extension) -> None:
            # the same sources are compiled for several CPUs: each has a folder for its objects
            outer = self.build_temp
            self.build_temp = os.path.join(outer, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = outer

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    variants = cpu_variants()
    if "native" in variants:
        needed = native_features(variants["native"])
        compile_args = {**compile_args, "cxx": [*flags, f'-DPOINTCMT_NATIVE="{" ".join(needed)}"']}
    modules = [
        kind(
            "pointcmt._C",
            sources,
            include_dirs=include,
            extra_compile_args=compile_args,
            extra_link_args=link,
        )
    ]
    modules += [
        cpp.CppExtension(
            f"pointcmt._cpu_{name}",
            kernels,
            include_dirs=[*[str(ROOT / "tests/ops/tsan")] * ("thread" in sanitizers), str(csrc)],
            extra_compile_args={"cxx": [*flags, *extra]},
            extra_link_args=link,
        )
        for name, extra in variants.items()
    ]
    return modules, {"build_ext": BuildOrFallBack}


modules, commands = extension()
setup(
    packages=[*find_packages(include=["pointcmt", "pointcmt.*"]), "pointcmt.adapters"],
    package_dir={"pointcmt": "pointcmt", "pointcmt.adapters": "adapters"},
    ext_modules=modules,
    cmdclass=commands,
)
