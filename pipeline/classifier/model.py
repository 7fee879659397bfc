"""CNN-LSTM: a 2D backbone on each slice, a sequence model over z, one head per target; and its loss."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..competition.targets import TARGETS, Target, group_slices
from ..run.config import TrainConfig

CHUNK = 8 * 192 * 192  # pixels that go through the backbone at once on a CPU without gradients: maps of more outgrow its caches


def chosen_targets(config: TrainConfig) -> list[Target]:
    """The targets a model is trained on, in the project's order."""
    return [target for target in TARGETS if target.name in config.targets]


class Recurrent(nn.Module):
    """Bidirectional LSTM or GRU over z: (B, S, E) -> (B, S, 2 * hidden)."""

    def __init__(self, kind: str, width: int, config: TrainConfig) -> None:
        super().__init__()
        cell = nn.LSTM if kind == "lstm" else nn.GRU
        dropout = config.dropout if config.layers > 1 else 0.0
        self.cell = cell(width, config.hidden, config.layers, batch_first=True, bidirectional=True, dropout=dropout)
        self.width = 2 * config.hidden

    def forward(self, x: Tensor) -> Tensor:
        """States of both directions at each slice."""
        return self.cell(x)[0]


class Transformer(nn.Module):
    """Pre-norm transformer encoder over z with sinusoidal positions: (B, S, E) -> (B, S, 2 * hidden)."""

    def __init__(self, width: int, config: TrainConfig) -> None:
        super().__init__()
        self.width = 2 * config.hidden
        self.embed = nn.Linear(width, self.width)
        heads = math.gcd(4, self.width)
        layer = nn.TransformerEncoderLayer(self.width, heads, 2 * self.width, config.dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Encode all slices at once."""
        return self.encoder(self.embed(x) + positions(x.shape[1], self.width, x.device))


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position code (length, width), width even (Vaswani et al. 2017)."""
    place = torch.arange(length, device=device)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).reshape(length, width)


