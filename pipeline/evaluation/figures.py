"""Pictures of scored predictions; each function draws from arrays and writes one PNG, the same
bytes for the same input.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..competition.targets import TARGETS
from ..system.pictures import write_picture
from . import curves
from .curves import Panel

COLUMNS = 3  # panels side by side
STYLES: dict[str, dict[str, Any]] = {
    "c1": {"color": "tab:blue"},
    "c2": {"color": "tab:orange"},
    "rule": {"color": "grey", "linestyle": ":", "linewidth": 1},
}


def precision_recall(labels: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Precision over recall of injured against healthy (N, 13), with the prevalence as the line of
    a coin.
    """
    figure = _panels(curves.precision_recall_panels(labels, probabilities))
    figure.supxlabel("recall")
    figure.supylabel("precision")
    write_picture(figure, path)


def reliability_curves(labels: np.ndarray, raw: np.ndarray, nested: np.ndarray, path: Path) -> None:
    """Observed frequency over predicted probability, weighted as the score weighs, before and after
    calibration.
    """
    figure = _panels(curves.reliability_panels(labels, raw, nested))
    figure.axes[0].legend()
    figure.supxlabel("predicted probability of injury")
    figure.supylabel("weighted share of injured")
    write_picture(figure, path)


def _panels(panels: list[Panel]) -> Figure:
    """One chart a panel, `COLUMNS` in a row, all with the axes 0 to 1."""
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        axis.set(title=panel.title, xlim=(0, 1), ylim=(0, 1.02))
        for line in panel.lines:
            marks = {"marker": "o", "markersize": 3} if line.dots else {}
            axis.plot(*np.transpose(line.points), label=line.name, **marks, **STYLES[line.style])
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def confusion_tables(labels: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Counts of true class (row) by most probable class (column) for each target, shaded by share
    of the row.
    """
    figure = Figure(figsize=(2.4 * len(TARGETS), 2.9), layout="constrained")
    axes = figure.subplots(1, len(TARGETS), squeeze=False)[0]
    for axis, (target, counts, share) in zip(
        axes, curves.confusion_counts(labels, probabilities), strict=True
    ):
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, f"{count:.0f}", ha="center", va="center", color=ink)
        ticks = range(len(target.classes))
        axis.set_xticks(ticks, target.classes)
        axis.set_yticks(ticks, target.classes, rotation=90, va="center")
        axis.set(title=target.name, xlabel="predicted")
    axes[0].set_ylabel("true")
    write_picture(figure, path)
