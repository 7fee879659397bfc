"""Ordered slices to one D x H x W volume: body box, area resampling in millimetres, aspect kept by
letterbox.

Arrays in, arrays out. Slices stream through once: memory is one D x rows x cols accumulator,
whatever their number.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..run.config import VolumeConfig
from ..slices.window import window

# grey: under it lies air, above it fat and everything denser
AIR_LEVEL = int(window(np.array(-125.0)))
COARSE_MM = 2.5  # pixel of the masks that the body box is found on
# share of a coarse pixel that must be filled: keeps the slit of air between arm and trunk open
SOLID = 0.9
OPENING_MM = 25.0  # table tops and the skin bridge between arm and body are thinner than this
MIN_PRESENCE = 0.15  # share of the slices in which a pixel of the box must be body


@dataclass(frozen=True)
class Volume:
    """A resampled series.

    `array` is (D, H, W) uint8, superior first; `box` is (y0, y1, x0, x1) in pixels of the common
    slice size; `spacing_mm` is (z, y, x) of the array; `plane_sources` gives for each of the D
    planes the position of its nearest slice in the input.
    """

    array: np.ndarray
    box: tuple[int, int, int, int]
    spacing_mm: tuple[float, float, float]
    plane_sources: tuple[int, ...]


def common_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The most frequent (rows, cols); the larger one on a tie."""
    counts = Counter(sizes)
    return max(counts, key=lambda size: (counts[size], size))


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w) to fit (height, width) with its aspect kept, centred on black."""
    rows, cols = image.shape
    if (rows, cols) == (height, width):
        return image
    scale = min(height / rows, width / cols)
    inner = max(1, round(rows * scale)), max(1, round(cols * scale))
    return _paste(_resize(image, *inner), height, width)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def _paste(image: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height, width), image.dtype)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def plane_weights(z_mm: np.ndarray, depth: int) -> np.ndarray:
    """Area weights (N, depth) that resample N ordered slices to `depth` planes, uniform in
    millimetres; columns sum to 1.

    Each slice owns the interval between the midpoints to its neighbours. Where positions are
    missing or do not run one way, the slices are taken as equidistant.
    """
    count = len(z_mm)
    steps = np.abs(np.diff(z_mm))
    one_way = (
        count > 1
        and np.isfinite(z_mm).all()
        and (np.all(np.diff(z_mm) <= 0) or np.all(np.diff(z_mm) >= 0))
        and steps.sum() > 0
    )
    place = np.concatenate([[0.0], np.cumsum(steps)]) if one_way else np.arange(count, dtype=float)
    middle = (place[1:] + place[:-1]) / 2
    first, last = (place[1] - place[0], place[-1] - place[-2]) if count > 1 else (1.0, 1.0)
    edges = np.concatenate(
        [[place[0] - max(first, 1e-3) / 2], middle, [place[-1] + max(last, 1e-3) / 2]]
    )
    planes = np.linspace(edges[0], edges[-1], depth + 1)
    overlap = np.minimum(edges[1:, None], planes[None, 1:]) - np.maximum(
        edges[:-1, None], planes[None, :-1]
    )
    overlap = np.clip(overlap, 0, None)
    return overlap / overlap.sum(0)


def body_mask(image: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """Coarse mask (pixels of about `COARSE_MM`) of the trunk in one slice (rows, cols) uint8:
    filled, opened, largest component.
    """
    filled = _fill((image > AIR_LEVEL).astype(np.uint8))
    rows, cols = (
        max(8, round(size * mm / COARSE_MM))
        for size, mm in zip(image.shape, spacing_mm, strict=True)
    )
    coarse = np.pad((_resize(filled * np.float32(1), rows, cols) > SOLID).astype(np.uint8), 8)
    radius = max(1, round(OPENING_MM / COARSE_MM / 2))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    core = _largest(cv2.erode(coarse, kernel))
    return cv2.dilate(core, kernel)[8:-8, 8:-8]


def _fill(mask: np.ndarray) -> np.ndarray:
    """Fill what the outer contours enclose: lungs and gas belong to the body."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(np.zeros_like(mask), contours, -1, 1, cv2.FILLED)


