"""Charts and pictures of the report as plain values: the template draws charts as inline SVG, so
that colours follow the reader's theme.
"""

import base64
import math
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import polars as pl

from ..evaluation.curves import Line

LEFT, RIGHT, TOP, BOTTOM = 36, 292, 8, 160  # frame of a chart within its 300 x 190 view box
SIDE = 192  # pixels of the longer side of a picture
POINTS = 200  # of one line
COLOURS = 6  # of the page: its CSS classes c1 to c6
Chart = dict[str, Any]


def colour(number: int) -> str:
    """CSS class of line 0, 1, ...: after c6 they start again."""
    return f"c{number % COLOURS + 1}"


def ticks(low: float, high: float) -> list[float]:
    """Two to six round values in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power * 5.001 >= high - low)
    return [
        round(k * step, 12)
        for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def chart(title: str, x_label: str, lines: Iterable[Line], unit: bool = False) -> Chart:
    """Lines, ticks and legend in view-box units; the y axis starts at 0 or below, with `unit` both
    axes are 0 to 1.
    """
    lines = [line for line in lines if len(line.points)]
    xs, ys = np.array(
        [point for line in lines for point in line.points] or [(0.0, 0.0)], dtype=np.float64
    ).T
    x0, x1 = (0.0, 1.0) if unit else (xs.min(), max(xs.max(), xs.min() + 1e-9))
    y0, y1 = (0.0, 1.0) if unit else (min(0.0, ys.min()), max(ys.max(), 1e-9) * 1.04)

    def x_at(x: float) -> float:
        return round(LEFT + float((x - x0) / (x1 - x0)) * (RIGHT - LEFT), 1)

    def y_at(y: float) -> float:
        return round(BOTTOM + float((y - y0) / (y1 - y0)) * (TOP - BOTTOM), 1)

    drawn = [
        {
            "style": line.style,
            "dots": line.dots,
            "points": [(x_at(x), y_at(y)) for x, y in line.points],
        }
        for line in lines
    ]
    return {
        "title": title,
        "x_label": x_label,
        "lines": drawn,
        "legend": [(line.style, line.name) for line in lines if line.name],
        "x_ticks": [(x_at(x), _text(x)) for x in ticks(x0, x1)],
        "y_ticks": [(y_at(y), _text(y)) for y in ticks(y0, y1)],
    }


def _text(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def curve(records: Iterable[dict[str, Any]], x: str, y: str) -> list[list[float]]:
    """(x, y) of the records that have both: the mean of equal x, and of neighbours where there are
    more than `POINTS`.
    """
    found = [
        (float(record[x]), float(record[y])) for record in records if record.get(y) is not None
    ]
    table = (
        pl.DataFrame(found, schema=["x", "y"], orient="row")
        .group_by("x")
        .mean()
        .sort("x")
        .to_numpy()
    )
    return [
        part.mean(axis=0).tolist()
        for part in np.array_split(table, min(POINTS, max(1, len(table))))
        if len(part)
    ]


def jpeg_uri(plane: np.ndarray) -> str:
    """A grey plane (H, W) uint8 as JPEG data URI, at most `SIDE` pixels a side."""
    scale = min(1.0, SIDE / max(plane.shape))
    small = cv2.resize(
        np.ascontiguousarray(plane), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA
    )
    return data_uri(
        cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes(), "jpeg"
    )


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of a picture as `data:image/<kind>` URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
