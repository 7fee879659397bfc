"""A seeded procedural abdomen in Hounsfield units, with injuries: arrays only, no files.

Body coordinates: u from -1 (patient's right, image left) to 1, v from -1 (anterior) to 1 (posterior) over the trunk's
half axes, t from 0 (dome of the diaphragm) to 1 (iliac crest). Everything that is not an injury is drawn from streams
that never see the labels, so a picture and its file differ by the injury alone.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .config import PhantomConfig

Array = NDArray[np.float32]
Box = tuple[slice, slice, slice]
# Mean HU of tissues by contrast phase (rounded values of radiology textbooks).
PHASES = {
    "arterial": {
        "aorta": 330,
        "ivc": 100,
        "portal": 130,
        "liver": 78,
        "spleen": 128,
        "cortex": 190,
        "medulla": 80,
        "wall": 95,
        "urine": 10,
    },
    "portal": {
        "aorta": 175,
        "ivc": 160,
        "portal": 185,
        "liver": 112,
        "spleen": 124,
        "cortex": 185,
        "medulla": 155,
        "wall": 85,
        "urine": 15,
    },
    "delayed": {
        "aorta": 118,
        "ivc": 115,
        "portal": 118,
        "liver": 95,
        "spleen": 98,
        "cortex": 125,
        "medulla": 130,
        "wall": 70,
        "urine": 380,
    },
}
AIR, FAT, MUSCLE, FLUID, BLOOD, CORTICAL, MARROW = -1000.0, -100.0, 58.0, 14.0, 42.0, 480.0, 190.0


@dataclass(frozen=True)
class Scan:
    """One series: `hu` (D, H, W) int16, superior first, patient's right at image left, anterior at top."""

    hu: NDArray[np.int16]
    spacing: tuple[float, float, float]  # z, y, x in mm
    aortic_hu: float
    bowel: NDArray[np.bool_]  # (D,) slices that show the bowel injury
    blush: NDArray[np.bool_]  # (D,) slices that show the extravasation


@dataclass
class Region:
    """A shape on part of the canvas: `r` is 1 on its surface, `px` the pixels between centre and surface."""

    box: Box
    r: Array
    px: float

    def alpha(self, limit: float = 1.0) -> Array:
        """Coverage 0..1 of the voxels inside r < limit, with an edge one pixel wide."""
        return np.clip((limit - self.r) * self.px + 0.5, 0.0, 1.0)


def smooth_field(rng: np.random.Generator, axes: tuple[Array, Array, Array], cells: tuple[int, int, int]) -> Array:
    """Gaussian random field of unit variance, (D, H, W): `cells` random values an axis, spread by Gaussian kernels.

    `axes` are coordinates (about -0.2 to 1.2) of the three axes, so that two samplings of one patient agree.
    """
    values = rng.standard_normal(cells)
    for axis, count in zip(axes, cells, strict=True):
        weights = np.exp(-0.5 * ((axis.reshape(-1, 1) - np.linspace(-0.1, 1.1, count)) * (count - 1) / 0.75) ** 2)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, (1, 0)), 0, -1)
    return values.astype(np.float32)