def _largest(mask: np.ndarray) -> np.ndarray:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count <= 1:
        return np.zeros_like(mask)
    return (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])).astype(np.uint8)


def body_outline(
    presence: np.ndarray, size: tuple[int, int], spacing_mm: tuple[float, float], margin_mm: float
) -> np.ndarray:
    """Mask (rows, cols) bool of `size` pixels: the body seen along z, with a margin; all True where
    nothing looks like a body.

    `presence` is the share of slices (coarse rows, cols) in which each pixel is body.
    """
    body = _largest((presence >= MIN_PRESENCE).astype(np.uint8))
    if not body.any():
        return np.ones(size, bool)
    body = cv2.resize(body, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
    reach = [2 * round(margin_mm / mm) + 1 for mm in spacing_mm]
    return cv2.dilate(body, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, reach[::-1])).astype(bool)


def body_box(outline: np.ndarray) -> tuple[int, int, int, int]:
    """Box (y0, y1, x0, x1) around a mask (rows, cols)."""
    rows, cols = np.flatnonzero(outline.any(1)), np.flatnonzero(outline.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1


def fit_plane(box_mm: tuple[float, float], config: VolumeConfig) -> tuple[int, int]:
    """Height and width in pixels that a box of `box_mm` (height, width) takes within the stored
    plane.
    """
    if config.aspect == "stretch":
        return config.height, config.width
    scale = min(config.height / box_mm[0], config.width / box_mm[1])
    return max(1, round(box_mm[0] * scale)), max(1, round(box_mm[1] * scale))


def build_volume(
    images: Iterable[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    z_mm: np.ndarray,
    spacing_mm: tuple[float, float],
    config: VolumeConfig,
) -> Volume:
    """Resample the usable slices of one series, given in superior-to-inferior order.

    Args:
        images: N arrays (rows, cols) uint8, read one at a time.
        sizes: N pairs (rows, cols), known beforehand.
        z_mm: (N,) positions along the slice normal, NaN where unknown.
        spacing_mm: (y, x) of a pixel of the common size.
        config: depth, height, width, aspect and margin.

    Raises:
        ValueError: no slice at all.
    """
    if not len(sizes):
        raise ValueError("a volume needs at least one usable slice")
    rows, cols = common_size(sizes)
    weights = plane_weights(np.asarray(z_mm, dtype=float), config.depth).astype(np.float32)
    planes = np.zeros((config.depth, rows, cols), np.float32)
    presence: np.ndarray = np.zeros((), np.float32)  # the first mask gives it its shape
    for image, weight in zip(images, weights, strict=True):
        image = letterbox(image, rows, cols)
        presence = presence + body_mask(image, spacing_mm) / np.float32(len(sizes))
        for plane in np.flatnonzero(weight):
            planes[plane] += image * weight[plane]
    outline = body_outline(presence, (rows, cols), spacing_mm, config.margin_mm)
    planes *= outline
    y0, y1, x0, x1 = box = body_box(outline)
    inner = fit_plane(((y1 - y0) * spacing_mm[0], (x1 - x0) * spacing_mm[1]), config)
    array = np.stack(
        [
            _paste(_resize(plane[y0:y1, x0:x1], *inner), config.height, config.width)
            for plane in planes
        ]
    )
    spacing = (
        _extent(z_mm) / config.depth,
        (y1 - y0) * spacing_mm[0] / inner[0],
        (x1 - x0) * spacing_mm[1] / inner[1],
    )
    return Volume(
        np.clip(np.rint(array), 0, 255).astype(np.uint8),
        box,
        spacing,
        tuple(int(i) for i in weights.argmax(0)),
    )


def _extent(z_mm: np.ndarray) -> float:
    """Length in mm that the slices cover, NaN where positions are unknown."""
    z_mm = np.asarray(z_mm, dtype=float)
    if len(z_mm) < 2 or not np.isfinite(z_mm).all():
        return float("nan")
    length = float(abs(z_mm[-1] - z_mm[0]))
    return length * len(z_mm) / (len(z_mm) - 1)
