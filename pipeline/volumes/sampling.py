"""Which planes of a volume, and at what size: the same for pretraining, classifier, probes and
report.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from ..run.config import TrainConfig

Window = tuple[slice, slice, slice]  # planes, rows and columns of a part of a volume
ROUNDING = 1e-6  # voxels: an edge of a box that is no further from a whole voxel is that


def evenly(depth: int, count: int, phase: float = 0.5) -> np.ndarray:
    """(count,) indices spread evenly over `depth` slices: at `phase` (0 to 1) of each of `count`
    equal parts, the middle if not told.
    """
    return ((np.arange(count) + phase) * depth / count).astype(int)


def bins(depth: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last plane (count,) of each of `count` bins, at most `depth`: plane p lies in bin p
    * count // depth.
    """
    edges = -(-np.arange(count + 1) * depth // count)
    return edges[:-1], edges[1:] - 1


def slice_positions(
    depth: int, count: int, rng: np.random.Generator | None = None, phase: float = 0.5
) -> np.ndarray:
    """`count` ascending plane numbers spread evenly over `depth`: at `phase` of each bin, the
    middle if not told, or a random plane in it.

    Not `evenly` alone, whose planes may lie one bin off where bins differ in size: each plane
    carries the labels of its own bin.
    """
    first, last = bins(depth, count)
    if rng is not None:
        return rng.integers(first, last, endpoint=True)
    return np.clip(evenly(depth, count, phase), first, last)


def box_window(
    box: Sequence[float], shape: tuple[int, int, int], margin: float, least: int
) -> Window:
    """The part of a volume of `shape` (D, H, W) that shows a box (z0, z1, y0, y1, x0, x1) given in
    shares of its sides, with `margin` times the box's side added at each end.

    It has the form of a whole plane, so that an organ is drawn out no further than there, and at
    least `least` planes. Where that reaches over a border it is moved inside.
    """
    low, high = np.reshape(box, (3, 2)).T
    half = (high - low) * (0.5 + margin)
    half[0] = max(half[0], least / (2 * shape[0]))
    half[1:] = half[1:].max()
    half = np.minimum(half, 0.5)
    centre = np.clip((low + high) / 2, half, 1 - half)
    first = np.floor((centre - half) * shape + ROUNDING).astype(int)
    end = np.ceil((centre + half) * shape - ROUNDING).astype(int)
    planes, rows, columns = map(slice, first.tolist(), end.tolist())
    return planes, rows, columns


def moved_to(positions: np.ndarray, plane: int, depth: int) -> np.ndarray:
    """`positions` (S,) moved together, each within its own bin, so that `plane` is one of them."""
    first, last = bins(depth, len(positions))
    step = plane - positions[plane * len(positions) // depth]
    return np.clip(positions + step, first, last)


def with_neighbours(positions: np.ndarray, depth: int, channels: int) -> np.ndarray:
    """(S,) plane numbers to (S * channels,): each between its neighbours in z, the adjacent stored
    planes, whatever lies between two samples; beyond the ends of `depth` planes the last one again.
    """
    around = np.arange(channels) - channels // 2
    return np.clip(positions[:, None] + around, 0, depth - 1).ravel()


def take_slices(
    volume: np.ndarray,
    positions: np.ndarray,
    config: TrainConfig,
    rng: np.random.Generator | None = None,
    window: Window | None = None,
    labels: bool = False,
) -> np.ndarray:
    """Slices (S, size, size) uint8 out of a volume (D, H, W): border cut by `config.crop`, then the
    square of `config.crop_size` at a place that `rng` draws, the middle without, resized by area.
    Of a `window` its rows and columns, resized linearly where they are fewer than `size`. Of
    `labels`, on the grid of a volume, what lies nearest to the middle of each pixel.
    """
    how = cv2.INTER_NEAREST_EXACT if labels else cv2.INTER_AREA
    if window is not None:
        small = min(part.stop - part.start for part in window[1:]) < config.image_size
        if small and not labels:
            how = cv2.INTER_LINEAR
        return resize_planes(volume[positions, window[1], window[2]], config.image_size, how)
    _, height, width = volume.shape
    top, left = round(height * config.crop), round(width * config.crop)
    if (side := config.crop_size) is not None:
        free = np.array([height - 2 * top - side, width - 2 * left - side])
        y, x = free // 2 if rng is None else rng.integers(0, free, endpoint=True)
        planes = volume[positions, top + y : top + y + side, left + x : left + x + side]
    else:
        planes = volume[positions, top : height - top, left : width - left]
    return resize_planes(planes, config.image_size, how)


def plane_range(window: Window | None, depth: int) -> tuple[int, int]:
    """First plane of a window and the one after its last, of all `depth` planes without one."""
    return (window[0].start, window[0].stop) if window else (0, depth)


def even_slices(
    volume: np.ndarray,
    config: TrainConfig,
    phases: int = 1,
    windows: Sequence[Window | None] = (None,),
) -> np.ndarray:
    """Slices (S * channels, size, size) uint8 that a classifier looks at in a volume (D, H, W) when
    it predicts: those of each of its regions' `windows` (None: the whole volume) one after another,
    S in all, and the channels of a slice; of several phases, which lie between each other, (phases,
    S * channels, size, size).
    """
    ranges = [plane_range(window, len(volume)) for window in windows]
    views = [
        _seen(
            volume,
            config,
            windows,
            [
                first + slice_positions(end - first, count, phase=(k + 0.5) / phases)
                for (first, end), count in zip(ranges, config.region_slices, strict=True)
            ],
        )
        for k in range(phases)
    ]
    return np.stack(views) if phases > 1 else views[0]


def all_planes(
    volume: np.ndarray, config: TrainConfig, windows: Sequence[Window | None] = (None,)
) -> np.ndarray:
    """Every plane (N * channels, size, size) uint8 of each of `windows` (None: the whole volume) of
    a volume (D, H, W), one window after another, and the channels of a plane, as a classifier sees
    it when it predicts.
    """
    planes = [np.arange(*plane_range(window, len(volume))) for window in windows]
    return _seen(volume, config, windows, planes)


def _seen(
    volume: np.ndarray,
    config: TrainConfig,
    windows: Sequence[Window | None],
    planes: Sequence[np.ndarray],
) -> np.ndarray:
    """The `planes` (S,) of each of `windows`, one window after another, with their neighbours."""
    depth, channels = len(volume), config.channels
    parts = [
        take_slices(volume, with_neighbours(own, depth, channels), config, window=window)
        for own, window in zip(planes, windows, strict=True)
    ]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def resample_planes(volume: np.ndarray, depth: int, chosen: np.ndarray) -> np.ndarray:
    """Planes `chosen` (S,) of a volume (D, H, W) uint8 resampled by area to `depth` planes:
    (S, H, W) uint8. The planes that they are made of are read and no more.
    """
    found = np.empty((len(chosen), *volume.shape[1:]), np.uint8)
    for own, plane in zip(found, chosen.tolist(), strict=True):
        edges = np.array([plane, plane + 1]) * len(volume) / depth
        sources = np.arange(int(edges[0]), int(np.ceil(edges[1])))
        shares = np.minimum(sources + 1, edges[1]) - np.maximum(sources, edges[0])
        mean = np.tensordot(np.float32(shares / shares.sum()), np.float32(volume[sources]), 1)
        own[:] = np.rint(mean)
    return found


def resize_planes(planes: np.ndarray, size: int, how: int = cv2.INTER_AREA) -> np.ndarray:
    """(S, H, W) to (S, size, size), by area if not told; as it is where it has that size."""
    if planes.shape[1:] == (size, size):
        return np.ascontiguousarray(planes)
    return np.stack([cv2.resize(plane, (size, size), interpolation=how) for plane in planes])
