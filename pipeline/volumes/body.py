"""Where the trunk is in the planes of a series: table, mattress and arms out plane by plane, and
nothing of the trunk lost, also what shows in few slices (breasts, hips, a hernia).

Masks are found on coarse pixels of about `COARSE_MM`. Arrays in, arrays out.
"""

from collections.abc import Sequence

import cv2
import numpy as np

COARSE_MM = 2.5
# share of a coarse pixel that must be filled: keeps the slit of air between arm and trunk open
SOLID = 0.9
OPENING_MM = 25.0  # table tops and the skin bridge between arm and body are thinner than this
PART = 0.3  # of the largest part: two thighs are trunk, an arm beside it is smaller
# what the opening took off the trunk comes back within this reach
RECOVER_MM = 2.5
# what is too thin or too loose in one plane is trunk where the planes within this distance have it
NEAR_MM = 20.0
LINES_MM = 5.0  # clothes and table tops are thinner, and never trunk
# an outline is implausible below these: cm2 and share of the plane (the smaller counts), share of
# the series' median, and share of the plane where the field of view cuts it
SMALL_CM2, SMALL_PLANE, SMALL_MEDIAN, SMALL_CUT = 100.0, 0.1, 0.25, 0.25


def _disc(mm: float, pixel_mm: Sequence[float]) -> np.ndarray:
    """Ellipse of a diameter of `mm`, at least three pixels (y, x) each way."""
    height, width = (2 * max(1, round(mm / 2 / size)) + 1 for size in pixel_mm)
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, height))


def _coarse(spacing_mm: Sequence[float]) -> tuple[int, int]:
    """Pixels (y, x) of a slice along one coarse pixel: whole numbers, which average fast."""
    y, x = (max(1, round(COARSE_MM / mm)) for mm in spacing_mm)
    return y, x


