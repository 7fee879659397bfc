"""How large the slices of a data set become as PNG: a sample is converted, nothing is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..run.config import ConvertConfig
from .convert import Picture, pictures
from .png import encode_png
from .readers import reader_of
from .sources import Found, SeriesTask, list_files

SERIES, VOLUMES = 24, 6  # of the sample: folders of slices, and files that are a series
FILES = 4  # of each series
HASTE_S = 5.0  # for a file of the sample
BLOCK = 4096  # bytes of a file system's block
ROW_BYTES = 250  # of a slice in sidecar and index


class Sizes(NamedTuple):
    """Slices, their bytes on disk as PNG, and those of the largest series in memory."""

    slices: int
    png_bytes: int
    largest: int


def _sample(number: int, phase: float) -> list[int]:
    """Places of a few evenly chosen ones of `number`, at `phase` (0 to 1) of equal parts."""
    count = min(number, FILES)
    return [int((k + phase) * number / count) for k in range(count)]


def _measure(
    task: SeriesTask, phase: float, data: Path, config: ConvertConfig
) -> tuple[float, float, int]:
    """Mean bytes of a slice as PNG and in memory, and how many slices there are; 0 of none."""
    listing, volume = list_files(task.path, data), _is_volume(task)
    number = len(listing.files)
    places = range(number) if volume else _sample(number, phase)
    part = listing._replace(files=[listing.files[k] for k in places])
    images = [
        one.image
        for _, one in pictures(part, config)
        if isinstance(one, Picture) and one.image is not None
    ]
    if not images:
        return 0.0, 0.0, 0
    chosen = [images[k] for k in _sample(len(images), phase)]
    png = np.mean([-(-len(encode_png(image)) // BLOCK) * BLOCK for image in chosen])
    memory = np.mean([image.size for image in chosen])
    return float(png) + ROW_BYTES, float(memory), len(images) if volume else number


def sizes(series: Sequence[tuple[SeriesTask, Found]], data: Path, config: ConvertConfig) -> Sizes:
    """An estimate from evenly chosen ones of the `series` that have files; of volumes in one file,
    whose slices are not known, the mean is taken of how many they have.
    """
    there = [(task, one) for task, one in series if one.files]
    total, png, largest = 0, 0.0, 0.0
    hasty = config.model_copy(update={"timeout_s": min(config.timeout_s, HASTE_S)})
    for volume in (False, True):
        part = [pair for pair in there if _is_volume(pair[0]) == volume]
        count = VOLUMES if volume else SERIES
        # another phase a series: all heights of the body are met
        phases = [(k + 0.5) / count for k in range(count if part else 0)]
        places = {int(phase * len(part)): phase for phase in phases}
        measured = [_measure(part[k][0], places[k], data, hasty) for k in sorted(places)]
        seen = np.array([one for one in measured if one[2]])
        if not len(seen):
            continue
        each, memory = np.average(seen[:, :2], axis=0, weights=(slices := seen[:, 2]))
        files = slices.mean() * len(part) if volume else sum(one.files for _, one in part)
        most = slices.max() if volume else max(one.files for _, one in part)
        total, png = total + int(files), png + each * files
        largest = max(largest, memory * most)
    return Sizes(total, int(png), int(largest))


def _is_volume(task: SeriesTask) -> bool:
    reader = reader_of(task.path)
    return bool(reader and reader.volume)
