"""Series of DICOM files, and NIfTI files, to oriented, ordered 8-bit slices in memory;
`slice_store` writes the same to disk.

    listing = list_files(folder, data) slices, quarantined = read_series(listing, config)

Every picture is made in a contained child process (`parallel.contained`), so a file that crashes,
hangs or fools a decoder costs that file only, and the rest of its series is what it would have been
without it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from ..run.config import ConvertConfig
from ..system.contained import Failure, contained
from . import dicom, nifti
from . import geometry as series
from .dicom_header import SPARE_BYTES, Unreadable
from .sources import NIFTI, Listing, instance_of


class SliceImage(NamedTuple):
    """One slice: its row of the slice index (without ids and `png`), the file it came from, and its
    picture.

    `instance_number` is the number in the file's name, else the tag's. `z_mm` grows towards the
    head, None where the series has no positions. `flags` are those of `series`, joined by commas.
    `crc32` is that of the pixels, by which stage 02 notices a change. `image` is uint8 (rows,
    cols), None where it went to disk.
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
    crc32: int
    file: str
    image: np.ndarray | None


class Picture(NamedTuple):
    """What a child answers for one slice: `placement` holds the fields of `series.Placement`."""

    shape: tuple[int, int]
    spacing: tuple[float | None, ...]
    placement: tuple[Any, ...]
    decoder: str
    transfer_syntax: str
    crc32: int
    image: np.ndarray | None = None


def _from_dicom(file: str, config: ConvertConfig, careful: bool) -> tuple[np.ndarray, Picture]:
    """The oriented picture of one DICOM file and what is known of it; Unreadable with the reason
    where there is none.
    """
    try:
        with open(file, "rb", buffering=0) as handle:
            if os.fstat(handle.fileno()).st_size > 4 * config.max_pixels + SPARE_BYTES:
                raise Unreadable(
                    "too large: the file is larger than any picture of convert.max_pixels"
                )
            data = handle.read()
    except OSError as fault:
        raise Unreadable(f"not readable: {type(fault).__name__}") from None
    stored, header, decoder = dicom.picture(data, config.max_pixels, careful)
    image = series.orient(stored, header.orientation, header.patient_position, config.flip_hfs)
    number, spacing = instance_of(os.path.basename(file)), header.spacing or (None, None)
    placement = (
        header.instance if number is None else number,
        header.position,
        header.orientation,
        header.patient_position,
    )
    spacing = spacing[::-1] if series.is_transposed(header.orientation) else spacing
    return image, Picture(
        image.shape,
        spacing,
        (*placement, series.is_cut(image)),
        decoder,
        header.transfer_syntax,
        crc32(image),
    )


def _from_nifti(file: str, k: int, config: ConvertConfig) -> tuple[np.ndarray, Picture]:
    image, position, orientation, spacing = nifti.nifti_slice(Path(file), k, config.max_pixels)
    return image, Picture(
        image.shape,
        spacing,
        (k + 1, position, orientation, "", series.is_cut(image)),
        "nibabel",
        "NIfTI",
        crc32(image),
    )


def pictures(
    listing: Listing,
    config: ConvertConfig,
    keep: Callable[[int, np.ndarray], None] | None = None,
    deaths: list[str] | None = None,
) -> Iterator[tuple[str, Picture | Failure]]:
    """(file, Picture or Failure) of every slice, made in contained children.

    The child hands picture k to `keep` (which writes it), or sends it back as `image` where there
    is no `keep`. A NIfTI file that brings its children down does so at loading, so its slices are
    not tried one by one.
    """
    items = [(file, k) for k, file in enumerate(listing.files)]
    volume = bool(listing.files) and listing.files[0].endswith(NIFTI)
    if volume:
        try:
            items = [
                (listing.files[0], k)
                for k in range(nifti.count_slices(Path(listing.files[0]), config.max_pixels))
            ]
        except Unreadable as fault:
            yield listing.files[0], Failure(str(fault))
            return

    def work(item: tuple[str, int], careful: bool) -> Picture | Failure:
        file, k = item
        try:
            image, found = (
                _from_nifti(file, k, config)
                if file.endswith(NIFTI)
                else _from_dicom(file, config, careful)
            )
        except Unreadable as fault:
            return Failure(str(fault))
        except MemoryError:
            if not careful:  # dicomsdl raises it over damaged files too
                raise
            return Failure("not readable: MemoryError")
        if keep is None:
            return found._replace(image=image)
        keep(k, image)
        return found

    yield from zip(
        (file for file, _ in items),
        contained(work, items, config.timeout_s, deaths, linked=volume),
        strict=True,
    )


def arranged(found: Sequence[tuple[str, Picture]], config: ConvertConfig) -> list[SliceImage]:
    """The slices of one series, superior first. A slice without any number gets the next free
    one.
    """
    following = 1 + max((picture.placement[0] or 0 for _, picture in found), default=0)
    placements = [series.Placement(*picture.placement) for _, picture in found]
    for k, placement in enumerate(placements):
        if placement.instance is None:
            placements[k], following = placement._replace(instance=following), following + 1
    slices = [
        SliceImage(
            placement.instance,
            place.order,
            place.z_mm,
            *picture.shape,
            *picture.spacing,
            place.flags,
            picture.decoder,
            picture.transfer_syntax,
            picture.crc32,
            file,
            picture.image,
        )
        for (file, picture), placement, place in zip(
            found, placements, series.arrange(placements, config.flip_hfs), strict=True
        )
    ]
    return sorted(slices, key=lambda item: item.order)


def decode_series_files(
    listing: Listing, config: ConvertConfig
) -> tuple[list[SliceImage], list[tuple[str, str]]]:
    """All good slices of a series in memory, superior first, and the (path, reason) of the others.

    Holds rows x cols bytes a slice. Safe in a joblib worker and on Dask: what a damaged file brings
    down is a child of it.
    """
    answers = list(pictures(listing, config))
    found = [(file, answer) for file, answer in answers if isinstance(answer, Picture)]
    failed = {(file, answer.reason) for file, answer in answers if isinstance(answer, Failure)}
    return arranged(found, config), sorted({*listing.refused, *failed})
