"""Order, orientation and flags of one series, from headers and arrays alone.

Patient coordinates are DICOM's: x to the patient's left, y to the back, z to the head, in millimetres. Flags of a slice (the only list):

| flag | meaning |
|---|---|
| `partial` | image columns are black from one column on, within the body: the reconstruction is incomplete |
| `duplicate` | an earlier slice lies at the same position |
| `tilted` | more than 45 degrees from axial, as a scout view is |

Flagged slices stay in the index and are left out of volumes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PARTIAL, DUPLICATE, TILTED = "partial", "duplicate", "tilted"
SAME_POSITION_MM = 0.01
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Placement:
    """What ordering needs of one slice. `position` and `orientation` are the tags' numbers, `cut` is `is_cut` of its picture."""

    instance: int
    position: Sequence[float] | None
    orientation: Sequence[float] | None
    patient_position: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Place:
    """Result for one slice: `order` counts from the most superior, `z_mm` grows towards the head (None: no position in the series)."""

    order: int
    z_mm: float | None
    flags: str


def _turns(patient_position: str, flip_hfs: bool) -> tuple[bool, bool, bool]:
    """Extra flips in x, y and z by PatientPosition: half turns about y (feet first) and about z (prone)."""
    feet, prone = flip_hfs and patient_position.startswith("FF"), flip_hfs and patient_position.endswith("P")
    return feet != prone, prone, feet


def orient(image: np.ndarray, orientation: Sequence[float] | None, patient_position: str = "", flip_hfs: bool = False) -> np.ndarray:
    """Picture (rows, cols) turned so that the patient's right is at image left and anterior at top; a view where nothing turns."""
    row, column = _axes(orientation)
    if abs(row[0]) < abs(row[1]) and abs(column[1]) < abs(column[0]):
        image, row, column = image.T, column, row
    turn_x, turn_y, _ = _turns(patient_position, flip_hfs)
    flip_x, flip_y = (row[0] < 0) != turn_x, (column[1] < 0) != turn_y
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def transposed(orientation: Sequence[float] | None) -> bool:
    """True where `orient` swaps rows and columns (and so the two pixel spacings)."""
    row, column = _axes(orientation)
    return abs(row[0]) < abs(row[1]) and abs(column[1]) < abs(column[0])


def _axes(orientation: Sequence[float] | None) -> np.ndarray:
    return np.asarray(orientation or AXIAL, dtype=np.float64).reshape(2, 3)


def is_cut(image: np.ndarray) -> bool:
    """True where columns of a windowed picture (rows, cols) are suddenly black next to a column through the body.

    A body's outline tapers towards its sides; a cut leaves a column about as full as the one two further in.
    """
    full = np.count_nonzero(image[::2], axis=0)
    dark = np.flatnonzero(full == 0)
    if not dark.size or dark.size == full.size:
        return False
    padded = np.concatenate(([0, 0], full, [0, 0]))
    for step in (1, -1):
        edge, inner = padded[dark + 2 + step], padded[np.clip(dark + 2 + 3 * step, 0, len(padded) - 1)]
        if ((edge >= 0.5 * full.max()) & (edge >= 0.85 * inner)).any():
            return True
    return False


def arrange(slices: Sequence[Placement], flip_hfs: bool = False) -> list[Place]:
    """Order a series superior first: by position along the common slice normal, by instance number where no slice has a position.

    Single missing positions are interpolated by instance number. Ties keep the order of instance numbers.
    """
    if not slices:
        return []
    normals = [np.cross(*_axes(item.orientation)) for item in slices]
    tilted = [abs(normal[2]) < np.sqrt(0.5) for normal in normals]
    common = np.array(Counter(tuple(np.round(normal, 3)) for normal in normals).most_common(1)[0][0])
    common = common * (-1 if common[np.argmax(abs(common))] < 0 else 1)
    if _turns(slices[0].patient_position, flip_hfs)[2]:
        common = -common
    instances = np.array([item.instance for item in slices], dtype=np.float64)
    z = np.array([np.nan if item.position is None else float(np.dot(item.position, common)) for item in slices])
    known = np.isfinite(z)
    if known.any():
        along = np.argsort(instances[known], kind="stable")
        z[~known] = np.interp(instances[~known], instances[known][along], z[known][along])
        ranks = np.lexsort((instances, -z))
    else:
        ranks = np.argsort(instances, kind="stable")
    cuts = [item.cut for item in slices]
    field = sum(cuts) * 2 > len(cuts) and len(cuts) > 2  # most slices cut alike: that is the field of view
    places: list[Place] = [Place(0, None, "")] * len(slices)
    above: float | None = None
    for order, k in enumerate(ranks):
        double = known[k] and above is not None and abs(z[k] - above) < SAME_POSITION_MM
        marks = ((PARTIAL, cuts[k] and not field), (DUPLICATE, double), (TILTED, tilted[k]))
        places[k] = Place(order, round(float(z[k]), 4) if known.any() else None, ",".join(name for name, there in marks if there))
        if known[k] and not tilted[k] and not double:
            above = float(z[k])
    return places
