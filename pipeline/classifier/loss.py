"""The loss of the five targets, weighted as the score weighs them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..competition.targets import Target, group_slices
from ..run.config import TrainConfig
from .model import chosen_targets, visible_targets


class InjuryLoss(nn.Module):
    """Sample-weighted cross entropy of every trained target, summed over targets (the metric's
    weights).

    A target's terms are divided by batch size times the mean sample weight of the training set: a
    constant, so that the sum over micro-batches equals the loss of the large batch. With
    `train.slice_weight` a positive slice weighs as many times as negatives are more, at most that;
    `positives` (2,) is their share in the training set, and the mean weight of a slice stays 1.
    """

    slice_positive: Tensor | None
    slice_scale: Tensor

    def __init__(
        self, config: TrainConfig, labels: np.ndarray, positives: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.targets, self.columns, self.slice_loss = (
            chosen_targets(config),
            group_slices(),
            config.slice_loss,
        )
        self.organs, self.visible_loss = visible_targets(config), config.visible_loss
        for target in self.targets:
            weights = torch.tensor(target.weights)
            self.register_buffer(f"weights_{target.name}", weights, persistent=False)
            share = torch.as_tensor(labels[:, self.columns[target.name]], dtype=torch.float32).mean(
                0
            )
            self.register_buffer(
                f"scale_{target.name}", (share * weights).sum().clamp_min(1e-6), persistent=False
            )
        positive, scale = None, torch.ones(2)
        if config.slice_weight > 1 and positives is not None:
            rare = torch.as_tensor(positives, dtype=torch.float32).clamp_min(1e-9)
            positive = (1 / rare - 1).clamp(1, config.slice_weight)
            scale = rare * positive + 1 - rare
        self.register_buffer("slice_positive", positive, persistent=False)
        self.register_buffer("slice_scale", scale, persistent=False)

    def forward(
        self,
        outputs: tuple[dict[str, Tensor], Sequence[Tensor]],
        labels: Tensor,
        planes: Tensor,
        known: Tensor,
        batch: int,
        visible: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms per target name, `slices` and `visible`; `labels` (B, 13), `planes` (B, S, 2),
        `known` (B, 2), `batch` the full batch's size, `visible` (B, organs, S).
        """
        logits, slice_logits = outputs
        terms = {}
        for target in self.targets:
            truth = labels[:, self.columns[target.name]]
            weights = (truth * getattr(self, f"weights_{target.name}")).sum(1)
            entropy = weights * cross_entropy(logits[target.name].float(), truth)
            terms[target.name] = entropy.sum() / (batch * getattr(self, f"scale_{target.name}"))
        organs = [one.float() for one in slice_logits]  # none: a second level's
        if self.slice_loss and organs:
            marks = organs.pop(0)
            # (B, 2)
            entropy = F.binary_cross_entropy_with_logits(
                marks, planes, reduction="none", pos_weight=self.slice_positive
            ).mean(1)
            entropy = entropy * known / self.slice_scale
            terms["slices"] = self.slice_loss * entropy.sum() / batch
        if visible is not None and organs:
            found = zip(self.organs, organs, visible.unbind(1), strict=True)
            total = torch.stack([self._visible_sum(*one, labels) for one in found]).sum()
            terms["visible"] = self.visible_loss * total / batch
        return terms

    def _visible_sum(
        self, target: Target, logits: Tensor, visible: Tensor, labels: Tensor
    ) -> Tensor:
        """Sum over a batch of a target's mean cross entropy of slices (B, S, classes) against the
        patient's class by the organ's share `visible` (B, S) in the slice, else healthy; weighted
        and divided like the patient's. An injured patient whose organ was not found is left out.
        """
        truth = labels[:, self.columns[target.name]]
        shares = visible[..., None] * truth[:, None]
        shares = torch.cat([shares[..., :1] + 1 - visible[..., None], shares[..., 1:]], -1)
        weighted = shares * getattr(self, f"weights_{target.name}")
        entropy = -(weighted * logits.log_softmax(-1)).sum(-1).mean(1)  # (B,)
        known = (visible.amax(1) > 0) | (truth[:, 0] > 0)
        return (entropy * known).sum() / getattr(self, f"scale_{target.name}")


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """-log p of the true class, (B,): one logit is a sigmoid on `injury`, three are a softmax;
    `truth` is one-hot (B, 2 or 3).
    """
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], truth[:, 1], reduction="none")
    return -(truth * logits.log_softmax(1)).sum(1)
