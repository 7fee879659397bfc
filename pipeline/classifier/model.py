"""CNN-LSTM: a 2D backbone on each slice, a sequence model over z, one head per target."""

from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from ..competition.targets import ABDOMEN, SLICE_TARGETS, TARGETS, Target, group_slices
from ..learning.backbone import pool_maps
from ..run.config import TrainConfig
from .sequence import PoolZ, sequence_model

# pixels that go through the backbone at once on a CPU without gradients: maps of more outgrow its
# caches
PIXELS_AT_ONCE = 8 * 192 * 192


def chosen_targets(config: TrainConfig) -> list[Target]:
    """The targets a model is trained on, in the project's order."""
    return [target for target in TARGETS if target.name in config.targets]


def visible_targets(config: TrainConfig) -> list[Target]:
    """Those of them that `train.visible_loss` is of."""
    return [t for t in chosen_targets(config) if t.organ] if config.visible_loss else []


def slice_columns(config: TrainConfig) -> list[tuple[int, int]]:
    """What the logits of a slice are made of: how many columns, of which region. Those of
    `SLICE_TARGETS` with `train.slice_loss`, the classes of each of `visible_targets`.
    """
    marks = [(len(SLICE_TARGETS), config.region_number(ABDOMEN))] if config.slice_loss else []
    organs = visible_targets(config)
    return marks + [(len(t.classes), config.region_number(t.region)) for t in organs]


def chosen_columns(config: TrainConfig) -> list[int]:
    """Those of the 13 columns that belong to `chosen_targets`."""
    columns = group_slices()
    return [k for t in chosen_targets(config) for k in range(13)[columns[t.name]]]


def target_heads(width: int, config: TrainConfig) -> nn.ModuleDict:
    """A linear layer for each trained target, to 1 logit or one of each class, its weights 0."""
    heads = nn.ModuleDict(
        {
            t.name: nn.Linear(width, 1 if t.binary else len(t.classes))
            for t in chosen_targets(config)
        }
    )
    for head in heads.values():
        nn.init.zeros_(head.get_parameter("weight"))
    return heads


@torch.no_grad()
def start_at_prior(heads: nn.ModuleDict, labels: np.ndarray) -> None:
    """Set the biases of `target_heads` to the best constant prediction for one-hot `labels`
    (N, 13): class shares times sample weights.
    """
    columns = group_slices()
    for target in TARGETS:
        if target.name in heads:
            share = np.maximum(labels[:, columns[target.name]].mean(0) * target.weights, 1e-3)
            logits = np.log(share)
            bias = logits[1:] - logits[:1] if target.binary else logits - logits.mean()
            heads[target.name].get_parameter("bias").copy_(torch.as_tensor(bias))


