"""A seeded procedural abdomen in Hounsfield units: arrays only, no files.

Everything that is not an injury is drawn from random streams that never see the labels, so that two
patients who differ in a label differ in the picture of that injury alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ..run.config import PhantomConfig
from .canvas import Array, Canvas, Region, soft
from .injuries import BLOOD, FLUID, Injuries, haze

# Mean HU by contrast phase, of a modest dose: nothing but bone and a blush saturates the window.
TISSUES = ("aorta", "ivc", "portal", "liver", "spleen", "cortex", "medulla", "wall", "urine")
PHASES = {
    "arterial": (180, 95, 120, 78, 122, 165, 80, 95, 10),
    "portal": (155, 145, 160, 112, 122, 165, 140, 85, 15),
    "delayed": (118, 115, 118, 95, 98, 125, 130, 70, 190),
}
FAT, MUSCLE, CORTICAL, MARROW, GAS, LUNG = -100.0, 58.0, 340.0, 110.0, -930.0, -860.0
SIDES = (-1, 1)


@dataclass(frozen=True)
class Scan:
    """One series: `hu` (D, H, W) int16, superior first, patient's right at image left, anterior at
    top.
    """

    hu: NDArray[np.int16]
    spacing: tuple[float, float, float]  # z, y, x in mm
    aortic_hu: float
    # per target with slice labels: (D,) slices that show the injury
    shown: dict[str, NDArray[np.bool_]]
    # (D,) slices that show at least 2 square centimetres of the organ
    organs: dict[str, NDArray[np.bool_]]


def make_scan(
    config: PhantomConfig, labels: dict[str, int], key: tuple[int, ...], series: int, phase: str
) -> Scan:
    """One series of one patient: the same `key` gives the same body, each `series` its own
    coverage, phase and noise.

    `labels` maps target names to class numbers; they steer the injuries and nothing else.
    """
    # sums of several threads round differently: the bytes would depend on the machine's load
    with threadpool_limits(1):
        return _draw_scan(config, labels, key, np.random.default_rng([*key, 1, series]), phase)


def _draw_scan(
    config: PhantomConfig,
    labels: dict[str, int],
    key: tuple[int, ...],
    take: np.random.Generator,
    phase: str,
) -> Scan:
    depth = int(take.integers(config.slices_min, config.slices_max + 1))
    c = Canvas(
        depth,
        config.image_size,
        np.random.default_rng([*key, 0]),
        (take.uniform(-0.03, 0.02), take.uniform(0.99, 1.05)),
    )
    hu = {
        name: value * take.uniform(0.93, 1.07)
        for name, value in zip(TISSUES, PHASES[phase], strict=True)
    }
    injuries = Injuries(c, labels, config.difficulty, hu["aorta"], np.random.default_rng([*key, 2]))
    cavity = draw_trunk(c)
    injuries.before_organs(cavity)
    draw_bowel(c, hu, cavity, injuries)
    abdomen = draw_organs(c, hu, cavity, injuries)
    draw_vessels(c, hu)
    draw_bones(c)
    shown = injuries.after_organs(abdomen)
    draw_surroundings(c)
    draw_noise(c, config.noise_hu, take)
    spacing = (float(c.tz[1] - c.tz[0]) * c.length, c.mm, c.mm)
    organs = {name: np.zeros(depth, bool) for name in c.organs}
    for name, (box, alpha) in c.organs.items():
        organs[name][box[0]] = alpha.sum(axis=(1, 2)) * c.mm**2 >= 200
    return Scan(
        np.clip(np.rint(c.hu), -1024, 2047).astype(np.int16),
        spacing,
        round(hu["aorta"], 2),
        shown,
        organs,
    )


def draw_trunk(c: Canvas) -> Array:
    """Skin, fat, muscle wall with ribs; returns the coverage of the fat-filled cavity."""
    rng = c.rng
    # more fat in front
    rim = 1 - rng.uniform(0.05, 0.16) * np.clip(1 - 0.45 * c.y + 0.12 * c.wobble, 0.5, 1.6)
    limit = rim - rng.uniform(0.085, 0.11)
    trunk, cavity = c.inside(rim), c.inside(limit)
    c.hu = np.where(c.rho < 0.975, FAT + 8 * c.fine, np.where(c.rho < 1.0, np.float32(30), c.hu))
    c.paint(None, trunk * (1 - cavity), MUSCLE + 6 * c.fine)
    for side in SIDES:  # erector muscles
        back = c.put(MUSCLE, (side * 0.2, 0.7), (0.18, 0.15), wobble=0.05, texture=10, within=trunk)
        cavity[back.box] *= 1 - back.alpha()
    angle = np.arctan2(np.abs(c.x), c.y + 0.1)  # 0 at the back, pi in front
    along = (
        c.t * c.length
        - 42 * np.minimum(angle, 2.5)
        + 60 * np.maximum(angle - 2.3, 0)
        + rng.uniform(0, 20)
    )
    band = np.abs(c.rho - limit - 0.035) * c.px
    rib = (
        np.clip((0.23 - np.abs((along / 25) % 1 - 0.5)) * 12, 0, 1)
        * ((along < 75) & (angle < 2.75))
        * np.clip(1.6 - band, 0, 1)
    )
    c.paint(
        None,
        rib,
        np.where(angle > 2.2, np.float32(140), CORTICAL - 160 * (band < 0.5).astype(np.float32)),
    )
    for side in SIDES:
        wing = _wing(c, side)  # the muscles on both sides of the bone, which is drawn later
        c.paint(
            wing.box,
            np.clip((2.2 - wing.r) * 3, 0, 1) * np.clip((wing.r - 1) * 9, 0, 1) * trunk[wing.box],
            MUSCLE,
        )
    return cavity


def _wing(c: Canvas, side: int) -> Region:
    """One iliac wing: its bone lies at r = 1."""
    return c.blob((side * 0.56, 0.32), (0.34, 0.13), tilt=side * 0.75, span=(0.84, 9), grow=2.3)


def draw_bowel(c: Canvas, hu: dict[str, float], cavity: Array, injuries: Injuries) -> None:
    """Mesenteric vessels, small bowel, colon and stomach with gas, fluid or positive contrast.

    What an injury might be mistaken for is in the healthy too: loops with thick walls, gas under
    the front wall, a hazy mesentery.
    """
    rng = c.rng
    misty, place = (
        rng.uniform(-0.8, 0.4),
        (rng.uniform(-0.3, 0.3), rng.uniform(-0.4, -0.1), rng.uniform(0.55, 0.85)),
    )
    if misty > 0:
        haze(c, cavity, place, misty)
    c.paint(None, c.vessels(0.42) * cavity * (np.abs(c.u) < 0.6), 0.7 * hu["portal"])
    oral = rng.uniform(100, 160) if rng.random() < 0.3 else FLUID
    front = 2 * int(rng.integers(0, 3))  # loops full of gas that lie against the front wall
    for index in range(24 + front):
        centre = (rng.uniform(-0.55, 0.55), rng.uniform(-0.62, 0.1), rng.uniform(0.42, 1.05))
        size, long, tilt, lumen = (
            rng.uniform(0.085, 0.14),
            rng.uniform(1.0, 1.9),
            rng.uniform(0, np.pi),
            rng.uniform(0.62, 0.82),
        )
        content, gas = (oral if rng.random() < 0.6 else 40.0), (0.2 if rng.random() < 0.2 else None)
        if index >= 24:
            centre, long, tilt, gas = (centre[0], -0.66, centre[2]), 1.3 * long, 0.0, -0.6
        swollen = injuries.swollen(centre)
        loop = c.blob(centre, (size * long, size * 1.3, size), tilt=tilt, wobble=0.12)
        _loop(
            c,
            loop,
            cavity,
            hu["wall"] * (1.3 if swollen else 1),
            content,
            0.42 if swollen else lumen,
            gas,
        )
    colon = {"wobble": 0.15}
    for side, v, start in ((-1, 0.12, 0.5), (1, 0.2, 0.36)):  # ascending and descending
        u = side * (0.66 + 0.03 * np.sin(9 * c.tz + rng.uniform(0, 6)))
        part = c.blob(
            (u, v), (rng.uniform(0.1, 0.15), rng.uniform(0.14, 0.19)), span=(start, 0.97), **colon
        )
        _loop(
            c,
            part,
            cavity,
            60.0,
            -40 + 130 * np.clip(c.fine[part.box], -1.5, 1),
            0.8,
            rng.uniform(-0.1, 0.6),
        )
    arch = c.blob(
        (rng.uniform(-0.1, 0.1), rng.uniform(-0.66, -0.58), rng.uniform(0.4, 0.5)),
        (0.5, 0.13, rng.uniform(0.06, 0.1)),
        **colon,
    )
    _loop(
        c,
        arch,
        cavity,
        60.0,
        -20 + 100 * np.clip(c.fine[arch.box], -1.5, 1),
        0.8,
        rng.uniform(-0.7, 0.3),
    )
    stomach = c.blob(
        (0.3, -0.3, 0.22),
        (rng.uniform(0.24, 0.32), rng.uniform(0.26, 0.34), 0.2),
        tilt=0.5,
        wobble=0.1,
    )
    _loop(c, stomach, cavity, 70.0, oral + 12 * c.fine[stomach.box], 0.85, rng.uniform(-0.2, 0.35))


def _loop(
    c: Canvas,
    shape: Region,
    cavity: Array,
    wall: float,
    content: float | Array,
    lumen: float,
    gas: float | None,
) -> None:
    """One bowel segment: wall, content inside `lumen` of it, and gas above the height `gas` (in its
    own half heights).
    """
    whole = shape.alpha() * cavity[shape.box]
    if not whole.any():
        return
    c.paint(shape.box, whole, wall)
    inner = shape.alpha(lumen) * cavity[shape.box]
    c.paint(shape.box, inner, content)
    if gas is not None:
        y = c.y[:, shape.box[1]]
        middle = float((y * whole).sum() / whole.sum())
        c.paint(shape.box, inner * soft((middle - y) * c.px - gas * shape.px), GAS)


def draw_organs(c: Canvas, hu: dict[str, float], cavity: Array, injuries: Injuries) -> Array:
    """Heart, pancreas, liver, gallbladder, spleen, kidneys, cysts, then the lung bases around the
    domes; fills `c.organs`.

    Returns the coverage of the cavity below the diaphragm.
    """
    rng = c.rng
    heart = c.put(0.5 * hu["aorta"] + 40, (0.1, -0.32, -0.08), (0.42, 0.34, 0.16), within=cavity)
    c.put(
        0.8 * hu["liver"] + 15,
        (0.1, rng.uniform(-0.06, 0.02), 0.4),
        (0.34, 0.085, 0.07),
        tilt=-0.35,
        wobble=0.25,
        texture=25,
    )
    down = np.clip(c.tz - 0.25, 0, 1)
    right = c.blob(
        (-0.42 - 0.3 * down, -0.02 - 0.5 * down, 0.24),
        (0.5, rng.uniform(0.64, 0.72), rng.uniform(0.4, 0.47)),
        wobble=0.035,
        grow=1.3,
    )
    left = c.blob((-0.1, -0.42, 0.17), (rng.uniform(0.42, 0.58), 0.27, 0.2), wobble=0.05, grow=1.3)
    _organ(c, "liver", [right, left], hu["liver"], cavity, injuries)
    box, alpha = c.organs["liver"]
    c.paint(box, c.vessels(0.3, box) * alpha, max(hu["portal"], hu["liver"] + 20))
    c.put(FLUID, (-0.27, -0.3, 0.45), (0.1, 0.13, 0.1), tilt=0.3)
    spleen = c.blob(
        (0.62, 0.26, 0.27),
        (rng.uniform(0.2, 0.26), rng.uniform(0.38, 0.46), rng.uniform(0.2, 0.26)),
        tilt=0.35,
        wobble=0.05,
        grow=1.4,
    )
    _organ(c, "spleen", [spleen], hu["spleen"], cavity, injuries)
    for side, name in zip(SIDES, ("right kidney", "left kidney"), strict=True):
        u, v, t = (
            side * rng.uniform(0.35, 0.4),
            rng.uniform(0.34, 0.39),
            0.55 - 0.04 * side + rng.uniform(-0.03, 0.03),
        )
        radii = (rng.uniform(0.16, 0.19), rng.uniform(0.22, 0.27), rng.uniform(0.19, 0.22))
        kidney = c.blob((u, v, t), radii, tilt=side * 0.5, wobble=0.03, grow=2.0)
        c.paint(kidney.box, kidney.alpha(1.15), FAT)
        _organ(c, name, [kidney], hu["cortex"], cavity, injuries)
        c.paint(
            kidney.box, kidney.alpha(0.72) * np.clip(0.9 + c.fine[kidney.box], 0, 1), hu["medulla"]
        )
        hilum = (u - side * 0.07, v - 0.07, t), (0.1, 0.1, 0.1)
        for value, limit in ((-60.0, 1.0), (hu["urine"], 0.5)):
            c.put(value, *hilum, limit=limit, tilt=side * 0.6, wobble=0.2)
    for organ in ("liver", "left kidney"):  # cysts are round and sharp, no injury
        wanted, radius, place = rng.random() < 0.25, rng.uniform(7, 11), rng.random()
        box, alpha = c.organs[organ]
        core = np.argwhere(alpha > 0.9)
        if wanted and len(core):
            away = np.sqrt(
                sum(d * d for d in c.offsets_mm(box, tuple(core[int(place * len(core))])))
            )
            c.paint(box, soft((radius - away) / c.mm) * alpha, 6.0)
    floor = np.minimum(
        _dome(c, -0.42, rng.uniform(0.0, 0.03)), _dome(c, 0.45, rng.uniform(0.02, 0.05))
    )
    lung = (
        np.clip((floor - c.t) * 80, 0, 1)
        * cavity
        * np.clip((np.abs(c.u) - 0.16 + 0.5 * np.maximum(c.y, 0)) * 20, 0, 1)
    )
    lung[heart.box] *= 1 - heart.alpha()
    c.paint(None, lung, LUNG + 420 * c.vessels(0.3))
    below = 1 - lung
    c.organs = {name: (box, alpha * below[box]) for name, (box, alpha) in c.organs.items()}
    return cavity * below


def _dome(c: Canvas, u: float, top: float) -> Array:
    """Depth t of one half of the diaphragm, deepest in the recess at the back; the other half of
    the body is left out.
    """
    bowl = top + 0.42 * np.maximum((c.u - u) ** 2 + 0.7 * (c.v + 0.15) ** 2 - 0.06, 0)
    return np.where(c.u * (1 if u > 0 else -1) < -0.02, np.float32(9), bowl)


def _organ(
    c: Canvas, name: str, parts: list[Region], value: float, cavity: Array, injuries: Injuries
) -> None:
    """Paint one organ made of overlapping parts, any blood around it first, and keep its coverage
    in `c.organs`.
    """
    box = tuple(
        slice(min(p.box[i].start for p in parts), max(p.box[i].stop for p in parts))
        for i in range(3)
    )
    whole = Region(box, np.full(c.hu[box].shape, 9.0, np.float32), parts[0].px)
    for part in parts:
        at = tuple(
            slice(s.start - b.start, s.stop - b.start) for s, b in zip(part.box, box, strict=True)
        )
        whole.r[at] = np.minimum(whole.r[at], part.r)
    if injuries.grade(name) == 2:
        c.paint(box, whole.alpha(injuries.rim(name, whole)) * cavity[box], BLOOD + 8 * c.fine[box])
    alpha = whole.alpha() * cavity[box]
    c.paint(box, alpha, value + 4 * c.fine[box])
    c.organs[name] = (box, alpha)


def draw_vessels(c: Canvas, hu: dict[str, float]) -> None:
    """Psoas muscles, aorta and inferior vena cava down to their branches, mesenteric, portal, renal
    and splenic vessels.
    """
    for side in SIDES:
        c.put(
            MUSCLE,
            (side * (0.16 + 0.1 * c.tz), 0.36),
            (0.09, 0.13),
            span=(0.5, 9),
            wobble=0.04,
            texture=4,
        )
    split = 0.09 * np.clip((c.tz - 0.85) / 0.15, 0, 1.4)
    for u, name, wide in ((0.04, "aorta", 0.066), (-0.1, "ivc", 0.075)):
        for branch in SIDES:
            c.put(hu[name], (u + branch * split, 0.15), (wide, 1.25 * wide))
    for u, name in ((0.06, "aorta"), (0.0, "portal")):
        c.put(
            hu[name],
            (u, -0.02 - 0.25 * np.clip(c.tz - 0.45, 0, 1)),
            (0.035, 0.045),
            span=(0.42, 0.85),
        )
    for name, centre, radii, tilt in (
        ("portal", (-0.16, 0.0, 0.36), (0.2, 0.05, 0.06), 0.45),
        ("aorta", (0.2, 0.24, 0.5), (0.17, 0.03, 0.03), 0.4),
        ("ivc", (-0.2, 0.24, 0.56), (0.17, 0.035, 0.03), -0.4),
        ("portal", (0.3, 0.05, 0.36), (0.3, 0.03, 0.03), 0.3),
    ):
        c.put(hu[name], centre, radii, tilt=tilt)


def draw_bones(c: Canvas) -> None:
    """Vertebral bodies (34 mm each) with discs, arch, transverse and spinous processes, canal;
    iliac wings.
    """
    level = (c.t * c.length / 34 + c.rng.uniform(0, 1)) % 1
    disc = np.clip((0.2 - np.abs(level - 0.5)) * 12, 0, 1) * (c.t < 0.9)
    body = c.put(CORTICAL + (90 - CORTICAL) * disc, (0.0, 0.44), (0.145, 0.15), wobble=0.02)
    c.paint(body.box, body.alpha(0.86), MARROW + (85 - MARROW) * disc + 20 * c.fine[body.box])
    everywhere = np.ones_like(c.hu)
    c.put(190.0, (0.0, 0.66), (0.135, 0.1), within=everywhere * (1 - 0.6 * disc))
    c.put(
        260.0,
        (0.0, 0.8),
        (0.03, 0.13),
        within=everywhere * np.clip(1.4 - 2 * np.abs(level - 0.2), 0, 1),
    )
    c.put(
        240.0,
        (0.0, 0.62),
        (0.33, 0.035),
        within=everywhere * np.clip((0.16 - np.abs(level - 0.05)) * 12, 0, 1),
    )
    c.put(25.0, (0.0, 0.64), (0.075, 0.065))
    for wing in (_wing(c, side) for side in SIDES):
        c.paint(
            wing.box,
            np.clip(1.2 - 0.9 * np.abs(wing.r - 1) * wing.px, 0, 1) * (c.rho[wing.box] < 0.92),
            290.0,
        )


def draw_surroundings(c: Canvas) -> None:
    """Table, and in a third of the patients both arms with bone beside the trunk."""
    rng = c.rng
    top, bend = 1.03 + rng.uniform(0, 0.03), rng.uniform(0.06, 0.18)
    for offset, value in ((0.0, 150.0), (0.14, 50.0)):
        line = np.abs(c.y - (top + offset - bend * c.x**2)) * c.px
        c.paint(
            None,
            soft(0.9 - line) * np.clip((1.05 - np.abs(c.x)) * 40, 0, 1) * (c.rho > 1.02),
            value,
        )
    arms, v, wide = rng.random() < 0.35, rng.uniform(0.0, 0.3), rng.uniform(0.15, 0.2)
    outside = soft((c.rho - 1.03) * c.px)
    for side in SIDES if arms else ():
        for value, size, limit in (
            (10.0, wide, 1),
            (FAT, wide, 0.93),
            (MUSCLE, wide, 0.75),
            (900.0, 0.068, 1),
            (-20.0, 0.036, 1),
        ):
            c.put(
                value, (side * (1.05 + wide), v), (size, 1.45 * size), limit=limit, within=outside
            )


def draw_noise(c: Canvas, sigma: float, rng: np.random.Generator) -> None:
    """Detector noise of `sigma` HU with the short correlation of a reconstruction kernel, stronger
    in the middle of the trunk.
    """
    noise = rng.standard_normal(c.hu.shape, dtype=np.float32)
    for axis in (1, 2):
        noise = 0.6 * noise + 0.4 * np.roll(noise, 1, axis)
    c.hu += noise * (sigma / 0.52 * (1.25 - 0.5 * np.minimum(c.rho, 1.4)))
