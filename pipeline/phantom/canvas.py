"""The volume a phantom is painted on: body coordinates, smooth random fields and soft-edged shapes.

Body coordinates: u from -1 (patient's right, image left) to 1, v from -1 (anterior) to 1
(posterior) over the trunk's half axes, t from 0 (dome of the diaphragm) to 1 (iliac crest).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .hospitals import Hospital, sub_planes

Array = NDArray[np.floating[Any]]  # of float32 where it is a volume
Box = tuple[slice, ...]  # planes, rows, columns
AIR = -1000.0


def soft(value: Array) -> Array:
    """Coverage 0..1 of a voxel whose centre lies `value` pixels inside an edge."""
    return np.clip(value + 0.5, 0.0, 1.0)


def level_set(field: Array, within: Array, voxels: float, mm: float) -> Array:
    """Coverage of the place where `field` (mm) is lowest within the coverage `within`, so large
    that it takes up `voxels` of it; an edge is `mm` wide.
    """
    values = np.sort(field[within > 0.5])
    count = int(round(voxels))
    if not count or not len(values):
        return np.zeros_like(within)
    return soft((values[min(count, len(values)) - 1] - field) / mm + 0.01)


def smooth_field(
    rng: np.random.Generator, axes: tuple[Array, Array, Array], cells: tuple[int, int, int]
) -> Array:
    """Gaussian random field of unit variance, (D, H, W): `cells` random values along each axis,
    spread by Gaussian kernels.

    `axes` are the coordinates (about -0.1 to 1.1) of the planes, rows and columns, so that two
    samplings of a patient agree.
    """
    values, weights = rng.standard_normal(cells, dtype=np.float32), []
    for axis, count in zip(axes, cells, strict=True):
        kernel = np.exp(
            -0.5 * ((axis.reshape(-1, 1) - np.linspace(-0.1, 1.1, count)) * (count - 1) / 0.75) ** 2
        )
        weights.append((kernel / np.linalg.norm(kernel, axis=1, keepdims=True)).astype(np.float32))
    return np.tensordot(weights[0], weights[1] @ (values @ weights[2].T), (1, 0))


@dataclass
class Region:
    """A shape on a box of the canvas: `r` is 1 on its surface, `px` the pixels from centre to
    surface.
    """

    box: Box
    r: Array
    px: float

    def alpha(self, limit: float | Array = 1.0) -> Array:
        """Coverage of the voxels inside r < limit."""
        return soft((limit - self.r) * self.px)


class Canvas:
    """HU volume (D, H, W) of one patient; `rng` decides build and place, `t_range` which part of
    the body is scanned.
    """

    def __init__(
        self,
        depth: int,
        size: int,
        rng: np.random.Generator,
        t_range: tuple[float, float],
        hospital: Hospital,
    ) -> None:
        self.rng, self.mass = rng, rng.uniform(0, 1)  # slim to stout
        width = 145 + 45 * self.mass + rng.uniform(-6, 6)
        self.half = (width, width * rng.uniform(0.66, 0.74))  # mm of the half axes
        self.length = rng.uniform(285, 320)  # mm of t = 0..1
        self.mm = 2 * width * rng.uniform(1.16, 1.26) * hospital.field / size
        self.px = self.half[1] / self.mm  # pixels per unit of v
        gap = (t_range[1] - t_range[0]) / (depth - 1)
        self.thick = sub_planes(hospital, gap * self.length)  # planes a slice is the mean of
        self.depth = depth * self.thick
        part = min(hospital.thickness_mm / self.length, gap) / self.thick
        within = part * (np.arange(self.thick) - (self.thick - 1) / 2)
        slices = np.linspace(*t_range, depth)
        self.tz = (slices[:, None] + within).ravel().astype(np.float32)
        self.t = self.tz[:, None, None]
        grid = np.arange(size, dtype=np.float32)
        self.x = ((grid - size / 2 - rng.uniform(-2, 2)) * (self.mm / self.half[0]))[None, None, :]
        self.y = ((grid - size * rng.uniform(0.46, 0.5)) / self.px)[None, :, None]
        self.axes = (self.t, grid / size, grid / size)
        waist = 1 - rng.uniform(0.0, 0.06) * np.sin(np.pi * np.clip(self.t, 0, 1)) ** 2
        roll = rng.normal(0, 0.03)  # of the trunk on the table
        self.u = (self.x - roll * self.y) / waist + 0.03 * self.field((3, 4, 4))
        self.v = (self.y + roll * self.x) / waist + 0.03 * self.field((3, 4, 4))
        self.wobble, self.fine = self.field((7, 9, 9)), self.field((14, 26, 26))
        self.tree = np.hypot(self.field((9, 14, 14)), self.field((9, 14, 14)))
        u2, v2 = self.u**2, self.v**2
        self.rho = np.sqrt(0.5 * (u2 + v2) + 0.5 * np.sqrt(u2 * u2 + v2 * v2))  # 1 on the skin
        self.hu = np.full(self.u.shape, AIR, np.float32)
        self.dz = self.length * gap / self.thick
        self.voxel = self.mm**2 * self.dz  # cubic mm
        self.organs: dict[str, tuple[Box, Array]] = {}
        self.level: dict[str, float] = {}  # HU
        self.depth_mm: dict[str, Array] = {}  # below the surface of the organ
        self.bowel = np.zeros(self.u.shape, np.float32)  # coverage
        self.solid = np.zeros(self.u.shape, np.float32)  # coverage of the organs

    def field(self, cells: tuple[int, int, int]) -> Array:
        """A smooth random field on this canvas."""
        return smooth_field(self.rng, self.axes, cells)

    def vessels(self, width: float, box: Box | None = None) -> Array:
        """Coverage of a random tree of vessels over a box: where two random fields are both near
        zero.
        """
        return np.clip(4 - (self.tree if box is None else self.tree[box]) * (4 / width), 0, 1)

    def inside(self, limit: float | Array) -> Array:
        """Coverage of rho < limit."""
        return soft((limit - self.rho) * self.px)

    def paint(self, box: Box | None, alpha: Array, value: float | Array) -> None:
        """Blend `value` HU over a box of the volume, or over all of it."""
        part = self.hu if box is None else self.hu[box]
        part += alpha * (value - part)

    def put(
        self,
        value: float | Array,
        *shape: Any,
        limit: float = 1.0,
        within: Array | None = None,
        texture: float = 0.0,
        **more: Any,
    ) -> Region:
        """Paint one `blob` of `value` HU with fine `texture` (HU), inside the coverage `within`;
        returns the region.
        """
        region = self.blob(*shape, **more)
        alpha = region.alpha(limit) if within is None else region.alpha(limit) * within[region.box]
        self.paint(region.box, alpha, value + texture * self.fine[region.box])
        return region

    def blob(
        self,
        centre: tuple,
        radii: tuple,
        tilt: float = 0.0,
        wobble: float = 0.0,
        span: tuple[float, float] = (-9, 9),
        grow: float = 1.0,
    ) -> Region:
        """Ellipsoid at (u, v, t), or where `radii` has no third entry a column over t in `span`.

        `centre` may hold arrays over the planes; `tilt` (rad) turns the shape in the plane;
        `wobble` roughens its surface; r is known out to `grow` times the radii.
        """
        if len(radii) == 3:
            span = (centre[2] - grow * radii[2], centre[2] + grow * radii[2])
        z = slice(*np.searchsorted(self.tz, span).tolist())
        cu, cv = (
            np.broadcast_to(np.asarray(c, np.float32), self.tz.shape)[z, None, None]
            for c in centre[:2]
        )
        reach = grow * max(radii[:2]) * (1 + 2 * wobble) + 0.18
        box = (z, _span(self.y.ravel(), cv, reach), _span(self.x.ravel(), cu, reach))
        du, dv = self.u[box] - cu, self.v[box] - cv
        if tilt:
            cos, sin = float(np.cos(tilt)), float(np.sin(tilt))
            du, dv = du * cos + dv * sin, dv * cos - du * sin
        r = (du / radii[0]) ** 2 + (dv / radii[1]) ** 2
        if len(radii) == 3:
            r += ((self.t[z] - centre[2]) / radii[2]) ** 2
        r = np.sqrt(r)
        if wobble:
            r *= 1 + wobble * self.wobble[box]
        return Region(box, r, min(radii[0] * self.half[0], radii[1] * self.half[1]) / self.mm)

    def offsets_mm(self, box: Box, place: tuple[float, ...]) -> tuple[Array, Array, Array]:
        """Distances in mm along x, y and z (one of every plane, (d, 1, 1)) from body coordinates to
        the voxels of a box.
        """
        return (
            (self.u[box] - place[0]) * self.half[0],
            (self.v[box] - place[1]) * self.half[1],
            (self.t[box[0]] - place[2]) * self.length,
        )

    def nearest(self, place: tuple[float, ...], thick: int) -> tuple[int, ...]:
        """The slice (of `thick` planes), row and column nearest to body coordinates."""
        plane = int(np.abs(self.tz - place[2]).argmin())
        away = (self.u[plane] - place[0]) ** 2 + (self.v[plane] - place[1]) ** 2
        return (plane // thick, *(int(k) for k in np.unravel_index(away.argmin(), away.shape)))

    def point(self, box: Box, index: tuple[int, ...]) -> tuple[float, float, float]:
        """Body coordinates of the voxel `index` of a box."""
        return (
            float(self.u[box][index]),
            float(self.v[box][index]),
            float(self.tz[box[0]][index[0]]),
        )


def _span(axis: Array, centre: Array, reach: float) -> slice:
    return (
        slice(*np.searchsorted(axis, (centre.min() - reach, centre.max() + reach)).tolist())
        if centre.size
        else slice(0, 0)
    )
