"""Volume augmentation: one draw for all slices, through albumentations (last release 2.0.8, so
nothing else imports it).
"""

import os

import cv2
import numpy as np

from ..run.config import AugmentConfig


class VolumeAugment:
    """Callable (slices (S, H, W) uint8, their labels (S, 2)) -> both, augmented; the draw is a pure
    function of `seed`.

    Geometry in plane and intensity are albumentations'; the z-flip reverses the slices and with
    them their labels. Laterality is kept unless `flip_x` is set: a mirrored patient has the liver
    on the left.
    """

    def __init__(self, config: AugmentConfig) -> None:
        # its import looks for a newer release on the network
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations as A

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
        self, slices: np.ndarray, planes: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment slices (S, H, W) uint8 and turn `planes` (S, 2) with them, by the draw that
        belongs to `seed`.
        """
        self._compose.set_random_seed(seed)
        moved = self._compose(images=slices[..., None])["images"][..., 0]
        if self.config.flip_z and np.random.default_rng(seed).random() < 0.5:
            moved, planes = moved[::-1], planes[::-1]
        return np.ascontiguousarray(moved), np.ascontiguousarray(planes)
