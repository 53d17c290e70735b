"""Proves an adapter on a network: that it tells the truth, that PointCMT trains through it, that nothing
stays.

``pointcmt adapters --check module:Class`` runs this, and so does the project's own suite over third-party
codebases.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt import compat
from pointcmt.adapters import INPUT_LAYOUTS, Adapter, AdapterError, find_adapter, verify_adapter
from pointcmt.adapters.proof import AdapterReport
from pointcmt.data import SyntheticShapes
from pointcmt.methods import PointCMT

GENERATED_POINTS = 64  # of the small generator that stands for a trained one
LEARNING_RATE = 1e-3


class CheckFailed(RuntimeError):
    """The adapter is true, but training under PointCMT through it did not do what it must."""


@dataclass(frozen=True)
class AdapterCheck:
    """What :func:`check_adapter` found; only complete checks are returned.

    Attributes:
        network: class name of the network.
        report: the adapter's proof.
        losses: total loss of each of the two training steps.
        objectives: value of each objective, unweighted, at the second step.
        parameters: number of parameters of the network.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: wall time of the whole check.
    """

    network: str
    report: AdapterReport
    losses: tuple[float, float]
    objectives: dict[str, float]
    parameters: int
    device: str
    seconds: float

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.objectives.items())
        first, second = (f"{loss:.4g}" for loss in self.losses)
        return "\n".join(
            [
                f"{self.network} ({self.parameters / 1e6:.2f} M parameters, {self.device})",
                f"  proved   {self.report}",
                f"  trained  two steps under PointCMT: loss {first}, then {second} ({values})",
                "  left     state_dict, hooks and attributes as before; eval output bit-equal to an "
                "untouched twin's",
            ]
        )


def check_adapter(
    spec: str,
    init: str | Sequence[str] | None = None,
    *,
    adapter: Adapter | str | None = None,
    layout: str | None = None,
    points: int = 1024,
    channels: int = 3,
    batch: int = 4,
    device: str | torch.device | None = None,
    seed: int = 0,
    stand_ins: bool = True,
) -> AdapterCheck:
    """Builds the network that ``spec`` names and proves its adapter; see :func:`check_network`.

    Args:
        spec: ``module:Class``, ``module:function`` or ``path/to/file.py:Class``; the working directory (or
            the file's folder) is put on ``sys.path`` while it is imported and built.
        init: its arguments, as written between the parentheses of the call: ``"40, normal_channel=False"``.
            The names ``torch``, ``nn`` and ``SimpleNamespace`` can be used.
        stand_ins: let :mod:`pointcmt.compat` stand in for extensions that are not installed.
        adapter, layout, points, channels, batch, device, seed: as in :func:`check_network`.

    Raises:
        ValueError: ``spec`` or ``init`` cannot be understood, or what it names is not there.
        AdapterError, CheckFailed: as in :func:`check_network`.
    """
    target, _, attribute = spec.rpartition(":")
    if not target or not attribute:
        raise ValueError(f"cannot read {spec!r}; expected module:Class, for example models.pointmlp:pointMLP")
    arguments = init if isinstance(init, str) else ", ".join(init or ())
    path_before, installed_before = list(sys.path), compat.installed()
    sys.path.insert(0, str(Path(target).resolve().parent if target.endswith(".py") else Path.cwd()))
    if stand_ins:
        compat.install()
    try:
        factory = getattr(_imported(target), attribute, None)
        if factory is None:
            raise ValueError(f"{target} has no {attribute!r}")
        return check_network(
            lambda: _called(factory, arguments, spec),
            adapter=adapter,
            layout=layout,
            points=points,
            channels=channels,
            batch=batch,
            device=device,
            seed=seed,
        )
    finally:
        sys.path[:] = path_before
        if stand_ins and not installed_before:
            compat.uninstall()


def check_network(
    build: Callable[[], nn.Module],
    *,
    adapter: Adapter | str | None = None,
    layout: str | None = None,
    points: int = 1024,
    channels: int = 3,
    batch: int = 4,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> AdapterCheck:
    """Proves everything that PointCMT promises of a network, on embedded shapes:

    1. it runs forward and backward;
    2. its adapter is true: ``classify(feature)`` is its output, in eval mode;
    3. it trains two steps under :class:`pointcmt.PointCMT`: finite losses that change, with gradients from
       the image side that reach layers in front of its classifier;
    4. afterwards nothing remains: same ``state_dict`` keys, hooks and attributes, and eval output bit-equal
       to that of a twin that was never entered and has the same weights.

    Args:
        build: makes the network; called twice.
        adapter: adapter or name; None finds one.
        layout: how the network takes its clouds, a key of ``pointcmt.adapters.INPUT_LAYOUTS``; None: the
            adapter's ``input_layout``.
        points: points per cloud.
        channels: 3, or 6 for coordinates and unit normals.
        batch: clouds, at least 2 because of batch normalisation.
        device: None: CUDA where there is a GPU, else the CPU.
        seed: of weights, clouds and everything else drawn.

    Raises:
        ValueError: an argument out of range, or ``build`` does not make a network.
        AdapterError: no adapter fits, or it is not true.
        CheckFailed: any other point of the list.
    """
    start = time.perf_counter()
    if batch < 2 or channels not in (3, 6):
        raise ValueError(f"batch is {batch} and channels {channels}; expected batch ≥ 2 and 3 or 6 channels")
    if layout is not None and layout not in INPUT_LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(INPUT_LAYOUTS)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(seed)
    network, twin = build(), build()
    if not isinstance(network, nn.Module):
        raise ValueError(f"the factory makes a {type(network).__name__}; expected a torch.nn.Module")
    network, twin = network.to(where), twin.to(where)
    clouds = _clouds(points, channels, batch, seed).to(where)
    if layout is None:
        found = find_adapter(network, adapter)
        inputs: Any = found.arrange(clouds)
    else:
        inputs = INPUT_LAYOUTS[layout](clouds)
    report = verify_adapter(network, inputs, adapter)
    chosen = report.adapter
    if report.logits_shape is None:
        raise AdapterError(
            f"adapter {chosen.name!r} has no classify, so that only the features' shapes can be checked: "
            f"{report}"
        )
    feature_dim, classes = report.feature_shape[1], report.logits_shape[1]
    labels = torch.arange(batch, device=where) % classes

    network.train()
    F.cross_entropy(chosen.logits(network(inputs)), labels).backward()
    _require(_any_gradient(network), "no parameter of the network got a gradient from its own output")
    network.zero_grad(set_to_none=True)

    keys, marks = list(network.state_dict()), _marks(network)
    weights = {name: tensor.clone() for name, tensor in network.named_parameters()}
    losses, objectives = _two_steps(network, chosen, inputs, labels, feature_dim, classes)
    network.zero_grad(set_to_none=True)
    _require(losses[0] != losses[1], f"two training steps gave the same loss, {losses[0]}")
    moved = any(not torch.equal(tensor, weights[name]) for name, tensor in network.named_parameters())
    _require(moved, "two training steps changed no parameter")

    _require(list(network.state_dict()) == keys, "the keys of state_dict are not what they were before")
    _require(_marks(network) == marks, "a hook or an attribute remains on the network")
    twin.load_state_dict(network.state_dict())
    _require(
        torch.equal(_evaluated(network, chosen, inputs, seed), _evaluated(twin, chosen, inputs, seed)),
        "the eval output is not bit-equal to that of an untouched twin with the same weights",
    )
    return AdapterCheck(
        network=type(network).__name__,
        report=report,
        losses=losses,
        objectives=objectives,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        device=where.type,
        seconds=time.perf_counter() - start,
    )


def _two_steps(
    network: nn.Module, adapter: Adapter, inputs: Any, labels: Tensor, feature_dim: int, classes: int
) -> tuple[tuple[float, float], dict[str, float]]:
    where = labels.device
    generator = nn.Sequential(
        nn.Linear(feature_dim, 3 * GENERATED_POINTS, bias=False), nn.Unflatten(1, (GENERATED_POINTS, 3))
    ).to(where)
    image_features = torch.rand(len(labels), feature_dim, device=where)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    with PointCMT(_Teacher(feature_dim, classes), network, generator=generator, adapter=adapter) as cmt:
        for step in range(2):
            task = F.cross_entropy(adapter.logits(network(inputs)), labels)
            taught = cmt.loss(image_features=image_features)
            if step == 0:
                _require_reach(network, adapter, taught, image_features)
            loss = task + taught
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            _require(bool(torch.isfinite(loss)), f"the loss of step {step + 1} is {losses[-1]}")
        objectives = cmt.losses
    for name, value in objectives.items():
        _require(value > 0, f"the objective {name} is {value}; two different features must differ")
    return (losses[0], losses[1]), objectives


def _require_reach(network: nn.Module, adapter: Adapter, taught: Tensor, feature: Tensor) -> None:
    """The image side's gradient must reach layers that the classifier does not have."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in network.modules()]
    for module, _ in modes:  # batch statistics of this one pass must not be kept
        module.training = False
    try:
        assert adapter.classify is not None
        score = adapter.classify(network, feature).sum()
        own = torch.autograd.grad(score, parameters, allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
    reached = torch.autograd.grad(taught, parameters, retain_graph=True, allow_unused=True)
    _require(
        any(
            grad is not None and bool(grad.any())
            for grad, in_classifier in zip(reached, own, strict=True)
            if in_classifier is None
        ),
        "the objectives' gradient reaches no layer in front of the classifier: the feature is cut off",
    )


class _Teacher(nn.Module):
    """Stands for an image teacher whose features were computed beforehand: it only classifies them."""

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.classifier = nn.Linear(feature_dim, num_classes)

    def classify(self, feature: Tensor) -> Tensor:
        return self.classifier(feature)


def _clouds(points: int, channels: int, batch: int, seed: int) -> Tensor:
    """float32 [B, N, channels]: embedded shapes spread over the classes; normals are random unit vectors."""
    shapes = SyntheticShapes("test", num_points=points, per_class=-(-batch // 16), seed=seed)
    chosen = torch.linspace(0, len(shapes) - 1, batch).long()
    clouds = torch.stack([torch.as_tensor(shapes[int(i)][0]) for i in chosen])
    if channels == 6:
        normals = torch.randn(clouds.shape, generator=torch.Generator().manual_seed(seed))
        clouds = torch.cat([clouds, F.normalize(normals, dim=-1)], dim=-1)
    return clouds


def _evaluated(network: nn.Module, adapter: Adapter, inputs: Any, seed: int) -> Tensor:
    network.eval()
    torch.manual_seed(seed)  # some networks sample points at random, also when they are evaluated
    with torch.no_grad():
        return adapter.logits(network(inputs))


def _any_gradient(network: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def _marks(network: nn.Module) -> dict[str, Any]:
    """Of every submodule: its class, its attributes' names and how many hooks of each kind it has."""
    return {
        path: (
            type(module),
            sorted(vars(module)),
            {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value},
        )
        for path, module in network.named_modules()
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def _imported(target: str) -> ModuleType:
    if not target.endswith(".py"):
        try:
            return importlib.import_module(target)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"cannot import {target!r} from {Path.cwd()}: {error}. Run it from the codebase's own "
                "folder, or give path/to/file.py:Class"
            ) from error
    path = Path(target)
    if not path.is_file():
        raise ValueError(f"there is no file {path.resolve()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the code may import itself by name
    spec.loader.exec_module(module)
    return module


def _called(factory: Callable[..., Any], arguments: str, spec: str) -> Any:
    names = {"torch": torch, "nn": nn, "SimpleNamespace": SimpleNamespace, "_factory": factory}
    try:
        return eval(f"_factory({arguments})", names)  # the user's own command line
    except (TypeError, SyntaxError, NameError) as error:
        raise ValueError(
            f"{spec} cannot be built as {spec.rpartition(':')[2]}({arguments}): {error}. Give its arguments "
            "by init (--init '40, normal_channel=False')"
        ) from error
