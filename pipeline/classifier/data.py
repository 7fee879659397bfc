"""Samples of stage 05: slices spread over a stored volume, with the labels of its patient and of
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
from ..volumes.sampling import bins, slice_positions, take_slices
from .augment import VolumeAugment

SLICE_NAMES = {name: column for column, name in enumerate(SLICE_TARGETS.values())}
HELD_OUT = -1  # in place of an epoch
PLACE = 1  # tells the draw of the crop's place from the others of a sample's seed


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
    """Map-style data set: (epoch, index) -> arrays: `slices` (S, h, w) uint8, `labels` (13,),
    `planes` (S, 2), `known` (2,), `item`.

    With an `augment` the sample is a pure function of (seed, epoch, index), so a resumed run draws
    what it would have drawn, in any number of workers, and one set of workers serves all epochs.
    """

    def __init__(
        self, series: Sequence[Series], config: TrainConfig, seed: int = 0, augment: bool = False
    ) -> None:
        self.series, self.config, self.seed = list(series), config, seed
        self._augment = VolumeAugment(config.augment) if augment else None

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        series, config = self.series[index], self.config
        seed = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        jitter = np.random.default_rng(seed) if self._augment and config.augment.z_jitter else None
        place = np.random.default_rng((seed, PLACE)) if self._augment else None
        volume = np.load(series.path, mmap_mode="r")
        positions = slice_positions(len(volume), config.slices, jitter)
        slices = take_slices(volume, positions, config, place)
        planes = bin_labels(series.planes, config.slices)
        if self._augment:
            slices, planes = self._augment(slices, planes, seed)
        return {
            "slices": slices,
            "labels": series.labels,
            "planes": planes,
            "known": series.known,
            "item": np.int64(index),
        }


class FoldSeries(Dataset):
    """Training series by (epoch, index) and held-out ones by (HELD_OUT, index), so that one set of
    workers reads both.
    """

    def __init__(self, training: SeriesDataset, held_out: SeriesDataset) -> None:
        self.training, self.held_out, self.config = training, held_out, training.config

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        return self.held_out[0, index] if epoch == HELD_OUT else self.training[key]


def series_batches(
    dataset: SeriesDataset | FoldSeries,
    plan: list[list[tuple[int, int]]],
    device: torch.device,
    waiting: Callable[[], object] = lambda: None,
    sharing: int = 1,
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Batches of `dataset` by the keys of `plan`, for one of `sharing` processes that train at
    once; `waiting` is called while one is waited for.
    """
    gpu, config = device.type == "cuda", dataset.config
    most = loaders(config.workers, train_batch_bytes(config), "train.workers", gpu, sharing)
    loader = make_loader(dataset, min(most, len(plan)), gpu, batch_sampler=plan)
    return batches_of(loader, waiting)
