"""Samples of stage 05: single planes of masked volumes between their neighbours."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from ..learning.loaders import loaded
from ..run.config import OrganConfig
from ..run.room import organ_batch_bytes
from ..volumes import sampling
from .masks import ORGANS

CHANNELS = 3  # a plane between its neighbours
SHOWING = 0.5  # share of the samples whose plane shows an organ that is drawn first


@dataclass(frozen=True)
class Masked:
    """A volume and its mask on the same grid, two files (D, H, W) uint8."""

    patient_id: str
    series_id: str
    volume: Path
    mask: Path


def with_neighbours(volume: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Planes (n,) of a volume (D, H, W), each with the one above and the one below as channels:
    (n, H, W, 3); the first and the last plane are their own neighbours.
    """
    around = sampling.with_neighbours(planes, len(volume), CHANNELS).reshape(-1, CHANNELS)
    return np.ascontiguousarray(np.moveaxis(volume[around], 1, -1))


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) or (H, W, C) to `size` x `size`: by area where that is smaller."""
    if image.shape[:2] == (size, size):
        return image
    how = cv2.INTER_AREA if size <= min(image.shape[:2]) else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=how)


def moved(config: OrganConfig, rng: np.random.Generator, size: int) -> np.ndarray:
    """A drawn turn, scale and shift of a `size` x `size` picture as an affine (2, 3)."""
    angle, factor = rng.uniform(-1, 1) * config.rotate_deg, 1 + rng.uniform(-1, 1) * config.scale
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, factor)
    shift = rng.uniform(-1, 1, (2, 1)) * config.shift * size
    return matrix + np.hstack([np.zeros((2, 2)), shift])


def planes_showing(mask: np.ndarray) -> np.ndarray:
    """Which planes of a label map (D, H, W) show which organ: (organs, D) bool."""
    return np.stack([(mask == k + 1).any((1, 2)) for k in range(len(ORGANS))])


def drawn_plane(showing: np.ndarray, rng: np.random.Generator) -> int:
    """A plane of those of `planes_showing`: every other time any, else one that shows an organ,
    which is drawn first, so that small organs are seen as often as large ones.
    """
    if rng.random() < SHOWING:
        shown = np.flatnonzero(showing[rng.integers(len(ORGANS))])
        if len(shown):
            return int(rng.choice(shown))
    return int(rng.integers(showing.shape[1]))


class PlaneDataset(Dataset):
    """(step, k) -> `image` (3, h, w) uint8, `label` (h, w) uint8, `item`: series and plane are
    drawn, each sample a pure function of (seed, step, k), so that a resumed run draws what it would
    have drawn.
    """

    def __init__(self, series: Sequence[Masked], config: OrganConfig, seed: int) -> None:
        self.series, self.config, self.seed = list(series), config, seed
        self._showing: dict[int, np.ndarray] = {}  # by series: a map is searched once

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | np.int64]:
        rng = np.random.default_rng((self.seed, *key))
        item = int(rng.integers(len(self.series)))
        one, size = self.series[item], self.config.image_size
        volume, mask = np.load(one.volume, mmap_mode="r"), np.load(one.mask, mmap_mode="r")
        if item not in self._showing:
            self._showing[item] = planes_showing(mask)
        plane = drawn_plane(self._showing[item], rng)
        image = resized(with_neighbours(volume, np.array([plane]))[0], size)
        label = cv2.resize(mask[plane], (size, size), interpolation=cv2.INTER_NEAREST)
        matrix = moved(self.config, rng, size)
        image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
        label = cv2.warpAffine(label, matrix, (size, size), flags=cv2.INTER_NEAREST)
        gain, bias = rng.uniform(-1, 1, 2) * self.config.contrast
        image = cv2.addWeighted(image, 1 + gain, image, 0, 128 * (bias - gain))
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "label": label,
            "item": np.int64(item),
        }


def plane_batches(
    dataset: PlaneDataset,
    steps: range,
    device: torch.device,
    waiting: Callable[[], object] = lambda: None,
    sharing: int = 1,
) -> Generator[dict[str, torch.Tensor], None, None]:
    """One batch for each of `steps`; `waiting` is called while one is waited for, `sharing`
    processes load at the same time.
    """
    config = dataset.config
    return loaded(
        dataset,
        len(steps),
        config.workers,
        organ_batch_bytes(config),
        "organs.workers",
        pinned=device.type == "cuda",
        waiting=waiting,
        sharing=sharing,
        batch_sampler=[[(step, k) for k in range(config.batch)] for step in steps],
    )
