"""Public classifiers, their real classes: the adapter is true, PointCMT trains, nothing remains."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

from pointcmt.adapters import AdapterError, list_adapters
from pointcmt.recipes.check_adapter import check_network
from tests.third_party.catalogue import CASES, Case, commit_of, openpoints_cases
from tests.third_party.sandbox import checkout
from tests.third_party.table import Row
from tests.third_party.unprepared import UNPREPARED, geometric_cases, torch_pointcloud_cases

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def local_features(local) -> str:
    if local is None:
        return ""
    order = "" if local.follow_order else ", in the order of the points"
    return f"{local.shape[1]} of {local.shape[2]}-d{order}"


def prove(
    case: Case, folder: Path, paths: tuple[str, ...], commit: str, device: str, rows: list[Row]
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    redirected = device == "cpu" and case.hard_codes_cuda
    if redirected and torch.cuda.is_available():
        pytest.skip("hard-codes CUDA, and there is a GPU: it runs unpatched there")
    common = {
        "codebase": case.codebase,
        "commit": commit[:10],
        "label": case.label,
        "device": device,
        "redirected": redirected,
    }
    with checkout(folder, *paths, stubs=case.stubs, cuda_on_cpu=redirected):
        if case.refused:
            network = case.build()
            with pytest.raises(AdapterError) as refusal:
                check_network(case.build, points=case.points, batch=2, device=device)
            assert case.refused in str(refusal.value)
            rows.append(
                Row(adapter="", feature="", layout="", channels=0, local="", help="", failure=case.note,
                    parameters=sum(p.numel() for p in network.parameters()), **common)
            )  # fmt: skip
            return
        check = check_network(case.build, adapter=case.own, points=case.points, batch=2, device=device)
        again = case.build()
        matching = [adapter.name for adapter in list_adapters() if adapter.describes(again)]
    report = check.report
    assert report.conclusive
    if not case.unprepared:
        assert report.adapter.name == case.adapter
        assert report.adapter.input_layout == case.layout and check.channels == case.channels
        # one that knows more of an encoder comes before the one that knows the family
        family = [name for name in matching[1:] if not case.adapter.startswith(f"{name}-")]
        assert matching[0] == case.adapter and not family, "exactly one codebase must claim a class"
    rows.append(
        Row(
            adapter=report.adapter.name,
            feature=f"{report.feature_shape[1]}-d, {report.adapter.feature_from} of `{report.feature_path}`",
            layout=report.adapter.input_layout,
            channels=check.channels,
            local=local_features(check.local),
            help=case.note if case.own is not None else "",
            failure="",
            parameters=check.parameters,
            **common,
        )
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES + UNPREPARED, ids=lambda case: f"{case.codebase}:{case.label}")
def test_real_class(case, device, repos, rows):
    folder = case.find(repos)
    if folder is None:
        pytest.skip(f"{case.codebase} is not in {repos} (no {case.marker} in any folder there)")
    missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{case.codebase} needs {', '.join(missing)}, which is not installed")
    prove(case, folder, case.paths, commit_of(folder), device, rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", list(openpoints_cases()), ids=lambda case: case.label)
def test_openpoints_from_the_package_index(case, device, rows, tmp_path):
    if importlib.util.find_spec("openpoints") is None:
        pytest.skip("openpoints is not installed: pip install openpoints (a development dependency)")
    prove(case, tmp_path, (), importlib.metadata.version("openpoints"), device, rows)


@pytest.mark.parametrize("case", list(geometric_cases()), ids=lambda case: case.label)
def test_pytorch_geometric_from_the_package_index(case, rows, tmp_path):
    if importlib.util.find_spec("torch_geometric") is None:
        pytest.skip("torch_geometric is not installed: pip install torch_geometric")
    prove(case, tmp_path, (), importlib.metadata.version("torch_geometric"), "cpu", rows)


@pytest.mark.parametrize("case", list(torch_pointcloud_cases()), ids=lambda case: case.label)
def test_torch_pointcloud_from_the_package_index(case, rows, tmp_path):
    if importlib.util.find_spec("torch_pointcloud") is None:
        pytest.skip("torch_pointcloud is not installed: pip install torch-pointcloud")
    prove(case, tmp_path, (), importlib.metadata.version("torch-pointcloud"), "cpu", rows)
