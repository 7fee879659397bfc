"""A series of DICOM files, or one NIfTI file, to oriented, ordered 8-bit slices in memory. `slice_store` writes the same to disk.

    listing = list_files(folder, data)
    slices, quarantined = read_series(listing, config)

Every picture is made in a contained child process (`parallel.contained`), so a file that crashes, hangs or fools a decoder costs
that file only, and the rest of its series is what it would have been without it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from . import dicom, nifti, series
from .config import ConvertConfig
from .parallel import Failure, contained
from .sources import NIFTI, Listing, instance_of


@dataclass(frozen=True)
class SliceImage:
    """One slice: its row of the slice index (without ids and `png`) and the oriented, windowed picture, (rows, cols) uint8.

    `instance_number` is the number in the file name, else the tag's. `z_mm` grows towards the head, None where the series has no
    positions. `flags` are those of `series`, joined by commas. `image` is None where it went to disk; `file` is where it came from.
    """

    instance_number: int
    order: int
    z_mm: float | None
    rows: int
    cols: int
    spacing_y_mm: float | None
    spacing_x_mm: float | None
    flags: str
    decoder: str
    transfer_syntax: str
    image: np.ndarray | None
    file: str


@dataclass(frozen=True)
class _Picture:
    """What the child answers for one slice."""

    shape: tuple[int, int]
    spacing: tuple[float | None, float | None]
    placement: series.Placement
    decoder: str
    transfer_syntax: str
    image: np.ndarray | None


def _from_dicom(path: str, config: ConvertConfig, careful: bool) -> tuple[np.ndarray, _Picture]:
    """The oriented picture of one DICOM file and what is known of it; Unreadable with the reason where there is none."""
    try:
        with open(path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size > 4 * config.max_pixels + (64 << 20):
                raise dicom.Unreadable("too large: the file is larger than any picture of convert.max_pixels")
            data = handle.read()
    except OSError as fault:
        raise dicom.Unreadable(f"not readable: {type(fault).__name__}") from None
    stored, header, decoder = dicom.picture(data, config.max_pixels, careful)
    image = series.orient(stored, header.orientation, header.patient_position, config.flip_hfs)
    number = instance_of(os.path.basename(path))
    spacing = header.spacing or (None, None)
    placement = series.Placement(header.instance if number is None else number, header.position, header.orientation,
                                 header.patient_position, series.is_cut(image))  # fmt: skip
    spacing = spacing[::-1] if series.transposed(header.orientation) else spacing
    return image, _Picture(image.shape, spacing, placement, decoder, header.transfer_syntax, None)


def _from_nifti(path: str, k: int, config: ConvertConfig) -> tuple[np.ndarray, _Picture]:
    image, place = nifti.nifti_slice(Path(path), k, config.max_pixels)
    placement = series.Placement(k + 1, place["position"], place["orientation"], "", series.is_cut(image))
    return image, _Picture(image.shape, place["spacing"], placement, "nibabel", "NIfTI", None)


def pictures(listing: Listing, config: ConvertConfig, keep: Callable[[int, np.ndarray], None] | None = None,
             deaths: list[str] | None = None) -> Iterator[tuple[str, _Picture | Failure]]:  # fmt: skip
    """(file, picture or Failure) of every slice, made in contained children.

    The child hands picture k to `keep` (which writes it), or sends it back as `image` where there is no `keep`.
    """
    items = [(file, k) for k, file in enumerate(listing.files)]
    if listing.files and listing.files[0].endswith(NIFTI):
        try:
            items = [(listing.files[0], k) for k in range(nifti.count_slices(Path(listing.files[0]), config.max_pixels))]
        except dicom.Unreadable as fault:
            yield listing.files[0], Failure(str(fault))
            return

    def work(item: tuple[str, int], careful: bool) -> _Picture | Failure:
        cv2.setNumThreads(1)
        file, k = item
        try:
            image, found = _from_nifti(file, k, config) if file.endswith(NIFTI) else _from_dicom(file, config, careful)
        except dicom.Unreadable as fault:
            return Failure(str(fault))
        if keep is None:
            return replace(found, image=image)
        keep(k, image)
        return found

    yield from zip((file for file, _ in items), contained(work, items, config.timeout_s, deaths), strict=True)


def arranged(found: Sequence[tuple[str, _Picture]], config: ConvertConfig) -> list[SliceImage]:
    """The slices of one series, superior first, with order, positions and flags."""
    following = 1 + max((picture.placement.instance or 0 for _, picture in found), default=0)
    placements = []
    for _, picture in found:
        number = picture.placement.instance
        placements.append(picture.placement if number is not None else replace(picture.placement, instance=following))
        following += number is None
    places = series.arrange(placements, config.flip_hfs)
    slices = [
        SliceImage(placement.instance, place.order, place.z_mm, *picture.shape, *picture.spacing, place.flags, picture.decoder,
                   picture.transfer_syntax, picture.image, file)
        for (file, picture), placement, place in zip(found, placements, places, strict=True)
    ]  # fmt: skip
    return sorted(slices, key=lambda item: item.order)


def read_series(listing: Listing, config: ConvertConfig) -> tuple[list[SliceImage], list[tuple[str, str]]]:
    """All good slices of a series in memory, superior first, and the (path, reason) of the others.

    Holds rows x cols bytes a slice. Safe in a joblib worker: what a damaged file brings down is a child of it.
    """
    found, quarantined = [], list(listing.refused)
    for file, picture in pictures(listing, config):
        if isinstance(picture, Failure):
            quarantined.append((file, picture.reason))
        else:
            found.append((file, picture))
    return arranged(found, config), sorted(set(quarantined))
