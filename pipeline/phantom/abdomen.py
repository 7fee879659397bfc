"""What lies in the cavity of the trunk: bowel and solid organs, and the lung bases above them."""

import numpy as np

from .canvas import Array, Canvas, Region, soft
from .injuries import FLUID, Injuries
from .tissues import FAT, GAS, LUNG, SIDES


def draw_bowel(c: Canvas, hu: dict[str, float], cavity: Array) -> None:
    """Mesenteric vessels, small bowel, colon and stomach with gas, fluid or positive contrast."""
    rng = c.rng
    c.paint(None, c.vessels(0.3) * cavity * (np.abs(c.u) < 0.6), 0.7 * hu["portal"])
    oral = rng.uniform(100, 160) if rng.random() < 0.3 else FLUID
    _draw_small_bowel(c, hu["wall"], oral, cavity)
    _draw_colon(c, cavity)
    stomach = c.blob(
        (0.3, -0.3, 0.22),
        (rng.uniform(0.24, 0.32), rng.uniform(0.26, 0.34), 0.2),
        tilt=0.5,
        wobble=0.1,
    )
    content = oral + 12 * c.fine[stomach.box]
    _loop(c, stomach, cavity, 70.0, content, 0.85, rng.uniform(-0.2, 0.35))


def _draw_small_bowel(c: Canvas, wall: float, oral: float, cavity: Array) -> None:
    """24 loops filled with what was drunk (`oral` HU) or fluid, and up to four full of gas that lie
    against the front wall.
    """
    rng = c.rng
    front = 2 * int(rng.integers(0, 3))
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
        loop = c.blob(centre, (size * long, size * 1.3, size), tilt=tilt, wobble=0.12)
        _loop(c, loop, cavity, wall, content, lumen, gas)


def _draw_loops(c: Canvas, wall: float, cavity: Array, injuries: Injuries) -> None:
    """Two loops of small bowel in fat of their own, of which one may have a thick wall."""
    for index, site in enumerate(injuries.loops):
        radii = (site.radius * 1.15, site.radius * 1.5, 1.6 * site.radius * c.half[0] / c.length)
        loop = c.blob(site.centre, radii, tilt=site.tilt, wobble=0.05, grow=1.6)
        room = cavity * (1 - c.solid)
        c.paint(loop.box, loop.alpha(1.35) * room[loop.box], FAT)
        _loop(c, loop, room, wall * 1.1, 20.0, 0.45 if injuries.thick(index) else 0.8, None)


def _draw_colon(c: Canvas, cavity: Array) -> None:
    """Ascending and descending colon, then the arch between them in front."""
    rng = c.rng
    for side, v, start in ((-1, 0.12, 0.5), (1, 0.2, 0.36)):
        u = side * (0.66 + 0.03 * np.sin(9 * c.tz + rng.uniform(0, 6)))
        radii = (rng.uniform(0.1, 0.15), rng.uniform(0.14, 0.19))
        part = c.blob((u, v), radii, span=(start, 0.97), wobble=0.15)
        content = -40 + 130 * np.clip(c.fine[part.box], -1.5, 1)
        _loop(c, part, cavity, 60.0, content, 0.8, rng.uniform(-0.1, 0.6))
    arch = c.blob(
        (rng.uniform(-0.1, 0.1), rng.uniform(-0.66, -0.58), rng.uniform(0.4, 0.5)),
        (0.5, 0.13, rng.uniform(0.06, 0.1)),
        wobble=0.15,
    )
    content = -20 + 100 * np.clip(c.fine[arch.box], -1.5, 1)
    _loop(c, arch, cavity, 60.0, content, 0.8, rng.uniform(-0.7, 0.3))


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
    np.maximum(c.bowel[shape.box], whole, out=c.bowel[shape.box])
    inner = shape.alpha(lumen) * cavity[shape.box]
    c.paint(shape.box, inner, content)
    if gas is not None:
        y = c.y[:, shape.box[1]]
        middle = float((y * whole).sum() / whole.sum())
        c.paint(shape.box, inner * soft((middle - y) * c.px - gas * shape.px), GAS)


