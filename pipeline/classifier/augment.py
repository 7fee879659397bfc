"""Volume augmentation: one draw for all slices, through albumentations."""

import cv2
import numpy as np

from ..learning.transforms import albumentations
from ..run.config import AugmentConfig

OWN = 2  # tells the draws made here from those of albumentations and of the flip in z
GREY_POINTS, GAMMA = 25, (0.5, 2.5)  # as the published configuration has them
BLUR, NOISE = (0.5, 1.5), (0.01, 0.04)  # sigma in pixels; standard deviation, of all greys
SMOOTH, MOVED = 1 / 12, 0.015  # elastic: reach and root mean square of a shift, of a side
NO_MASKS = np.zeros((0, 1, 1), np.uint8)
BOXES, SMALLEST_BOX, LARGEST_BOX = (8, 16), (4, 8, 8), (8, 16, 16)  # (z, y, x)


def grey_curve(rng: np.random.Generator) -> np.ndarray:
    """(256,) uint8: a random rising curve through `GREY_POINTS` points or, as likely, a gamma."""
    grey = np.linspace(0, 1, 256)
    if rng.random() < 0.5:
        return np.rint(255 * grey ** rng.uniform(*GAMMA)).astype(np.uint8)
    points = np.linspace(0, 1, GREY_POINTS)
    moved = points.copy()
    for k in range(1, GREY_POINTS - 1):
        moved[k] = rng.uniform(moved[k - 1], moved[k + 1])
    return np.rint(255 * np.interp(grey, points, moved)).astype(np.uint8)


def drop_boxes(slices: np.ndarray, rng: np.random.Generator) -> None:
    """Blacken small boxes at random places of slices (S, H, W), in place."""
    for _ in range(rng.integers(*BOXES, endpoint=True)):
        size = np.minimum(rng.integers(SMALLEST_BOX, LARGEST_BOX, endpoint=True), slices.shape)
        corner = rng.integers(0, slices.shape - size, endpoint=True)
        slices[tuple(map(slice, corner, corner + size))] = 0


class VolumeAugment:
    """Callable (slices (S, H, W) uint8, their labels (S, 2)) -> both, augmented, with masks where
    there are any; the draw is a pure function of `seed`. `size` is that of a slice.

    Geometry in plane and intensity are albumentations'; the z-flip reverses the slices and with
    them their labels and masks. Laterality is kept unless `flip_x` is set: a mirrored patient has
    the liver on the left.
    """

    def __init__(self, config: AugmentConfig, size: int = 192) -> None:
        A = albumentations()
        cv2.setNumThreads(1)
        self.config = config
        chance = config.probability
        steps = [
            A.Affine(
                rotate=(-config.rotate_deg, config.rotate_deg),
                scale=(1 - config.scale, 1 + config.scale),
                translate_percent=(-config.shift, config.shift),
                p=chance,
            ),
            A.RandomBrightnessContrast(
                brightness_limit=config.brightness, contrast_limit=config.contrast, p=chance
            ),
        ]
        if config.elastic:
            sigma = size * SMOOTH
            # uniform noise, smoothed: its root mean square is 1 / (sigma sqrt(12 pi))
            alpha = size * MOVED * sigma * (12 * np.pi) ** 0.5
            steps.append(
                A.ElasticTransform(
                    alpha, sigma, noise_distribution="uniform", same_dxdy=False, p=config.elastic
                )
            )
        if config.blur:
            steps.append(A.GaussianBlur(0, BLUR, p=config.blur))
        if config.noise:
            steps.append(A.GaussNoise(NOISE, p=config.noise))
        if config.cutout:
            steps.append(
                A.CoarseDropout(
                    num_holes_range=(1, 1),
                    hole_height_range=(0.1, 0.3),
                    hole_width_range=(0.1, 0.3),
                    p=config.cutout,
                )
            )
        if config.flip_x:
            steps.append(A.HorizontalFlip(p=0.5))
        if config.flip_y:
            steps.append(A.VerticalFlip(p=0.5))
        self._compose = A.Compose(steps)

    def __call__(
        self,
        slices: np.ndarray,
        planes: np.ndarray,
        seed: int,
        masks: np.ndarray = NO_MASKS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Augment slices (S, H, W) uint8 and turn `planes` (S, 2) with them, by the draw that
        belongs to `seed`. `masks` (N, H, W) uint8 are moved alike; no change of grey, and nothing
        that is dropped, touches them.
        """
        self._compose.set_random_seed(seed)
        given = {"images": slices[..., None]} | ({"masks": masks} if len(masks) else {})
        found = self._compose(**given)
        moved, masks = found["images"].reshape(slices.shape), found.get("masks", masks)
        config, rng = self.config, np.random.default_rng((seed, OWN))
        turned, curved, dropped = rng.random(3) < (
            config.quarter_turn,
            config.grey_curve,
            config.boxes,
        )
        if turned:
            turns = int(rng.integers(1, 4))
            moved = np.rot90(moved, turns, (1, 2))
            masks = np.rot90(masks, turns, (1, 2))
        if curved:
            moved = grey_curve(rng)[moved]
        if dropped:
            drop_boxes(moved := moved.copy(), rng)
        if self.config.flip_z and np.random.default_rng(seed).random() < 0.5:
            moved, planes, masks = moved[::-1], planes[::-1], masks[::-1]
        moved, planes, masks = (np.ascontiguousarray(one) for one in (moved, planes, masks))
        return moved, planes, masks
