"""Findings of the phantom: injuries, and in everybody harmless twins of the same grey and amount.

Where there is dark tissue in an organ, haze and thick wall at the bowel, bright and grey liquid is
drawn without the labels, and how grey it is. A label decides the form: a dark volume is round cysts
or a branching tear, haze is nodes or strands, a bright volume is dots or a jet. Injuries have more
of it than their twins on average, hidden among the spread of organs and tissues: the counts of grey
values and a coarse picture tell little.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .canvas import Array, Box, Canvas, level_set

FLUID, BLOOD, STRAND = 14.0, 48.0, 25.0
KIDNEYS = ("right kidney", "left kidney")
ORGANS = ("liver", "spleen", *KIDNEYS)
FULL_SIZE = 256  # pixels of a picture from which on the sizes in mm hold
# Least and most of the dark volume in a healthy organ, a low and a high grade, in shares of what
# four branching tears take up. They grow with the grade as far as a reader of grey alone, who does
# not know the organ's size and own grey, stays near the constant (tests/benchmarks/phantom.py).
AMOUNTS = ((0.0, 0.25), (0.6, 1.0), (1.5, 2.2))
LIVER = 0.75  # of these: its dark volume is the largest, and shows most among the grey counts
PLAIN = 0.2  # difficulty from which on injuries have less of it, and more of the healthy a twin
RARE = 0.03  # share of patients without a spleen, without a kidney, with a low kidney
TWINS = 0.36  # share of patients without the injury who have its twin


@dataclass(frozen=True)
class Site:
    """A place in body coordinates and the loop of bowel there."""

    centre: tuple[float, float, float]
    radius: float  # in units of the half axes
    tilt: float


class Injuries:
    """What is found in one canvas. `labels` are class numbers by target; `difficulty` 0: plain,
    1: faint and small. `stream(*numbers)` gives a generator of its own for each purpose.
    """

    def __init__(
        self,
        c: Canvas,
        labels: dict[str, int],
        difficulty: float,
        width_mm: float,
        key: tuple[int, ...],
    ) -> None:
        self.c, self.labels, self.key = c, labels, (*key, 2)
        rng = self.stream(0)
        self.contrast = 1 - 0.4 * difficulty
        hidden = 2 * max(0.0, difficulty - PLAIN)
        self.amount = 1 - min(hidden, 0.6)  # of dark volume in an injury, in shares of `AMOUNTS`
        # of tears and strands; never less than what the network can see
        self.width = max(rng.uniform(2.5, 6.0), width_mm) * (1.05 - 0.35 * difficulty)
        self.kidney = KIDNEYS[int(rng.integers(2))]
        self.twins = rng.random(3) < min(TWINS + hidden, 1)
        self.loops = [
            Site(
                (side * rng.uniform(0.14, 0.34), rng.uniform(-0.4, -0.12), rng.uniform(0.66, 0.86)),
                rng.uniform(0.13, 0.15),
                rng.uniform(0, np.pi),
            )
            for side in rng.permutation([-1, 1])
        ]

        other, missing = KIDNEYS[self.kidney == KIDNEYS[0]], rng.random(3) < RARE
        self.absent = {
            n
            for n, gone in (("spleen", missing[0] and not labels["spleen"]), (other, missing[1]))
            if gone
        }
        self.moved = {other} if missing[2] else set()
        self.sites: dict[str, tuple[float, ...]] = {"bowel": self.loops[0].centre}

    def stream(self, *numbers: int) -> np.random.Generator:
        """Random numbers for one purpose, whatever the labels make of the others."""
        return np.random.default_rng([*self.key, *numbers])

    def grade(self, organ: str) -> int:
        """Class number of an organ; of the two kidneys only one is injured."""
        return self.labels.get(organ, self.labels["kidney"] if organ == self.kidney else 0)

    def thick(self, index: int) -> bool:
        """Whether the loop at `loops[index]` has a thick wall: in a bowel injury the first, which
        has the strands about it, else in `TWINS` of the patients the second.
        """
        return index == 0 if self.labels["bowel"] else index == 1 and bool(self.twins[0])

    def organs(self) -> None:
        """Cysts, tears and crescents in all organs."""
        for index, name in enumerate(ORGANS):
            if name in self.c.organs:
                self._organ(name, self.stream(1, index))

    def _organ(self, name: str, rng: np.random.Generator) -> None:
        """The dark volume of one organ: round in the healthy, partly one short tear or thin
        crescent in a low grade, all in branching tears or a wide crescent in a high grade.
        """
        c, grade = self.c, self.grade(name)
        box, mask = c.organs[name]
        core = np.argwhere(mask > 0.9)
        if name == self.kidney and len(core):
            self.sites["kidney"] = c.point(box, tuple(core[len(core) // 2]))
        kind, drop = rng.random(), rng.uniform(65, 85)
        if name in KIDNEYS:
            drop *= 1.7
        drop *= self.contrast
        width = self.width
        most, branch = (0.2, 3.6) if name == "liver" else (0.3, 2.6)  # of the organ; mm per mm
        volume = min(most * c.voxel * len(core), 4 * width * (branch * (width + 8)) ** 2)
        least, most = AMOUNTS[grade]
        volume *= (least + (most - least) * rng.random()) * (self.amount if grade else 1)
        volume *= LIVER if name == "liver" else 1
        if len(core) < 20:
            return
        share = (0.0, 0.45, 0.95)[grade]
        dark = np.zeros_like(mask)
        if grade:
            form = _crescent if grade == 1 and kind < 0.3 else _tears
            field = form(self, name, core, volume * share, width, rng)
            dark = level_set(field, mask, volume * share / c.voxel, c.mm)
        if share < 0.9:
            field = self._cysts(name, core, volume * (1 - share), width, rng)
            rest = level_set(field + 1e3 * (dark > 0.1), mask, volume * (1 - share) / c.voxel, c.mm)
            dark = np.maximum(dark, rest)
        c.paint(box, dark * mask, c.level[name] - drop + 5 * c.fine[box])

    def _cysts(
        self,
        name: str,
        core: NDArray[np.int64],
        volume: float,
        width: float,
        rng: np.random.Generator,
    ) -> Array:
        """Distance (mm) to the middles of round cysts three times as wide as a tear, whose surface
        is then as large for its volume, apart from each other.
        """
        c = self.c
        box = c.organs[name][0]
        count = max(1, round(volume / (0.52 * (2.4 * width) ** 3)))
        chosen: list[NDArray[np.int64]] = []
        scale = np.array([c.dz, c.mm, c.mm])
        for index in core[rng.integers(len(core), size=12 * count)]:
            if all(np.linalg.norm((index - o) * scale) > 3.4 * width for o in chosen):
                chosen.append(index)
            if len(chosen) == count:
                break
        return nearest(c, box, chosen, rng)

    def bowel(self, cavity: Array) -> NDArray[np.bool_]:
        """Grey in the fat about the first loop: strands that run out from it in an injury, round
        nodes in the healthy. Returns the planes that show the injury.
        """
        c, rng, site, width = self.c, self.stream(2), self.loops[0], 0.8 * self.width
        reach = (30 + 2.2 * self.width) / c.half[0]
        shape = c.blob(
            site.centre, (reach, reach * c.half[0] / c.half[1], 1.1 * reach * c.half[0] / c.length)
        )
        box = shape.box
        if not shape.r.size or not (self.labels["bowel"] or self.twins[1]):
            return np.zeros(c.depth, bool)
        fat = (
            np.clip((-45 - c.hu[box]) / 20, 0, 1)
            * cavity[box]
            * (shape.r < 1)
            * (c.rho[box] < 0.85)
        )
        volume = rng.uniform(0.24, 0.34) * fat.sum() * (1.4 if self.labels["bowel"] else 0.6)
        x, y, z = c.offsets_mm(box, site.centre)
        if self.labels["bowel"]:
            turn = np.arctan2(y, x) + 0.5 * c.wobble[box] + 0.01 * z
            spokes = 7
            field = (
                np.hypot(x, y) * np.abs(np.sin(spokes / 2 * turn + rng.uniform(0, 6))) * 2 / spokes
            )
        else:
            inside = np.argwhere(fat > 0.5)
            count = max(3, round(volume * c.voxel / (0.52 * (2.0 * width) ** 3)))
            some = inside[rng.integers(len(inside), size=count)] if len(inside) else []
            field = nearest(c, box, list(some), rng)
        grey = level_set(field, fat, volume, c.mm) * fat
        c.paint(box, grey * self.contrast, STRAND + 6 * c.fine[box])
        shown = np.zeros(c.depth, bool)
        if self.labels["bowel"]:
            shown[box[0]] = grey.sum(axis=(1, 2)) * c.mm**2 > 60
        return shown

    def vessels(self, cavity: Array) -> NDArray[np.bool_]:
        """One bright and one grey volume near an organ or in the mesentery: a jet of escaped
        contrast within its pool of blood, or bare clips and calcifications with liquid beside them.
        Returns the planes that show an extravasation.
        """
        c, rng = self.c, self.stream(3)
        point, away = self._bleeding(rng)
        self.sites["extravasation"], width = point, 0.85 * self.width
        reach = np.array([30 + 8 * width] * 2 + [30 + 4 * width]) / (c.half[0], c.half[1], c.length)
        shape = c.blob(point, tuple(reach.tolist()))
        box = shape.box
        if not shape.r.size or not (self.labels["extravasation"] or self.twins[2]):
            return np.zeros(c.depth, bool)
        free = cavity[box] * (c.rho[box] < 0.88) * (shape.r < 1) * (1 - c.solid[box])
        loose, free = free * np.clip((-20 - c.hu[box]) / 40, 0, 1), free * (c.hu[box] < 100)
        value = rng.uniform(260, 420)
        bright_volume = rng.uniform(0.8, 1.3) * width * width * (width + 2) * 20 / c.voxel
        pool_volume = rng.uniform(0.8, 1.2) * 7 * bright_volume
        x, y, z = c.offsets_mm(box, point)
        turn, slant = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4)
        across = np.cos(turn) * x + np.sin(turn) * y + slant * z + 3 * c.wobble[box]
        along = np.cos(turn) * y - np.sin(turn) * x
        across += along**2 / (5 * width) + width / 4 * c.fine[box]
        jet = np.maximum(np.hypot(across, 0.35 * z), np.abs(along) - 2.8 * width)
        if self.labels["extravasation"]:
            bright = level_set(jet, free, bright_volume, c.mm)
            around = np.sqrt(across**2 + 0.6 * along**2 + 0.6 * z**2)
            pool = level_set(around, loose * (bright < 0.5), pool_volume, c.mm)
        else:
            dots = np.full(x.shape, 1e3, np.float32)
            for k, end in enumerate(rng.normal(0, 1, (3, 3))):
                place = (1.8 * width + 4) * np.array(
                    [np.cos(turn + 2.1 * k), np.sin(turn + 2.1 * k), 0.5 * end[2]]
                )
                dots = np.minimum(
                    dots,
                    np.sqrt((x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2)
                    / rng.uniform(0.8, 1.2),
                )
            bright = level_set(dots, free, bright_volume, c.mm)
            beside = np.sqrt((x - away[0]) ** 2 + (y - away[1]) ** 2 + (z - away[2]) ** 2) + 1e3 * (
                dots < 1.6 * width
            )
            pool = level_set(beside, loose * (bright < 0.1), pool_volume, c.mm)
        c.paint(box, pool * loose, BLOOD + 6 * c.fine[box])
        c.paint(box, bright * free, value)
        shown = np.zeros(c.depth, bool)
        if self.labels["extravasation"]:
            shown[box[0]] = (bright * free).sum(axis=(1, 2)) * c.mm**2 > 0.4 * width**2
        return shown

    def _bleeding(self, rng: np.random.Generator) -> tuple[tuple[float, ...], NDArray[np.float64]]:
        """The middle of the bright volume, at the rim of an injured organ, or of any, or in the
        mesentery; and where (mm from it) the liquid of the healthy lies.
        """
        c, turn = self.c, rng.uniform(0, 2 * np.pi)
        away = (6 * self.width + 10) * np.array([np.cos(turn), np.sin(turn), 0.0])
        places, mesentery = rng.random((12, 3)), rng.random() < 0.4
        organ = rng.random()
        names = [name for name in ORGANS if name in c.organs]
        hurt = [name for name in names if self.grade(name)]
        if not hurt and mesentery or not names:
            low, high = np.array([-0.4, -0.45, 0.45]), np.array([0.4, 0.0, 0.8])
            points = [tuple(p) for p in (low + places * (high - low)).tolist()]
            return max(points, key=self._fat_at), away
        box, mask = c.organs[(hurt or names)[int(organ * len(hurt or names))]]
        rim = np.argwhere(
            (mask > 0.2) & (mask < 0.8) & (c.rho[box] < 0.8) & (np.abs(c.t[box[0]] - 0.5) < 0.4)
        )
        if not len(rim):
            return (0.0, -0.2, 0.6), away
        points = [c.point(box, tuple(rim[int(p * len(rim))])) for p in places[:, 0]]
        return max(points, key=self._fat_at), away

    def _fat_at(self, point: tuple[float, float, float]) -> float:
        """Share of fat about a place."""
        c = self.c
        near = c.blob(point, tuple(24 / np.array([*c.half, c.length])))
        ball = near.r < 1
        return float(np.mean(c.hu[near.box][ball] < -50)) if ball.any() else 0.0


def nearest(
    c: Canvas, box: Box, middles: list[NDArray[np.int64]], rng: np.random.Generator
) -> Array:
    """Distance (mm, in units of each ball's relative radius) to the nearest of `middles`, voxels of
    a box.
    """
    field = np.full(c.u[box].shape, 1e3, np.float32)
    for middle in middles:
        x, y, z = c.offsets_mm(box, c.point(box, tuple(middle)))
        field = np.minimum(field, np.sqrt(x * x + y * y + z * z) / rng.uniform(0.8, 1.25))
    return field


def _tears(
    injuries: Injuries,
    name: str,
    core: NDArray[np.int64],
    volume: float,
    width: float,
    rng: np.random.Generator,
) -> Array:
    """Distance (mm) to upright plates that branch from one point: four from the depth of the organ
    in a high grade, one from its surface inwards in a low grade.
    """
    c, grade = injuries.c, injuries.grade(name)
    box = c.organs[name][0]
    middle = core.mean(axis=0)
    order = np.argsort((((core - middle) / (core.std(0) + 1e-3)) ** 2).sum(1))
    deep = rng.uniform(0.02, 0.2) if grade == 2 else rng.uniform(0.8, 0.97)
    start = core[order[int(deep * (len(order) - 1))]]
    x, y, z = c.offsets_mm(box, c.point(box, tuple(start)))
    inwards = np.arctan2(*(middle - start)[1:])
    branches = int(rng.integers(3, 5)) if grade == 2 else 1
    turn = rng.uniform(0, 2 * np.pi) if grade == 2 else inwards + rng.uniform(-0.4, 0.4)
    area = volume / width / branches
    high = min(np.sqrt(1.5 * area), 0.7 * c.length * float(np.ptp(c.tz[box[0]])))
    field = np.full(x.shape, 1e3, np.float32)
    for k in range(branches):
        angle = turn + 2 * np.pi * k / branches + rng.uniform(-0.3, 0.3)
        along = np.cos(angle) * x + np.sin(angle) * y
        across = np.cos(angle) * y - np.sin(angle) * x + 0.15 * z + 3 * c.wobble[box]
        out = np.maximum(-along - width / 2, along - area / high)
        field = np.minimum(field, np.maximum(np.maximum(np.abs(across), out), np.abs(z) - high / 2))
    return field


def _crescent(
    injuries: Injuries,
    name: str,
    core: NDArray[np.int64],
    volume: float,
    width: float,
    rng: np.random.Generator,
) -> Array:
    """Depth (mm) below the capsule on one side of the organ."""
    c = injuries.c
    box, _ = c.organs[name]
    depth = c.depth_mm[name]
    rim = core[np.argsort(depth[tuple(core.T)])[: max(1, len(core) // 5)]]
    start = rim[int(rng.integers(len(rim)))]
    x, y, z = c.offsets_mm(box, c.point(box, tuple(start)))
    radius = np.sqrt(volume / width / 1.6)
    return depth + np.maximum(0, np.sqrt(x * x + y * y + (0.8 * z) ** 2) - radius)
