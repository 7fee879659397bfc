"""Injuries of the phantom: lacerations, blood around organs, hazy fat, swollen bowel, free fluid
and gas, contrast blush.
"""

import numpy as np
from numpy.typing import NDArray

from .canvas import Array, Canvas, Region, soft

FLUID, BLOOD, FREE_GAS, HAZE = 14.0, 42.0, -960.0, -25.0
KIDNEYS = ("right kidney", "left kidney")
# Signs of a bowel injury beside hazy fat, one row a patient: every injury has two more, gas is in
# two of five.
BOWEL_SIGNS = (
    ("wall", "fluid"),
    ("wall", "gas"),
    ("wall", "fluid"),
    ("fluid", "gas"),
    ("wall", "fluid"),
)
SEGMENT = (0.4, 0.34, 0.16)  # half axes (u, v, t) of the injured segment


class Injuries:
    """What `labels` (class numbers by target) add to one canvas. `difficulty` 0: large and plain,
    1: small and faint.
    """

    def __init__(
        self,
        c: Canvas,
        labels: dict[str, int],
        difficulty: float,
        aorta: float,
        rng: np.random.Generator,
    ) -> None:
        self.c, self.labels, self.aorta, self.rng = c, labels, aorta, rng
        self.contrast, self.size = 1 - 0.6 * difficulty, 1.06 - 0.45 * difficulty
        self.kidney = KIDNEYS[int(rng.integers(2))]
        # middle of the injured loops
        self.segment = (rng.uniform(-0.3, 0.3), rng.uniform(-0.4, -0.1), rng.uniform(0.6, 0.85))
        self.signs = BOWEL_SIGNS[int(rng.integers(len(BOWEL_SIGNS)))] if labels["bowel"] else ()

    def swollen(self, centre: tuple[float, float, float]) -> bool:
        """Whether a loop of small bowel belongs to the injured segment."""
        away = (
            (a - b) / radius for a, b, radius in zip(centre, self.segment, SEGMENT, strict=True)
        )
        return "wall" in self.signs and sum(d * d for d in away) < 1

    def grade(self, organ: str) -> int:
        """Class number of an organ; of the two kidneys only one is injured."""
        return self.labels.get(organ, self.labels["kidney"] if organ == self.kidney else 0)

    def rim(self, name: str, organ: Region) -> Array:
        """Outer limit (in r of the organ) of the uneven blood around it, thickest in the loose fat
        around a kidney.
        """
        return 1 + (26 if name in KIDNEYS else 18) * self.size / (organ.px * self.c.mm) * (
            1 + 0.35 * np.clip(self.c.wobble[organ.box], -1, 1)
        )

    def before_organs(self, cavity: Array) -> None:
        """Bowel injury behind the loops: hazy fat around the injured segment, a little free fluid
        between loops and in one gutter.
        """
        if not self.labels["bowel"]:
            return
        c, rng = self.c, self.rng
        haze(c, cavity, self.segment, rng.uniform(0.7, 1.0) * self.contrast)
        side = (-1, 1)[int(rng.integers(2))]
        spread = rng.normal(0, (0.2, 0.1, 0.05), (4, 3)) + self.segment
        if "fluid" in self.signs:
            within = cavity * self.contrast
            c.put(
                FLUID,
                (side * 0.6, 0.28),
                (0.24, 0.34 * self.size),
                wobble=0.2,
                span=(self.segment[2] - 0.15, 1.0),
                within=within,
            )
            for centre in spread.tolist():
                c.put(FLUID, tuple(centre), (0.18, 0.1, 0.1), wobble=0.3, within=within)

    def after_organs(self, cavity: Array) -> dict[str, NDArray[np.bool_]]:
        """Lacerations, free gas and blush; returns which planes show the bowel injury and the
        extravasation.
        """
        for organ in self.c.organs:
            if grade := self.grade(organ):
                self._lacerate(organ, grade, cavity)
        bowel, blush = np.zeros(self.c.depth, bool), np.zeros(self.c.depth, bool)
        if self.labels["bowel"]:
            bowel |= np.abs(self.c.tz - self.segment[2]) < SEGMENT[2]
        if "gas" in self.signs:
            bowel |= self._free_gas(cavity)
        return {
            "bowel": bowel,
            "extravasation": self._blush(cavity) if self.labels["extravasation"] else blush,
        }

    def _lacerate(self, organ: str, grade: int, cavity: Array) -> None:
        """Low grade: one tear with blood at its mouth. High grade: tears in four directions, half
        of the organ without blood supply.
        """
        c, rng = self.c, self.rng
        box, mask = c.organs[organ]
        core = np.argwhere(mask > 0.9)
        if not len(core):
            return
        size = self.size * (0.85 if organ in KIDNEYS else 1.0)
        # from the middle to the surface
        order = np.argsort((((core - core.mean(0)) / (core.std(0) + 1e-3)) ** 2).sum(1))
        if grade == 1:  # on the side away from the spine
            order = order[
                np.abs(c.u[box][tuple(core[order].T)]) >= np.median(np.abs(c.u[box][tuple(core.T)]))
            ]
        depth = (0.05 if grade == 2 else 0.5 if organ == "liver" else 0.8) + rng.uniform(-0.05, 0.1)
        x, y, z = c.offsets_mm(box, tuple(core[order[int(depth * len(order))]]))
        away = np.sqrt(x * x + y * y + (0.8 * z) ** 2)
        tear, start = np.zeros_like(x), rng.uniform(0, np.pi)
        for branch in range(4 if grade == 2 else 1):
            half = rng.uniform(6.5, 8) * size if grade == 2 else rng.uniform(9, 11) * size
            line = (
                _across(x, y, z, start + branch * np.pi / 4 + rng.uniform(-0.2, 0.2))
                + 4 * c.wobble[box]
            )
            tear = np.maximum(tear, soft((half * (1 + 0.3 * c.fine[box]) - np.abs(line)) / c.mm))
        tear *= np.clip((80 * size - away) / 8, 0, 1)
        if grade == 2:
            dead = np.clip(
                (_across(x, y, z, start + np.pi / 8) + 6 * c.wobble[box]) / 6 + 0.5, 0, 1
            )
            c.paint(box, 0.8 * dead * mask * self.contrast, BLOOD)
        else:
            # blood fills fat
            mouth = (
                np.clip((36 * self.size - away) / 5, 0, 1)
                * (np.abs(c.hu[box] + 100) < 60)
                * cavity[box]
            )
            c.paint(box, mouth * self.contrast, BLOOD + 8 * c.fine[box])
        c.paint(box, tear * mask * self.contrast, 12 + 8 * c.fine[box])

    def _free_gas(self, cavity: Array) -> NDArray[np.bool_]:
        """A little gas under the front wall, flat below because it rises."""
        c = self.c
        middle = self.segment[2] - 0.15
        top = np.where(cavity > 0.5, c.y, 9).min(axis=(1, 2), keepdims=True)
        gas = (
            soft((top + 0.14 * self.size - c.y) * c.px)
            * cavity
            * np.clip((0.22 * self.size - np.abs(c.t - middle)) * 20, 0, 1)
        )
        c.paint(None, gas, FREE_GAS)
        return gas.sum(axis=(1, 2)) > 5

    def _blush(self, cavity: Array) -> NDArray[np.bool_]:
        """Escaped contrast: a chain of bright clumps in a pool of blood, at an injured organ or in
        the mesentery.
        """
        c, rng = self.c, self.rng
        point = (rng.uniform(-0.3, 0.3), rng.uniform(-0.4, 0.0), rng.uniform(0.5, 0.75))
        hurt = [organ for organ in c.organs if self.grade(organ)]
        if hurt:
            box, mask = c.organs[hurt[int(rng.integers(len(hurt)))]]
            rim = np.argwhere(
                (mask > 0.3) & (np.abs(c.rho[box] - 0.5) < 0.3) & (c.t[box[0]] > 0.15)
            )
            point = c.point(box, tuple(rim[int(rng.integers(len(rim)))])) if len(rim) else point
        clumps = []
        for k in range(7):
            radius, step = (
                rng.uniform(16, 23) * self.size,
                rng.normal(0, (0.05, 0.06, 0.01)) + (0, 0, 0.045 * (k - 3)),
            )
            radii = (radius / c.half[0], 1.3 * radius / c.half[1], 1.6 * radius / c.length)
            clumps.append(c.blob(tuple((point + step).tolist()), radii, wobble=0.15, grow=2.0))
        shown = np.zeros(c.depth)
        for limit, value, strength in (
            (1.6, BLOOD, 0.8),
            (1.0, max(self.aorta + 150, 420), self.contrast),
        ):
            for clump in clumps:
                alpha = clump.alpha(limit) * cavity[clump.box]
                c.paint(clump.box, alpha * strength, value)
                shown[clump.box[0]] += alpha.sum(axis=(1, 2)) * (limit == 1.0)
        return shown > 4


def haze(c: Canvas, cavity: Array, centre: tuple[float, float, float], strength: float) -> None:
    """Stranding: patchy fat of up to `HAZE` HU with no sharp edge, of the size of a segment."""
    shape = c.blob(centre, SEGMENT, wobble=0.25, grow=1.5)
    fade = np.clip(2.0 - 1.2 * shape.r, 0, 1) * np.clip(0.75 + 0.35 * c.fine[shape.box], 0, 1)
    c.paint(shape.box, strength * fade * cavity[shape.box], HAZE)


def _across(x: Array, y: Array, z: Array, angle: float) -> Array:
    """Signed distance (mm) from an upright, slightly slanting plane through the origin."""
    return float(np.cos(angle)) * x + float(np.sin(angle)) * y + 0.15 * z
