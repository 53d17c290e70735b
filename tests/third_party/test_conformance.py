"""Every known codebase, on its real classes: the adapter is true, PointCMT trains, nothing remains."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

from pointcmt.adapters import list_adapters
from pointcmt.recipes.check_adapter import check_network
from tests.third_party.catalogue import CASES, Case, commit_of, openpoints_cases
from tests.third_party.cuda_on_cpu import cuda_on_cpu
from tests.third_party.sandbox import checkout
from tests.third_party.table import Row

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def prove(
    case: Case, folder: Path, paths: tuple[str, ...], commit: str, device: str, rows: list[Row]
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    patched = device == "cpu" and case.hard_codes_cuda
    if patched and torch.cuda.is_available():
        pytest.skip("hard-codes CUDA, and there is a GPU: it runs unpatched there")
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkout(folder, *paths, stubs=case.stubs))
        if patched:
            stack.enter_context(cuda_on_cpu())
        check = check_network(
            case.build, layout=case.layout, points=case.points, channels=case.channels, batch=2, device=device
        )
        again = case.build()
        matching = [adapter.name for adapter in list_adapters() if adapter.describes(again)]
    assert check.report.adapter.name == case.adapter
    assert check.report.adapter.input_layout == case.layout
    assert check.report.conclusive
    # one that knows more of an encoder comes before the one that knows the family
    family = [name for name in matching[1:] if not case.adapter.startswith(f"{name}-")]
    assert matching[0] == case.adapter and not family, "exactly one codebase must claim a class"
    report = check.report
    rows.append(
        Row(
            case.codebase,
            commit[:10],
            case.label,
            case.adapter,
            f"{report.feature_shape[1]}-d, {report.adapter.feature_from} of `{report.feature_path}`",
            check.parameters,
            check.device,
            " (CUDA redirected)" if patched else "",
        )
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.codebase}:{case.label}")
def test_real_class(case, device, repos, rows):
    folder = case.find(repos)
    if folder is None:
        pytest.skip(f"{case.codebase} is not in {repos} (no {case.marker} in any folder there)")
    prove(case, folder, case.paths, commit_of(folder), device, rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", list(openpoints_cases()), ids=lambda case: case.label)
def test_openpoints_from_the_package_index(case, device, rows, tmp_path):
    if importlib.util.find_spec("openpoints") is None:
        pytest.skip("openpoints is not installed: pip install openpoints (a development dependency)")
    version = importlib.metadata.version("openpoints")
    prove(case, tmp_path, (), version, device, rows)
