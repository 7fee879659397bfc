"""A small U-Net: the project's 2D backbone as encoder, its neighbours as channels, a light
decoder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..learning.backbone import create_backbone, load_backbone, placed
from ..learning.checkpoint import described, load_weights
from ..run import layout
from ..run.config import (
    Config,
    ConvertConfig,
    ModelConfig,
    OrganConfig,
    Section,
    VolumeConfig,
)
from ..system.console import log
from .data import CHANNELS
from .masks import ORGANS

WIDEST = 128  # channels of the decoder


class Segmented(Section):
    """The sections of a config that are kept with a segmenter's weights."""

    model: ModelConfig
    organs: OrganConfig
    volume: VolumeConfig
    convert: ConvertConfig


def pyramid(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Maps of a timm model for images (N, C, h, w), the last of each size, coarsest first; of a
    family that gives one map alone, that one.
    """
    if hasattr(backbone, "forward_intermediates"):
        maps = cast(Any, backbone).forward_intermediates(images, intermediates_only=True)
    else:
        maps = [backbone(images)]
    by_size = {tuple(one.shape[2:]): one for one in maps if one.shape[2:] != images.shape[2:]}
    return [by_size[size] for size in sorted(by_size)]


@torch.no_grad()
def inflate_stem(backbone: nn.Module, channels: int) -> nn.Module:
    """Let a one-channel backbone take `channels` planes (odd): the middle one has the weights that
    are there, its neighbours start without weight, so that features are as they were.
    """
    stem = next(
        layer
        for layer in backbone.modules()
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups == 1
    )
    weight = stem.weight.new_zeros(stem.out_channels, channels, *stem.kernel_size)
    weight[:, channels // 2] = stem.weight[:, 0]
    stem.weight, stem.in_channels = nn.Parameter(weight), channels
    return backbone


class Up(nn.Module):
    """A coarse map brought to the size of a finer one and joined with it."""

    def __init__(self, coarse: int, skip: int, width: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(skip, width, 1, bias=False)
        self.coarse = nn.Conv2d(coarse, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.join = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """(N, C, h, w) and the finer (N, C', h', w') to (N, width, h', w')."""
        up = functional.interpolate(
            self.coarse(coarse), skip.shape[2:], mode="bilinear", align_corners=False
        )
        return self.join(functional.relu(self.norm(up + self.skip(skip))))


class Decoder(nn.Module):
    """Maps of a backbone, coarsest first, of `channels` each, to logits of organs: every map is
    brought to the size of the next finer one and joined with it. `width` is that of the finest.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self._add_layers(channels, width)

    def _add_layers(self, channels: Sequence[int], width: int) -> None:
        widths = [min(WIDEST, width << step) for step in reversed(range(len(channels) - 1))]
        inputs = [channels[0], *widths]
        self.ups = nn.ModuleList(
            Up(coarse, skip, own)
            for coarse, skip, own in zip(inputs, channels[1:], widths, strict=False)
        )
        self.head = nn.Conv2d(inputs[-1], 1 + len(ORGANS), 1)

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (N, 1 + organs, h, w) float32 of maps (N, C, h', w'), background first; `size` is
        (h, w) in pixels.
        """
        found, *finer = maps
        for up, skip in zip(self.ups, finer, strict=True):
            found = up(found, skip)
        logits = self.head(found).float()
        return functional.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


class OrganNet(Decoder):
    """(N, 3, h, w) standardised planes, each between its neighbours, to logits (N, 1 + organs, h,
    w): background first.
    """

    def __init__(self, backbone: nn.Module, config: OrganConfig) -> None:
        nn.Module.__init__(self)  # the backbone is the first of the parameters
        size = config.image_size
        training = backbone.training
        with torch.no_grad():
            maps = pyramid(backbone.eval(), torch.zeros(1, 1, size, size))
        backbone.train(training)
        self.backbone = inflate_stem(backbone, CHANNELS)
        self._add_layers([one.shape[1] for one in maps], config.width)

    def forward(self, planes: Tensor) -> Tensor:
        """Logits of each pixel, float32."""
        planes = planes.contiguous(memory_format=torch.channels_last)
        return self.decode(pyramid(self.backbone, planes), planes.shape[2:])


def build_segmenter(
    config: Config | Segmented, init: str = "scratch", pretrained: Path | None = None
) -> OrganNet:
    """The segmenter of a config, its backbone from `scratch` or `imagenet`, or the weights that
    stage 04 left in `pretrained`: how many of them matched is logged.
    """
    model, options = config.model, config.organs
    backbone = create_backbone(model.backbone, init, model.weights, options.image_size)
    if pretrained is not None:
        log(f"organs: {load_backbone(backbone, pretrained)}")
    return OrganNet(backbone, options)


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> tuple[OrganNet, Segmented]:
    """Rebuild the model of a `model.safetensors` of stage 05 from its own metadata, ready to
    predict, with its config.

    Raises:
        InputError: not a segmenter of this project, or tensors that do not fit.
    """
    maker = layout.script(layout.ORGANS)
    config = described(path, Segmented, "segmenter of organs", maker)
    model = build_segmenter(config)
    load_weights(model, path)
    return placed(model, device).eval(), config
