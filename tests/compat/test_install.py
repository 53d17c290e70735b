"""Stand-ins take the place of what cannot be imported, and of nothing else, and go away again."""

from __future__ import annotations

import importlib
import sys

import pytest

from pointcmt import compat


@pytest.fixture(autouse=True)
def clean():
    before = dict(sys.modules)
    yield
    compat.uninstall()
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in {"pointnet2_ops", "pointnet2", "emd", "emd_module", "knn_cuda", "_ext"}:
            del sys.modules[name]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder at the front of ``sys.path``."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def test_everything_can_be_imported_by_its_own_name():
    assert compat.install() == list(compat.STAND_INS) == compat.installed()
    from pointnet2_ops import pointnet2_modules, pointnet2_utils

    assert pointnet2_utils.furthest_point_sample is not None
    assert pointnet2_modules.PointnetSAModuleMSG is not None
    import pointnet2_ops.pointnet2_utils as utils

    assert utils is pointnet2_utils
    import emd
    import pointnet2_batch_cuda
    from _ext import pointnet2
    from emd_module import emdModule
    from knn_cuda import KNN

    assert callable(pointnet2.ball_query_wrapper) and callable(pointnet2_batch_cuda.ball_query_wrapper)
    assert emd.emdModule is emdModule and callable(emd.forward) and KNN(k=2).k == 2


def test_uninstall_leaves_nothing_behind():
    before = dict(sys.modules)
    compat.install()
    compat.uninstall()
    assert compat.installed() == []
    changed = {
        name for name in set(before) | set(sys.modules) if before.get(name) is not sys.modules.get(name)
    }
    assert {name for name in changed if not name.startswith("pointcmt.")} == set()
    with pytest.raises(ImportError):
        import pointnet2_ops  # noqa: F401


def test_only_what_is_asked_for():
    assert compat.install("emd") == ["emd"]
    assert "pointnet2_ops" not in sys.modules
    with pytest.raises(ValueError, match="no stand-in for spconv; there are: pointnet2_ops"):
        compat.install("spconv")


def test_installing_twice_still_uninstalls():
    compat.install("emd")
    compat.install("emd", force=True)
    compat.uninstall("emd")
    assert "emd" not in sys.modules


def test_a_real_package_is_left_alone(site):
    write(site / "knn_cuda.py", "REAL = True")
    assert "knn_cuda" not in compat.install()
    import knn_cuda

    assert knn_cuda.REAL


def test_a_real_package_is_replaced_when_asked_and_comes_back(site):
    write(site / "knn_cuda.py", "REAL = True")
    import knn_cuda as real

    assert compat.install("knn_cuda", force=True) == ["knn_cuda"]
    import knn_cuda

    assert not hasattr(knn_cuda, "REAL")
    compat.uninstall("knn_cuda")
    assert sys.modules["knn_cuda"] is real


def test_a_package_without_its_compiled_part_is_replaced_and_not_built(site):
    write(site / "pointnet2_ops/__init__.py", "raise RuntimeError('importing me starts a build')")
    assert compat.install("pointnet2_ops") == ["pointnet2_ops"]


def test_a_package_whose_binary_does_not_load_is_replaced(site):
    write(site / "pointnet2_ops/__init__.py", "from pointnet2_ops import _ext")
    write(site / "pointnet2_ops/_ext.py", "raise ImportError('undefined symbol')")
    assert compat.install("pointnet2_ops") == ["pointnet2_ops"]
    from pointnet2_ops import pointnet2_utils

    assert pointnet2_utils.__name__.startswith("pointcmt.compat")


def test_a_working_package_with_its_compiled_part_is_left_alone(site):
    write(site / "pointnet2_ops/__init__.py", "from pointnet2_ops import _ext")
    write(site / "pointnet2_ops/_ext.py", "")
    assert compat.install("pointnet2_ops") == []


def test_a_folder_of_sources_is_not_a_package(site):
    write(site / "emd/emd_cuda.cu")  # MSN keeps the sources of its extension in a folder called emd
    assert compat.install("emd") == ["emd"]
    import emd

    assert hasattr(emd, "emdModule")


def test_the_repositorys_own_ffi_package_cannot_work_and_is_replaced(site):
    write(site / "_ext/__init__.py")
    write(site / "_ext/pointnet2/__init__.py", "from torch.utils.ffi import _wrap_function")
    assert compat.install("_ext") == ["_ext"]
    from _ext import pointnet2

    assert callable(pointnet2.furthest_point_sampling_wrapper)


def test_the_extension_of_the_first_generation_is_found_inside_the_repositorys_package(site):
    write(site / "pointnet2/__init__.py")
    write(site / "pointnet2/utils.py", "import pointnet2._ext as _ext")
    compat.install("pointnet2._ext")
    from pointnet2.utils import _ext

    assert callable(_ext.ball_query)
