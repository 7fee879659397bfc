"""Samples of stage 06: slices spread over a stored volume, with the labels of its patient and of
its slices.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.utils.data import Dataset

from ..competition.targets import COLUMNS, SLICE_TARGETS
from ..learning.loaders import batches_of, make_loader
from ..run import layout
from ..run.config import TrainConfig
from ..run.room import loaders, train_batch_bytes
from ..system.frames import read_frame
from ..volumes.sampling import (
    bins,
    even_slices,
    moved_to,
    slice_positions,
    take_slices,
    with_neighbours,
)
from .augment import VolumeAugment

SLICE_NAMES = {name: column for column, name in enumerate(SLICE_TARGETS.values())}
HELD_OUT = -1  # in place of an epoch
# tell the draws of the crop's place and of positive slices from the others of a sample's seed
PLACE, SHOWN = 1, 3


def plane_labels(
    instances: Sequence[int], labelled: Sequence[tuple[int, int]], depth: int
) -> np.ndarray:
    """Slice labels (D, 2) of a volume whose planes lie nearest to the slices `instances` (D,): each
    labelled (instance number, column of `SLICE_TARGETS`) marks its nearest planes, of a stack with
    fewer slices than planes all that one slice became.
    """
    labels = np.zeros((depth, len(SLICE_TARGETS)), np.float32)
    known = np.asarray(instances)
    for instance, column in labelled:
        away = np.abs(known - instance)
        labels[away == away.min(), column] = 1
    return labels


def bin_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Plane labels (D, 2) to (count, 2): a sampled slice carries the label of any plane in its
    bin.
    """
    return np.maximum.reduceat(labels, bins(len(labels), count)[0])


def positive_share(series: Sequence["Series"], count: int) -> np.ndarray:
    """Share (2,) of positives among the `count` slices sampled of each series whose labels are
    known.
    """
    planes = np.stack([bin_labels(one.planes, count).mean(0) for one in series])
    known = np.stack([one.known for one in series])
    return (planes * known).sum(0) / np.maximum(known.sum(0), 1)


@dataclass(frozen=True)
class Series:
    """One volume of the index with its targets: `labels` (13,) one-hot, `planes` (D, 2), `known`
    (2,) where slice labels can be trusted.
    """

    patient_id: str
    series_id: str
    path: Path
    labels: np.ndarray
    planes: np.ndarray
    known: np.ndarray


def labelled_series(
    folder: Path, labels: pl.DataFrame, slice_labels: pl.DataFrame | None
) -> list[Series]:
    """The competition's volumes of `folder`'s index, joined with patient labels and, where there
    are any, slice labels.

    A series of an injured patient without any slice label of that injury says nothing about its
    slices: not `known`.
    """
    index = read_frame(folder / layout.INDEX).filter(pl.col("source") == "train")
    # a resumed run must find the same order
    index = index.join(labels, on="patient_id", how="inner", maintain_order="left")
    marks: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row in slice_labels.iter_rows(named=True) if slice_labels is not None else ():
        if row["injury_name"] in SLICE_NAMES:
            marks.setdefault((row["patient_id"], row["series_id"]), []).append(
                (row["instance_number"], SLICE_NAMES[row["injury_name"]])
            )
    return [
        _series(row, folder, marks.get((row["patient_id"], row["series_id"]), []))
        for row in index.iter_rows(named=True)
    ]


def _series(row: dict[str, Any], folder: Path, marks: list[tuple[int, int]]) -> Series:
    planes = plane_labels(row["plane_instances"], marks, row["depth"])
    healthy = np.array([row[f"{name}_healthy"] for name in SLICE_TARGETS], np.float32)
    return Series(
        row["patient_id"],
        row["series_id"],
        folder / row["path"],
        np.array([row[column] for column in COLUMNS], np.float32),
        planes,
        np.maximum(healthy, planes.max(0)),
    )


class SeriesDataset(Dataset):
    """Map-style data set: (epoch, index, ...) -> arrays: `slices` (S * channels, h, w) uint8, the
    channels of a slice one after another, `labels` (13,), `planes` (S, 2), `known` (2,), `item`.

    With an `augment` the sample is a pure function of the seed and its key, so a resumed run draws
    what it would have drawn, in any number of workers, and one set of workers serves all epochs.
    Without, several `phases` give `slices` (phases, S * channels, h, w).
    """

    def __init__(
        self,
        series: Sequence[Series],
        config: TrainConfig,
        seed: int = 0,
        augment: bool = False,
        phases: int = 1,
    ) -> None:
        self.series, self.config, self.seed, self.phases = list(series), config, seed, phases
        self._augment = VolumeAugment(config.augment, config.image_size) if augment else None

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        index = key[1]
        series, config = self.series[index], self.config
        volume = np.load(series.path, mmap_mode="r")
        planes = bin_labels(series.planes, config.slices)
        if self._augment:
            seed = int(np.random.SeedSequence((self.seed, *key)).generate_state(1)[0])
            slices, planes = self._augment(self._drawn(volume, series, seed), planes, seed)
        else:
            slices = even_slices(volume, config, self.phases)
        return {
            "slices": slices,
            "labels": series.labels,
            "planes": planes,
            "known": series.known,
            "item": np.int64(index),
        }

    def _drawn(self, volume: np.ndarray, series: Series, seed: int) -> np.ndarray:
        """Slices (S * channels, h, w) for training, before augmentation."""
        config, depth = self.config, len(volume)
        jitter = np.random.default_rng(seed) if config.augment.z_jitter else None
        positions = slice_positions(depth, config.slices, jitter)
        draw, positive = np.random.default_rng((seed, SHOWN)), np.flatnonzero(series.planes.any(1))
        missed = len(positive) and not np.isin(positions, positive).any()
        if missed and draw.random() < config.positive_slices:
            positions = moved_to(positions, int(draw.choice(positive)), depth)
        place = np.random.default_rng((seed, PLACE))
        return take_slices(
            volume, with_neighbours(positions, depth, config.channels), config, place
        )


class FoldSeries(Dataset):
    """Training series by (epoch, index, ...) and held-out ones by (HELD_OUT, index), so that one
    set of workers reads both.
    """

    def __init__(self, training: SeriesDataset, held_out: SeriesDataset) -> None:
        self.training, self.held_out, self.config = training, held_out, training.config
        self.phases = held_out.phases

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        return self.held_out[0, key[1]] if key[0] == HELD_OUT else self.training[key]


def series_batches(
    dataset: SeriesDataset | FoldSeries,
    plan: list[list[tuple[int, ...]]],
    device: torch.device,
    waiting: Callable[[], object] = lambda: None,
    sharing: int = 1,
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Batches of `dataset` by the keys of `plan`, for one of `sharing` processes that train at
    once; `waiting` is called while one is waited for.
    """
    gpu, config = device.type == "cuda", dataset.config
    need = train_batch_bytes(config, dataset.phases)
    most = loaders(config.workers, need, "train.workers", gpu, sharing)
    loader = make_loader(dataset, min(most, len(plan)), gpu, batch_sampler=plan)
    return batches_of(loader, waiting)
