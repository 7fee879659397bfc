"""What the segmenter is trained with and what it is judged by: soft Dice with cross-entropy, and
Dice of label maps.
"""

import numpy as np
from torch import Tensor
from torch.nn import functional

SMOOTH = 1.0  # pixels: an organ that a batch lacks and the network does not see costs nothing


def soft_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - mean Dice over the organs (background apart), each over the whole batch.

    Args:
        logits: (N, 1 + C, h, w), background first.
        truth: (N, h, w, 1 + C), one-hot.
    """
    shares = logits.softmax(1)[:, 1:]
    truth = truth[..., 1:].movedim(-1, 1)
    both = (shares * truth).sum((0, 2, 3))
    sizes = shares.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return 1 - ((2 * both + SMOOTH) / (sizes + SMOOTH)).mean()


def organ_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The terms `dice` and `entropy` (scalars), summed with equal weights.

    A pixel weighs in the cross-entropy by one over the root of the pixels that its class has in the
    batch: with equal weights some runs never learnt the spleen or the kidneys, one pixel in a
    hundred, whose share had gone to 0 everywhere before soft Dice had a slope.
    """
    labels = labels.long()
    truth = functional.one_hot(labels, logits.shape[1])
    weights = truth.sum((0, 1, 2)).clamp_min(1).float().rsqrt()
    entropy = functional.cross_entropy(logits, labels, weights)
    return {"dice": soft_dice(logits, truth), "entropy": entropy}


def dice_scores(found: np.ndarray, truth: np.ndarray, organs: int) -> list[float | None]:
    """Dice of each organ 1 to `organs` in two label maps of one shape; None where neither has
    it.
    """
    pairs = np.bincount(
        (truth.astype(np.int64) * (organs + 1) + found).ravel(), minlength=(organs + 1) ** 2
    ).reshape(organs + 1, organs + 1)
    sizes = pairs.sum(0) + pairs.sum(1)
    return [
        2 * int(pairs[k, k]) / int(sizes[k]) if sizes[k] else None for k in range(1, organs + 1)
    ]
