"""What a fold reads and in which order: the keys of each epoch's batches, and the one stream of
them that serves a sitting.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..run.config import Config, TrainConfig
from ..system.machine import world_size
from ..system.processes import parent_stage
from .data import HELD_OUT, FoldSeries, Series, SeriesDataset, series_batches
from .fold import FoldData
from .model import chosen_columns

Key = tuple[int, ...]  # (epoch, index), of the n-th repetition in an epoch (epoch, index, n)


def rarity_weights(series: Sequence[Series], config: TrainConfig) -> np.ndarray:
    """How often each series (N,) is drawn, 1 on average: the share of patients with its patient's
    rarest class among the trained targets, to the power of -`train.rarity`.
    """
    labels = np.stack([one.labels for one in series])[:, chosen_columns(config)]
    _, first = np.unique([one.patient_id for one in series], return_index=True)
    rarest = np.where(labels > 0, labels[first].mean(0), 1).min(1)
    weights = rarest.astype(float) ** -config.rarity
    return weights / weights.mean()


def numbered(epoch: int, order: Sequence[int]) -> Iterator[Key]:
    """The keys of an epoch's samples in their order: a series drawn again is augmented anew."""
    seen: Counter[int] = Counter()
    for index in order:
        yield (epoch, index, seen[index]) if seen[index] else (epoch, index)
        seen[index] += 1


class FoldBatches:
    """The batches of one fold; `waiting` is called while one is waited for."""

    def __init__(
        self,
        config: Config,
        data: FoldData,
        device: torch.device,
        waiting: Callable[[], object],
    ) -> None:
        self.config, self.options, self.data = config, config.train, data
        self.device, self.waiting = device, waiting
        self.training = SeriesDataset(
            data.train, self.options, config.seed + data.fold, augment=True
        )
        self.weights = rarity_weights(data.train, self.options)
        self._stream: Generator[dict[str, Tensor], None, None] | None = None
        # held-out batches that stand in the stream after the training batches of this epoch
        self._held_out_due = 0

    def close(self) -> None:
        """End the stream and its processes."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def plan(self, epoch: int) -> list[list[Key]]:
        """Keys of an epoch's micro-batches, in an order that is a pure function of (seed, fold,
        epoch): all series once, or with `train.rarity` as many drawn by their weights.
        """
        rng = np.random.default_rng((self.config.seed, self.data.fold, epoch))
        count, size = len(self.weights), self.options.batch
        if self.options.rarity:
            order = rng.choice(count, count, p=self.weights / count)
        else:
            order = rng.permutation(count)
        keys = list(numbered(epoch, order.tolist()))
        return [keys[i : i + size] for i in range(0, count, size)]

    def validates(self, epoch: int) -> bool:
        """Whether a score of the held-out patients follows an epoch (from 0)."""
        return (epoch + 1) % self.options.eval_every == 0 or epoch + 1 == self.options.epochs

    def _held_out_plan(self, phases: int = 1) -> list[list[Key]]:
        """Keys of the batches of all held-out series: twice as large as those of the training, for
        they need no gradients.
        """
        keys: list[Key] = [(HELD_OUT, k) for k in range(len(self.data.held_out))]
        size = max(1, 2 * self.options.batch // phases)
        return [keys[i : i + size] for i in range(0, len(keys), size)]

    def _after(self, epoch: int) -> list[list[Key]]:
        """Keys of the held-out batches that follow an epoch in the stream."""
        return self._held_out_plan() if self.validates(epoch) else []

    def of_epoch(self, epoch: int, steps: int) -> Iterator[list[dict[str, Tensor]]]:
        """Lists of up to `accumulate` micro-batches of an epoch of which `steps` are done."""
        stream = self._opened(epoch, steps)
        for _ in range(self._held_out_due):  # of an epoch whose score nobody asked for
            next(stream)
        self._held_out_due = len(self._after(epoch))
        left = len(self.plan(epoch)) - steps * self.options.accumulate
        while left > 0:
            yield list(itertools.islice(stream, min(self.options.accumulate, left)))
            left -= self.options.accumulate

    def held_out(self, epoch: int, through: bool) -> Iterator[dict[str, Tensor]]:
        """All held-out series, out of the stream where it has come `through` the epoch to them."""
        plan = self._after(epoch)
        if plan and through and (self._stream is None or self._held_out_due):
            self._held_out_due = 0
            return itertools.islice(self._opened(epoch, len(self.plan(epoch))), len(plan))
        return self.held_out_alone()

    def held_out_alone(self, phases: int = 1) -> Generator[dict[str, Tensor], None, None]:
        """All held-out series in `phases`, loaded by themselves."""
        return self._loaded(self._held_out_plan(phases), phases)

    def _opened(self, epoch: int, steps: int) -> Generator[dict[str, Tensor], None, None]:
        """The one stream of a sitting, from where the epoch under way has come to: each epoch's
        training batches and then, where it has a score, held-out ones. Its workers start once and
        work ahead.
        """
        if self._stream is None:
            plan = [
                batch
                for one in range(epoch, self.options.epochs)
                for batch in (*self.plan(one), *self._after(one))
            ]
            done = min(steps * self.options.accumulate, len(self.plan(epoch)))
            self._stream = self._loaded(plan[done:])
        return self._stream

    def _loaded(
        self, plan: list[list[Key]], phases: int = 1
    ) -> Generator[dict[str, Tensor], None, None]:
        """The batches of a plan; several processes may train on this machine at once and share what
        there is of it.
        """
        both = FoldSeries(
            self.training, SeriesDataset(self.data.held_out, self.options, phases=phases)
        )
        sharing = self.config.folds.count if parent_stage() else world_size()
        return series_batches(both, plan, self.device, self.waiting, sharing)
