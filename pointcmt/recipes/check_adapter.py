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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcmt import compat
from pointcmt.adapters import Adapter, fit_adapter
from pointcmt.adapters._untouched import quiet_evaluation
from pointcmt.adapters.proof import AdapterReport, NoLayout, observe
from pointcmt.data import SyntheticShapes
from pointcmt.methods import PointCMT

GENERATED_POINTS = 64  # of the small generator that stands for a trained one
LEARNING_RATE = 1e-3


class CheckFailed(RuntimeError):
    """The adapter is true, but training under PointCMT through it did not do what it must."""


@dataclass(frozen=True)
class LocalFeatures:
    """What :func:`examine_local` found of an adapter's local features.

    Attributes:
        shape: [B, M, C].
        follow_order: whether they are the same, at the same centres, for the points in another order. A ball
            query that takes the first points of a full ball depends on their order.
        reach: share of the features that change when one point moves a little: 1 where each sees the whole
            cloud.
    """

    shape: tuple[int, ...]
    follow_order: bool
    reach: float

    def __str__(self) -> str:
        order = "do not depend" if self.follow_order else "depend"
        return (
            f"{list(self.shape)}, one per centre; they {order} on the order of the points; one point is seen "
            f"by {self.reach:.0%} of them"
        )


@dataclass(frozen=True)
class AdapterCheck:
    """What :func:`check_adapter` found; only complete checks are returned.

    Attributes:
        network: class name of the network.
        report: the adapter's proof.
        losses: total loss of each of the two training steps.
        objectives: value of each objective, unweighted, at the second step.
        channels: of the clouds that the network ran on.
        parameters: number of parameters of the network.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: wall time of the whole check.
        local: what the local features are; None where the adapter has none.
    """

    network: str
    report: AdapterReport
    losses: tuple[float, float]
    objectives: dict[str, float]
    channels: int
    parameters: int
    device: str
    seconds: float
    local: LocalFeatures | None = None

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.objectives.items())
        first, second = (f"{loss:.4g}" for loss in self.losses)
        return "\n".join(
            [
                f"{self.network} ({self.parameters / 1e6:.2f} M parameters, {self.device})",
                f"  layout   {self.report.adapter.input_layout}, {self.channels} channels",
                f"  proved   {self.report}",
                *([] if self.local is None else [f"  local    {self.local}"]),
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
    channels: int | None = None,
    batch: int = 4,
    device: str | torch.device | None = None,
    seed: int = 0,
    stand_ins: bool = True,
    imports: Sequence[str] = (),
) -> AdapterCheck:
    """Builds the network that ``spec`` names and proves its adapter; see :func:`check_network`.

    Args:
        spec: ``module:Class``, ``module:function`` or ``path/to/file.py:Class``; the working directory (or
            the file's folder) is put on ``sys.path`` while it is imported and built.
        init: its arguments, as written between the parentheses of the call: ``"40, normal_channel=False"``.
            The names ``torch``, ``nn`` and ``SimpleNamespace`` can be used.
        stand_ins: let :mod:`pointcmt.compat` stand in for extensions that are not installed.
        imports: modules or files that register adapters, imported first.
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
        for name in imports:
            imported(name)
        module = imported(target, "--check")
        factory = getattr(module, attribute, None)
        if factory is None:
            there = [name for name, value in vars(module).items() if isinstance(value, type)]
            classes = ", ".join(name for name in there if issubclass(getattr(module, name), nn.Module))
            raise ValueError(f"{target} has no {attribute!r}; its networks and layers: {classes or 'none'}")
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
    channels: int | None = None,
    batch: int = 4,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> AdapterCheck:
    """Proves everything that PointCMT promises of a network, on embedded shapes:

    1. it runs forward and backward;
    2. its adapter is true: ``classify(feature)`` is its output, also with moved parameters and in training
       mode; its local features, if it has any, belong to their own cloud;
    3. it trains two steps under :class:`pointcmt.PointCMT`: finite losses that change, with gradients from
       the image side that reach layers in front of its classifier;
    4. afterwards nothing remains: same ``state_dict`` keys, hooks and attributes, and eval output bit-equal
       to that of a twin that was never entered and has the same weights.

    Args:
        build: makes the network; called twice.
        adapter: adapter or name; None finds one.
        layout: how the network takes its clouds, a key of ``pointcmt.adapters.INPUT_LAYOUTS``; None tries
            the adapter's ``input_layout``, then the others in turn.
        points: points per cloud.
        channels: 3, or 6 for coordinates and unit normals; None tries 3 and, where the network runs in no
            layout of those, 6.
        batch: clouds, at least 2 because of batch normalisation.
        device: None: CUDA where there is a GPU, else the CPU.
        seed: of weights, clouds and everything else drawn.

    Raises:
        ValueError: an argument out of range, or ``build`` does not make a network.
        AdapterError: no adapter fits, or it is not true.
        CheckFailed: any other point of the list.
    """
    start = time.perf_counter()
    if batch < 2 or channels not in (3, 6, None):
        raise ValueError(f"batch is {batch} and channels {channels}; expected batch ≥ 2 and 3 or 6 channels")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(seed)
    network, twin = build(), build()
    if not isinstance(network, nn.Module):
        raise ValueError(f"the factory makes a {type(network).__name__}; expected a torch.nn.Module")
    network, twin = network.to(where), twin.to(where)
    clouds = _clouds(points, channels or 3, batch, seed).to(where)
    try:
        report = fit_adapter(network, clouds, adapter, layout)
    except NoLayout as error:
        if channels is not None:
            raise
        clouds = _clouds(points, 6, batch, seed).to(where)
        try:
            report = fit_adapter(network, clouds, adapter, layout)
        except NoLayout as other:
            raise NoLayout(f"{other}\nWith 3 channels: {error}") from None
    chosen = report.adapter
    if report.logits_shape is None:
        raise ValueError(
            f"the adapter {chosen.name!r} has no classify, so that PointCMT cannot train with it"
        )
    feature_dim, classes = report.feature_shape[1], report.logits_shape[1]
    labels = torch.arange(batch, device=where) % classes

    # before two steps on a batch this small, which may leave a network with NaN
    local = None if chosen.local is None else examine_local(network, chosen, clouds, seed)
    network.train()
    F.cross_entropy(chosen.logits(chosen.call(network, clouds)), labels).backward()
    _require(_any_gradient(network), "no parameter of the network got a gradient from its own output")
    network.zero_grad(set_to_none=True)

    keys, marks = list(network.state_dict()), _marks(network)
    weights = {name: tensor.clone() for name, tensor in network.named_parameters()}
    losses, objectives = _two_steps(network, chosen, clouds, labels, feature_dim, classes)
    network.zero_grad(set_to_none=True)
    _require(losses[0] != losses[1], f"two training steps gave the same loss, {losses[0]}")
    moved = any(not torch.equal(tensor, weights[name]) for name, tensor in network.named_parameters())
    _require(moved, "two training steps changed no parameter")

    _require(list(network.state_dict()) == keys, "the keys of state_dict are not what they were before")
    _require(_marks(network) == marks, "a hook or an attribute remains on the network")
    twin.load_state_dict(network.state_dict())
    _require(
        torch.equal(_evaluated(network, chosen, clouds, seed), _evaluated(twin, chosen, clouds, seed)),
        "the eval output is not bit-equal to that of an untouched twin with the same weights",
    )
    return AdapterCheck(
        network=type(network).__name__,
        report=report,
        losses=losses,
        objectives=objectives,
        channels=clouds.shape[2],
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        device=where.type,
        seconds=time.perf_counter() - start,
        local=local,
    )


def examine_local(network: nn.Module, adapter: Adapter, clouds: Tensor, seed: int = 0) -> LocalFeatures:
    """Looks at an adapter's local features with points in another order, other clouds, and one point moved.

    Args:
        network: unwrapped.
        adapter: one with local features, proved on the network.
        clouds: [B, N, 3 + C].
        seed: of what is drawn; the same at every pass of the network.

    Raises:
        CheckFailed: the features of one cloud depend on the other clouds of the batch.
    """
    random = torch.Generator().manual_seed(seed)
    clouds = torch.cat([2 * clouds[..., :3], clouds[..., 3:]], -1)  # wide: balls that are not full

    def seen(points: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        found = observe(network, adapter, lambda: adapter.call(network, points)).local
        assert found is not None
        return found

    with quiet_evaluation(network):
        local, centers = seen(clouds)
        scale = float(local.abs().max()) + 1e-6

        other = clouds.clone()
        other[1:] = other[1:] * 0.7 + 0.1
        _require(
            bool((seen(other)[0][0] - local[0]).abs().max() <= 1e-4 * scale),
            "the local features of a cloud change with the other clouds of the batch",
        )

        # sampling begins at the first point, or at a point that is drawn: most stay where they are
        some = 1 + torch.randperm(clouds.shape[1] - 1, generator=random)[: clouds.shape[1] // 4]
        order = torch.arange(clouds.shape[1])
        order[some.sort().values] = some
        moved_local, moved_centers = seen(clouds[:, order.to(clouds.device)])
        follows = any(
            _same_at_same_centers(*pair, 1e-3 * scale)
            for pair in zip(local, centers, moved_local, moved_centers, strict=True)
        )

        nudged = clouds.clone()
        far = clouds[..., :3].square().sum(-1).argmax(-1)
        nudged[torch.arange(len(clouds)), far, :3] *= 1.001
        changed = (seen(nudged)[0] != local).any(-1)
    return LocalFeatures(tuple(local.shape), follows, float(changed.float().mean()))


def _same_at_same_centers(
    local: Tensor, centers: Tensor, other: Tensor, there: Tensor, tolerance: float
) -> bool:
    """Whether [M, C] features at [M, 3] centres are those at the same centres in another order."""
    distance, match = torch.cdist(centers, there).min(dim=1)
    return bool(distance.max() < 1e-4) and bool((local - other[match]).abs().max() <= tolerance)


def _two_steps(
    network: nn.Module, adapter: Adapter, clouds: Tensor, labels: Tensor, feature_dim: int, classes: int
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
            task = F.cross_entropy(adapter.logits(adapter.call(network, clouds)), labels)
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


def _evaluated(network: nn.Module, adapter: Adapter, clouds: Tensor, seed: int) -> Tensor:
    network.eval()
    torch.manual_seed(seed)  # some networks sample points at random, also when they are evaluated
    with torch.no_grad():
        return adapter.logits(adapter.call(network, clouds))


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


def imported(target: str, option: str = "--import") -> ModuleType:
    """The module of a dotted name or of a file, for an option of the command line.

    Raises:
        ValueError: it cannot be imported; the message says what is there in its place.
    """
    if not target.endswith(".py"):
        try:
            return importlib.import_module(target)
        except ImportError as error:
            raise ValueError(_why_not_imported(target, option, error)) from error
        except Exception as error:
            raise ValueError(_failed(f"{option} {target} fails while it is imported", error)) from error
    path = Path(target)
    if not path.is_file():
        raise ValueError(f"there is no file {path.resolve()}, which {option} names")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the code may import itself by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        if isinstance(error, ImportError):
            raise ValueError(_why_not_imported(target, option, error)) from error
        raise ValueError(_failed(f"{option} {target} fails while it is imported", error)) from error
    return module


def _failed(what: str, error: Exception) -> str:
    """With the last place in the user's code, which a message without a traceback does not show."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{what}: {type(error).__name__}: {error}{place}"


def _why_not_imported(target: str, option: str, error: ImportError) -> str:
    missing = error.name or ""
    text = f"{option} {target} cannot be imported from {Path.cwd()}: {error}. "
    if missing == target or target.startswith(f"{missing}."):
        as_file = Path(*target.split(".")).with_suffix(".py")
        found = sorted(Path.cwd().rglob(as_file.name))[:3] if target else []
        if found:
            folder = found[0].relative_to(Path.cwd())
            return text + f"There is {folder}: give {option} {folder}"
        return (
            text + f"There is no {as_file} here; give path/to/{as_file.name} or go to the codebase's folder"
        )
    if missing in compat.STAND_INS or missing.split(".")[0] in compat.STAND_INS:
        return text + "pointcmt stands in for it only where that is allowed (stand_ins=True)"
    text += f"{target} itself was found, and imports {missing or 'something'}, which is not there"
    holds_it = _folder_with(missing.partition(".")[0]) if missing else None
    if holds_it is None:
        return text + ": install it"
    return text + (
        f" but in {holds_it}: go there and give {option} as it is seen from there, or put that folder on the "
        f"path (PYTHONPATH={holds_it})"
    )


def _folder_with(module: str) -> Path | None:
    """A folder above or below the one at hand, never that one, which holds a module of that name."""
    here = Path.cwd()
    below = [path.parent for path in sorted(here.rglob(f"{module}.py"))]
    below += [path.parent for path in sorted(here.rglob(module)) if any(path.glob("*.py"))]
    above = [
        folder
        for folder in here.parents[:3]
        if (folder / f"{module}.py").is_file() or any((folder / module).glob("*.py"))
    ]
    return next((folder for folder in [*above, *below] if folder != here), None)


def _called(factory: Callable[..., Any], arguments: str, spec: str) -> Any:
    names = {"torch": torch, "nn": nn, "SimpleNamespace": SimpleNamespace, "_factory": factory}
    try:
        return eval(f"_factory({arguments})", names)  # the user's own command line
    except Exception as error:
        what = f"{spec} cannot be built as {spec.rpartition(':')[2]}({arguments})"
        raise ValueError(
            f"{_failed(what, error)}. Give its arguments by init (--init '40, normal_channel=False')"
        ) from error
