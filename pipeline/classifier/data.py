"""Samples of stage 06: slices spread over a stored volume, with the labels of its patient and of
its slices.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.utils.data import Dataset, default_collate

from ..competition.targets import ABDOMEN, COLUMNS, SLICE_TARGETS
from ..learning.loaders import loaded
from ..organs.find import Organ
from ..run import layout
from ..run.config import TrainConfig
from ..run.room import train_batch_bytes
from ..system.frames import read_frame
from ..volumes.sampling import (
    Window,
    bins,
    even_slices,
    moved_to,
    plane_range,
    slice_positions,
    take_slices,
    with_neighbours,
)
from .augment import NO_MASKS, VolumeAugment
from .model import visible_targets
from .regions import region_planes, region_windows, visible_shares

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


def positive_share(series: Sequence["Series"], config: TrainConfig) -> np.ndarray:
    """Share (2,) of positives among the slices sampled of each series whose labels are known, with
    regions among those of the abdomen.
    """
    shares, place = [], config.region_number(ABDOMEN)
    count = config.region_slices[place]
    for one in series:
        first, end = region_planes(one.organs, len(one.planes), config)[place]
        shares.append(bin_labels(one.planes[first:end], count).mean(0))
    planes = np.stack(shares)
    known = np.stack([one.known for one in series])
    return (planes * known).sum(0) / np.maximum(known.sum(0), 1)


@dataclass(frozen=True)
class Series:
    """One volume of the index with its targets: `labels` (13,) one-hot, `planes` (D, 2), `known`
    (2,) where slice labels can be trusted, `organs` as stage 05 found them, where they are needed,
    `mask`, a file (D, H, W) uint8 of organ numbers from 1, where `train.dice_loss` learns from one.
    """

    patient_id: str
    series_id: str
    path: Path
    labels: np.ndarray
    planes: np.ndarray
    known: np.ndarray
    organs: tuple[Organ, ...] = ()
    mask: Path | None = None


def labelled_series(
    folder: Path,
    labels: pl.DataFrame,
    slice_labels: pl.DataFrame | None,
    organs: Mapping[str, tuple[Organ, ...]] = MappingProxyType({}),
    masks: Mapping[str, Path] = MappingProxyType({}),
) -> list[Series]:
    """The competition's volumes of `folder`'s index, joined with patient labels and, where there
    are any, slice labels, `organs` by series id and `masks` by the volume's name.

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
        _series(
            row,
            folder,
            marks.get((row["patient_id"], row["series_id"]), []),
            organs.get(row["series_id"], ()),
            masks.get(row["path"]),
        )
        for row in index.iter_rows(named=True)
    ]


def _series(
    row: dict[str, Any],
    folder: Path,
    marks: list[tuple[int, int]],
    organs: tuple[Organ, ...],
    mask: Path | None,
) -> Series:
    planes = plane_labels(row["plane_instances"], marks, row["depth"])
    healthy = np.array([row[f"{name}_healthy"] for name in SLICE_TARGETS], np.float32)
    return Series(
        row["patient_id"],
        row["series_id"],
        folder / row["path"],
        np.array([row[column] for column in COLUMNS], np.float32),
        planes,
        np.maximum(healthy, planes.max(0)),
        organs,
        mask,
    )