def _fill(mask: np.ndarray) -> np.ndarray:
    """Fill what the outer contours enclose: lungs and gas belong to the body. 0 and 1."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(np.zeros_like(mask), contours, -1, 1, cv2.FILLED)


def slice_masks(image: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Coarse masks (2, h, w) uint8 of one slice (rows, cols) uint8: all that is solid, and the
    trunk, which is what is left of it after an opening without its small parts.
    """
    fine = _coarse(spacing_mm)
    h, w = (-(-size // step) for size, step in zip(image.shape, fine, strict=True))
    # any grey above black, lungs and gas filled
    filled: np.ndarray = _fill(cv2.threshold(image, 0, 1, cv2.THRESH_BINARY)[1]) * np.uint8(255)
    below, right = h * fine[0] - image.shape[0], w * fine[1] - image.shape[1]
    filled = cv2.copyMakeBorder(filled, 0, below, 0, right, cv2.BORDER_REPLICATE)
    share = cv2.resize(filled, (w, h), interpolation=cv2.INTER_AREA)
    solid = cv2.threshold(share, int(255 * SOLID), 1, cv2.THRESH_BINARY)[1]
    disc = _disc(OPENING_MM, [mm * step for mm, step in zip(spacing_mm, fine, strict=True)])
    core = cv2.erode(solid, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    # contours: a tenth of the time of labels
    parts, _ = cv2.findContours(core, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    areas = [cv2.contourArea(part) for part in parts]
    large = [part for part, area in zip(parts, areas, strict=True) if area >= PART * max(areas)]
    kept = cv2.drawContours(np.zeros_like(core), large, -1, 1, cv2.FILLED)
    return np.stack([solid, cv2.dilate(kept, disc)])


def _cut_by_field(mask: np.ndarray) -> bool:
    """True where a coarse mask (h, w) reaches the plane's edge, or the circle within it that most
    scanners reconstruct.
    """
    y, x = (np.linspace(-1, 1, size) for size in mask.shape)
    circle = y[:, None] ** 2 + x**2 < 0.97**2
    edge = np.concatenate([mask[[0, -1]].ravel(), mask[:, [0, -1]].ravel()])
    return bool(edge.any() or mask[~circle].any())


def _hull(mask: np.ndarray) -> np.ndarray:
    """The convex hull of a mask (h, w): closes lungs, and streaks of metal, that are open to the
    border of the field of view.
    """
    points = cv2.findNonZero(mask)
    return cv2.fillConvexPoly(np.zeros_like(mask), cv2.convexHull(points), 1)


def _plane_outlines(
    solid: np.ndarray, trunk: np.ndarray, pixel_mm: Sequence[float], plane_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coarse outlines (D, h, w) uint8 of all planes, and (D,) which of them are plausible."""
    lines, reach = _disc(LINES_MM, pixel_mm), _disc(2 * RECOVER_MM, pixel_mm)
    near = int(NEAR_MM // plane_mm) if np.isfinite(plane_mm) and plane_mm > 0 else 1
    found, cut = np.empty_like(trunk), np.zeros(len(trunk), bool)
    for k, mask in enumerate(solid):
        around = trunk[max(0, k - near) : k + near + 1].max(0)
        seed = trunk[k] | (cv2.morphologyEx(mask, cv2.MORPH_OPEN, lines) & around)
        outline = _fill(seed | (cv2.dilate(seed, reach) & mask))
        cut[k] = _cut_by_field(outline)
        found[k] = _hull(outline) if cut[k] else outline
    cm2 = np.prod(pixel_mm) / 100
    areas, plane = found.sum((1, 2)) * cm2, found[0].size * cm2
    least = max(min(SMALL_CM2, SMALL_PLANE * plane), SMALL_MEDIAN * float(np.median(areas)))
    return found, areas >= np.where(cut, max(least, SMALL_CUT * plane), least)


def body_outlines(
    masks: np.ndarray,
    size: tuple[int, int],
    spacing_mm: Sequence[float],
    plane_mm: float,
    margin_mm: float,
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Masks (D, rows, cols) uint8, 0 or 1, of the trunk with a margin, and the box (y0, y1, x0, x1)
    around them all.

    A plane whose outline is implausibly small is kept whole, within the box of the others.

    Args:
        masks: (2, D, h, w) uint8, the union of `slice_masks` over the slices of each plane.
        size: rows and cols of a slice.
        spacing_mm: (y, x) of a pixel.
        plane_mm: distance of two planes, NaN where unknown.
        margin_mm: kept around the trunk.
    """
    fine = _coarse(spacing_mm)
    pixel_mm = [mm * step for mm, step in zip(spacing_mm, fine, strict=True)]
    coarse, plausible = _plane_outlines(masks[0], masks[1], pixel_mm, plane_mm)
    margin = cv2.getStructuringElement(
        cv2.MORPH_ELLIPSE, [2 * round(margin_mm / mm) + 1 for mm in spacing_mm[::-1]]
    )
    found = np.ones((len(coarse), *size), np.uint8)
    if not plausible.any():
        return found, (0, size[0], 0, size[1])
    found[plausible] = 0
    reach = 2 + int(margin_mm / min(pixel_mm))  # coarse pixels around, so that no margin is cut
    y0, y1, x0, x1 = _box(cv2.dilate(coarse[plausible].max(0), np.ones((3, 3)), iterations=reach))
    for k in np.flatnonzero(plausible):
        inner = coarse[k, y0:y1, x0:x1] * np.uint8(255)
        full = (inner.shape[1] * fine[1], inner.shape[0] * fine[0])
        # halves of a coarse pixel: the outline is smooth, and a box lies on the body's edge
        smooth = cv2.resize(inner, full, interpolation=cv2.INTER_LINEAR)
        edge = cv2.dilate(cv2.threshold(smooth, 127, 1, cv2.THRESH_BINARY)[1], margin)
        target = found[k, y0 * fine[0] : y1 * fine[0], x0 * fine[1] : x1 * fine[1]]
        target[:] = edge[: target.shape[0], : target.shape[1]]
    return found, _box(found[plausible].max(0))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Box (y0, y1, x0, x1) around a mask (rows, cols)."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
