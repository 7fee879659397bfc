"""Pretraining batches by memory map: what a step reads is a pure function of (seed, step, rank), so
nothing is to be restored.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.utils.data import Dataset

from ..learning.loaders import loaded
from ..learning.transforms import albumentations
from ..run import layout
from ..run.config import VocoConfig
from ..run.room import voco_batch_bytes
from ..system.errors import InputError
from ..volumes.sampling import evenly, resample_planes, resize_planes
from .crops import (
    base_boxes,
    cut,
    in_slabs,
    overlap_labels,
    random_boxes,
    turn,
    twin_boxes,
    window_of,
)

EVALUATION = 1 << 30  # the "step" of the fixed evaluation crops, which no training step reaches
Batch = dict[str, Any]


def choose_volumes(
    index: pl.DataFrame, config: VocoConfig, seed: int, excluded: frozenset[str] = frozenset()
) -> tuple[list[str], list[str]]:
    """Relative paths of training and of held-out volumes, by patient, from all sources that
    `config` wants, without the labelled patients `excluded`.

    At most a quarter of the volumes is held out.

    Raises:
        InputError: fewer volumes than one batch.
    """
    rng = np.random.default_rng([seed, EVALUATION])
    kept = (pl.col("source") == "unlabelled") | ~pl.col("patient_id").is_in(list(excluded))
    index = index.filter(kept) if excluded else index
    patients = index.select("patient_id", "source").unique().sort("patient_id", "source")
    labelled = (
        patients.filter(pl.col("source") != "unlabelled") if config.labelled else patients.clear()
    )
    unlabelled = patients.filter(pl.col("source") == "unlabelled")
    chosen = [
        *labelled["patient_id"],
        *rng.permutation(unlabelled["patient_id"].to_list())[
            : round(config.unlabelled * len(unlabelled))
        ],
    ]
    if config.patients < 1:
        chosen = rng.permutation(chosen)[: round(config.patients * len(chosen))].tolist()
    table = index.filter(pl.col("patient_id").is_in(chosen)).sort("patient_id", "series_id")
    limit = min(config.holdout, len(table) // 4)
    of_patient = dict(table.group_by("patient_id").agg("path").iter_rows())
    held: list[str] = []
    for patient in rng.permutation(sorted(of_patient)):
        paths = of_patient[patient]
        held += paths if len(held) + len(paths) <= limit else []
    away = set(held)
    training = [path for path in table["path"] if path not in away]
    if len(training) < config.batch or not held:
        raise InputError(
            f"{len(table)} volumes are too few for pretrain.batch={config.batch} and a held-out"
            " quarter",
            layout.VOLUMES,
            "add data, lower pretrain.batch, or leave less out (pretrain.labelled,"
            " pretrain.unlabelled, pretrain.patients)",
        )
    return training, held


class VocoSamples(Dataset):
    """Item `step`: this rank's part of the global batch of that step.

    With `pairs` the crops of a volume are as many places as random and base crops have room for,
    each twice.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[str],
        config: VocoConfig,
        seed: int,
        rank: int = 0,
        size: int = 1,
        pairs: bool = False,
    ) -> None:
        self.folder, self.paths, self.config, self.seed = folder, list(paths), config, seed
        self.ranks, self.pairs = size, pairs
        self.slots = range(rank * config.batch // size, (rank + 1) * config.batch // size)
        self.base = base_boxes(config.image_size, config.grid)
        self._intensity: Any = None

    def __getitem__(self, step: int) -> Batch:
        chosen = self.order(step)
        return collate(
            [self.sample(int(chosen[slot]), [self.seed, step, slot]) for slot in self.slots]
        )

    def order(self, step: int) -> np.ndarray:
        """Indices of the whole batch of `step`: all sources shuffled together, each volume at most
        once an epoch.
        """
        per_epoch = len(self.paths) // self.config.batch
        order = np.random.default_rng([self.seed, step // per_epoch]).permutation(len(self.paths))
        start = step % per_epoch * self.config.batch
        return order[start : start + self.config.batch]

    def sample(
        self,
        index: int,
        seeds: list[int],
        random_crops: int | None = None,
        augment: bool | None = None,
    ) -> Batch:
        """Of one volume: crops (P, S, h, h) uint8, random ones first, their labels (Z * R, Z * K)
        float32, slab by slab, and the heights (S,) float32 of its slices, 0 (superior) to 1.
        """
        rng, config = np.random.default_rng(seeds), self.config
        augment = config.augment if augment is None else augment
        boxes, base = self._boxes(random_crops, rng)
        phase = rng.random() if augment and config.jitter else 0.5
        draw = rng.uniform(-1, 1, 2) if config.window else None
        crops = cut(self.planes(index, phase, draw), np.concatenate([boxes, base]))
        if augment:
            crops = self._augment(crops, len(crops) if self.pairs else len(boxes), rng)
        slabs = (in_slabs(part, config.z_bins) for part in (boxes, base))
        return {
            "crops": crops,
            "overlap": overlap_labels(*slabs).astype(np.float32),
            "heights": ((np.arange(config.slices) + phase) / config.slices).astype(np.float32),
            "ids": self.paths[index],
        }

    def _boxes(self, count: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random boxes (R, 4), `count` of them where told, and base boxes (K, 4); of pairs, places
        and the same places again.
        """
        config = self.config
        room = (config.random_crops + len(self.base)) // 2 if self.pairs else config.random_crops
        boxes = random_boxes(config.image_size, config.grid, count or room, rng)
        return boxes, twin_boxes(boxes, config.image_size, rng) if self.pairs else self.base

    def planes(self, index: int, phase: float = 0.5, draw: np.ndarray | None = None) -> np.ndarray:
        """(S, size, size) uint8 of one volume, resampled to `pretrain.depth` planes: base crops
        tile the plane, so the bytes of S planes are read and no more. With `draw` (2,), -1 to 1,
        of the inner window at that place.
        """
        volume = np.load(self.folder / self.paths[index], mmap_mode="r")
        if draw is not None:
            margin, jitter = self.config.window_margin, self.config.window_jitter
            rows, columns = window_of(volume.shape[1:], margin, jitter, draw)
            volume = volume[:, rows, columns]
        depth = self.config.depth or len(volume)
        chosen = evenly(depth, self.config.slices, phase)
        same = depth == len(volume)
        planes = np.asarray(volume[chosen]) if same else resample_planes(volume, depth, chosen)
        return resize_planes(planes, self.config.image_size)

    def whole_slices(self, count: int) -> Iterator[torch.Tensor]:
        """`count` batches (batch * S, 1, size, size) uint8 of uncut planes of the whole batch's
        volumes, none augmented.
        """
        for step in range(count):
            planes = [self.planes(int(index), (step + 0.5) / count) for index in self.order(step)]
            yield torch.from_numpy(np.concatenate(planes))[:, None]

    def _augment(
        self, crops: np.ndarray, random_crops: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Turn crops, and change the intensity by one draw for each random crop and one for all
        base crops.
        """
        turned = rng.random(len(crops)) < self.config.turn
        crops = turn(crops, turned * rng.integers(1, 8, len(crops)))
        views: list[int | slice] = [*range(random_crops)]
        if random_crops < len(crops):
            views.append(slice(random_crops, None))
        for view, change, seed in zip(
            views,
            rng.random(len(views)) < self.config.intensity,
            rng.integers(0, 1 << 31, len(views)),
            strict=True,
        ):
            if change:
                crops[view] = self._intensity_of(crops[view], int(seed))
        return crops

    def _intensity_of(self, crops: np.ndarray, seed: int) -> np.ndarray:
        if self._intensity is None:
            A = albumentations()
            self._intensity = A.Compose(
                [A.RandomBrightnessContrast(0.1, 0.2, p=1.0), A.RandomGamma((80, 125), p=0.5)]
            )
        self._intensity.set_random_seed(seed)
        return self._intensity(image=crops.reshape(-1, crops.shape[-1]))["image"].reshape(
            crops.shape
        )


def collate(samples: list[Batch]) -> Batch:
    """Crops (B, P, S, h, h) uint8, overlap (B, Z * R, Z * K) and heights (B, S) float32, and
    ids (B,).
    """
    batch: Batch = {
        key: torch.from_numpy(np.stack([sample[key] for sample in samples]))
        for key in ("crops", "overlap", "heights")
    }
    return batch | {"ids": [sample["ids"] for sample in samples]}


def evaluation_batches(
    samples: VocoSamples, random_crops: int, volumes: int = 1, augment: bool = False
) -> Iterator[Batch]:
    """The same crops at every call: `random_crops` of each volume, not augmented if not told,
    batches of `volumes`; the last one may be smaller.
    """

    def sample(index: int) -> Batch:
        seeds = [samples.seed, EVALUATION, index]
        return samples.sample(index, seeds, random_crops, augment)

    for start in range(0, len(samples.paths), volumes):
        yield collate([sample(k) for k in range(start, min(start + volumes, len(samples.paths)))])


def batches(
    samples: VocoSamples,
    start: int,
    steps: int,
    pinned: bool,
    waiting: Callable[[], object] = lambda: None,
) -> Generator[Batch, None, None]:
    """Batches of steps start..steps-1, made ahead by processes in pinned memory (none: made when
    asked for); `waiting` is called while one is waited for.
    """
    config, ranks = samples.config, samples.ranks
    todo, need = range(start, steps), voco_batch_bytes(config, ranks)
    return loaded(
        samples,
        len(todo),
        config.workers,
        need,
        "pretrain.workers",
        pinned=pinned,
        waiting=waiting,
        sharing=ranks,
        batch_size=None,
        sampler=todo,
    )