class Independent(nn.Module):
    """No sequence model: each slice by itself, (B, S, E) -> (B, S, 2 * hidden); with pooling over z this is MIL."""

    def __init__(self, width: int, config: TrainConfig) -> None:
        super().__init__()
        self.width = 2 * config.hidden
        self.layers = nn.Sequential(nn.Linear(width, self.width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Embed each slice."""
        return self.layers(x)


def sequence_model(width: int, config: TrainConfig) -> nn.Module:
    """The model over z that `train.sequence` names."""
    if config.sequence == "transformer":
        return Transformer(width, config)
    if config.sequence == "none":
        return Independent(width, config)
    return Recurrent(config.sequence, width, config)


class PoolZ(nn.Module):
    """Pool (B, S, E) over z to (B, E): `max`, `mean`, or learnt `attention` (Ilse et al. 2018)."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.score = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the slices."""
        if self.kind == "max":
            return x.amax(1)
        if self.kind == "mean":
            return x.mean(1)
        return (self.score(x).softmax(1) * x).sum(1)


class CnnLstm(nn.Module):
    """Volumes (B, S, H, W) float -> logits (B, 1 or 3) per target and slice logits (B, S, 2).

    `backbone` maps (N, 1, H, W) to (N, C, h, w); `channels` is its C.
    """

    def __init__(self, backbone: nn.Module, channels: int, config: TrainConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(2 * channels)
        self.sequence = sequence_model(2 * channels, config)
        width = self.sequence.width + 2 * channels
        self.pool = PoolZ(config.pool, width)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.ModuleDict({t.name: nn.Linear(width, 1 if t.binary else len(t.classes)) for t in chosen_targets(config)})
        self.slice_head = nn.Linear(width, 2) if config.slice_loss else None
        for head in (*self.heads.values(), *([self.slice_head] if config.slice_loss else [])):
            nn.init.zeros_(head.weight)

    @torch.no_grad()
    def start_at_prior(self, labels: np.ndarray) -> None:
        """Set the heads' biases to the best constant prediction for one-hot `labels` (N, 13): class shares times sample weights."""
        columns = group_slices()
        for target in TARGETS:
            if target.name in self.heads:
                share = np.maximum(labels[:, columns[target.name]].mean(0) * target.weights, 1e-3)
                logits = np.log(share)
                bias = logits[1:] - logits[:1] if target.binary else logits - logits.mean()
                self.heads[target.name].bias.copy_(torch.as_tensor(bias))

    def forward(self, volumes: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Logits per target, and per slice where the model has a slice head."""
        B, S, H, W = volumes.shape
        slices = volumes.reshape(B * S, 1, H, W).contiguous(memory_format=torch.channels_last)
        whole = self.training or torch.is_grad_enabled() or slices.is_cuda
        parts = [slices] if whole else slices.split(max(1, CHUNK // (H * W)))
        features = self.norm(torch.cat([self._features(part) for part in parts])).reshape(B, S, -1)  # (B, S, 2C)
        states = torch.cat([self.sequence(features), features], 2)  # (B, S, E): what a slice shows reaches the heads directly too
        pooled = self.dropout(self.pool(states))  # (B, E)
        with torch.autocast(volumes.device.type, enabled=False):  # a logit of 4 in bfloat16 is 1 percent of a probability off
            logits = {name: head(pooled.float()) for name, head in self.heads.items()}
            return logits, self.slice_head(states.float()) if self.slice_head is not None else None

    def _features(self, slices: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, 2C): an organ fills the mean of a slice, a small lesion shows in its maximum."""
        maps = self.backbone(slices)  # (N, C, h, w)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1).float()


class InjuryLoss(nn.Module):
    """Sample-weighted cross entropy of every trained target, summed over targets (the metric's weights).

    A target's terms are divided by batch size times the mean sample weight of the training set: a constant, so that the
    sum over micro-batches equals the loss of the large batch.
    """

    def __init__(self, config: TrainConfig, labels: np.ndarray) -> None:
        super().__init__()
        self.targets, self.columns, self.slice_weight = chosen_targets(config), group_slices(), config.slice_loss
        for target in self.targets:
            weights = torch.tensor(target.weights)
            self.register_buffer(f"weights_{target.name}", weights, persistent=False)
            share = torch.as_tensor(labels[:, self.columns[target.name]], dtype=torch.float32).mean(0)
            self.register_buffer(f"scale_{target.name}", (share * weights).sum().clamp_min(1e-6), persistent=False)

    def forward(self, outputs: tuple[dict[str, Tensor], Tensor | None], labels: Tensor, planes: Tensor, known: Tensor,
                batch: int) -> dict[str, Tensor]:  # fmt: skip
        """Terms per target name, and `slices`; `labels` (B, 13), `planes` (B, S, 2), `known` (B, 2), `batch` the full batch's size."""
        logits, slice_logits = outputs
        terms = {}
        for target in self.targets:
            truth = labels[:, self.columns[target.name]]
            weights = (truth * getattr(self, f"weights_{target.name}")).sum(1)
            terms[target.name] = (weights * cross_entropy(logits[target.name].float(), truth)).sum()
            terms[target.name] = terms[target.name] / (batch * getattr(self, f"scale_{target.name}"))
        if slice_logits is not None:
            entropy = F.binary_cross_entropy_with_logits(slice_logits.float(), planes, reduction="none").mean(1)  # (B, 2)
            terms["slices"] = self.slice_weight * (entropy * known).sum() / batch
        return terms


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """-log p of the true class, (B,): one logit is a sigmoid on `injury`, three are a softmax; `truth` is one-hot (B, 2 or 3)."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], truth[:, 1], reduction="none")
    return -(truth * logits.log_softmax(1)).sum(1)


def probabilities(logits: dict[str, Tensor]) -> Tensor:
    """The 13 columns (B, 13) float64 in the project's order; a target that was not trained gets equal shares."""
    batch = len(next(iter(logits.values())))
    columns = []
    for target in TARGETS:
        if target.name not in logits:
            columns.append(torch.full((batch, len(target.classes)), 1 / len(target.classes), dtype=torch.float64))
        elif target.binary:
            injury = logits[target.name].double().cpu().sigmoid()
            columns.append(torch.cat([1 - injury, injury], 1))
        else:
            columns.append(logits[target.name].double().cpu().softmax(1))
    return torch.cat(columns, 1)
