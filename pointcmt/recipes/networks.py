"""Pre-trained networks: found, built, their features taken, and others started from their weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pointcmt.adapters.proof import observe
from pointcmt.adapters.registry import Adapter, find_adapter, unwrap
from pointcmt.checkpoint import PathLike, check_configuration, kind_of, load_module, read_config
from pointcmt.data import PointDataset
from pointcmt.data.dataset import Split
from pointcmt.recipes.batches import Batches
from pointcmt.recipes.build import StudentOptions, check_named_by_file, make_student
from pointcmt.recipes.config import restore
from pointcmt.recipes.options import DataOptions, parse_assignments
from pointcmt.types import PointFeatures

KINDS = ("network", "student", "segmenter")


def clouds_of(data: DataOptions, split: Split, labelled: bool = True) -> PointDataset:
    """All clouds of a split, none held out; ``labelled``: those that have a label (--labels-per-class)."""
    count = data.per_class if split == "train" else data.test_per_class
    if split == "train" and labelled and data.labels_per_class is not None:
        count = data.labels_per_class
    made = data.build(split, count)
    for problem in data.settle(made):
        warnings.warn(problem, stacklevel=2)
    return made


def find_weights(path: Path) -> Path:
    """The file of weights that a user means by ``path``: the file, or that of a run folder.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path)
    if path.is_file():
        return path
    tried = [path / f"{kind}.safetensors" for kind in KINDS]
    for file in tried:
        if file.is_file():
            return file
    unfinished = (
        " The run in that folder is not finished: continue it with --resume."
        if (path / "config.json").exists() and not (path / "results.json").exists()
        else ""
    )
    raise FileNotFoundError(
        f"no network at {path} (looked for {', '.join(str(p) for p in [path, *tried])}).{unfinished} Make "
        "one with: pointcmt pretrain --out FOLDER"
    )


def weights_of(file: Path) -> dict[str, Tensor]:
    """The state_dict in a file: of this package, or of ``torch.save`` (also inside a checkpoint's dictionary,
    and of a wrapped network). Nothing in the file is run.

    Raises:
        ValueError: there is none.
    """
    try:
        if file.suffix == ".safetensors":
            return _finite(load_file(file), file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from error
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as weights alone ({error}); save network.state_dict() with torch.save"
        ) from error
    for name in ("state_dict", "model_state_dict", "model", "net", "network"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no state_dict; save network.state_dict() with torch.save")
    return _finite({name.removeprefix("module."): value for name, value in content.items()}, file)


def _finite(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{file}: the weights {name} are not finite: the file is damaged; copy it again")
    return weights


def _kind(file: Path) -> str | None:
    """What a checkpoint of this package holds; None for a file of others."""
    try:
        return kind_of(file)
    except ValueError:
        return None


def load_network(
    path: Path | None, options: StudentOptions, num_classes: int
) -> tuple[nn.Module, Adapter, StudentOptions]:
    """A network in eval mode with its adapter.

    Args:
        path: run folder or file of ``pretrain`` or ``train``, which says itself how its network is built; or
            a state_dict of the network that ``options`` name. None: that network with random weights.
        options: which network, where the file does not say; and ``module:factory`` of one's own, which a
            file may not name by itself: it is data, and code is named by the user.
        num_classes: of its head, where the file does not say.

    Raises:
        FileNotFoundError, ValueError: nothing there, weights that do not fit, or a file that names code which
            the user did not.
    """
    if path is None:
        model = make_student(options, num_classes).eval()
        return model, find_adapter(model, options.adapter), options
    file = find_weights(path)
    kind = _kind(file)
    if kind is None:
        model = make_student(options, num_classes)
        weights = weights_of(file)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {file} do not fit --student {options.student}: {error}. Give the network "
                "that they are of (--student module:factory, --student-options)"
            ) from error
        return model.eval(), find_adapter(model, options.adapter), options
    if kind not in KINDS:
        raise ValueError(f"{file} holds a {kind}: give a network of pointcmt pretrain or train")
    config = read_config(file, kind)
    own: StudentOptions = restore(StudentOptions(), config.get("student") or {}, f"{file}: student")
    if ":" in options.student:
        own.student = options.student
    classes = config.get("num_classes")
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise ValueError(
            f"{file}: num_classes is {classes!r}; expected a whole number. It was changed: copy it again"
        )

    def check(_: dict[str, Any], where: PathLike) -> None:
        if own.student != options.student:
            check_named_by_file(own.student, file)
        check_configuration(parse_assignments(own.student_options, f"{file}: student_options"), where)
        check_configuration({"student": (own.width, own.feature_dim, classes)}, where)

    def build(**_: Any) -> nn.Module:
        return make_student(own, classes)

    build.__name__ = own.student
    model = load_module(file, kind, build, check)
    return model, find_adapter(model, options.adapter or own.adapter), own


def start_from(network: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    """Gives ``network`` the weights at ``path`` wherever name and shape are equal; for ``train --init``.

    Args:
        network: freshly built.
        path: run folder or file of ``pretrain`` or ``train``, or a state_dict of anybody's.

    Returns:
        Names of the parameters and buffers that were taken over, and of those that stay as they were made.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: nothing fits.
    """
    file = find_weights(path)
    weights, own = weights_of(file), network.state_dict()
    taken = [name for name, value in own.items() if name in weights and weights[name].shape == value.shape]
    if not taken:
        raise ValueError(
            f"nothing in {file} ({', '.join(list(weights)[:3])} …) has a name and shape of "
            f"{type(network).__name__} ({', '.join(list(own)[:3])} …): give weights of that network, "
            "pre-trained with the same --student and options"
        )
    network.load_state_dict({name: weights[name] for name in taken}, strict=False)
    return taken, [name for name in own if name not in taken]


@torch.no_grad()
def encode(network: nn.Module, adapter: Adapter, points: Tensor) -> PointFeatures:
    """What a network says of clouds [B, N, C], as its adapter taps it: the pooled feature of its encoder
    (the shape feature where the adapter does not say), local features where there are any."""
    module = unwrap(network)
    seen = observe(module, adapter, lambda: adapter.call(network, points))
    if seen.feature is None:
        raise ValueError(
            f"adapter {adapter.name!r} taps {adapter.feature_path(module)!r}, which the forward pass of "
            f"{type(module).__name__} never runs; give another --adapter"
        )
    pooled = adapter.feature(seen.feature) if seen.global_ is None else seen.global_
    local, centers = (None, None) if seen.local is None else seen.local
    return PointFeatures(pooled, local, centers)


@torch.no_grad()
def frozen_features(
    network: nn.Module,
    adapter: Adapter,
    data: PointDataset,
    device: torch.device,
    batch_size: int,
    which: Literal["pooled", "feature"] = "pooled",
) -> np.ndarray:
    """Features [n, D] of all clouds of a set, in eval mode, without augmentation.

    Args:
        which: ``pooled``, the encoder's before any layer of the head, where the adapter says where it is; or
            the shape ``feature``, which the head's last layers read.
    """
    network = network.to(device).eval()
    parts = []
    for batch in Batches(data, batch_size, device).epoch():
        if which == "pooled":
            found = encode(network, adapter, batch.inputs).global_
        else:
            seen = observe(unwrap(network), adapter, lambda: network(adapter.arrange(batch.inputs)))  # noqa: B023
            assert seen.feature is not None
            found = adapter.feature(seen.feature)
        parts.append(found.float().cpu().numpy())
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise ValueError("the features are not finite: the network's weights, or the clouds, are damaged")
    return features
