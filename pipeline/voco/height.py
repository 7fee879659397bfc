"""Regression of height: how far down its volume a crop lies."""

import numpy as np
import torch
from torch import nn

from . import baselines
from .data import Batch, VocoSamples, evaluation_batches
from .method import OneNetwork
from .model import VocoNet


class HeightNet(nn.Module):
    """2D-VoCo's network and a linear layer to one number."""

    def __init__(self, net: VocoNet, width: int) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(width, 1)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 (B, P, S, h, w) -> heights (B, G, P) float32 of G slabs or slices."""
        return self.head(self.net(crops)).float()[..., 0]


class Height(OneNetwork):
    """Regresses the height of every slab where `pretrain.z_bins` is above 1, of every slice
    otherwise: 0 is the first plane of the volume, 1 its last.
    """

    stats = ("loss",)
    merit = "height_r2"
    student: HeightNet

    def network(self) -> HeightNet:
        """2D-VoCo's with a height on top."""
        options = self.options
        pool = "clip" if options.z_bins > 1 else "slice"
        net = VocoNet(self.first_backbone(), options.crop, options.width, pool, options.z_bins)
        return HeightNet(net, options.width)

    @property
    def backbone(self) -> nn.Module:
        """That of 2D-VoCo's network."""
        return self.student.net.backbone

    @property
    def _groups(self) -> int:
        """Slabs or slices whose height is asked."""
        return self.options.z_bins if self.options.z_bins > 1 else self.options.slices

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared error."""
        found = self.output(self.distributed_student, batch)  # (B, G, P)
        heights = batch["heights"].to(self.world.device, non_blocking=True)  # (B, S)
        wanted = heights.unflatten(1, (self._groups, -1)).mean(2)[..., None]
        loss = (found - wanted).square().mean()
        return loss, loss.detach()[None]

    def _task(self, sample: Batch) -> baselines.Task:
        """All crops of one volume, and the heights (G * P, 1) of their slabs or slices."""
        heights = sample["heights"].reshape(self._groups, -1).mean(1)
        return sample["crops"], self._groups, heights.repeat(len(sample["crops"]))[:, None]

    @torch.no_grad()
    def evaluate(self, samples: VocoSamples) -> dict[str, float]:
        """The share of the variance of heights that is explained on held-out volumes."""
        self.student.eval()
        found, wanted = [], []
        for batch in evaluation_batches(samples, baselines.CROPS):
            found.append(self.output(self.student, batch)[0].cpu().numpy().reshape(-1, 1))
            only = {name: batch[name][0].numpy() for name in ("crops", "heights")}
            wanted.append(self._task(only)[2])
        self.student.train()
        return {"height_r2": r2(np.concatenate(wanted), np.concatenate(found))}

    def baselines(self, training: VocoSamples, held: VocoSamples) -> dict[str, float]:
        """The same of pictures of 8 x 8 cells and regression trees."""
        wanted, found = baselines.regressed(training, held, self._task)
        return {f"{name}_height_r2": r2(wanted, said) for name, said in found.items()}


def r2(wanted: np.ndarray, found: np.ndarray) -> float:
    """Coefficient of determination; 0 is the mean height."""
    from sklearn.metrics import r2_score

    return float(r2_score(wanted, found))
