"""Models over the slices of a volume: recurrent, transformer, or none, and the pooling over z."""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..run.config import TrainConfig


class Recurrent(nn.Module):
    """Bidirectional LSTM or GRU over z: (B, S, E) -> (B, S, 2 * hidden), in float32 whatever the
    rest computes in: cuDNN's cells know float16 alone beside it, which overflows where bfloat16
    does not and nothing would scale the loss.
    """

    def __init__(self, kind: str, width: int, config: TrainConfig) -> None:
        super().__init__()
        cell = nn.LSTM if kind == "lstm" else nn.GRU
        dropout = config.dropout if config.layers > 1 else 0.0
        self.cell = cell(
            width,
            config.hidden,
            config.layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout,
        )
        self.width = 2 * config.hidden

    def forward(self, x: Tensor) -> Tensor:
        """States of both directions at each slice."""
        with torch.autocast(x.device.type, enabled=False):
            return self.cell(x.float())[0]


class Transformer(nn.Module):
    """Pre-norm transformer encoder over z with sinusoidal positions: (B, S, E) -> (B, S, 2 *
    hidden).
    """

    def __init__(self, width: int, config: TrainConfig) -> None:
        super().__init__()
        self.width = 2 * config.hidden
        self.embed = nn.Linear(width, self.width)
        heads = math.gcd(4, self.width)
        layer = nn.TransformerEncoderLayer(
            self.width, heads, 2 * self.width, config.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Encode all slices at once."""
        return self.encoder(self.embed(x) + positions(x.shape[1], self.width, x.device))


@lru_cache(maxsize=8)
def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position code (length, width), width even (Vaswani et al. 2017); made once."""
    with torch.inference_mode(False):  # training may use what a prediction has made
        place = torch.arange(length, device=device)[:, None]
        rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
        code = torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1)
        return code.reshape(length, width)


class Independent(nn.Module):
    """No sequence model: each slice by itself, (B, S, E) -> (B, S, 2 * hidden); with pooling over z
    this is MIL.
    """

    def __init__(self, width: int, config: TrainConfig) -> None:
        super().__init__()
        self.width = 2 * config.hidden
        self.layers = nn.Sequential(nn.Linear(width, self.width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Embed each slice."""
        return self.layers(x)


def sequence_model(width: int, config: TrainConfig) -> Recurrent | Transformer | Independent:
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
            self.score = nn.Sequential(
                nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the slices."""
        if self.kind == "max":
            return x.amax(1)
        if self.kind == "mean":
            return x.mean(1)
        return (self.score(x).softmax(1) * x).sum(1)
