"""2D-VoCo geometry on arrays: base crops tile the plane, random crops lie anywhere, labels are
shares of area.

Boxes are (y0, x0, y1, x1) in pixels, ends excluded; a box is the same in every slice of its volume.
"""

from typing import Any, TypeVar

import numpy as np

Boxes = TypeVar("Boxes", bound=Any)  # numpy array or torch tensor


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


def overlap_labels(random_boxes: Boxes, base_boxes: Boxes) -> Boxes:
    """Share of each random box that lies in each base box: (R, 4), (K, 4) -> (R, K); rows sum to 1
    where the base boxes tile the plane.
    """
    random, base = random_boxes[:, None], base_boxes[None]
    # the larger of both: written for arrays and tensors alike
    start = base[..., :2] + (random[..., :2] - base[..., :2]).clip(0)
    stop = base[..., 2:] - (base[..., 2:] - random[..., 2:]).clip(0)
    sides, own = (stop - start).clip(0), random[..., 2:] - random[..., :2]
    return sides[..., 0] * sides[..., 1] / (own[..., 0] * own[..., 1])


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
