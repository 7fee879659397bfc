"""Order, orientation and flags of one series, from headers and arrays alone.

Patient coordinates are DICOM's: x to the patient's left, y to the back, z to the head, in
millimetres. The flags, all of them here:

| flag | meaning |
|---|---|
| `partial` | columns are black from one on, within the body: an incomplete reconstruction |
| `duplicate` | an earlier slice lies at the same position |
| `tilted` | more than 45 degrees from axial, as a scout view is |

Flagged slices stay in the index and are left out of volumes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

PARTIAL, DUPLICATE, TILTED = "partial", "duplicate", "tilted"
SAME_POSITION_MM = 0.01
FARTHEST_MM = 1e5  # no scanner's coordinates reach this far
# how far a slice must lie from its neighbours to count as misplaced: see `_lone`
LONE_MM, LONE_GAPS, LONE_END_MM = 100.0, 30.0, 500.0
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Placement(NamedTuple):
    """What ordering needs of one slice: its number, the tags' position and orientation, and
    `is_cut` of its picture.

    A reader leaves `cut` as it is, and `instance` None where the file says no number.
    """

    instance: int | None
    position: Sequence[float] | None
    orientation: Sequence[float] | None
    patient_position: str = ""
    cut: bool = False


class Place(NamedTuple):
    """Where a slice belongs: `order` counts from the most superior, `z_mm` grows towards the head
    (None: the series has no positions).
    """

    order: int
    z_mm: float | None
    flags: str


def _half_turns(patient_position: str, flip_hfs: bool) -> tuple[bool, bool, bool]:
    """Extra flips in x, y and z by PatientPosition where that is asked for: half turns about y
    (feet first) and about z (prone).
    """
    feet, prone = (
        flip_hfs and patient_position.startswith("FF"),
        flip_hfs and patient_position.endswith("P"),
    )
    return feet != prone, prone, feet


def _directions(orientation: Sequence[float] | None) -> Sequence[float]:
    """Directions of rows and columns: axial where there is no orientation, or one of zeros, which
    is none.
    """
    return orientation if orientation and any(orientation) else AXIAL


def is_transposed(orientation: Sequence[float] | None) -> bool:
    """True where image rows run along the patient's back-to-front axis, so that `orient` swaps rows
    and columns.
    """
    o = _directions(orientation)
    return abs(o[0]) < abs(o[1]) and abs(o[4]) < abs(o[3])


def orient(
    image: np.ndarray,
    orientation: Sequence[float] | None,
    patient_position: str = "",
    flip_hfs: bool = False,
) -> np.ndarray:
    """Picture (rows, cols) turned so that the patient's right is at image left and anterior at
    top.
    """
    o, swap = _directions(orientation), is_transposed(orientation)
    turn_x, turn_y, _ = _half_turns(patient_position, flip_hfs)
    flip_x, flip_y = (o[3 if swap else 0] < 0) != turn_x, (o[1 if swap else 4] < 0) != turn_y
    image = image.T if swap else image
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def is_cut(image: np.ndarray) -> bool:
    """True where columns of a windowed picture (rows, cols) are suddenly black next to a column
    through the body.

    A body tapers towards its sides; a cut leaves a column about as full as the one two further in.
    """
    sample = cv2.threshold(image[:: max(1, len(image) // 128)], 0, 1, cv2.THRESH_BINARY)[1]
    full = cv2.reduce(sample, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
    dark, enough = np.flatnonzero(full == 0), 0.5 * full.max()
    if not dark.size or not enough:
        return False
    padded = np.zeros(len(full) + 6, full.dtype)
    padded[3:-3] = full
    for next_to_it, further_in in ((4, 6), (2, 0)):  # to the right and to the left of a dark column
        edge, inner = padded[dark + next_to_it], padded[dark + further_in]
        if ((edge >= enough) & (edge >= 0.85 * inner)).any():
            return True
    return False


def _normal(orientation: Sequence[float] | None) -> tuple[float, float, float]:
    a, b, c, d, e, f = _directions(orientation)
    return b * f - c * e, c * d - a * f, a * e - b * d


def _heights(
    slices: Sequence[Placement], normals: Sequence[tuple[float, ...]], flip_hfs: bool
) -> np.ndarray:
    """Positions along the commonest normal, turned to the head, NaN where a slice has none that can
    be.
    """
    common = Counter(tuple(round(part, 3) for part in normal) for normal in normals).most_common(1)[
        0
    ][0]
    up = -1 if max(common, key=abs) < 0 else 1
    up = -up if _half_turns(slices[0].patient_position, flip_hfs)[2] else up
    z = np.array(
        [
            np.nan if item.position is None else up * np.dot(item.position, common)
            for item in slices
        ],
        np.float64,
    )
    return np.where(np.abs(z) < FARTHEST_MM, z, np.nan)


def _lone(z: np.ndarray) -> np.ndarray:
    """True where a position cannot be meant: heights (N,) by instance number, `LONE_MM` and
    `LONE_GAPS` median gaps from both neighbours.

    Slices beyond a real gap have a neighbour on their side of it. The first and the last slice have
    one neighbour only and may lie apart on purpose: these must be `LONE_END_MM` away, and farther
    than the others are from each other. Too few slices tell nothing.
    """
    gaps, lone = np.abs(np.diff(z)), np.zeros(len(z), bool)
    if len(z) < 5 or not gaps.any():
        return lone
    limit = max(LONE_MM, LONE_GAPS * np.quantile(gaps[gaps > 0], 0.5, method="lower"))
    lone[1:-1] = (gaps[:-1] > limit) & (gaps[1:] > limit)
    rest = z[~lone]
    limit = max(LONE_END_MM, limit, np.ptp(rest[1:-1]))
    lone[[0, -1]] = abs(rest[0] - rest[1]) > limit, abs(rest[-1] - rest[-2]) > limit
    return lone


def _between(at: np.ndarray, instances: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Heights at the numbers `at`, from those known (N,) at rising `instances`: interpolated, and
    beyond them by the median step.
    """
    steps = np.diff(instances)
    step = np.median(np.diff(z)[steps > 0] / steps[steps > 0]) if steps.any() else 0.0
    ends = np.clip(at, instances[0], instances[-1])
    return np.interp(ends, instances, z) + (at - ends) * step