@dataclass
class Canvas:
    """The volume being painted, its body coordinates and the random fields that make shapes irregular."""

    depth: int
    size: int
    rng: np.random.Generator
    t_range: tuple[float, float]
    organs: dict[str, tuple[Box, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng, n = self.rng, self.size
        self.half = np.array([rng.uniform(150, 180), 0.0])
        self.half[1] = self.half[0] * rng.uniform(0.64, 0.73)
        self.length = rng.uniform(285, 320)  # mm of t = 0..1
        self.mm = 2 * self.half[0] * rng.uniform(1.14, 1.3) / n
        self.centre = np.array([n / 2 + rng.uniform(-2, 2), n * rng.uniform(0.46, 0.5)])
        self.t = np.linspace(*self.t_range, self.depth, dtype=np.float32)[:, None, None]
        grid = np.arange(n, dtype=np.float32)
        self.x = ((grid - self.centre[0]) * self.mm / self.half[0]).astype(np.float32)[None, None, :]
        self.y = ((grid - self.centre[1]) * self.mm / self.half[1]).astype(np.float32)[None, :, None]
        self.axes = (self.t, grid / n, grid / n)
        waist = 1 - rng.uniform(0.0, 0.06) * np.sin(np.pi * np.clip(self.t, 0, 1)) ** 2
        self.u = self.x / waist + 0.03 * self.field((3, 4, 4))
        self.v = self.y / waist + 0.03 * self.field((3, 4, 4))
        self.wobble = self.field((7, 9, 9))
        self.fine = self.field((14, 26, 26))
        u2, v2 = self.u**2, self.v**2
        self.rho = np.sqrt(0.5 * (u2 + v2) + 0.5 * np.sqrt(u2 * u2 + v2 * v2))
        self.hu = np.full(self.u.shape, AIR, np.float32)
        self.px = float(self.half[1] / self.mm)  # pixels per unit of v

    def field(self, cells: tuple[int, int, int]) -> Array:
        """A smooth random field on this canvas."""
        return smooth_field(self.rng, self.axes, cells)

    def tubes(self, width: float, cells: tuple[int, int, int]) -> Array:
        """Coverage of a random tree of vessels: where two random fields are both near zero."""
        r = np.hypot(self.field(cells), self.field(cells))
        return np.clip((width - r) * 4 / width, 0, 1)

    def inside(self, limit: float) -> Array:
        """Coverage of rho < limit (rho is 1 on the skin)."""
        return np.clip((limit - self.rho) * self.px + 0.5, 0, 1)

    def paint(self, box: Box | None, alpha: Array, value: float | Array) -> None:
        """Blend `value` HU over a part of the volume."""
        part = self.hu if box is None else self.hu[box]
        part += alpha * (value - part)

    def blob(
        self, centre: tuple, radii: tuple, tilt: float = 0.0, wobble: float = 0.0, span: tuple | None = None, grow: float = 1.0
    ) -> Region:
        """Ellipsoid at (u, v, t), or with `radii[2]` None a column over t in `span`; centres may be arrays over the slices.

        `tilt` (rad) turns it in the plane; `wobble` roughens its surface; r is known out to `grow` times the radius.
        """
        low, high = span or ((-9, 9) if radii[2] is None else (centre[2] - grow * radii[2], centre[2] + grow * radii[2]))
        t = self.t[:, 0, 0]
        z = slice(int(np.searchsorted(t, low)), int(np.searchsorted(t, high)))
        cu, cv = (np.broadcast_to(np.asarray(c, np.float32), t.shape)[z, None, None] for c in centre[:2])
        reach = grow * max(radii[:2]) * (1 + 2 * wobble) + 0.12
        columns, rows = (_span(axis.ravel(), c, reach) for axis, c in ((self.x, cu), (self.y, cv)))
        box = (z, rows, columns)
        du, dv = self.u[box] - cu, self.v[box] - cv
        if tilt:
            du, dv = (
                du * np.float32(np.cos(tilt)) + dv * np.float32(np.sin(tilt)),
                dv * np.float32(np.cos(tilt)) - du * np.float32(np.sin(tilt)),
            )
        r2 = (du / np.float32(radii[0])) ** 2 + (dv / np.float32(radii[1])) ** 2
        if radii[2] is not None:
            r2 += ((self.t[z] - np.float32(centre[2])) / np.float32(radii[2])) ** 2
        r = np.sqrt(r2)
        if wobble:
            r *= 1 + np.float32(wobble) * self.wobble[box]
        return Region(box, r, min(radii[0] * self.half[0], radii[1] * self.half[1]) / self.mm)

    def mm_from(self, box: Box, centre: tuple[float, float, float]) -> tuple[Array, Array, Array]:
        """Distances in mm along x, y, z from a point (u, v, t), over a box."""
        scale = (*self.half, self.length)
        return tuple(
            (f[box] - c) * np.float32(s)
            for f, c, s in zip((self.u, self.v, np.broadcast_to(self.t, self.u.shape)), centre, scale, strict=True)
        )


def _span(axis: Array, centre: Array, reach: float) -> slice:
    if not centre.size:
        return slice(0, 0)
    return slice(int(np.searchsorted(axis, centre.min() - reach)), int(np.searchsorted(axis, centre.max() + reach)))


def draw_trunk(c: Canvas) -> None:
    """Skin, fat, muscle wall with ribs, and the fat-filled cavity (its limit is kept as `c.cavity`)."""
    rng = c.rng
    fat = rng.uniform(0.05, 0.16)
    rim = 1 - fat * np.clip(1 - 0.45 * c.y + 0.12 * c.wobble, 0.5, 1.6)  # more fat in front than at the back
    c.paint(None, c.inside(1.0), 30.0)
    c.paint(None, c.inside(0.975), FAT + 8 * c.fine)
    c.paint(None, c.inside(rim), MUSCLE + 6 * c.fine)
    c.limit = rim - rng.uniform(0.085, 0.11)
    c.cavity = c.inside(c.limit)
    c.paint(None, c.cavity, FAT + 5 * c.fine)
    for side in (-1, 1):  # muscles along the spine
        back = c.blob((side * 0.2, 0.68), (0.17, 0.15, None), wobble=0.05)
        c.paint(back.box, back.alpha() * c.inside(0.95)[back.box], MUSCLE + 10 * c.fine[back.box])
    angle = np.arctan2(np.abs(c.x), c.y + 0.1)  # 0 at the back, pi in front
    along = c.t * c.length - 42 * np.minimum(angle, 2.5) + 60 * np.maximum(angle - 2.3, 0) + rng.uniform(0, 20)
    phase = np.abs((along / 25) % 1 - 0.5)
    band = np.abs(c.rho - (c.limit + 0.035)) * c.px
    rib = np.clip((0.23 - phase) * 12, 0, 1) * np.clip(1.6 - band, 0, 1) * (along < 75) * (angle < 2.75)
    c.paint(None, rib, np.where(angle > 2.2, 140.0, np.where(band < 0.5, 260.0, 480.0)).astype(np.float32))
    wings = {side: c.blob((side * 0.56, 0.32), (0.34, 0.13, None), tilt=side * 0.75, span=(0.84, 9)) for side in (-1, 1)}
    for wing in wings.values():
        gluteal = c.inside(0.9)[wing.box] * wing.alpha(2.2)
        c.paint(wing.box, gluteal * np.clip((wing.r - 1) * 9, 0, 1), MUSCLE)
        c.paint(wing.box, np.clip((1.25 - np.abs(wing.r - 1) * wing.px) * 0.9, 0, 1) * c.inside(0.92)[wing.box], CORTICAL)


def draw_bowel(c: Canvas, hu: dict[str, float], thick: int) -> None:
    """Mesentery, small bowel loops, colon and stomach with gas, fluid or positive contrast; `thick` loops have a swollen wall."""
    rng = c.rng
    c.paint(None, c.tubes(0.42, (10, 15, 15)) * c.cavity * (np.abs(c.u) < 0.6), 0.7 * hu["portal"])
    oral = rng.uniform(110, 210) if rng.random() < 0.3 else 0.0
    for index in range(26):
        centre = (rng.uniform(-0.55, 0.55), rng.uniform(-0.62, 0.1), rng.uniform(0.42, 1.05))
        size, gas, full, tilt = rng.uniform(0.085, 0.14), rng.random() < 0.2, rng.random() < 0.6, rng.uniform(0, np.pi)
        loop = c.blob(centre, (size * rng.uniform(1.0, 1.9), size * 1.3, size), tilt=tilt, wobble=0.12)
        swollen = index < thick
        content = (oral or FLUID) if full else 40.0
        _loop(c, loop, hu["wall"] * (1.5 if swollen else 1.0), content, 0.45 if swollen else 0.72, 0.2 if gas and not swollen else None)
    for side, v, start in ((-1, 0.12, 0.5), (1, 0.2, 0.36)):  # ascending and descending colon
        path = side * (0.66 + 0.03 * np.sin(9 * c.t[:, 0, 0] + rng.uniform(0, 6)))
        colon = c.blob(
            (path, np.full(c.depth, v)), (rng.uniform(0.1, 0.15), rng.uniform(0.14, 0.19), None), wobble=0.15, span=(start, 0.97)
        )
        _loop(c, colon, 60.0, -40 + 130 * np.clip(c.fine[colon.box], -1.5, 1), 0.8, rng.uniform(-0.1, 0.6))
    arch = c.blob((rng.uniform(-0.1, 0.1), -0.58, rng.uniform(0.4, 0.5)), (0.5, 0.13, 0.08), wobble=0.2)
    _loop(c, arch, 60.0, -20 + 100 * np.clip(c.fine[arch.box], -1.5, 1), 0.8, rng.uniform(-0.2, 0.4))
    stomach = c.blob((0.3, -0.3, 0.22), (rng.uniform(0.24, 0.32), rng.uniform(0.26, 0.34), 0.2), tilt=0.5, wobble=0.1)
    _loop(c, stomach, 70.0, (oral or 22.0) + 12 * c.fine[stomach.box], 0.85, rng.uniform(-0.2, 0.35))


def _loop(c: Canvas, shape: Region, wall: float, content: float | Array, lumen: float, gas: float | None) -> None:
    """One bowel segment: wall, content and, above a level (in its own half height, upwards), gas."""
    c.paint(shape.box, shape.alpha() * c.cavity[shape.box], wall)
    inner = shape.alpha(lumen) * c.cavity[shape.box]
    c.paint(shape.box, inner, content)
    if gas is not None and shape.r.size:
        y = np.broadcast_to(c.y, c.hu.shape)[shape.box]
        middle = np.float32((y * shape.alpha()).sum() / max(shape.alpha().sum(), 1e-3))
        c.paint(shape.box, inner * np.clip((middle - gas * shape.px / c.px - y) * c.px + 0.5, 0, 1), -920.0)


def draw_organs(c: Canvas, hu: dict[str, float], injuries: "Injuries") -> None:
    """Heart, liver, gallbladder, spleen, kidneys, pancreas, then the lung bases over the domes; masks go to `c.organs`."""
    rng = c.rng
    heart = c.blob((0.1, -0.32, -0.08), (0.42, 0.34, 0.16))
    c.paint(heart.box, heart.alpha() * c.cavity[heart.box], 0.5 * hu["aorta"] + 40)
    pancreas = c.blob((0.1, -0.02 + rng.uniform(-0.04, 0.04), 0.4), (0.34, 0.085, 0.07), tilt=-0.35, wobble=0.25)
    c.paint(pancreas.box, pancreas.alpha(), 0.8 * hu["liver"] + 15 + 25 * c.fine[pancreas.box])
    lateral = -0.42 - 0.22 * np.clip(c.t[:, 0, 0] - 0.25, 0, 1)
    right = c.blob((lateral, np.full(c.depth, -0.02), 0.24), (0.5, rng.uniform(0.64, 0.74), rng.uniform(0.4, 0.47)), wobble=0.035, grow=1.3)
    left = c.blob((-0.1, -0.42, 0.17), (rng.uniform(0.42, 0.58), 0.27, 0.2), wobble=0.05, grow=1.3)
    _organ(c, "liver", [right, left], hu["liver"], injuries)
    box, alpha = c.organs["liver"]
    vessels = c.tubes(0.3, (9, 13, 13))[box] * alpha
    c.paint(box, vessels, max(hu["portal"], hu["liver"] + 20))
    bladder = c.blob((-0.27, -0.3, 0.45), (0.1, 0.13, 0.1), tilt=0.3)
    c.paint(bladder.box, bladder.alpha(), FLUID)
    spleen = c.blob(
        (0.62, 0.26, 0.27), (rng.uniform(0.2, 0.26), rng.uniform(0.38, 0.46), rng.uniform(0.2, 0.26)), tilt=0.35, wobble=0.05, grow=1.4
    )
    _organ(c, "spleen", [spleen], hu["spleen"], injuries)
    for side, name in ((-1, "right kidney"), (1, "left kidney")):
        centre = (side * rng.uniform(0.35, 0.4), rng.uniform(0.32, 0.38), 0.55 - 0.04 * side + rng.uniform(-0.03, 0.03))
        kidney = c.blob(
            centre, (rng.uniform(0.16, 0.19), rng.uniform(0.22, 0.27), rng.uniform(0.19, 0.22)), tilt=side * 0.5, wobble=0.03, grow=1.6
        )
        _organ(c, name, [kidney], hu["cortex"], injuries)
        c.paint(kidney.box, kidney.alpha(0.72) * np.clip(0.9 + c.fine[kidney.box], 0, 1), hu["medulla"])
        sinus = c.blob((centre[0] - side * 0.07, centre[1] - 0.07, centre[2]), (0.1, 0.1, 0.1), tilt=side * 0.6, wobble=0.2)
        c.paint(sinus.box, sinus.alpha(), -60.0)
        c.paint(sinus.box, sinus.alpha(0.5), hu["urine"])
    for organ in ("liver", "left kidney"):  # cysts: round and sharp, no injury
        if rng.random() < 0.25:
            box, alpha = c.organs[organ]
            at = tuple(rng.integers(0, max(length, 1)) for length in alpha.shape)
            x, y, z = c.mm_from(box, tuple(f[box][at] for f in (c.u, c.v, np.broadcast_to(c.t, c.u.shape))))
            c.paint(box, np.clip((rng.uniform(7, 11) - np.sqrt(x * x + y * y + z * z)) / c.mm + 0.5, 0, 1) * alpha, 6.0)
    floor = np.minimum(_dome(c, -0.42, rng.uniform(0.0, 0.03)), _dome(c, 0.45, rng.uniform(0.02, 0.05)))
    lung = np.clip((floor - c.t) * 40, 0, 1) * c.cavity * np.clip((np.abs(c.u) - 0.16 + 0.5 * np.maximum(c.y, 0)) * 20, 0, 1)
    lung[heart.box] *= 1 - heart.alpha()
    c.lung = lung
    c.paint(None, lung, -860 + 420 * c.tubes(0.3, (9, 14, 14)))


def _dome(c: Canvas, u: float, top: float) -> Array:
    """Depth t of one half of the diaphragm, deepest in the recess at the back."""
    return top + 0.5 * np.maximum((c.u - u) ** 2 + 0.7 * (c.v + 0.15) ** 2 - 0.06, 0) + (c.u * np.sign(u) < -0.02) * 9


def _organ(c: Canvas, name: str, parts: list[Region], value: float, injuries: "Injuries") -> None:
    """Paint one organ made of overlapping parts, any fluid around it first, and keep its mask."""
    box = tuple(slice(min(p.box[i].start for p in parts), max(p.box[i].stop for p in parts)) for i in range(3))
    full = np.full(c.hu[box].shape, 9.0, np.float32)
    for part in parts:
        inner = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(part.box, box, strict=True))
        np.minimum(full[inner], part.r, out=full[inner])
    shape = Region(box, full, parts[0].px)
    c.paint(box, injuries.crescent(name, shape) * c.cavity[box], BLOOD + 8 * c.fine[box])
    alpha = shape.alpha() * c.cavity[box]
    c.paint(box, alpha, value + 4 * c.fine[box])
    c.organs[name] = (box, alpha)


def draw_vessels(c: Canvas, hu: dict[str, float]) -> None:
    """Aorta and its two branches, inferior vena cava, mesenteric pair, renal and portal vessels, psoas muscles."""
    t, n = c.t[:, 0, 0], c.depth
    for side in (-1, 1):
        psoas = c.blob((side * (0.16 + 0.1 * t), np.full(n, 0.36)), (0.09, 0.13, None), span=(0.5, 9), wobble=0.04)
        c.paint(psoas.box, psoas.alpha(), MUSCLE + 4 * c.fine[psoas.box])
    split = 0.09 * np.clip((t - 0.85) / 0.15, 0, 1.4)
    for side, name, wide in ((1, "aorta", 0.066), (-1, "ivc", 0.075)):
        trunk = 0.07 * side - 0.03
        for branch in (-1, 1):
            line = c.blob((trunk + branch * split, np.full(n, 0.15)), (wide * (1 - 0.25 * (branch * side < 0)), 1.25 * wide, None))
            c.paint(line.box, line.alpha(), hu[name])
    for u, value in ((0.06, hu["aorta"]), (0.0, hu["portal"])):
        root = c.blob((np.full(n, u), -0.02 - 0.25 * np.clip(t - 0.45, 0, 1)), (0.035, 0.045, None), span=(0.42, 0.85))
        c.paint(root.box, root.alpha(), value)
    for centre, radii, tilt, name in (
        ((-0.16, 0.0, 0.36), (0.2, 0.05, 0.06), 0.45, "portal"), ((0.2, 0.24, 0.5), (0.17, 0.03, 0.03), 0.4, "aorta"),
        ((-0.2, 0.24, 0.56), (0.17, 0.035, 0.03), -0.4, "ivc"), ((0.3, 0.05, 0.36), (0.3, 0.03, 0.03), 0.3, "portal")):  # fmt: skip
        vessel = c.blob(centre, radii, tilt=tilt)
        c.paint(vessel.box, vessel.alpha(), hu[name])


def draw_spine(c: Canvas) -> None:
    """Vertebral bodies and discs, canal, arch, spinous and transverse processes; wider below (sacrum)."""
    rng = c.rng
    level = (c.t * c.length / 34 + rng.uniform(0, 1)) % 1  # one vertebra is 34 mm high
    disc = np.clip((0.2 - np.abs(level - 0.5)) * 12, 0, 1) * (c.t < 0.9)
    body = c.blob((0.0, 0.44), (0.145, 0.15, None), wobble=0.02)
    c.paint(body.box, body.alpha(), (CORTICAL + (90 - CORTICAL) * disc)[body.box[0]])
    c.paint(body.box, body.alpha(0.86), ((MARROW + (85 - MARROW) * disc)[body.box[0]]) + 35 * c.fine[body.box])
    arch = c.blob((0.0, 0.66), (0.135, 0.1, None))
    c.paint(arch.box, arch.alpha() * (1 - 0.6 * disc)[arch.box[0]], 420.0)
    process = c.blob((0.0, 0.8), (0.03, 0.13, None))
    c.paint(process.box, process.alpha() * np.clip(1.4 - 2 * np.abs(level - 0.2), 0, 1)[process.box[0]], CORTICAL)
    wings = c.blob((0.0, 0.62), (0.33, 0.035, None))
    c.paint(wings.box, wings.alpha() * np.clip((0.16 - np.abs(level - 0.05)) * 12, 0, 1)[wings.box[0]], 400.0)
    canal = c.blob((0.0, 0.64), (0.075, 0.065, None))
    c.paint(canal.box, canal.alpha(), 25.0)


def draw_surroundings(c: Canvas) -> None:
    """Table, and in a third of the patients both arms with bone beside the trunk."""
    rng = c.rng
    top, bend = 1.04 + rng.uniform(0, 0.03), rng.uniform(0.03, 0.12)
    for offset, value in ((0.0, -150.0), (0.13, -250.0)):
        line = np.abs(c.y - (top + offset - bend * c.x**2)) * c.px
        c.paint(None, np.clip(1.1 - line, 0, 1) * np.clip((1.05 - np.abs(c.x)) * 40, 0, 1) * (c.rho > 1.02), value)
    arms, spot, wide = rng.random() < 0.35, rng.uniform(0.0, 0.3), rng.uniform(0.15, 0.2)
    for side in (-1, 1) if arms else ():
        arm = c.blob((side * (1.04 + wide), np.full(c.depth, spot)), (wide, 1.5 * wide, None), wobble=0.03)
        outside = np.clip((c.rho[arm.box] - 1.01) * c.px, 0, 1)
        bone = np.hypot((c.u[arm.box] - side * (1.06 + wide)) * c.half[0], (c.v[arm.box] - spot) * c.half[1])
        for alpha, value in ((arm.alpha(), 10.0), (arm.alpha(0.93), FAT), (arm.alpha(0.75), MUSCLE),
                             (np.clip((11 - bone) / c.mm + 0.5, 0, 1), 900.0),
                             (np.clip((6 - bone) / c.mm + 0.5, 0, 1), -20.0)):  # fmt: skip
            c.paint(arm.box, alpha * outside, value)


def draw_noise(c: Canvas, sigma: float, rng: np.random.Generator) -> None:
    """Detector noise with the short correlation of a reconstruction kernel, stronger in the middle of the trunk."""
    noise = rng.standard_normal(c.hu.shape, dtype=np.float32)
    for axis in (1, 2):
        noise = 0.6 * noise + 0.4 * np.roll(noise, 1, axis)
    noise /= np.float32(0.6**2 + 0.4**2)
    c.hu += noise * (np.float32(sigma) * (1.25 - 0.5 * np.minimum(c.rho, 1.4)))


class Injuries:
    """What the labels add to one canvas. `difficulty` 0 gives large and plain injuries, 1 small and faint ones."""

    def __init__(self, c: Canvas, labels: dict[str, int], difficulty: float, hu: dict[str, float], rng: np.random.Generator) -> None:
        self.c, self.labels, self.hu, self.rng = c, labels, hu, rng
        self.contrast, self.size = 1 - 0.6 * difficulty, 1.06 - 0.45 * difficulty
        self.side = ("right kidney", "left kidney")[int(rng.integers(2))]
        self.thick_loops = 5 if labels["bowel"] else 0
        self.bowel_slices = self.blush_slices = np.zeros(c.depth)

    def grade(self, organ: str) -> int:
        """Class number of an organ; of the two kidneys only one is injured."""
        return self.labels.get(organ, self.labels["kidney"] if organ == self.side else 0)

    def crescent(self, organ: str, shape: Region) -> Array:
        """Blood around a high-grade organ: a rim of about 15 mm, uneven."""
        if self.grade(organ) < 2:
            return np.zeros((1, 1, 1), np.float32)
        rim = 1 + 15 * self.size / (shape.px * self.c.mm) * (1 + 0.35 * np.clip(self.c.wobble[shape.box], -1, 1))
        return np.clip((rim - shape.r) * shape.px + 0.5, 0, 1)

    def before_organs(self) -> None:
        """Free fluid of a bowel injury: the gutters beside the colon and between loops."""
        if not self.labels["bowel"]:
            return
        c, rng = self.c, self.rng
        for side in (-1, 1):
            gutter = c.blob((side * 0.6, 0.28), (0.24, rng.uniform(0.3, 0.4) * self.size, None), wobble=0.2, span=(0.45, 1.0))
            c.paint(gutter.box, gutter.alpha() * c.cavity[gutter.box] * self.contrast, FLUID)
        for _ in range(3):
            pool = c.blob((rng.uniform(-0.35, 0.35), rng.uniform(-0.4, -0.1), rng.uniform(0.6, 0.9)), (0.2, 0.1, 0.12), wobble=0.3)
            c.paint(pool.box, pool.alpha() * c.cavity[pool.box] * self.contrast, FLUID)

    def after_organs(self) -> None:
        """Lacerations, free gas and the contrast blush."""
        for organ in self.c.organs:
            if grade := self.grade(organ):
                self._lacerate(organ, grade)
        if self.labels["bowel"]:
            self._free_gas()
        if self.labels["extravasation"]:
            self._blush()

    def _lacerate(self, organ: str, grade: int) -> None:
        """Low grade: one band from the surface. High grade: bands in several directions through a devascularised core."""
        c, rng = self.c, self.rng
        box, mask = c.organs[organ]
        inside = np.argwhere(mask > 0.9) if (mask > 0.9).any() else np.zeros((1, 3), int)
        middle = inside.mean(0)
        order = np.argsort(np.linalg.norm((inside - middle) / (inside.std(0) + 1e-3), axis=1))
        pick = inside[order[int((0.1 if grade == 2 else 0.45) * len(order))]]
        x, y, z = c.mm_from(box, tuple(f[box][tuple(pick)] for f in (c.u, c.v, np.broadcast_to(c.t, c.u.shape))))
        away = np.sqrt(x * x + y * y + (0.8 * z) ** 2)
        small = 0.8 if "kidney" in organ else 1.0
        reach = (80 if grade == 2 else 45) * self.size * small
        start, tear = rng.uniform(0, np.pi), np.zeros_like(x)
        for branch in range(4 if grade == 2 else 1):
            angle = start + branch * np.pi / 4 + rng.uniform(-0.2, 0.2)
            width = rng.uniform(12, 15) * self.size * small
            line = np.abs(np.cos(angle) * x + np.sin(angle) * y + 0.15 * z + 4 * c.wobble[box]) - width / 2 * (1 + 0.3 * c.fine[box])
            tear = np.maximum(tear, np.clip(0.5 - line / c.mm, 0, 1) * np.clip((reach - away) / 8, 0, 1))
        if grade == 2:
            tear = np.maximum(tear, 0.8 * np.clip((26 * self.size * small + 6 * c.wobble[box] - away) / 6, 0, 1))
        c.paint(box, tear * mask * self.contrast, 22 + 10 * c.fine[box])

    def _free_gas(self) -> None:
        """Gas under the front wall, flat below because it rises."""
        c, rng = self.c, self.rng
        start = rng.uniform(0.15, 0.3)
        extent = np.clip((0.28 * self.size - np.abs(c.t - start - 0.28)) * 20, 0, 1)
        top = np.where(c.cavity > 0.5, c.y, 9).min(axis=(1, 2), keepdims=True)
        level = np.clip((top + 0.2 * self.size - c.y) * c.px + 0.5, 0, 1)
        gas = level * c.cavity * extent
        c.paint(None, gas, -960.0)
        self.bowel_slices = gas.sum(axis=(1, 2)) / 12

    def _blush(self) -> None:
        """Escaped contrast: joined bright clumps in a pool of blood, at an injured organ or in the mesentery."""
        c, rng = self.c, self.rng
        hurt = [organ for organ in c.organs if self.grade(organ)]
        point = np.array([rng.uniform(-0.3, 0.3), rng.uniform(-0.4, 0.0), rng.uniform(0.5, 0.75)])
        if hurt:
            box, mask = c.organs[hurt[int(rng.integers(len(hurt)))]]
            rim = np.argwhere((mask > 0.3) & (np.abs(c.rho[box] - 0.5) < 0.3))
            if len(rim):
                at = tuple(rim[int(rng.integers(len(rim)))])
                point = np.array([f[box][at] for f in (c.u, c.v, np.broadcast_to(c.t, c.u.shape))])
        value = max(self.hu["aorta"] + 150, 420)
        steps = rng.normal(0, (0.07, 0.09, 0.01), (6, 3)) + np.array([[0, 0, 0.035 * (i - 2.5)] for i in range(6)])
        radii = rng.uniform(9, 14, 6) * self.size
        blobs = [
            c.blob(tuple(point + step), (r / c.half[0], 1.3 * r / c.half[1], 1.6 * r / c.length), wobble=0.3, grow=2.0)
            for step, r in zip(steps, radii, strict=True)
        ]
        for limit, hu in ((1.9, BLOOD), (1.0, value)):
            for blob in blobs:
                c.paint(blob.box, blob.alpha(limit) * c.inside(c.limit + 0.02)[blob.box] * (self.contrast if hu == value else 0.7), hu)
        shown = np.zeros(c.hu.shape, np.float32)
        for blob in blobs:
            np.maximum(shown[blob.box], blob.alpha(), out=shown[blob.box])
        self.blush_slices = shown.sum(axis=(1, 2)) / 10


def make_scan(config: PhantomConfig, labels: dict[str, int], key: tuple[int, ...], series: int, phase: str) -> Scan:
    """One series of one patient: the same `key` gives the same anatomy, each `series` its own coverage, phase and noise.

    `labels` maps target names to class numbers; they steer the injuries and nothing else.
    """
    take = np.random.default_rng([*key, 1, series])
    depth = int(take.integers(config.slices_min, config.slices_max + 1))
    canvas = Canvas(depth, config.image_size, np.random.default_rng([*key, 0]), (take.uniform(-0.03, 0.02), take.uniform(0.99, 1.05)))
    hu = {name: value * take.uniform(0.93, 1.07) for name, value in PHASES[phase].items()}
    injuries = Injuries(canvas, labels, config.difficulty, hu, np.random.default_rng([*key, 2]))
    draw_trunk(canvas)
    injuries.before_organs()
    draw_bowel(canvas, hu, injuries.thick_loops)
    draw_organs(canvas, hu, injuries)
    draw_vessels(canvas, hu)
    draw_spine(canvas)
    injuries.after_organs()
    draw_surroundings(canvas)
    draw_noise(canvas, config.noise_hu, take)
    spacing = (float(canvas.t[1, 0, 0] - canvas.t[0, 0, 0]) * canvas.length, canvas.mm, canvas.mm)
    volume = np.clip(np.rint(canvas.hu), -1024, 2047).astype(np.int16)
    return Scan(volume, spacing, round(hu["aorta"], 2), injuries.bowel_slices > 0.4, injuries.blush_slices > 0.4)
