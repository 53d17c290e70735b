"""A small, fast image backbone for views projected from points; registered with timm under its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn


class SimpleViewResNet(nn.Module):
    """The ResNet of SimpleView (Goyal et al. 2021, §4; princeton-vl/SimpleView, ``models/mv.py``).

    With the defaults: ResNet-18 at a quarter of its width (16, 32, 64, 128 channels), a 3×3 stem without
    stride and no pooling after it. Depth images of a few hundred points are sparse and small: a wide stem, or
    an early pooling, would throw away where the points are. Images [M, C, H, W] → [M, num_features].

    Args:
        in_chans: image channels C.
        width: channels relative to ResNet-18's 64, 128, 256, 512.
        layers: basic blocks in each stage; 1 to 4 stages. Each but the first halves the image.
        stem_kernel: side of the first convolution, in pixels.
        stem_stride: its stride; 2 costs a quarter of 1.

    Raises:
        ValueError: sizes that make no network.
    """

    def __init__(
        self,
        in_chans: int = 3,
        width: float = 0.25,
        layers: Sequence[int] = (2, 2, 2, 2),
        stem_kernel: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        channels = [round(width * full) for full in (64, 128, 256, 512)][: len(layers)]
        if not 1 <= len(layers) <= 4 or min(layers) < 1 or min(channels) < 1:
            raise ValueError(
                f"width={width}, layers={list(layers)}: expected 1 to 4 stages of at least one block each, "
                "and a width that leaves a channel"
            )
        if not 1 <= stem_stride <= stem_kernel:
            raise ValueError(
                f"stem_kernel={stem_kernel}, stem_stride={stem_stride}: expected 1 ≤ stride ≤ kernel, else "
                "pixels are skipped"
            )
        padding = (stem_kernel - stem_stride + 1) // 2  # the output is the input's size over the stride
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, channels[0], stem_kernel, stem_stride, padding, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(inplace=True),
        )
        blocks: list[BasicBlock] = []
        before = channels[0]
        for stage, (planes, count) in enumerate(zip(channels, layers, strict=True)):
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                shortcut = None
                if stride != 1 or before != planes:
                    shortcut = nn.Sequential(
                        nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
                    )
                blocks.append(BasicBlock(before, planes, stride, shortcut))
                before = planes
        self.stages = nn.Sequential(*blocks)
        self.num_features = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in blocks:
            block.zero_init_last()  # each block starts as the identity, as in the public code

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [M, C, H, W] → maps [M, num_features, h, w]."""
        return self.stages(self.stem(images))

    def forward_head(self, maps: Tensor) -> Tensor:
        """Maps [M, num_features, h, w] → [M, num_features]."""
        return maps.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images [M, C, H, W] → [M, num_features]."""
        return self.forward_head(self.forward_features(images))


@register_model
def simpleview_resnet(pretrained: bool = False, **options: Any) -> SimpleViewResNet:
    """``timm.create_model("simpleview_resnet", …)``: a ``SimpleViewResNet``, never pretrained."""
    if pretrained:
        raise ValueError(
            "simpleview_resnet has no pretrained weights: use pretrained=False, or a backbone of timm's own"
        )
    # what timm hands to every model, without meaning for this one
    for unused in ("num_classes", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(unused, None)
    return SimpleViewResNet(**options)
