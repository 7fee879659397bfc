"""Mixup and cutmix over the volumes of a batch: each is mixed with the next, truths and all."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..run.config import TrainConfig
from .loss import InjuryLoss

Box = tuple[slice, slice]  # rows and columns of a plane
TRUTHS = ("labels", "planes", "known", "visible")


def cut_box(height: int, width: int, share: float, rng: np.random.Generator) -> Box:
    """Rows and columns of a box of `share` of a plane, its centre anywhere in it, cut at its
    border.
    """
    box = []
    for side in (height, width):
        length, centre = round(side * math.sqrt(share)), int(rng.integers(side))
        start = centre - length // 2
        box.append(slice(max(0, start), min(side, start + length)))
    return box[0], box[1]


def mix_volumes(
    volumes: Tensor, config: TrainConfig, rng: np.random.Generator
) -> tuple[Tensor, float, Box | None]:
    """Volumes (B, P, H, W) float, each mixed with the next one (b + 1 modulo B), the share that is
    its own, the same for the batch, and the box that is the next one's, None where they were added;
    as they are, 1 and None, where both keys are 0.

    Mixup adds them by a share out of Beta(alpha, alpha); cutmix puts the next one's pixels into one
    box of all planes. Where both keys are set a coin chooses.
    """
    if not config.mixup and not config.cutmix:
        return volumes, 1.0, None
    following = volumes.roll(-1, 0)
    if config.mixup and not (config.cutmix and rng.random() < 0.5):
        share = float(rng.beta(config.mixup, config.mixup))
        return volumes.lerp(following, 1 - share), share, None
    _, _, H, W = volumes.shape
    rows, columns = cut_box(H, W, 1 - rng.beta(config.cutmix, config.cutmix), rng)
    mixed = volumes.clone()
    mixed[..., rows, columns] = following[..., rows, columns]
    share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (H * W)
    return mixed, share, (rows, columns)


def mixed_terms(
    loss: InjuryLoss,
    outputs: tuple[dict[str, Tensor], Sequence[Tensor]],
    batch: dict[str, Tensor],
    share: float,
    full: int,
) -> dict[str, Tensor]:
    """Loss terms of volumes of which `share` is their own: that share of the loss against their own
    truths and the rest against the next one's, each with its own sample weight.
    """
    truths = {name: batch[name] for name in TRUTHS if name in batch}
    terms = loss(outputs, **truths, batch=full)
    if share == 1:
        return terms
    following = {name: truth.roll(-1, 0) for name, truth in truths.items()}
    others = loss(outputs, **following, batch=full)
    return {name: share * terms[name] + (1 - share) * others[name] for name in terms}
