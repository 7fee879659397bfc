"""A seeded procedural abdomen in Hounsfield units: arrays only, no files.

Everything that is not an injury is drawn from random streams that never see the labels, so that two
patients who differ in a label differ in the picture of that injury alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ..run.config import PhantomConfig
from .abdomen import draw_bowel, draw_organs
from .canvas import Array, Canvas, Region, soft
from .hospitals import HOSPITALS, Hospital, blurred, enhancement, noise
from .injuries import FULL_SIZE, Injuries
from .tissues import CORTICAL, FAT, MARROW, MUSCLE, SIDES, TISSUES


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
    masks: NDArray[np.uint8]  # (D, H, W), the competition's numbers (`MASKS`)
    # plane, row and column of the findings at the bowel and of the bright ones, harmless or not
    sites: dict[str, tuple[int, ...]]


def make_scan(
    config: PhantomConfig,
    labels: dict[str, int],
    key: tuple[int, ...],
    series: int,
    phase: str,
    hospital: Hospital = HOSPITALS[0],
) -> Scan:
    """One series of one patient: the same `key` gives the same body, each `series` its own
    coverage, phase and noise.

    `labels` maps target names to class numbers; they steer the injuries and nothing else.
    """
    # sums of several threads round differently: the bytes would depend on the machine's load
    with threadpool_limits(1):
        take = np.random.default_rng([*key, 1, series])
        return _draw_scan(config, labels, key, take, phase, hospital)


def _draw_scan(
    config: PhantomConfig,
    labels: dict[str, int],
    key: tuple[int, ...],
    take: np.random.Generator,
    phase: str,
    hospital: Hospital,
) -> Scan:
    depth = int(take.integers(config.slices_min, config.slices_max + 1))
    c = Canvas(
        depth, config.image_size, np.random.default_rng([*key, 0]), extent(config, take), hospital
    )
    hu = {
        name: value * take.uniform(0.93, 1.07) + take.normal(0, 9)
        for name, value in zip(TISSUES, enhancement(phase, hospital.timing), strict=True)
    }
    injuries = Injuries(c, labels, config.difficulty, width_mm(config, c), key)
    cavity = draw_trunk(c)
    draw_bowel(c, hu, cavity)
    abdomen = draw_organs(c, hu, cavity, injuries)
    injuries.organs()
    draw_vessels(c, hu)
    draw_bones(c)
    draw_pelvis(c)
    shown = {"bowel": injuries.bowel(abdomen), "extravasation": injuries.vessels(abdomen)}
    draw_surroundings(c, hospital)
    return finished(
        c, config.noise_hu, take, hospital, round(hu["aorta"], 2), shown, injuries.sites
    )


def extent(config: PhantomConfig, take: np.random.Generator) -> tuple[float, float]:
    """Where the scan begins and ends (t): the abdomen, and of the chest and the thighs so much that
    the abdomen is at least `coverage` of it.
    """
    top, end = take.uniform(-0.03, 0.02), take.uniform(0.99, 1.05)
    more, above = 1 / take.uniform(config.coverage, 1) - 1, take.random()
    return top - more * above, end + more * (1 - above)


def finished(
    c: Canvas,
    sigma: float,
    take: np.random.Generator,
    hospital: Hospital,
    aorta: float,
    shown: dict[str, NDArray[np.bool_]],
    sites: dict[str, tuple[float, ...]],
) -> Scan:
    """The drawn canvas as its scanner sees it: slices of their thickness, edges and noise of the
    kernel; noise is stronger in the middle of the trunk.
    """
    depth, n = c.depth // c.thick, c.thick
    hu = c.hu.reshape(depth, n, *c.hu.shape[1:]).mean(axis=1) if n > 1 else c.hu
    hu = blurred(hu, hospital, c.mm)
    strength = sigma * hospital.noise * (1.25 - 0.5 * np.minimum(c.rho[n // 2 :: n], 1.4))
    hu = hu + noise(hu.shape, hospital, c.mm, take) * strength
    found = masks(c)[n // 2 :: n]
    organs = {name: in_view(found, number, c.mm) for name, number in MASKS.items()}
    return Scan(
        np.clip(np.rint(hu), -1024, 2047).astype(np.int16),
        (c.dz * n, c.mm, c.mm),
        aorta,
        {name: planes.reshape(depth, n).max(axis=1) for name, planes in shown.items()},
        organs,
        found,
        {name: c.nearest(place, n) for name, place in sites.items()},
    )


def in_view(found: NDArray[np.uint8], number: int, mm: float) -> NDArray[np.bool_]:
    """(D,) planes that show at least 2 square centimetres of one number of a label map."""
    area: NDArray[np.int64] = (found == number).sum(axis=(1, 2))
    return area * mm**2 >= 200


# numbers of the competition's segmentations
MASKS = {"liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4}
BOWEL = 5


def masks(c: Canvas) -> NDArray[np.uint8]:
    """Label map of what is at least half covered by an organ or by bowel."""
    found = np.where(c.bowel > 0.5, np.uint8(BOWEL), np.uint8(0))
    for name, (box, alpha) in c.organs.items():
        found[box][alpha > 0.5] = MASKS[name]
    return found


def width_mm(config: PhantomConfig, c: Canvas) -> float:
    """Least width of a tear or strand: nothing from `FULL_SIZE` pixels on, else 2.75 pixels of the
    trunk at half the picture's size, which is about what the network sees.
    """
    return 0.0 if config.image_size >= FULL_SIZE else 11 * c.half[0] / config.image_size


def draw_trunk(c: Canvas) -> Array:
    """Skin, fat, muscle wall with ribs; returns the coverage of the fat-filled cavity."""
    rng = c.rng
    # more fat in front
    rim = 1 - (0.05 + 0.12 * c.mass * rng.uniform(0.8, 1.2)) * np.clip(
        1 - 0.45 * c.y + 0.12 * c.wobble, 0.5, 1.6
    )
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
    return c.blob((side * 0.56, 0.32), (0.34, 0.13), tilt=side * 0.75, span=(0.84, 1.45), grow=2.3)


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


def draw_pelvis(c: Canvas) -> None:
    """Below the abdomen: bladder, sacrum, gluteal muscles, hips and thighs."""
    if c.tz[-1] < 1.1:
        return
    c.put(8.0, (0.0, -0.25, 1.42), (0.3, 0.3, 0.16))
    c.put(230.0, (0.0, 0.62), (0.3, 0.14), span=(1.05, 1.5), wobble=0.1)
    for side in SIDES:
        c.put(MUSCLE, (side * 0.48, 0.55), (0.3, 0.26), span=(1.12, 9), texture=6)
        c.put(260.0, (side * 0.55, 0.05, 1.55), (0.14, 0.2, 0.08))
        c.put(CORTICAL, (side * 0.6, 0.05), (0.09, 0.13), span=(1.6, 9))
        c.put(MARROW - 150, (side * 0.6, 0.05), (0.05, 0.07), span=(1.62, 9))


def draw_surroundings(c: Canvas, hospital: Hospital) -> None:
    """Table, and in some patients both arms with bone beside the trunk."""
    rng = c.rng
    top, bend = 1.03 + rng.uniform(0, 0.03), hospital.table
    for offset, value in ((0.0, 150.0), (0.14, 50.0)):
        line = np.abs(c.y - (top + offset - bend * c.x**2)) * c.px
        c.paint(
            None,
            soft(0.9 - line) * np.clip((1.05 - np.abs(c.x)) * 40, 0, 1) * (c.rho > 1.02),
            value,
        )
    arms, v, wide = rng.random() < hospital.arms, rng.uniform(0.0, 0.3), rng.uniform(0.15, 0.2)
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
