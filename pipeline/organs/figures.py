"""Picture of what was found: outlines of the organs over planes of one volume."""

from pathlib import Path

import cv2
import numpy as np

from ..system.files import atomic_path
from ..volumes.sampling import evenly

PLANES, SIDE = 8, 192  # planes of the strip, pixels of one
# of each organ, blue, green, red
COLOURS = ((60, 60, 230), (70, 190, 60), (230, 140, 40), (40, 200, 230))
WHITE = (255, 255, 255)


def outlined(plane: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A plane (H, W) uint8 as (SIDE, SIDE, 3) with the outlines of the labels `found` (H, W) in
    the colours of their organs, and of `truth` (H, W) in white below them.
    """
    picture = cv2.cvtColor(cv2.resize(plane, (SIDE, SIDE)), cv2.COLOR_GRAY2BGR)
    for labels, colours in ((truth, len(COLOURS) * (WHITE,)), (found, COLOURS)):
        large = cv2.resize(labels, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
        for number, colour in enumerate(colours, start=1):
            mask = (large == number).astype(np.uint8)
            parts, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, parts, -1, colour, 1)
    return picture


def draw_strip(volume: np.ndarray, found: np.ndarray, truth: np.ndarray, path: Path) -> None:
    """Write planes of a volume (D, H, W) uint8, spread evenly over those with an organ, beside
    each other as PNG.
    """
    there = np.flatnonzero(((found > 0) | (truth > 0)).any((1, 2)))
    planes = there[evenly(len(there), min(PLANES, len(there)))] if len(there) else np.array([0])
    tiles = [outlined(volume[k], found[k], truth[k]) for k in planes]
    with atomic_path(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", np.hstack(tiles))[1].tobytes())
