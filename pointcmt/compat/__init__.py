"""Stand-ins for the CUDA extensions that point-cloud repositories import and that no longer build.

::

    import pointcmt.compat
    pointcmt.compat.install()          # before the repository's own imports

    from pointnet2_ops import pointnet2_utils   # now backed by pointcmt.ops, on CPU and CUDA

Each stand-in has the names, shapes, dtypes, tie rules and gradients of the package it stands for:

==========================  =========================================================================
name                        who imports it
==========================  =========================================================================
``pointnet2_ops``           PointMLP, PCT, Point-MAE, Point-BERT, erikwijmans/Pointnet2_PyTorch, …
``pointnet2._ext``          the first release of Pointnet2_PyTorch, as in SimpleView and PointCMT
``pointnet2_batch_cuda``    OpenPoints (PointNeXt)
``pointnet2_cuda``          PointRCNN, RIConv++ and others
``_ext``                    Relation-Shape CNN and DensePoint: ``_ext.pointnet2``
``pointops_cuda``           PAConv, RepSurf, Point Transformer, OpenPoints
``pointops2_cuda``          Stratified Transformer
``pointops``                Pointcept
``chamfer``                 Point-MAE, Point-BERT, ACT, ReCon, PointGPT, PointMamba, … on import
``chamfer_distance``        OcCo, learning3d
``emd``, ``emd_module``     MSN, PointCMT and the many that copied their earth mover's distance
``emd_cuda``                Point-MAE's family, OpenPoints
``knn_cuda``                Point-MAE, Point-BERT, PCN and others
``torch_scatter``           OpenPoints, DeepGCNs, torch-points3d, where it is not installed
==========================  =========================================================================

The list follows from a search of what public code imports: ``benchmarks/results/extensions.json``, shown in
docs/adapters.md. A real package that can be imported is left alone unless ``force=True``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

from pointcmt.compat import _cuda_on_cpu

__all__ = ["STAND_INS", "install", "installed", "uninstall"]

_HERE = "pointcmt.compat"
# public name -> {module name to provide: our module}
STAND_INS: dict[str, dict[str, str]] = {
    "pointnet2_ops": {
        "pointnet2_ops": f"{_HERE}.pointnet2_ops",
        "pointnet2_ops._ext": f"{_HERE}.pointnet2_ops._ext",
        "pointnet2_ops._version": f"{_HERE}.pointnet2_ops._version",
        "pointnet2_ops.pointnet2_utils": f"{_HERE}.pointnet2_ops.pointnet2_utils",
        "pointnet2_ops.pointnet2_modules": f"{_HERE}.pointnet2_ops.pointnet2_modules",
    },
    "pointnet2._ext": {"pointnet2._ext": f"{_HERE}.pointnet2_ops._ext"},
    "pointnet2_batch_cuda": {"pointnet2_batch_cuda": f"{_HERE}.pointnet2_batch_cuda"},
    "pointnet2_cuda": {"pointnet2_cuda": f"{_HERE}.pointnet2_batch_cuda"},
    "_ext": {"_ext": f"{_HERE}.rscnn_ext", "_ext.pointnet2": f"{_HERE}.rscnn_ext.pointnet2"},
    "pointops_cuda": {"pointops_cuda": f"{_HERE}.pointops_cuda"},
    "pointops2_cuda": {"pointops2_cuda": f"{_HERE}.pointops2_cuda"},
    "pointops": {"pointops": f"{_HERE}.pointops"},
    "chamfer": {"chamfer": f"{_HERE}.chamfer"},
    "chamfer_distance": {"chamfer_distance": f"{_HERE}.chamfer"},
    "emd": {"emd": f"{_HERE}.emd"},
    "emd_module": {"emd_module": f"{_HERE}.emd"},
    "emd_cuda": {"emd_cuda": f"{_HERE}.emd_cuda"},
    "knn_cuda": {"knn_cuda": f"{_HERE}.knn_cuda"},
    "torch_scatter": {"torch_scatter": f"{_HERE}.torch_scatter"},
}

_replaced: dict[str, ModuleType | None] = {}  # what sys.modules held before; None: nothing


def install(*names: str, force: bool = False, cuda_on_cpu: bool = False) -> list[str]:
    """Makes the stand-ins importable under the names of the packages they stand for.

    Call it before the first import of the code that needs them: a module that already holds a
    reference to the real package keeps it.

    Args:
        names: keys of :data:`STAND_INS`; all of them where none is given.
        force: stand in even for a package that is installed and works.
        cuda_on_cpu: where there is no GPU, give CPU tensors to code that asks for CUDA by name
            (``.cuda()``, ``device="cuda"``, ``torch.cuda.FloatTensor``, …), until :func:`uninstall`.

    Returns:
        The names that are ours now, in the order of :data:`STAND_INS`.

    Raises:
        ValueError: a name that has no stand-in.
    """
    for name in _checked(names):
        if name in installed() or (not force and _works(name)):
            continue
        ours = {alias: importlib.import_module(path) for alias, path in STAND_INS[name].items()}
        for alias, module in ours.items():
            _replaced.setdefault(alias, sys.modules.get(alias))
            sys.modules[alias] = module
    if cuda_on_cpu:
        _cuda_on_cpu.turn_on()
    return [name for name in _checked(names) if name in installed()]


def uninstall(*names: str) -> None:
    """Takes the stand-ins away again; undoes :func:`install`.

    Where no name is given, all of them, and the redirect of CUDA with them.

    Code that imported them keeps working: only later imports find the real package, or none.

    Raises:
        ValueError: a name that has no stand-in.
    """
    for name in _checked(names):
        for alias in STAND_INS[name]:
            if alias not in _replaced:
                continue
            before = _replaced.pop(alias)
            if before is None:
                sys.modules.pop(alias, None)
            else:
                sys.modules[alias] = before
    if not names:
        _cuda_on_cpu.turn_off()


def installed() -> list[str]:
    """The names that our stand-ins answer to now."""
    return [name for name, aliases in STAND_INS.items() if all(alias in _replaced for alias in aliases)]


def _checked(names: Iterable[str]) -> list[str]:
    unknown = [name for name in names if name not in STAND_INS]
    if unknown:
        raise ValueError(f"no stand-in for {', '.join(unknown)}; there are: {', '.join(STAND_INS)}")
    wanted = set(names) or set(STAND_INS)
    return [name for name in STAND_INS if name in wanted]


def _works(name: str) -> bool:
    """Whether the real package can be imported, found out without starting a build of it."""
    if name in sys.modules:
        return True
    if name == "_ext":  # a cffi build for a torch that had torch.utils.ffi
        return importlib.util.find_spec("torch.utils.ffi") is not None and _found("_ext") is not None
    if name == "pointnet2._ext":
        parent = _found("pointnet2")
        return parent is not None and _compiled(parent, "_ext") and _imports(name)
    spec = _found(name)
    if spec is None:
        return False
    if name == "emd_module":  # plain Python that imports the compiled `emd`
        return _works("emd")
    if name == "chamfer_distance" and not _compiled(spec, "cd"):
        return False  # as with pointnet2_ops: it compiles when it is imported
    if name == "pointnet2_ops" and not _compiled(spec, "_ext"):
        return False  # importing it would start compiling for architectures that CUDA has dropped
    return _imports(name)


def _found(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a top-level name; None for a bare folder (MSN keeps its sources in one named ``emd``)."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else spec


def _compiled(package: importlib.machinery.ModuleSpec, name: str) -> bool:
    return importlib.machinery.PathFinder.find_spec(name, package.submodule_search_locations) is not None


def _imports(name: str) -> bool:
    before = set(sys.modules)
    try:
        importlib.import_module(name)
    except (
        Exception
    ):  # a binary of another torch fails with OSError or ImportError, a JIT build with anything
        for half_imported in set(sys.modules) - before:
            if half_imported == name or half_imported.startswith(name + "."):
                del sys.modules[half_imported]
        return False
    return True
