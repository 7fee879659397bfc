"""Series of any registered kind (`readers`) to ordered 8-bit slices in memory; `store` writes the
same to disk.

    listing = list_files(folder, data)
    slices, quarantined = decode_series_files(listing, config)

Every picture is made in a contained child process (`system.contained`), so a file that crashes,
hangs or fools a decoder costs that file only, and the rest of its series is what it would have been
without it.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from ..run.config import ConvertConfig
from ..system.contained import Failure, contained
from .geometry import (
    NO_AIR,
    RESCALED,
    Placement,
    arrange,
    is_cut,
    is_rescaled,
    millimetres,
    typical_mm,
)
from .readers import SliceRead, Unreadable, reader_of
from .sources import Listing
from .window import AIR_HU, HIGH_HU, LOW_HU, Stored, grey, integers


class SliceImage(NamedTuple):
    """One slice: its row of the slice index (without ids and `png`), the file it came from, and its
    picture.

    `instance_number` is the number in the file's name, else the tag's. `z_mm` grows towards the
    head, None where the series has no positions. `flags` are those of `geometry`, joined by commas.
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
    """What a child answers for one slice: the facts of its `SliceRead`, and its picture."""

    shape: tuple[int, ...]
    spacing: Sequence[float | None]
    placement: Placement
    decoder: str
    transfer_syntax: str
    crc32: int
    air: bool
    image: np.ndarray | None = None


def _holds_air(pixels: np.ndarray | Stored) -> bool:
    """True where a slice has HU below `AIR_HU`, as every CT has somewhere."""
    if not isinstance(pixels, Stored):
        return bool((pixels < AIR_HU).any())
    # seldom asked of all pixels: a corner or two tell of air
    for words in (pixels.words[::8, ::8], pixels.words):
        found = integers(words.astype(np.int64), pixels.bits, pixels.signed)
        low, high = sorted(
            float(end) * pixels.slope + pixels.intercept for end in (found.min(), found.max())
        )
        # MONOCHROME1 counts after the window, 255 minus grey: its air may lie at the other end
        if low < AIR_HU or (pixels.inverted and high > LOW_HU + HIGH_HU - AIR_HU):
            return True
    return False


def _windowed(read: SliceRead) -> tuple[np.ndarray, Picture]:
    """The 8-bit picture of a slice that was read, and what is known of it."""
    image = grey(read.pixels)
    placement = read.placement._replace(cut=is_cut(image))
    return image, Picture(
        image.shape,
        read.spacing,
        placement,
        read.decoder,
        read.transfer_syntax,
        crc32(image),
        _holds_air(read.pixels),
    )


def pictures(
    listing: Listing,
    config: ConvertConfig,
    keep: Callable[[int, np.ndarray], None] | None = None,
    deaths: list[str] | None = None,
) -> Iterator[tuple[str, Picture | Failure]]:
    """(file, Picture or Failure) of every slice, made in contained children.

    The child hands picture k to `keep` (which writes it), or sends it back as `image` where there
    is no `keep`. A volume that brings its children down does so at loading, so its slices are not
    tried one by one.
    """
    items = [(file, k) for k, file in enumerate(listing.files)]
    reader = reader_of(listing.files[0]) if listing.files else None
    if reader is None:
        return
    module = importlib.import_module(reader.module)  # here, so that no child has to
    if reader.volume:
        file = listing.files[0]
        try:
            count = module.count_slices(Path(file), config.max_pixels)
        except Unreadable as fault:
            yield file, Failure(str(fault))
            return
        items = [(file, k) for k in range(count)]

    def work(item: tuple[str, int], careful: bool) -> Picture | Failure:
        try:
            image, found = _windowed(module.read(*item, config, careful))
        except Unreadable as fault:
            return Failure(str(fault))
        except MemoryError:
            if not careful:  # dicomsdl raises it over damaged files too
                raise
            return Failure("not readable: MemoryError")
        if keep is None:
            return found._replace(image=image)
        keep(item[1], image)
        return found

    yield from zip(
        (file for file, _ in items),
        contained(work, items, config.timeout_s, deaths, linked=reader.volume),
        strict=True,
    )


def arranged(found: Sequence[tuple[str, Picture]], config: ConvertConfig) -> list[SliceImage]:
    """The slices of one series, superior first. A slice without any number gets the next free
    one.
    """
    pictures = _in_mm([picture for _, picture in found])
    given = [picture.placement.instance for picture in pictures]
    free = itertools.count(1 + max((number or 0 for number in given), default=0))
    numbers = [next(free) if number is None else number for number in given]
    places = arrange(
        [
            picture.placement._replace(instance=number, numbered=own is not None)
            for picture, number, own in zip(pictures, numbers, given, strict=True)
        ],
        config.flip_hfs,
    )
    slices = [
        SliceImage(
            instance_number=number,
            order=place.order,
            z_mm=place.z_mm,
            rows=picture.shape[0],
            cols=picture.shape[1],
            spacing_y_mm=picture.spacing[0],
            spacing_x_mm=picture.spacing[1],
            flags=",".join(filter(None, (place.flags, *flags))),
            decoder=picture.decoder,
            transfer_syntax=picture.transfer_syntax,
            crc32=picture.crc32,
            file=file,
            image=picture.image,
        )
        for (file, _), picture, number, place, flags in zip(
            found, pictures, numbers, places, _flags(pictures), strict=True
        )
    ]
    return sorted(slices, key=lambda item: item.order)


def _in_mm(pictures: Sequence[Picture]) -> list[Picture]:
    """The slices of a series with spacing and position in mm, whatever their unit."""
    factor = millimetres([mm for picture in pictures for mm in picture.spacing])
    if factor == 1:
        return list(pictures)

    def scaled(lengths: Sequence[float | None] | None) -> Any:
        return None if lengths is None else [mm and mm * factor for mm in lengths]

    return [
        picture._replace(
            spacing=scaled(picture.spacing),
            placement=picture.placement._replace(position=scaled(picture.placement.position)),
        )
        for picture in pictures
    ]


def _flags(pictures: Sequence[Picture]) -> list[list[str]]:
    """The flags of the slices of a series that their pixels and spacings tell."""
    no_air = [] if any(picture.air for picture in pictures) else [NO_AIR]
    common = [typical_mm([picture.spacing[axis] for picture in pictures]) for axis in (0, 1)]
    return [
        no_air + ([RESCALED] if is_rescaled(picture.spacing, common) else [])
        for picture in pictures
    ]


def decode_series_files(
    listing: Listing, config: ConvertConfig, deaths: list[str] | None = None
) -> tuple[list[SliceImage], list[tuple[str, str]]]:
    """All good slices of a series in memory, superior first, and the (path, reason) of the others;
    the causes of lost children are appended to `deaths`.

    Holds rows x cols bytes a slice. Safe in a joblib worker and on Dask: what a damaged file brings
    down is a child of it.
    """
    answers = list(pictures(listing, config, deaths=deaths))
    found = [(file, answer) for file, answer in answers if isinstance(answer, Picture)]
    failed = {(file, answer.reason) for file, answer in answers if isinstance(answer, Failure)}
    return arranged(found, config), sorted({*listing.refused, *failed})
