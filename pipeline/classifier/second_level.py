"""The second level: a small recurrent model over the classifier's features of all planes of a
series, each target's planes gated by the visible share of its organ.

It is trained on features that the classifier has of its own training series, which it knows too
well: they separate the classes better than those of any other series do. Features of the same
series by the other folds' classifiers would be free of that, but each network has features of its
own, so that a model trained on some cannot read the others; and those classifiers have been trained
on this fold's held-out patients, who would no longer be held out. So the features stay, and are
made less telling: whole features are left out and noise is added to all, there are few epochs, and
every sample is another sub-sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from ..learning.checkpoint import described, load_weights, read_metadata
from ..organs.find import Organ
from ..run import layout
from ..run.config import TrainConfig
from ..system.errors import InputError
from ..volumes.sampling import all_planes, slice_positions
from .features import plane_features, weights_digest
from .model import CnnLstm, chosen_targets, target_heads
from .predict import Trained, on_host
from .regions import organ_gates, region_planes, region_windows

KIND, CLASSIFIER = "second level", "classifier"  # in the metadata of its weights


def gated_pool(states: Tensor, scores: Tensor, gates: Tensor) -> Tensor:
    """Pool states (B, T, N, E) of N planes for each of T targets to (B, T, 2E), by gates (B, T, N)
    in 0 to 1 of which at least one is not 0.

    The first half is a mean with weights `gates * exp(scores)`, the second the maximum of gate
    times state over the planes whose gate is not 0.
    """
    weights = (scores + gates.log()).softmax(-1)
    mean = (weights[..., None] * states).sum(2)
    closed = gates[..., None] == 0
    most = (states * gates[..., None]).masked_fill(closed, float("-inf")).amax(2)
    return torch.cat([mean, most], -1)


class SecondLevel(nn.Module):
    """Features (B * R, N, C) of the planes of R regions, their numbers of planes (B * R,) and gates
    (B, T, N) of the trained targets -> logits (B, 1 or 3) by target. What lies behind the planes of
    a shorter region has gates of 0.

    `mean` and `std` (C,) are those of the features that it is trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, config: TrainConfig) -> None:
        super().__init__()
        options, targets = config.second_level, chosen_targets(config)
        hidden, self.noise = options.hidden, options.noise
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.feature_dropout = nn.Dropout1d(options.dropout)
        self.embed = nn.Sequential(nn.Linear(width, 2 * hidden), nn.ReLU())
        self.cell = nn.LSTM(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.scores = nn.Linear(4 * hidden, len(targets), bias=False)
        self.dropout = nn.Dropout(options.dropout)
        self.heads = target_heads(8 * hidden, config)
        self.regions = len(config.region_names)
        self.own_region = [config.region_number(target.region) for target in targets]

    def forward(self, features: Tensor, lengths: Tensor, gates: Tensor) -> dict[str, Tensor]:
        """Logits of each target, float32."""
        x = (features - self.mean) / self.std
        if self.training:
            x = x + self.noise * torch.randn_like(x)
        # a feature is left out of all planes: else its neighbours tell what it was
        x = self.embed(self.feature_dropout(x.transpose(1, 2)).transpose(1, 2))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.cell(packed)[0], True, total_length=x.shape[1])
        states = torch.cat([states, x], 2).unflatten(0, (-1, self.regions))  # (B, R, N, E)
        own = states[:, self.own_region]  # (B, T, N, E)
        scores = torch.einsum("btne,te->btn", own, self.scores.weight)
        pooled = self.dropout(gated_pool(own, scores, gates))
        return {name: head(pooled[:, k]) for k, (name, head) in enumerate(self.heads.items())}


def gated_sequences(
    features: Tensor,
    organs: Sequence[Organ],
    depth: int,
    config: TrainConfig,
    rng: np.random.Generator | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of features (N, C) of all planes of all regions of a volume of `depth` planes those of each
    region (N_r, C) float32, and the gates (N_r,) of each trained target in its region; with an
    `rng` those of as many planes as it draws, from half of them to all, one of each of equal parts.
    """
    gates, parts, numbers, start = organ_gates(organs, depth, config), [], [], 0
    for first, end in region_planes(organs, depth, config):
        planes = np.arange(N := end - first)
        if rng is not None:
            planes = slice_positions(N, int(rng.integers(-(-N // 2), N, endpoint=True)), rng)
        parts.append(features[torch.from_numpy(start + planes)].float())
        numbers.append(first + planes)
        start += N
    own = [
        gates[k, numbers[config.region_number(target.region)]]
        for k, target in enumerate(chosen_targets(config))
    ]
    # where the planes drawn show nothing of the organ they count alike
    return parts, [torch.from_numpy(one if one.any() else np.ones_like(one)) for one in own]


def as_gated_batch(
    samples: Sequence[tuple[list[Tensor], list[Tensor]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What `SecondLevel` takes, of samples of `gated_sequences`; the numbers of planes stay on the
    CPU.
    """
    parts = [part for regions, _ in samples for part in regions]
    features = pad_sequence(parts, batch_first=True)
    gates = pad_sequence([one for _, own in samples for one in own], batch_first=True)
    gates = nn.functional.pad(gates, (0, features.shape[1] - gates.shape[1]))
    lengths = torch.tensor([len(part) for part in parts])
    return features.to(device), lengths, gates.unflatten(0, (len(samples), -1)).to(device)


@torch.inference_mode()
def second_logits(
    second: SecondLevel,
    features: Tensor,
    organs: Sequence[Organ],
    depth: int,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """Logits (1, 1 or 3) by target of a series with features (N, C) of all planes."""
    sample = gated_sequences(features, organs, depth, config)
    return second(*as_gated_batch([sample], second.mean.device))


def logits_of_volume(
    pairs: Sequence[tuple[CnnLstm, SecondLevel]],
    volume: np.ndarray,
    options: TrainConfig,
    organs: Sequence[Organ] = (),
    each: Callable[..., Iterable[Any]] = map,
) -> list[dict[str, Tensor]]:
    """For each classifier with its second level the logits by target (1, 1 or 3) on the CPU of a
    volume (D, H, W) uint8 with these `organs`. `each` maps over the pairs.
    """
    windows = region_windows(organs, volume.shape, options)
    device = next(pairs[0][0].parameters()).device
    pictures = torch.from_numpy(all_planes(volume, options, windows)).to(device)

    def answer(pair: tuple[CnnLstm, SecondLevel]) -> dict[str, Tensor]:
        features = plane_features(pair[0], pictures, options.amp)
        return second_logits(pair[1], features, organs, len(volume), options)

    return on_host(list(each(answer, pairs)))


def load_second_level(path: Path, classifier: CnnLstm) -> SecondLevel:
    """The second level in a file of stage 06, ready to predict, on the device of its classifier.

    Raises:
        InputError: not a second level of this project, or of another classifier.
    """
    maker = layout.script(layout.CLASSIFIERS)
    config = described(path, Trained, f"{KIND} of stage 06", maker)
    if read_metadata(path).get(CLASSIFIER) != weights_digest(classifier):
        raise InputError("it is of another classifier's features", str(path), f"run {maker} again")
    second = SecondLevel(classifier.norm.normalized_shape[0], config.train)
    load_weights(second, path)
    return second.to(next(classifier.parameters()).device).eval()
