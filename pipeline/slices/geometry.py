"""Order, orientation and flags of one series, from headers and arrays alone.

Patient coordinates are DICOM's: x to the patient's left, y to the back, z to the head, in
millimetres. The flags, all of them here:

| flag | meaning |
|---|---|
| `partial` | columns are black from one on, within the body: an incomplete reconstruction |
| `duplicate` | another slice lies at the same position, or another pass covers it; bolus tracking |
| `tilted` | more than 45 degrees from axial, as a scout view is, or not parallel to the others |
| `unplaced` | no position, or none that can be meant, while other slices have one |
| `no air` | nothing in the whole series lies below -500 HU: no CT, or not in HU |
| `rescaled` | pixels of another size in mm than in most slices |

Flagged slices stay in the index and are left out of volumes, except those that are `rescaled` only,
which are brought to the common size in mm.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

PARTIAL, DUPLICATE, TILTED, UNPLACED = "partial", "duplicate", "tilted", "unplaced"
NO_AIR, RESCALED = "no air", "rescaled"
USABLE = ("", RESCALED)  # flags of the slices that go into volumes
PIXEL_MM = (0.05, 10.0)  # spacings outside are damage, or in another unit
SAME_SPACING = 0.01  # pixel spacings that differ by less than this share are one
SAME_POSITION_MM = 0.01
FARTHEST_MM = 1e5  # no scanner's coordinates reach this far
# how far a slice must lie from its neighbours to count as misplaced: see `_lone`
LONE_MM, LONE_GAPS, LONE_END_MM = 100.0, 30.0, 500.0
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PARALLEL = 0.996  # cosine of 5 degrees
MANY = 3  # slices at one place, one after the other, in a series of single ones: bolus tracking
PASS = 5  # slices that make a pass


class Placement(NamedTuple):
    """What ordering needs of one slice: its number, the tags' position and orientation, and
    `is_cut` of its picture.

    A reader leaves `cut` and `numbered` as they are, and `instance` None where the file says no
    number; `numbered` is False once one was made up.
    """

    instance: int | None
    position: Sequence[float] | None
    orientation: Sequence[float] | None
    patient_position: str = ""
    cut: bool = False
    numbered: bool = True


class Place(NamedTuple):
    """Where a slice belongs: `order` counts from the most superior, `z_mm` grows towards the head
    (None: the series has no positions, or the slice none that can be).
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
    Columns that are a twentieth full at most are specks, not a body.
    """
    sample = cv2.threshold(image[:: max(1, len(image) // 128)], 0, 1, cv2.THRESH_BINARY)[1]
    full = cv2.reduce(sample, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
    dark, enough = np.flatnonzero(full == 0), 0.5 * full.max()
    if not dark.size or full.max() <= len(sample) / 20:
        return False
    padded = np.zeros(len(full) + 6, full.dtype)
    padded[3:-3] = full
    # to the right and to the left of a dark column: the next one, and that two further in
    sides = ((padded[dark + 4], padded[dark + 6]), (padded[dark + 2], padded[dark]))
    return any(((edge >= enough) & (edge >= 0.85 * inner)).any() for edge, inner in sides)


def _heights(slices: Sequence[Placement], common: tuple[float, ...], flip_hfs: bool) -> np.ndarray:
    """Positions along the normal `common`, turned to the head, NaN where a slice has none that can
    be.
    """
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


def _runs(z: np.ndarray) -> list[np.ndarray]:
    """Heights (N,) by instance number, cut where their direction turns: the indices of each run."""
    cuts, direction = [], 0.0
    for k, step in enumerate(np.diff(z), start=1):
        sign = np.sign(step) if abs(step) >= SAME_POSITION_MM else 0.0
        turns = sign * direction < 0
        cuts += [k] if turns else []
        direction = 0.0 if turns else sign or direction
    return np.split(np.arange(len(z)), cuts)


def _covered(at: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """True where heights `at` lie between two of `kept` that are no farther apart than usual."""
    kept = np.unique(kept)
    above = np.clip(np.searchsorted(kept, at), 1, len(kept) - 1)
    gap = kept[above] - kept[above - 1]
    between = (at >= kept[above - 1]) & (at <= kept[above])
    return between & (gap <= 1.5 * np.median(np.diff(kept)))


def _repeated(z: np.ndarray) -> np.ndarray:
    """True where a slice shows again what others show: heights (N,) by instance number.

    Bolus tracking is many slices in a row at one place, in a series that is otherwise single. A
    pass is a run of numbers in one direction. Of passes over the same heights, as a native and a
    late phase in one folder, the longest stays, the first if they are equal; another one fills its
    gaps.
    """
    again = np.zeros(len(z), bool)
    starts = np.flatnonzero(np.abs(np.diff(z, prepend=np.inf)) >= SAME_POSITION_MM)
    lengths = np.diff(starts, append=len(z))
    if len(z) and np.median(lengths) == 1:
        again = np.repeat(lengths >= MANY, lengths)
    single = np.flatnonzero(~again)
    runs = sorted(_runs(z[single]), key=len, reverse=True)
    if sum(len(run) for run in runs if len(run) >= PASS) < max(PASS, 0.8 * len(single)):
        return again  # numbers in no order tell of no pass
    kept = z[single[runs[0]]]
    for run in runs[1:]:
        heights = z[single[run]]
        again[single[run]] = covered = _covered(heights, kept)
        kept = np.concatenate([kept, heights[~covered]])
    return again


def _invented(z: np.ndarray, instances: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Heights (N,) with those that are missing interpolated by instance number between the slices
    `along`, in the order of their numbers; NaN where what comes out cannot be meant either.
    """
    z, missing = z.copy(), np.flatnonzero(~np.isfinite(z))
    z[missing] = _between(instances[missing], instances[along], z[along])
    for k in missing:
        place = np.searchsorted(instances[along], instances[k])
        lone = _lone(np.insert(z[along], place, z[k]))[place]
        z[k] = np.nan if lone or abs(z[k]) >= FARTHEST_MM else z[k]
    return z


