"""What is installed, what was compiled, what is wrong, and how to put it right."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch
from rich.table import Table

from pointcmt.adapters import list_adapters
from pointcmt.adapters.registry import adapter_problems
from pointcmt.ops import _extension
from pointcmt.ops.emd import emd, reference_emd
from pointcmt.recipes.build import objective_classes
from pointcmt.recipes.progress import console
from pointcmt.recipes.run import commit, environment
from pointcmt.students.registry import list_students

REQUIRED = (
    "torch", "torchvision", "timm", "numpy", "h5py", "safetensors", "accelerate", "tyro", "rich",
    "matplotlib", "pyyaml", "scipy", "cattrs",
    "scikit-learn", "trimesh", "geomloss",
)  # fmt: skip
OPTIONAL = {
    "pyvista": "rendering meshes (pip install 'pointcmt[mesh]')",
    "tensorboard": "TensorBoard event files (pip install 'pointcmt[tensorboard]')",
    "submitit": "studies on a SLURM cluster (pip install 'pointcmt[cluster]')",
}


@dataclass
class Doctor:
    """Say what is installed, compiled and registered, and what is wrong; exits with 1 where something is."""


def trouble() -> tuple[list[str], list[str]]:
    """Errors, which keep something from working, and remarks, which only make it slower or leave it out."""
    errors: list[str] = []
    remarks: list[str] = []
    for package in REQUIRED:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            errors.append(f"{package} is not installed: pip install {package}")
    for package, use in OPTIONAL.items():
        if util.find_spec(package) is None:
            remarks.append(f"{package} is not installed; it serves {use}")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
        errors.append(f"torch {torch.__version__} is too old: pip install 'torch>=2.6'")
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        errors.append(
            f"torchvision does not load beside torch {torch.__version__} ({error}): install both from one "
            f"source, "
            "pip install --force-reinstall torch torchvision"
        )

    if not _extension.has_cpu_kernels():
        problem = _extension.load_error()
        if isinstance(problem, ModuleNotFoundError):
            remarks.append(
                "the kernels were not compiled; the slower PyTorch twins serve. Build them: "
                f"{_extension.BUILD_COMMAND}"
            )
        elif isinstance(problem, _extension.UnsuitableCpuError):
            errors.append(f"{problem}: {_extension.BUILD_COMMAND}")
        else:
            errors.append(
                f"the compiled kernels do not load ({problem}): they were built for another torch. Build "
                f"them again: "
                f"{_extension.BUILD_COMMAND}"
            )
    elif missing := _extension.missing_ops():
        errors.append(
            f"the compiled kernels are older than the sources and lack {', '.join(missing)}; their "
            f"slow twins serve. Build again: {_extension.BUILD_COMMAND}"
        )
    else:
        points = torch.rand(2, 2, 32, 3, generator=torch.Generator().manual_seed(0))
        difference = (emd(*points)[0] - reference_emd(*points)[0]).abs().max().item()
        if not difference < 1e-2:
            errors.append(
                f"the compiled EMD differs from its twin by {difference:.3g}: the extension is stale. "
                f"Build it again: "
                f"{_extension.BUILD_COMMAND}"
            )
    if torch.cuda.is_available() and not _extension.has_cuda_kernels():
        remarks.append(
            "a GPU is visible, but the CUDA kernels were not compiled; the twins serve on it. Install a "
            "CUDA toolkit "
            f"and build again: FORCE_CUDA=1 {_extension.BUILD_COMMAND}"
        )
    if torch.version.cuda and not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        remarks.append("nvidia-smi is there, but torch sees no GPU: see nvidia-smi, and CUDA_VISIBLE_DEVICES")
    try:
        names = [adapter.name for adapter in list_adapters()]
        if not names:
            errors.append("no adapter is registered: the package is not whole, install it again")
    except Exception as error:
        errors.append(f"the adapters do not load: {error}")
    for name, reason in adapter_problems().items():
        errors.append(
            f"the adapter entry point {name!r} does not load ({reason}): update or remove its package"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd()):
            pass
    except OSError:
        remarks.append(f"{Path.cwd()} cannot be written to; run folders must go elsewhere (--out)")
    return errors, remarks


def doctor(options: Doctor | None = None) -> int:
    """Print what is there and what is wrong; returns the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = environment(device)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("python", there["python"])
    for package, version in there["versions"].items():
        table.add_row(package, version or "not installed")
    for package in OPTIONAL:
        table.add_row(
            package, metadata.version(package) if util.find_spec(package) else "not installed (optional)"
        )
    table.add_row("commit", commit() or "not a checkout")
    table.add_row("device", f"{device}: {there['gpu'] or there['processor']}, {there['threads']} threads")
    table.add_row("torch's CUDA", str(torch.version.cuda or "none"))
    kernels = ", ".join(k for k, ok in there["kernels"].items() if ok) or "none"
    capability = _extension.cpu_capability()
    table.add_row("compiled kernels", f"{kernels} (CPU: {capability})" if capability else kernels)
    table.add_row("adapters", ", ".join(adapter.name for adapter in list_adapters()) or "none")
    table.add_row("students", ", ".join(list_students()))
    table.add_row("objectives", ", ".join(objective_classes()))
    console.print(table)
    errors, remarks = trouble()
    for text in remarks:
        console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)
    for text in errors:
        console.print(f"wrong: {text}", style="bold red", markup=False)
    if not errors:
        console.print("all is well" if not remarks else "nothing is wrong", style="green")
    return 1 if errors else 0
