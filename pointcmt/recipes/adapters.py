"""``pointcmt adapters``: what is registered, and the proof of one adapter on one network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.table import Table

from pointcmt.adapters import adapter_problems, list_adapters
from pointcmt.recipes.check_adapter import check_adapter, imported
from pointcmt.recipes.progress import console, say, warn


@dataclass
class Adapters:
    """List the registered adapters, or prove the one for a network."""

    check: str | None = None
    """module:Class, module:function or path/to/file.py:Class of a network: builds it, finds its adapter,
    proves it on
    real points and trains two steps through it."""
    init: str = ""
    """Arguments of the class, as between the parentheses of the call: "40, normal_channel=False"."""
    adapter: str | None = None
    """Name of the adapter to prove; default: the one that would be chosen."""
    layout: str | None = None
    """How the network takes its clouds (BN3, B3N, pos_x, xyz,f:B3N, ...); default: all are tried."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules or files that register adapters, imported first: mynet_pointcmt."""
    num_points: int = 1024
    """Points per cloud."""
    channels: Literal[3, 6] | None = None
    """3 for coordinates, 6 with normals; default: 3, and 6 where the network does not run on 3."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""


def adapters(options: Adapters) -> int:
    """Run the command; returns the exit code."""
    if options.check is not None:
        report = check_adapter(
            options.check,
            options.init,
            adapter=options.adapter,
            layout=options.layout,
            points=options.num_points,
            channels=options.channels,
            device=None if options.device == "auto" else options.device,
            imports=options.imports,
        )
        say(str(report))
        size = report.report.feature_shape[1]
        say(f"  next     pointcmt train-teacher --feature-dim {size} ...   (an image teacher of this size)")
        return 0
    if options.init or options.adapter or options.layout:
        raise ValueError("--init, --adapter and --layout belong to --check module:Class")
    for name in options.imports:
        imported(name)
    table = Table("adapter", "feature", "local features", "input")
    for adapter in list_adapters():
        where = adapter.feature_module if isinstance(adapter.feature_module, str) else "by structure"
        local = "yes" if adapter.local is not None else "-"
        table.add_row(adapter.name, f"{adapter.feature_from} of {where}", local, adapter.input_layout)
    table.add_row("generic", "input of the last linear layer", "if per point", "any", style="dim")
    console.print(table)
    for name, reason in adapter_problems().items():
        warn(f"the adapter entry point {name!r} does not load: {reason}")
    return 0