class SeriesDataset(Dataset):
    """Map-style data set: (epoch, index, ...) -> arrays: `slices` (slices * channels, h, w) uint8,
    those of `train.region_slices` one region after another, and the channels of a slice, `labels`
    (13,), `planes` (S, 2), with regions those of the abdomen, `known` (2,), `visible` (targets, S)
    of `visible_targets`, each in its region, `item`; with an `augment`, of a series with a mask,
    `organs` (slices, h, w) uint8, the organ numbers in the plane of each slice.

    With an `augment` the sample is a pure function of the seed and its key, so a resumed run draws
    what it would have drawn, in any number of workers, and one set of workers serves all epochs.
    All regions of it are augmented alike. Without, several `phases` give `slices` (phases,
    slices * channels, h, w).
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
        windows, masks = region_windows(series.organs, volume.shape, config), NO_MASKS
        if augment := self._augment:
            seed = int(np.random.SeedSequence((self.seed, *key)).generate_state(1)[0])
            parts = zip(windows, config.region_slices, strict=True)
            drawn = [self._drawn(volume, series, *part, seed) for part in parts]
            moved = [augment(pictures, truth, seed, own) for pictures, truth, own in drawn]
            slices, masks = (np.concatenate([one[k] for one in moved]) for k in (0, 2))
            truths = [one[1] for one in moved]
        else:
            slices = even_slices(volume, config, self.phases, windows)
            middles = list(map(partial(self._positions, series), windows, config.region_slices))
            truths = list(map(partial(self._truths, series), windows, middles))
        own = [truths[config.region_number(one.region)] for one in visible_targets(config)]
        visible = [truth[:, len(SLICE_TARGETS) + k] for k, truth in enumerate(own)]
        return {
            **({"organs": masks} if len(masks) else {}),
            "slices": slices,
            "labels": series.labels,
            "planes": truths[config.region_number(ABDOMEN)][:, : len(SLICE_TARGETS)],
            "known": series.known,
            "visible": np.array(visible, np.float32).reshape(-1, config.slices),
            "item": np.int64(index),
        }

    def _positions(
        self, series: Series, window: Window | None, count: int, seed: int | None = None
    ) -> np.ndarray:
        """`count` planes (S,) of a window, or of the whole volume: with a `seed` those for
        training, else the middles of their bins.
        """
        config = self.config
        first, end = plane_range(window, len(series.planes))
        jittered = seed is not None and config.augment.z_jitter
        jitter = np.random.default_rng(seed) if jittered else None
        positions = slice_positions(end - first, count, jitter)
        positive = np.flatnonzero(series.planes[first:end].any(1))
        if seed is not None and len(positive) and not np.isin(positions, positive).any():
            draw = np.random.default_rng((seed, SHOWN))
            if draw.random() < config.positive_slices:
                positions = moved_to(positions, int(draw.choice(positive)), end - first)
        return first + positions

    def _truths(self, series: Series, window: Window | None, positions: np.ndarray) -> np.ndarray:
        """Of each of the planes at `positions` (S,) the slice labels of its bin and the share of
        each of `visible_targets`' organs: (S, 2 + targets).
        """
        first, end = plane_range(window, depth := len(series.planes))
        marks = bin_labels(series.planes[first:end], len(positions))
        shares = visible_shares(series.organs, depth, self.config)[:, positions]
        return np.concatenate([marks, shares.T], 1)

    def _drawn(
        self, volume: np.ndarray, series: Series, window: Window | None, count: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slices (S * channels, h, w) for training, before augmentation, their `_truths`, and the
        organs (S, h, w) in their own planes, none without a mask.
        """
        config, masks = self.config, NO_MASKS
        positions = self._positions(series, window, count, seed)
        around = with_neighbours(positions, len(volume), config.channels)
        place = np.random.default_rng((seed, PLACE))
        slices = take_slices(volume, around, config, place, window)
        if config.dice_loss and series.mask is not None:
            place = np.random.default_rng((seed, PLACE))  # the same once more
            organs = np.load(series.mask, mmap_mode="r")
            masks = take_slices(organs, positions, config, place, window, labels=True)
        return slices, self._truths(series, window, positions), masks


class FoldSeries(Dataset):
    """Training series by (epoch, index, ...) and held-out ones by (HELD_OUT, index), so that one
    set of workers reads both.
    """

    def __init__(self, training: SeriesDataset, held_out: SeriesDataset) -> None:
        self.training, self.held_out, self.config = training, held_out, training.config
        self.phases = held_out.phases

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        return self.held_out[0, key[1]] if key[0] == HELD_OUT else self.training[key]


def collated(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of samples; where some of them have `organs`, `masked` (B,) says which, and `organs`
    (M, slices, h, w) are those of these M alone.
    """
    found = [one.pop("organs", None) for one in samples]
    batch = default_collate(samples)
    if known := [one for one in found if one is not None]:
        batch["organs"] = torch.from_numpy(np.stack(known))
        batch["masked"] = torch.tensor([one is not None for one in found])
    return batch


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
    config = dataset.config
    return loaded(
        dataset,
        len(plan),
        config.workers,
        train_batch_bytes(config, dataset.phases),
        "train.workers",
        pinned=device.type == "cuda",
        waiting=waiting,
        sharing=sharing,
        batch_sampler=plan,
        collate_fn=collated,
    )