class CnnLstm(nn.Module):
    """Volumes (B, slices * planes, H, W) float -> logits (B, 1 or 3) per target and slice logits
    (B, S, width) of each of `slice_columns`, S those of its region; `planes` is `train.channels`,
    the channels of a slice lie one after another, and so do the slices of the regions
    (`train.region_slices`). A target's head reads the sequence of its region.

    `backbone` maps (N, planes, H, W) to (N, C, h, w); `channels` is its C.
    """

    def __init__(self, backbone: nn.Module, channels: int, config: TrainConfig) -> None:
        super().__init__()
        self.backbone, self.map_pool, self.shortcut = backbone, config.map_pool, config.shortcut
        self.planes, self.map_dropout = config.channels, nn.Dropout(config.backbone_dropout)
        own = channels if config.map_pool == "mean" else 2 * channels
        self.slice_columns = slice_columns(config)
        self.region_planes = [count * config.channels for count in config.region_slices]
        # regions next to each other with as many slices go through the sequence model at once
        self.alike = [(S, len([*some])) for S, some in groupby(config.region_slices)]
        self.norm = nn.LayerNorm(own)
        self.sequence = sequence_model(own, config)
        width = self.sequence.width + (own if config.shortcut else 0)
        self.pool = PoolZ(config.pool, width)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = target_heads(width, config)
        self.own_region = {t.name: config.region_number(t.region) for t in chosen_targets(config)}
        columns = sum(width for width, _ in self.slice_columns)
        self.slice_head = nn.Linear(width, columns) if columns else None
        if self.slice_head is not None:
            nn.init.zeros_(self.slice_head.weight)

    def forward(self, volumes: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Logits per target, and per slice of each of `slice_columns`."""
        B, _, H, W = volumes.shape
        features = self.features(volumes.reshape(-1, self.planes, H, W)).unflatten(0, (B, -1))
        sizes = [S * regions for S, regions in self.alike]
        parts = features.split(sizes, 1) if len(sizes) > 1 else [features]
        of_regions, pools = [], []
        for part, (_, regions) in zip(parts, self.alike, strict=True):
            states = self._states(part.unflatten(1, (regions, -1)).flatten(0, 1))
            of_regions += states.unflatten(0, (B, regions)).unbind(1)
            pools.append(self.dropout(self.pool(states)).unflatten(0, (B, regions)))
        pooled = torch.cat(pools, 1)  # (B, R, E)
        # a logit of 4 in bfloat16 is 1 percent of a probability off
        with torch.autocast(volumes.device.type, enabled=False):
            logits = {
                name: head(pooled[:, self.own_region[name]].float())
                for name, head in self.heads.items()
            }
            return logits, self._of_slices(of_regions)

    def _states(self, features: Tensor) -> Tensor:
        """Of features (N, S, width) what heads read of each slice, (N, S, E)."""
        states = self.sequence(features)
        # what a slice shows reaches the heads directly too
        return torch.cat([states, features], 2) if self.shortcut else states

    def features(self, slices: Tensor) -> Tensor:
        """What the sequence model reads of slices (N, planes, H, W) float: (N, 2C), with
        `train.map_pool=mean` (N, C).
        """
        slices = slices.contiguous(memory_format=torch.channels_last)
        whole = self.training or torch.is_grad_enabled() or slices.is_cuda
        pixels = slices.shape[2] * slices.shape[3]
        parts = [slices] if whole else slices.split(max(1, PIXELS_AT_ONCE // pixels))
        maps = (self.map_dropout(self.backbone(part)) for part in parts)
        return self.norm(torch.cat([pool_maps(part, self.map_pool) for part in maps]))

    def _of_slices(self, states: list[Tensor]) -> list[Tensor]:
        """Slice logits (B, S, width) of each of `slice_columns`, of the states (B, S, E) of its
        region.
        """
        if self.slice_head is None:
            return []
        widths = [width for width, _ in self.slice_columns]
        seen = {region for _, region in self.slice_columns}
        parts = {k: self.slice_head(states[k].float()).split(widths, -1) for k in seen}
        return [parts[region][k] for k, (_, region) in enumerate(self.slice_columns)]


def probabilities(logits: dict[str, Tensor]) -> Tensor:
    """The 13 columns (B, 13) float64 in the project's order; a target that was not trained gets
    equal shares.
    """
    first, columns = next(iter(logits.values())).double(), []
    for target in TARGETS:
        if target.name not in logits:
            shape = len(first), len(target.classes)
            columns.append(first.new_full(shape, 1 / len(target.classes)))
        elif target.binary:
            injury = logits[target.name].double().sigmoid()
            columns.append(torch.cat([1 - injury, injury], 1))
        else:
            columns.append(logits[target.name].double().softmax(1))
    return torch.cat(columns, 1)


def injury_log_odds(logits: dict[str, Tensor]) -> Tensor:
    """Log-odds of any injury of each trained target (B, targets), in the project's order."""
    known = [(target, logits[target.name]) for target in TARGETS if target.name in logits]
    return torch.stack(
        [x[:, 0] if one.binary else x[:, 1:].logsumexp(1) - x[:, 0] for one, x in known], 1
    )
