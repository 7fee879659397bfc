"""Masked reconstruction: a small decoder paints what of a crop is hidden."""

import torch
from torch import nn

from ..learning import optimise
from ..learning.backbone import feature_shape, standardise
from .baselines import CROPS
from .data import EVALUATION, Batch, VocoSamples, evaluation_batches
from .method import OneNetwork
from .model import dropout_mask

PATCHES = 8  # along a side of a crop


class MaskedNet(nn.Module):
    """Backbone, and two 1 x 1 convolutions that paint a square of pixels for each cell of its
    map.
    """

    def __init__(self, backbone: nn.Module, crop: int, width: int) -> None:
        super().__init__()
        C, h, _ = feature_shape(backbone, crop)
        side = -(-crop // h)  # pixels
        self.backbone = backbone
        self.decoder = nn.Sequential(
            nn.Conv2d(C, width, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, side * side, 1),
            nn.PixelShuffle(side),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, h, h) with what is hidden at 0 -> the whole image, (N, 1, h, h) float32."""
        painted = self.decoder(self.backbone(images)).float()
        if painted.shape == images.shape:
            return painted
        return nn.functional.interpolate(painted, images.shape[2:], mode="bilinear")


class Masked(OneNetwork):
    """Reconstructs the hidden share `pretrain.masked` of the 8 x 8 patches of every slice of every
    crop.
    """

    stats = ("loss", "explained")
    merit = "held_out_explained"
    student: MaskedNet

    def network(self) -> MaskedNet:
        """Backbone and decoder."""
        return MaskedNet(self.first_backbone(), self.options.crop, self.options.width)

    def _errors(
        self, network: nn.Module, batch: Batch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum of squared errors over hidden pixels, of the reconstruction and of the mean grey of
        what is visible of each image, and the number of these pixels; `hidden` (B, P * S, 1, 8, 8)
        bool.
        """
        crops = batch["crops"].to(self.world.device, non_blocking=True)
        images = standardise(crops).flatten(0, 2)[:, None]  # (N, 1, h, h)
        cells = hidden.flatten(0, 1).float()
        mask = nn.functional.interpolate(cells, images.shape[2:], mode="nearest")
        seen = (images * (1 - mask)).contiguous(memory_format=torch.channels_last)
        with optimise.autocast(self.world.device, self.options.amp):
            painted = network(seen)
        visible = (1 - mask).sum((2, 3), keepdim=True).clamp_min(1)
        mean = seen.sum((2, 3), keepdim=True) / visible
        painted_error, plain_error = (
            ((guess - images).square() * mask).sum() for guess in (painted, mean)
        )
        return painted_error, plain_error, mask.sum()

    def _hidden(self, batch: Batch, count: int, seed: int, step: int) -> torch.Tensor:
        """Which patches of `count` volumes are hidden, (count, P * S, 1, 8, 8) bool: a function of
        `seed` and `step`.
        """
        P, S = batch["crops"].shape[1:3]
        shape = (count, P * S, 1, PATCHES, PATCHES)
        return dropout_mask(shape, self.options.masked, seed, step, self.world.device) == 0

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared error over hidden pixels of standardised grey."""
        hidden = self._hidden(batch, self.options.batch, self.config.seed, step)
        B = len(batch["crops"])
        own = hidden[self.world.rank * B : (self.world.rank + 1) * B]
        painted, plain, pixels = self._errors(self.distributed_student, batch, own)
        # ranks hide different numbers of pixels: the mean over ranks is that over all pixels
        ours, plain, pixels = self.world.mean(torch.stack([painted.detach(), plain, pixels]))
        return painted / pixels, torch.stack([painted.detach() / pixels, 1 - ours / plain])

    @torch.no_grad()
    def evaluate(self, samples: VocoSamples) -> dict[str, float]:
        """The share of the squared error of the visible pixels' mean that the reconstruction
        removes, on held-out volumes.
        """
        self.student.eval()
        errors = []
        for number, batch in enumerate(evaluation_batches(samples, CROPS)):
            hidden = self._hidden(batch, 1, self.config.seed, EVALUATION + number)
            errors.append(torch.stack(self._errors(self.student, batch, hidden)))
        self.student.train()
        painted, plain, _ = torch.stack(errors).sum(0).tolist()
        return {"held_out_explained": 1 - painted / plain}

    def baselines(self, training: VocoSamples, held: VocoSamples) -> dict[str, float]:
        """0 by definition."""
        return {"visible_mean_held_out_explained": 0.0}