def arrange(slices: Sequence[Placement], flip_hfs: bool = False) -> list[Place]:
    """Order a series superior first: by position along the slice normal, by instance number where
    no slice has a position.

    Single positions that are missing, or cannot be meant, are interpolated by instance number,
    beyond the ends extrapolated; positions that are all the same count as missing. Slices at one
    position keep the order of their numbers. Cuts in most slices of a series are its field of view
    and no flag.
    """
    if not slices:
        return []
    normals = [_normal(item.orientation) for item in slices]
    z = _heights(slices, normals, flip_hfs)
    instances = np.array([item.instance for item in slices], np.float64)
    tilted = np.array([abs(normal[2]) < 0.5**0.5 for normal in normals])
    by_number = np.argsort(instances, kind="stable")
    # a scout view may lie anywhere
    axial = by_number[np.isfinite(z[by_number]) & ~tilted[by_number]]
    z[axial[_lone(z[axial])]] = np.nan
    if len(axial) > 2 and np.nanmax(z[axial]) - np.nanmin(z[axial]) < SAME_POSITION_MM:
        z[:] = np.nan  # one place for all, as some de-identification leaves it, is no place
    known = np.isfinite(z)
    if known.any():
        along = by_number[known[by_number]]
        z[~known] = _between(instances[~known], instances[along], z[along])
    cuts = [item.cut for item in slices]
    field_of_view = len(cuts) > 2 and sum(cuts) > len(cuts) / 2
    places = [Place(0, None, "")] * len(slices)
    above = np.nan
    for order, k in enumerate(np.lexsort((instances, -np.nan_to_num(z)))):
        double = bool(known[k] and abs(z[k] - above) < SAME_POSITION_MM)
        marks = ((PARTIAL, cuts[k] and not field_of_view), (DUPLICATE, double), (TILTED, tilted[k]))
        places[k] = Place(
            order,
            round(float(z[k]), 4) if known.any() else None,
            ",".join(name for name, there in marks if there),
        )
        above = z[k] if known[k] and not tilted[k] and not double else above
    return places