def arrange(slices: Sequence[Placement], flip_hfs: bool = False) -> list[Place]:
    """Order a series superior first: by position along the slice normal, by instance number where
    most slices have no position.

    Single positions that are missing, or cannot be meant, are interpolated by instance number,
    beyond the ends extrapolated, and flagged; so are numbers that were made up, where nothing else
    orders. Positions that are all the same count as missing. Slices at one position keep the order
    of their numbers. Cuts in most slices of a series are its field of view and no flag.
    """
    if not slices:
        return []
    o = np.array([_directions(item.orientation) for item in slices], np.float64)
    normals = np.cross(o[:, :3], o[:, 3:])
    upright = np.abs(normals[:, 2]) >= 0.5**0.5
    chosen = normals[upright] if upright.any() else normals
    rounded = Counter(tuple(round(part, 3) for part in normal) for normal in chosen.tolist())
    common = rounded.most_common(1)[0][0]
    z = _heights(slices, common, flip_hfs)
    instances = np.array([item.instance for item in slices], np.float64)
    tilted = ~upright | (np.abs(normals @ common) < PARALLEL)
    by_number = np.argsort(instances, kind="stable")
    # a scout view may lie anywhere
    axial = by_number[np.isfinite(z[by_number]) & ~tilted[by_number]]
    z[axial[_lone(z[axial])]] = np.nan
    if len(axial) > 2 and np.nanmax(z[axial]) - np.nanmin(z[axial]) < SAME_POSITION_MM:
        z[:] = np.nan  # one place for all, as some de-identification leaves it, is no place
    if np.isfinite(z).sum() < len(z) / 2:
        z[:] = np.nan  # the few that have one are the strangers
    known, unplaced = np.isfinite(z), np.array([not item.numbered for item in slices])
    again = np.zeros(len(z), bool)
    if known.any():
        unplaced = ~known
        axial = by_number[(known & ~tilted)[by_number]]
        again[axial] = _repeated(z[axial])
        z = _invented(z, instances, by_number[known[by_number]])
    elif unplaced.sum() >= len(z) / 2:
        unplaced[:] = False
    cuts = [item.cut for item in slices]
    field_of_view = len(cuts) > 2 and sum(cuts) > len(cuts) / 2
    places = [Place(0, None, "")] * len(slices)
    above = np.nan
    for order, k in enumerate(np.lexsort((instances, np.where(np.isfinite(z), -z, np.inf)))):
        double = bool(again[k] or known[k] and abs(z[k] - above) < SAME_POSITION_MM)
        marks = (
            (PARTIAL, cuts[k] and not field_of_view),
            (DUPLICATE, double),
            (TILTED, tilted[k]),
            (UNPLACED, unplaced[k]),
        )
        places[k] = Place(
            order,
            round(float(z[k]), 4) if np.isfinite(z[k]) else None,
            ",".join(name for name, there in marks if there),
        )
        above = z[k] if known[k] and not tilted[k] and not double else above
    return places


def typical_mm(spacings: Sequence[float | None]) -> float | None:
    """The most common pixel spacing of those that are plausible, the larger one on a tie; None
    where none is.
    """
    counts = Counter(mm for mm in spacings if mm is not None and PIXEL_MM[0] <= mm <= PIXEL_MM[1])
    return max(counts, key=lambda mm: (counts[mm], mm)) if counts else None


def is_rescaled(spacing: Sequence[float | None], common: Sequence[float | None]) -> bool:
    """True where a plausible pixel spacing (y, x) of a slice is not that of its series."""
    return any(
        own is not None
        and mm is not None
        and PIXEL_MM[0] <= own <= PIXEL_MM[1]
        and abs(own / mm - 1) > SAME_SPACING
        for own, mm in zip(spacing, common, strict=True)
    )


def millimetres(spacings: Sequence[float | None]) -> float:
    """What the lengths of a series must be multiplied with to be mm: pixels that are a thousand
    times too small are in metres, as some exports write, a thousand times too large in micrometres.
    """
    known = [mm for mm in spacings if mm is not None and np.isfinite(mm) and mm > 0]
    middle = float(np.median(known)) if known else 1.0
    factors = () if PIXEL_MM[0] <= middle <= PIXEL_MM[1] else (1e3, 1e-3)
    return next((factor for factor in factors if 0.1 <= middle * factor <= 5.0), 1.0)
