"""Which part of a volume a target looks at, and how much of its organ each plane shows."""

from collections.abc import Sequence

import numpy as np

from ..competition.targets import ABDOMEN
from ..organs.find import Organ
from ..run.config import TrainConfig
from ..volumes.sampling import Window, box_window, plane_range
from .model import chosen_targets, visible_targets

WHOLE = (0.0, 1.0) * 3  # the box of a whole volume


def region_windows(
    organs: Sequence[Organ], shape: tuple[int, int, int], config: TrainConfig
) -> list[Window | None]:
    """The part of a volume of `shape` (D, H, W) for each of `train.region_names`: the box of its
    organ, for the abdomen that of all organs found, and the whole volume where it was not found;
    None alone with `train.regions=whole`.
    """
    if config.regions == "whole":
        return [None]
    boxes = {one.name: one.box for one in organs if one.voxels}
    if boxes:
        sides = np.array(list(boxes.values())).reshape(-1, 3, 2)
        boxes[ABDOMEN] = tuple(np.stack([sides[..., 0].min(0), sides[..., 1].max(0)], 1).ravel())
    return [
        box_window(boxes.get(name, WHOLE), shape, config.region_margin, count)
        for name, count in zip(config.region_names, config.region_slices, strict=True)
    ]


def region_planes(
    organs: Sequence[Organ], depth: int, config: TrainConfig
) -> list[tuple[int, int]]:
    """First plane of each of `region_windows` and the one after its last, of `depth` planes."""
    # along z a window depends on nothing else of the shape
    windows = region_windows(organs, (depth, 1, 1), config)
    return [plane_range(window, depth) for window in windows]


def visible_shares(organs: Sequence[Organ], depth: int, config: TrainConfig) -> np.ndarray:
    """For each of `visible_targets` how much of its organ each of `depth` planes shows, against the
    plane that shows most: (targets, D) float32, zeros where it was not found.
    """
    found = _shares(organs)
    rows = [found.get(target.region, np.zeros(depth)) for target in visible_targets(config)]
    return np.array(rows, np.float32).reshape(-1, depth)


def organ_gates(organs: Sequence[Organ], depth: int, config: TrainConfig) -> np.ndarray:
    """How much each of `depth` planes counts for each trained target: (targets, D) float32, the
    share of its organ that it shows, against the plane that shows most, for the abdomen the largest
    such share of any organ; 1 in all planes where the organ was not found.
    """
    found = _shares(organs)
    if found:
        found[ABDOMEN] = np.max(list(found.values()), axis=0)
    rows = [found.get(target.region, np.ones(depth)) for target in chosen_targets(config)]
    return np.array(rows, np.float32)


def _shares(organs: Sequence[Organ]) -> dict[str, np.ndarray]:
    return {one.name: one.visible / one.visible.max() for one in organs if one.voxels}
