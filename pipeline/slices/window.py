"""The fixed window: stored values to HU to 8-bit grey. The one place that knows its limits."""

import functools
from typing import NamedTuple

import cv2
import numpy as np

LOW_HU, HIGH_HU = -150.0, 250.0
AIR_HU = -500.0  # below it lies nothing but air and lung


class Stored(NamedTuple):
    """Bit patterns (rows, cols) uint8 or uint16 of a file: `bits` low ones count, sign-extended
    where `signed`; HU = value x slope + intercept; `inverted` (MONOCHROME1) counts after the
    window, as 255 minus grey. Values from one end of `padding` to the other are no picture.
    """

    words: np.ndarray
    bits: int
    signed: bool
    slope: float
    intercept: float
    inverted: bool
    padding: tuple[int, int] | None = None


def grey(pixels: np.ndarray | Stored) -> np.ndarray:
    """The 8-bit picture (rows, cols) of HU or of what a file stores; padding is air, black."""
    if not isinstance(pixels, Stored):
        return np.ascontiguousarray(window(pixels))
    image = windowed(*pixels[:6])
    if pixels.padding:
        _blacken(image, pixels)
    return image


def _blacken(image: np.ndarray, stored: Stored) -> None:
    """Make padding black in the windowed `image` (rows, cols).

    Padding that is itself an HU of tissue may occur in the body too: then only what reaches the
    border is meant. A limit that makes tissue of the range is a mistake, and the value stands
    alone.
    """

    def hu(value: int) -> float:
        return value * stored.slope + stored.intercept

    value, limit = stored.padding or (0, 0)
    if min(hu(value), hu(limit)) < HIGH_HU and max(hu(value), hu(limit)) > LOW_HU:
        limit = value
    if max(hu(value), hu(limit)) <= LOW_HU and not stored.inverted:
        return  # black anyway
    padded = _between(stored, min(value, limit), max(value, limit))
    if LOW_HU < hu(value) < HIGH_HU:
        framed = np.pad(padded, 1, constant_values=True).astype(np.uint8)
        labels = cv2.connectedComponents(framed, connectivity=4)[1]
        padded &= (labels == labels[0, 0])[1:-1, 1:-1]
    image[padded] = 0


def _between(stored: Stored, low: int, high: int) -> np.ndarray:
    """True (rows, cols) where `low` to `high` is stored, by all bits or by those that count."""
    every, bits = stored.words.astype(np.int32), 8 * stored.words.itemsize
    found = np.zeros(every.shape, bool)
    for count in {bits, stored.bits}:
        values = integers(every, count, stored.signed)
        found |= (values >= low) & (values <= high)
    return found


def integers(words: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """What bit patterns in a type of more bits mean: only the low `bits` count, sign-extended where
    `signed`.
    """
    low = words & ((1 << bits) - 1)
    sign = 1 << (bits - 1) if signed else 0
    return (low ^ sign) - sign  # takes 2^bits off where the sign bit is set


def window(hu: np.ndarray) -> np.ndarray:
    """HU to 0..255: `clip(rint((HU + 150) * 255 / 400), 0, 255)` in float64, halves to even."""
    return np.clip(
        np.rint((np.asarray(hu, np.float64) - LOW_HU) * 255 / (HIGH_HU - LOW_HU)), 0, 255
    ).astype(np.uint8)


@functools.lru_cache(64)
def lookup(
    size: int, bits: int, signed: bool, slope: float, intercept: float, inverted: bool
) -> np.ndarray:
    """Window values of all `size` (256 or 65536) bit patterns, as `integers` reads them."""
    table = window(integers(np.arange(size), bits, signed) * np.float64(slope) + intercept)
    return 255 - table if inverted else table


def _scaled(words: np.ndarray, low: int, scale: float) -> np.ndarray:
    """uint16 to `(words - low) x scale` as uint8, saturated at both ends: two passes of vector
    instructions.
    """
    above: np.ndarray = cv2.subtract(words, low)  # type: ignore[call-overload]  # a scalar
    return cv2.convertScaleAbs(above, alpha=scale)


@functools.lru_cache(64)
def _scaling(bits: int, shift: int, slope: float, intercept: float) -> tuple[int, float] | None:
    """`low` and `scale` by which `_scaled` is the window of words that are values of `bits` plus
    `shift`; None where one would differ.
    """
    if not slope > 0:
        return None
    low, scale = round((LOW_HU - intercept) / slope) + shift, 255 * slope / (HIGH_HU - LOW_HU)
    words = np.arange(1 << bits, dtype=np.uint16)
    exact = window((words.astype(np.float64) - shift) * slope + intercept)
    return (
        (low, scale)
        if 0 <= low < 1 << 16 and np.array_equal(_scaled(words[None], low, scale)[0], exact)
        else None
    )


@functools.cache
def _wide_lut() -> bool:
    """True where this OpenCV looks up 16-bit values, twice as fast as numpy does."""
    try:
        return (
            cv2.LUT(np.full((1, 1), 65535, np.uint16), np.arange(65536).astype(np.uint8))[0, 0]
            == 255
        )
    except cv2.error:
        return False


def windowed(
    stored: np.ndarray, bits: int, signed: bool, slope: float, intercept: float, inverted: bool
) -> np.ndarray:
    """`lookup` of a picture of bit patterns; by plain arithmetic, in half the time, where that is
    known to give the same.
    """
    shift = 1 << bits >> 1 if signed else 0
    if (
        stored.itemsize == 2
        and not inverted
        and (scaling := _scaling(bits, shift, slope, intercept))
    ):
        words = stored + np.uint16(shift) if signed else stored
        if bits == 16 or words.max() < 1 << bits:  # bits that do not count are a sign or nothing
            return _scaled(words, *scaling)
    table = lookup(256**stored.itemsize, bits, signed, slope, intercept, inverted)
    return cv2.LUT(stored, table) if stored.itemsize == 1 or _wide_lut() else table[stored]
