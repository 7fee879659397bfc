"""2D-VoCo geometry on arrays: base crops tile the plane, random crops lie anywhere, labels are
shares of area.

Boxes are (y0, x0, y1, x1) in pixels, ends excluded; a box is the same in every slice of its volume.
Boxes in slabs are (z0, y0, x0, z1, y1, x1), z in slabs.
"""

from typing import Any, TypeVar

import numpy as np

Boxes = TypeVar("Boxes", bound=Any)  # numpy array or torch tensor
TOLERANCE = 0.1  # of overlap, within which a base crop counts as the right one


def base_boxes(size: int, grid: int) -> np.ndarray:
    """(grid * grid, 4): the tiles of a `size` x `size` plane, row by row."""
    side = size // grid
    corners = (
        np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1).reshape(-1, 2)
        * side
    )
    return np.concatenate([corners, corners + side], 1)


def random_boxes(size: int, grid: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 4): boxes as large as a tile, their centres uniform over all places where they
    fit.
    """
    side = size // grid
    corners = rng.integers(0, size - side, (count, 2), endpoint=True)
    return np.concatenate([corners, corners + side], 1)


def twin_boxes(boxes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(P, 4): each box again, moved by at most an eighth of its side, within the plane."""
    side = boxes[0, 2] - boxes[0, 0]
    moved = boxes[:, :2] + rng.integers(-(side // 8), side // 8, (len(boxes), 2), endpoint=True)
    corners = moved.clip(0, size - side)
    return np.concatenate([corners, corners + side], 1)


def in_slabs(boxes: np.ndarray, z_bins: int) -> np.ndarray:
    """(P, 4) -> (z_bins * P, 6): the same boxes in every slab, slab by slab."""
    slab = np.repeat(np.arange(z_bins), len(boxes))[:, None]
    plane = np.tile(boxes, (z_bins, 1))
    return np.concatenate([slab, plane[:, :2], slab + 1, plane[:, 2:]], 1)


def overlap_labels(random_boxes: Boxes, base_boxes: Boxes) -> Boxes:
    """Share of each random box that lies in each base box: (R, 4), (K, 4) -> (R, K), of boxes with
    z (R, 6), (K, 6) -> (R, K); rows sum to 1 where the base boxes tile plane and z.
    """
    n = random_boxes.shape[-1] // 2
    random, base = random_boxes[:, None], base_boxes[None]
    # the larger of both: written for arrays and tensors alike
    start = base[..., :n] + (random[..., :n] - base[..., :n]).clip(0)
    stop = base[..., n:] - (base[..., n:] - random[..., n:]).clip(0)
    return (stop - start).clip(0).prod(-1) / (random[..., n:] - random[..., :n]).prod(-1)


def window_of(
    shape: tuple[int, ...], margin: float, jitter: float, draw: np.ndarray
) -> tuple[slice, slice]:
    """Rows and columns of the inner window of a plane (H, W): `margin` of the plane off each side,
    moved by `draw` (2,), -1 to 1, times `jitter` of the plane.
    """
    sides = np.array(shape)
    inner = np.maximum(1, ((1 - 2 * margin) * sides).astype(int))
    start = np.rint((margin + jitter * draw) * sides).astype(int).clip(0, sides - inner)
    return slice(start[0], start[0] + inner[0]), slice(start[1], start[1] + inner[1])


def hits(chosen: np.ndarray, overlap: np.ndarray, z_bins: int) -> dict[str, np.ndarray]:
    """Is each random crop's base crop the right one? `chosen` (N,), labels (N, z_bins * K).

    Right is an overlap within `TOLERANCE` of the largest: `position_accuracy` (N,) bool in the
    plane; with more than one slab `slab_accuracy` along z and `place_accuracy` over both.
    """
    rows, K = np.arange(len(chosen)), overlap.shape[1] // z_bins
    parts = overlap.reshape(len(overlap), z_bins, K)
    shares = {"position_accuracy": (parts.sum(1), chosen % K)}
    if z_bins > 1:
        shares["slab_accuracy"] = parts.sum(2), chosen // K
        shares["place_accuracy"] = overlap, chosen
    return {
        name: share[rows, taken] >= share.max(1) - TOLERANCE - 1e-6
        for name, (share, taken) in shares.items()
    }


def cut(planes: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(S, H, W), (P, 4) -> (P, S, h, w), the same boxes in every slice."""
    return np.stack([planes[:, y0:y1, x0:x1] for y0, x0, y1, x1 in boxes])


def turn(crops: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Turn each crop (P, S, h, h) by `draws[p]` in 0..7: that many right angles modulo 4, mirrored
    where 4 or more.

    A crop's pixels are turned within its own box, so the box and with it every overlap label stay
    true.
    """
    turned = [
        np.rot90(crop[..., ::-1] if draw >= 4 else crop, draw % 4, (1, 2))
        for crop, draw in zip(crops, draws, strict=True)
    ]
    return np.stack(turned)
