"""What `train.dice_loss` adds to training: a decoder on the classifier's own backbone finds the
organs of the series that have masks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..learning.backbone import Taps
from ..organs.loss import organ_terms
from ..organs.model import Decoder
from ..run.config import TrainConfig
from .mix import Box

WIDTH = 16  # channels of the decoder's finest map


def sources(masked: Sequence[bool], share: float) -> list[tuple[int, int, float, bool]]:
    """What masks say of volumes each of which is mixed with the next: volume, the series whose mask
    it is, its share, and whether that is the next one.
    """
    pairs = [
        (b, (b + following) % len(masked), 1 - share if following else share, following)
        for b in range(len(masked))
        for following in (False, True)
    ]
    return [pair for pair in pairs if masked[pair[1]] and pair[2]]


def pixels(values: Tensor, box: Box | None, inside: bool) -> Tensor:
    """Those of (..., h, w) in a box, or all others, (..., P, 1); without a box as they are."""
    if box is None:
        return values
    rows, columns = box
    every, above, below = slice(None), slice(0, rows.start), slice(rows.stop, None)
    left, right = slice(0, columns.start), slice(columns.stop, None)
    around = [(above, every), (below, every), (rows, left), (rows, right)]
    parts = [values[..., y, x].flatten(-2) for y, x in ([box] if inside else around)]
    return torch.cat(parts, -1)[..., None]


class OrganDecoder(Decoder):
    """Decoder on the maps that a classifier's backbone makes in its own forward pass. It is trained
    beside the classifier and no part of it.
    """

    def __init__(self, backbone: nn.Module, config: TrainConfig) -> None:
        size, training = config.image_size, backbone.training
        taps = Taps(backbone)
        backbone.eval()(torch.zeros(1, config.channels, size, size))
        backbone.train(training)
        super().__init__([one.shape[1] for one in taps.maps(size)], WIDTH)
        self.taps, self.size = taps, size

    def forward(
        self, batch: Mapping[str, Tensor], share: float = 1.0, box: Box | None = None
    ) -> Tensor:
        """The loss of stage 05, Dice and cross-entropy over all planes of a volume, summed over the
        volumes of the backbone's last forward pass: a scalar float32, 0 without masks.

        Args:
            batch: where there are masks, `masked` (B,) on the CPU and `organs` (M, slices, h, w)
                uint8 of the M series that have one; all others are left out.
            share, box: how the volumes were mixed, see `mix_volumes`. A mask counts with its share,
                and of a cut volume in its own pixels alone.
        """
        maps = self.taps.maps(self.size)
        masked = batch["masked"].tolist() if "masked" in batch else []
        if not (told := sources(masked, share)):
            return self.head.weight.new_zeros(())
        chosen = sorted({b for b, *_ in told})
        parts = [one.unflatten(0, (len(masked), -1)) for one in maps]
        logits = self.decode(
            [torch.cat([one[b] for b in chosen]) for one in parts], (self.size, self.size)
        )
        found = dict(zip(chosen, logits.unflatten(0, (len(chosen), -1)), strict=True))
        own = [b for b, known in enumerate(masked) if known]
        truths, total = dict(zip(own, batch["organs"], strict=True)), logits.new_zeros(())
        with torch.autocast(logits.device.type, enabled=False):
            for b, one, part, inside in told:
                seen, truth = (pixels(of, box, inside) for of in (found[b], truths[one]))
                total = total + part * sum(organ_terms(seen, truth).values())
        return total
