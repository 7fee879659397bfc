"""Ordered slices to one D x H x W volume: body box, area resampling, to the whole plane or, with
`volume.aspect=letterbox`, to scale.

Arrays in, arrays out. Slices stream through once: memory is one D x rows x cols accumulator,
whatever their number.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..run.config import VolumeConfig
from ..slices.geometry import SAME_SPACING
from .body import body_outlines, slice_masks

UNKNOWN = (float("nan"), float("nan"))  # a pixel spacing


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
    return _centre(_resize(image, *_fitting(image.shape, height, width)), height, width)


def _fitting(sides: Sequence[float], height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels of the largest of the form of `sides` within (height, width)."""
    scale = min(height / sides[0], width / sides[1])
    return max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))


def match_plane(
    image: np.ndarray,
    size: tuple[int, int],
    spacing_mm: tuple[float, float],
    common_mm: tuple[float, float],
) -> np.ndarray:
    """A slice (h, w) as one of the common size and pixel spacing (y, x), centre on centre; by
    `letterbox` where its own spacing is unknown.
    """
    if not np.isfinite(spacing_mm).all():
        return letterbox(image, *size)
    scale = [own / mm for own, mm in zip(spacing_mm, common_mm, strict=True)]
    if max(abs(ratio - 1) for ratio in scale) <= SAME_SPACING:
        return _centre(image, *size)
    inner = (max(1, round(n * ratio)) for n, ratio in zip(image.shape, scale, strict=True))
    return _centre(_resize(image, *inner), *size)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) as (height, width): cut at its border or set on black, centre on centre."""
    if image.shape == (height, width):
        return image
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    image = image[max(0, top) :, max(0, left) :][:height, :width]
    canvas = np.zeros((height, width), image.dtype)
    canvas[max(0, -top) :, max(0, -left) :][: image.shape[0], : image.shape[1]] = image
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


def fit_plane(box_mm: tuple[float, float], config: VolumeConfig) -> tuple[int, int]:
    """Height and width in pixels that a box of `box_mm` (height, width) takes within the stored
    plane.
    """
    if config.aspect == "stretch":
        return config.height, config.width
    return _fitting(box_mm, config.height, config.width)


def _stored(part: np.ndarray, inner: tuple[int, int], config: VolumeConfig) -> np.ndarray:
    """The body's box (h, w) of a plane as a plane of the volume."""
    return _centre(_resize(part, *inner), config.height, config.width)


def resample_labels(
    labels: Iterable[np.ndarray],
    count: int,
    z_mm: np.ndarray,
    spacing_mm: tuple[float, float],
    box: tuple[int, int, int, int],
    config: VolumeConfig,
) -> np.ndarray:
    """A label map of usable slices, superior first, on the grid of the volume that `build_volume`
    made of them: (D, H, W) uint8. A voxel has the label that most of it has.

    Args:
        labels: N arrays (rows, cols) uint8 of the common size, values 0 to `count`.
        count: the largest label.
        z_mm, spacing_mm: those that the volume was made with.
        box: (y0, y1, x0, x1) of the volume.
    """
    (y0, y1, x0, x1), weights = box, plane_weights(np.asarray(z_mm, float), config.depth)
    inner = fit_plane(((y1 - y0) * spacing_mm[0], (x1 - x0) * spacing_mm[1]), config)
    shares = np.zeros((count + 1, config.depth, config.height, config.width), np.float32)
    for plane, weight in zip(labels, weights, strict=True):
        part = plane[y0:y1, x0:x1]
        for label in np.flatnonzero(np.bincount(part.ravel(), minlength=count + 1)[1:]) + 1:
            own = _stored((part == label).astype(np.float32), inner, config)
            for k in np.flatnonzero(weight):
                cv2.scaleAdd(own, float(weight[k]), shares[label, k], shares[label, k])
    shares[0] = 1 - shares[1:].sum(0)
    return shares.argmax(0).astype(np.uint8)


def build_volume(
    images: Iterable[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    z_mm: np.ndarray,
    spacing_mm: tuple[float, float],
    config: VolumeConfig,
    spacings: Sequence[tuple[float, float]] | None = None,
) -> Volume:
    """Resample the usable slices of one series, given in superior-to-inferior order.

    Args:
        images: N arrays (rows, cols) uint8, read one at a time.
        sizes: N pairs (rows, cols), known beforehand.
        z_mm: (N,) positions along the slice normal, NaN where unknown.
        spacing_mm: (y, x) of a pixel of the common size.
        config: depth, height, width, aspect and margin.
        spacings: N pairs (y, x) in mm, NaN where unknown: slices of another size or spacing are
            brought to `spacing_mm`, and where nothing is known letterboxed.

    Raises:
        ValueError: no slice at all.
    """
    if not len(sizes):
        raise ValueError("a volume needs at least one usable slice")
    size = common_size(sizes)
    weights = plane_weights(np.asarray(z_mm, dtype=float), config.depth)
    planes, masks = _accumulate(
        (
            match_plane(image, size, own, spacing_mm)
            for image, own in zip(images, spacings or len(sizes) * [UNKNOWN], strict=True)
        ),
        weights,
        size,
        spacing_mm,
    )
    plane_mm = _extent(z_mm) / config.depth
    outlines, box = body_outlines(masks, size, spacing_mm, plane_mm, config.margin_mm)
    y0, y1, x0, x1 = box
    inner = fit_plane(((y1 - y0) * spacing_mm[0], (x1 - x0) * spacing_mm[1]), config)
    array = np.empty((config.depth, config.height, config.width), np.uint8)
    for k, (plane, outline) in enumerate(zip(planes, outlines, strict=True)):
        body = plane[y0:y1, x0:x1] * outline[y0:y1, x0:x1]
        array[k] = np.clip(np.rint(_stored(body, inner, config)), 0, 255)
    in_plane = ((y1 - y0) * spacing_mm[0] / inner[0], (x1 - x0) * spacing_mm[1] / inner[1])
    # the slice at a plane's centre, the upper one of two: of several that lie whole in it `argmax`
    # would take any, and a label at its other end would lie nearer to the next plane
    sources = np.ceil(np.arange(len(weights)) @ weights - 0.5 - 1e-6)
    return Volume(array, box, (plane_mm, *in_plane), tuple(sources.astype(int).tolist()))


def _accumulate(
    images: Iterable[np.ndarray],
    weights: np.ndarray,
    size: tuple[int, int],
    spacing_mm: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means of the slices in each plane, (D, rows, cols) float32, and the union of their
    `slice_masks`, (2, D, h, w) uint8; `weights` are (N, D), columns sum to 1.
    """
    planes = np.zeros((weights.shape[1], *size), np.float32)
    masks, total = np.empty(0, np.uint8), np.zeros(len(planes))
    for image, weight in zip(images, weights, strict=True):
        found = slice_masks(image, spacing_mm)
        if not masks.size:
            masks = np.zeros((2, len(planes), *found.shape[1:]), np.uint8)
        for k in np.flatnonzero(weight):
            total[k] += weight[k]
            # a running mean: no temporary plane, which would take as long as the sum itself
            cv2.accumulateWeighted(image, planes[k], weight[k] / total[k])
            masks[:, k] |= found
    return planes, masks


def _extent(z_mm: np.ndarray) -> float:
    """Length in mm that the slices cover, NaN where positions are unknown."""
    z_mm = np.asarray(z_mm, dtype=float)
    if len(z_mm) < 2 or not np.isfinite(z_mm).all():
        return float("nan")
    length = float(abs(z_mm[-1] - z_mm[0]))
    return length * len(z_mm) / (len(z_mm) - 1)
