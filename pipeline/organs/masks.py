"""Organ masks in the competition's format, `segmentations/<series_id>.nii[.gz]`, on the grid of
their series' volumes.

The competition's five labels become four organs: left and right kidney are one, as they are one
target of the competition, and the side of a kidney is no more than its place.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..run import layout
from ..run.config import VolumeConfig
from ..slices.readers import Unreadable
from ..system.errors import InputError
from ..system.files import atomic_path
from ..volumes.build import common_size
from ..volumes.store import heights, labels_of, usable

ORGANS = ("liver", "spleen", "kidney", "bowel")
# organ number, from 1, of the file's labels: 1 liver, 2 spleen, 3 and 4 the kidneys, 5 bowel
ORGAN_OF_LABEL = np.array([0, 1, 2, 3, 3, 4], np.uint8)
NEAR = 0.25  # of the distance of two slices: how far a plane of the mask may lie from its slice
WAY_OUT = "give the masks of this very series, or remove the file"


def matching_planes(
    heights_mm: np.ndarray, slices: pl.DataFrame, used: pl.DataFrame
) -> np.ndarray | None:
    """For each of the `used` slices of a series the plane of a mask (both superior first) that
    shows it; None where the mask does not fit.

    The mask's planes lie where its affine says; where that places the whole mask elsewhere, but it
    has a plane for each of the `slices`, or where slices have no position, they go in order. Of
    slices without position some may be lost: the instance numbers of the others then say which.
    """
    order = np.searchsorted(slices["order"].to_numpy(), used["order"].to_numpy())
    z_mm, one_each = heights(used), len(heights_mm) == len(slices)
    if not np.isfinite(z_mm).all():
        numbers = slices["instance_number"].to_numpy()
        if not one_each and np.ptp(numbers) + 1 == len(heights_mm):
            return used["instance_number"].to_numpy() - numbers.min()
        return order if one_each else None
    gaps = np.abs(np.diff(np.unique(z_mm)))
    limit = NEAR * float(np.median(gaps)) if len(gaps) else float("inf")
    shifts = [0.0, *([float(np.nanmax(heights(slices)) - heights_mm.max())] if one_each else [])]
    for shift in shifts:
        away = np.abs(heights_mm[None] + shift - z_mm[:, None])
        if (away.min(1) <= limit).all():
            return away.argmin(1)
    return None


def read_mask(path: Path, slices: pl.DataFrame, max_pixels: int) -> list[np.ndarray]:
    """The mask of each usable slice of a series, superior first: (rows, cols) uint8 with the
    numbers of `ORGANS` from 1, turned as the slices are. `slices` are the series' rows of the slice
    index.

    Raises:
        InputError: the file is damaged, or does not fit the series.
    """
    from ..slices.nifti import read_labels

    try:
        labels, heights_mm = read_labels(path, max_pixels, len(ORGAN_OF_LABEL) - 1)
    except Unreadable as fault:
        raise InputError(f"mask not usable: {fault}", str(path), WAY_OUT) from None
    slices = slices.sort("order")
    used = usable(slices)
    size = common_size(list(used.select("rows", "cols").iter_rows()))
    if labels.shape[1:] != size:
        raise InputError(
            f"the mask's planes have {labels.shape[1]} x {labels.shape[2]} pixels, the slices of"
            f" its series {size[0]} x {size[1]}",
            str(path),
            WAY_OUT,
        )
    planes = matching_planes(heights_mm, slices, used)
    if planes is None:
        raise InputError(
            f"the mask's {len(labels)} planes {_extent(heights_mm)} are not where the"
            f" {len(slices)} slices of its series are {_extent(heights(used))}",
            str(path),
            WAY_OUT,
        )
    return [ORGAN_OF_LABEL[labels[k]] for k in planes]


def _extent(z_mm: np.ndarray) -> str:
    known = z_mm[np.isfinite(z_mm)]
    return f"({known.min():.1f} to {known.max():.1f} mm)" if len(known) else "(no positions)"


def store_mask(
    item: tuple[Path, pl.DataFrame, dict[str, Any]],
    target: Path,
    config: VolumeConfig,
    max_pixels: int,
) -> str:
    """Write one mask on the grid of its series' volume, (D, H, W) uint8; returns the file's name.
    `item`: the mask's file, the series' rows of the slice index and its row of the volume index.
    """
    path, slices, row = item
    labels = read_mask(path, slices, max_pixels)
    grid = labels_of(labels, len(ORGANS), usable(slices), row, config)
    with atomic_path(target / row["path"]) as temporary, open(temporary, "wb") as handle:
        np.save(handle, grid)
    return row["path"]


def with_masks(
    files: dict[str, Path], index: pl.DataFrame, slices: pl.DataFrame
) -> list[tuple[Path, pl.DataFrame, dict[str, Any]]]:
    """The items of `store_mask` for the masks whose series have a volume in `index`."""
    chosen = index.filter(pl.col("series_id").is_in(list(files)))
    keys = ["patient_id", "series_id"]
    parts = slices.join(chosen.select(keys), on=keys, how="semi").partition_by(keys, as_dict=True)
    return [
        (files[row["series_id"]], parts[row["patient_id"], row["series_id"]], row)
        for row in chosen.iter_rows(named=True)
    ]


def slice_table(volumes: Path, slices: Path) -> Path:
    """The slice index that the volumes were made from."""
    beside = volumes / layout.SLICE_TABLE
    return beside if beside.is_file() else slices / layout.INDEX
