"""SimCLR: two crops of one place are to be more alike than crops of other places and volumes."""

from collections.abc import Iterator

import torch

from . import baselines
from .data import Batch, VocoSamples, evaluation_batches
from .losses import cosine, nt_xent
from .method import OneNetwork
from .model import VocoNet, spread_of


class SimClr(OneNetwork):
    """NT-Xent over pairs of crops of one volume's place, each moved by at most an eighth of its
    side and augmented by itself; the other crops of the batch over all ranks are what it is not.
    """

    stats = ("loss", "std")
    merit = "retrieval_accuracy"
    pairs = True
    student: VocoNet

    def network(self) -> VocoNet:
        """2D-VoCo's."""
        options = self.options
        return VocoNet(
            self.first_backbone(), options.crop, options.width, options.pool, options.z_bins
        )

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """NT-Xent over the whole batch."""
        found = self.output(self.distributed_student, batch)
        first, second = twins(self.world.gather(found))
        loss = nt_xent(first, second, self.options.temperature)
        return loss, torch.stack([loss.detach(), spread_of(torch.cat([first, second])[None])])

    @torch.no_grad()
    def evaluate(self, samples: VocoSamples) -> dict[str, float]:
        """Share of held-out crops whose twin is the most similar crop of the volume."""
        self.student.eval()
        found = [
            retrieved(*twins(self.output(self.student, batch))) for batch in _held_out(samples)
        ]
        self.student.train()
        return {"retrieval_accuracy": torch.cat(found).float().mean().item()}

    def baselines(self, training: VocoSamples, held: VocoSamples) -> dict[str, float]:
        """The same of pictures of 8 x 8 cells."""
        figures = {}
        for name, picture in baselines.PICTURES.items():
            found = []
            for batch in _held_out(held):
                cells = picture(batch["crops"][0].numpy(), self.options.z_bins)
                views = torch.from_numpy(cells).unflatten(0, (self.options.z_bins, -1))
                # about their mean: the cosine of all that is bright is near 1
                centred = (views - views.mean((0, 1))).chunk(2, 1)
                found.append(retrieved(*(part.flatten(0, 1) for part in centred)))
            figures[f"{name}_retrieval_accuracy"] = torch.cat(found).float().mean().item()
        return figures


def twins(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, G, P, E), those of a place P / 2 apart, to (N, E) of the places of all volumes
    and slabs, twice.
    """
    first, second = found.chunk(2, 2)
    return first.flatten(0, 2), second.flatten(0, 2)


def _held_out(samples: VocoSamples) -> Iterator[Batch]:
    """Pairs, augmented alike at every call."""
    return evaluation_batches(samples, baselines.CROPS, augment=True)


def retrieved(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(2 N,) bool of pairs (N, E), (N, E): is the twin of each the most similar of the others?"""
    views = torch.cat([first, second])
    alike = cosine(views, views).fill_diagonal_(float("-inf"))
    return alike.argmax(1) == torch.arange(len(views), device=views.device).roll(len(first))