def draw_organs(c: Canvas, hu: dict[str, float], cavity: Array, injuries: Injuries) -> Array:
    """Heart, pancreas, liver, gallbladder, spleen, kidneys, then the lung bases around the
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
    _draw_liver(c, hu, cavity)
    c.put(FLUID, (-0.27, -0.3, 0.45), (0.1, 0.13, 0.1), tilt=0.3)
    spleen = c.blob(
        (0.62, 0.26, 0.27),
        (rng.uniform(0.2, 0.26), rng.uniform(0.38, 0.46), rng.uniform(0.2, 0.26)),
        tilt=0.35,
        wobble=0.05,
        grow=1.4,
    )
    if "spleen" not in injuries.absent:
        _organ(c, "spleen", [spleen], hu["spleen"], cavity)
    _draw_kidneys(c, hu, cavity, injuries)
    _draw_loops(c, hu["wall"], cavity, injuries)
    lung = _draw_lung_bases(c, cavity, heart)
    below = 1 - lung
    c.organs = {name: (box, alpha * below[box]) for name, (box, alpha) in c.organs.items()}
    return cavity * below


def _draw_liver(c: Canvas, hu: dict[str, float], cavity: Array) -> None:
    """Both lobes as one organ, with the branches of the portal vein."""
    rng = c.rng
    down = np.clip(c.tz - 0.25, 0, 1)
    right = c.blob(
        (-0.42 - 0.3 * down, -0.02 - 0.5 * down, 0.24),
        (0.5, rng.uniform(0.64, 0.72), rng.uniform(0.4, 0.47)),
        wobble=0.035,
        grow=1.3,
    )
    left = c.blob((-0.1, -0.42, 0.17), (rng.uniform(0.42, 0.58), 0.27, 0.2), wobble=0.05, grow=1.3)
    _organ(c, "liver", [right, left], hu["liver"], cavity)
    box, alpha = c.organs["liver"]
    c.paint(box, c.vessels(0.3, box) * alpha, max(hu["portal"], hu["liver"] + 20))


def _draw_kidneys(c: Canvas, hu: dict[str, float], cavity: Array, injuries: Injuries) -> None:
    """Cortex and medulla in a capsule of fat, and at each hilum fat around the renal pelvis. One
    may be absent or lie low.
    """
    rng = c.rng
    for side, name in zip(SIDES, ("right kidney", "left kidney"), strict=True):
        u, v, t = (
            side * rng.uniform(0.35, 0.4),
            rng.uniform(0.34, 0.39),
            0.55 - 0.04 * side + rng.uniform(-0.03, 0.03),
        )
        t += 0.25 * (name in injuries.moved)
        radii = (rng.uniform(0.16, 0.19), rng.uniform(0.22, 0.27), rng.uniform(0.19, 0.22))
        if name in injuries.absent:
            continue
        kidney = c.blob((u, v, t), radii, tilt=side * 0.5, wobble=0.03, grow=2.0)
        c.paint(kidney.box, kidney.alpha(1.15), FAT)
        _organ(c, name, [kidney], hu["cortex"], cavity)
        c.paint(
            kidney.box, kidney.alpha(0.72) * np.clip(0.9 + c.fine[kidney.box], 0, 1), hu["medulla"]
        )
        hilum = (u - side * 0.07, v - 0.07, t), (0.1, 0.1, 0.1)
        for value, limit in ((-60.0, 1.0), (hu["urine"], 0.5)):
            pelvis = c.put(value, *hilum, limit=limit, tilt=side * 0.6, wobble=0.2)
        _cut(c, name, pelvis)


def _cut(c: Canvas, name: str, shape: Region) -> None:
    """Take a shape out of the coverage of an organ."""
    box, alpha = c.organs[name]
    hole = np.zeros_like(c.solid)
    hole[shape.box] = shape.alpha()
    alpha *= 1 - hole[box]


def _draw_lung_bases(c: Canvas, cavity: Array, heart: Region) -> Array:
    """Lung above both domes of the diaphragm, around the heart; returns its coverage."""
    rng = c.rng
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
    return lung


def _dome(c: Canvas, u: float, top: float) -> Array:
    """Depth t of one half of the diaphragm, deepest in the recess at the back; the other half of
    the body is left out.
    """
    bowl = top + 0.42 * np.maximum((c.u - u) ** 2 + 0.7 * (c.v + 0.15) ** 2 - 0.06, 0)
    return np.where(c.u * (1 if u > 0 else -1) < -0.02, np.float32(9), bowl)


def _organ(c: Canvas, name: str, parts: list[Region], value: float, cavity: Array) -> None:
    """Paint one organ made of overlapping parts and keep its coverage in `c.organs`."""
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
    alpha = whole.alpha() * cavity[box]
    c.paint(box, alpha, value + 4 * c.fine[box])
    c.organs[name], c.level[name] = (box, alpha), value
    c.depth_mm[name] = (1 - whole.r) * (whole.px * c.mm)
    np.maximum(c.solid[box], alpha, out=c.solid[box])
