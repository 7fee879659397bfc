"""The kinds of source files that become slices, and where each is read.

A new kind is one module with these functions and one row of `READERS`; nothing else asks what a
file is:

    read(file, k, config, careful) -> SliceRead
    count_slices(file, max_pixels) -> int       where one file is a whole series

`read` gives slice `k` of a volume, or the one slice of the `k`-th file of a folder, or raises
`Unreadable`. It runs in a child process that may crash, hang and be killed; `careful` is true where
one was lost over this very slice. `count_slices` runs in the parent and may read no more than the
header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # whoever lists files only loads no pixel library
    import numpy as np

    from .geometry import Placement
    from .window import Stored


class Unreadable(Exception):
    """This file becomes no picture. The text is `KIND: DETAIL`, never a value of an identifying
    tag.
    """


class SliceRead(NamedTuple):
    """What a reader makes of one slice.

    `pixels` (rows, cols) are HU (a series of which none lies below -500 is taken for no CT), or the
    bit patterns of a file, turned so that the patient's right
    is at image left and anterior at top (`geometry.orient`). `spacing` is (y, x) of a pixel in mm.
    `decoder` and `transfer_syntax` are only reported.
    """

    pixels: np.ndarray | Stored
    spacing: Sequence[float | None]
    placement: Placement
    decoder: str
    transfer_syntax: str


@dataclass(frozen=True)
class Reader:
    """One kind of file, by the `endings` of its names, in capitals too, the shortest first. With
    `volume` a file is a whole series, else a folder of files is.

    `module` is imported when there is such a file to read.
    """

    title: str
    module: str
    endings: tuple[str, ...]
    volume: bool

    def takes(self, name: str) -> bool:
        """True for the name of such a file, in capitals too, as some exports write."""
        return name.lower().endswith(self.endings)

    def stem(self, name: str) -> str:
        """The name of such a file without its ending."""
        return name[: name.lower().index(self.endings[0])]


READERS: tuple[Reader, ...] = (
    Reader("DICOM", "pipeline.slices.dicom", (".dcm",), volume=False),
    Reader("NIfTI", "pipeline.slices.nifti", (".nii", ".nii.gz"), volume=True),
)


def reader_of(name: str) -> Reader | None:
    """The first reader that takes a file of this name."""
    return next((reader for reader in READERS if reader.takes(name)), None)


def instance_of(name: str) -> int | None:
    """Instance number that the name of a slice's file says (`12.dcm`), None where it says none."""
    found = re.fullmatch(r"([0-9]{1,12})\.[A-Za-z]+", name)
    return int(found[1]) if found else None
