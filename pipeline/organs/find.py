"""From a volume to its organs: label map, boxes, and the share of each organ in each plane; the
same for the series that are trained on and for the test set.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from ..learning.backbone import standardise
from ..learning.optimise import autocast
from ..run.config import OrganConfig
from ..system.frames import read_frame
from .data import resized, with_neighbours
from .masks import ORGANS
from .model import OrganNet, load_segmenter

PLANES_AT_ONCE = 1 << 20  # pixels (of what the network sees) that bound the memory of a prediction
PARTS = {"liver": 1, "spleen": 1, "kidney": 2}  # connected parts that are kept at most
ENDS = ("z0", "z1", "y0", "y1", "x0", "x1")  # of a box, in its order
LEAST_ORGAN = 1e-4  # of the voxels of a volume: of an abdomen a few ml
LEAST_PART = 0.1  # of the largest part, of those beside it; of the bowel, which has many, too


class Organ(NamedTuple):
    """What of an organ shows in a volume (D, H, W): `voxels`; `box` (z0, z1, y0, y1, x0, x1) in
    shares of the volume's sides, all 0 where there is none; `visible` (D,), the share of the organ
    in each plane, which sum to 1, or zeros.
    """

    name: str
    voxels: int
    box: tuple[float, ...]
    visible: np.ndarray


def without_islands(labels: np.ndarray) -> np.ndarray:
    """A label map (D, H, W) uint8 without what is too small to be an organ, or its second part."""
    cleaned, least = np.zeros_like(labels), LEAST_ORGAN * labels.size
    for number, place in enumerate(ndimage.find_objects(labels, len(ORGANS)), start=1):
        if place is None:
            continue
        mask = labels[place] == number
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(parts.ravel())[1:]
            most = PARTS.get(ORGANS[number - 1], count)
            largest = np.argsort(-sizes, kind="stable")[:most]
            kept = largest[sizes[largest] >= LEAST_PART * sizes.max()] + 1
            mask = np.isin(parts, kept)
        if mask.sum() >= least:
            cleaned[place][mask] = number
    return cleaned


def organ_boxes(labels: np.ndarray) -> list[Organ]:
    """Every organ of `ORGANS` in a label map (D, H, W) uint8, which holds their numbers from 1."""
    found = []
    places = ndimage.find_objects(labels, len(ORGANS))
    for number, (name, place) in enumerate(zip(ORGANS, places, strict=True), start=1):
        counts = np.zeros(len(labels), np.int64)
        box: tuple[float, ...] = (0.0,) * 6
        if place is not None:
            counts[place[0]] = (labels[place] == number).sum((1, 2))
            sides = zip(place, labels.shape, strict=True)
            box = tuple(float(end / n) for s, n in sides for end in (s.start, s.stop))
        total = int(counts.sum())
        found.append(Organ(name, total, box, counts / max(1, total)))
    return found


@torch.inference_mode()
def label_volume(
    models: Sequence[OrganNet], volume: np.ndarray, options: OrganConfig, device: torch.device
) -> np.ndarray:
    """Label map (D, H, W) uint8 of a volume (D, H, W) uint8: the likeliest by the mean
    probabilities of the models. A batch of planes at a time; no more is in memory.
    """
    size, (depth, height, width) = options.image_size, volume.shape
    labels = np.empty(volume.shape, np.uint8)
    step = max(1, PLANES_AT_ONCE // size**2)
    for first in range(0, depth, step):
        numbers = np.arange(first, min(depth, first + step))
        planes = [resized(one, size) for one in with_neighbours(volume, numbers)]
        batch = torch.from_numpy(np.stack(planes).transpose(0, 3, 1, 2)).to(device)
        with autocast(device, options.amp):
            logits = [model(standardise(batch)) for model in models]
        shares = torch.stack([one.softmax(1) for one in logits]).mean(0)
        if (height, width) != (size, size):
            shares = functional.interpolate(
                shares, (height, width), mode="bilinear", align_corners=False
            )
        labels[numbers] = shares.argmax(1).to(torch.uint8).cpu().numpy()
    return labels


def millilitres(voxels: int, spacing_mm: Sequence[float | None]) -> float | None:
    """Volume of so many voxels of (z, y, x) mm; None where a spacing is unknown."""
    if any(mm is None or not np.isfinite(mm) for mm in spacing_mm):
        return None
    return round(voxels * float(np.prod([float(mm or 0) for mm in spacing_mm])) / 1000, 2)


def rows_of(organs: Sequence[Organ], spacing_mm: Sequence[float | None]) -> list[dict[str, Any]]:
    """Rows of `organs.parquet`, without the ids, for the organs of one volume."""
    return [
        {
            "organ": one.name,
            **dict(zip(ENDS, one.box, strict=True)),
            "voxels": one.voxels,
            "ml": millilitres(one.voxels, spacing_mm),
            "visible": one.visible.tolist(),
        }
        for one in organs
    ]


def read_organs(path: Path) -> dict[str, tuple[Organ, ...]]:
    """The organs of each series id of an `organs.parquet`."""
    found: dict[str, tuple[Organ, ...]] = {}
    for row in read_frame(path).iter_rows(named=True):
        box, visible = tuple(row[end] for end in ENDS), np.array(row["visible"])
        own = Organ(row["organ"], row["voxels"], box, visible)
        found[row["series_id"]] = (*found.get(row["series_id"], ()), own)
    return found


class OrganFinder:
    """The segmenters of all folds, for volumes that none of them has seen: one volume after the
    other, in bounded memory.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        loaded = [load_segmenter(path, device) for path in paths]
        self.models, self.options = [model for model, _ in loaded], loaded[0][1].organs
        self.device = device

    def __call__(self, volume: np.ndarray) -> list[Organ]:
        """The organs of a volume (D, H, W) uint8, as stage 02 stores it."""
        labels = label_volume(self.models, volume, self.options, self.device)
        return organ_boxes(without_islands(labels))
