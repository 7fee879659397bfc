"""Pictures of scored predictions; each function draws from arrays and writes one PNG, the same
bytes for the same input.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..competition.targets import ANY_INJURY, TARGET_NAMES, TARGETS, group_slices
from ..system.files import atomic_path
from .metrics import binary_problems, ranking, reliability


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, without the writer's name and version."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _questions(
    labels: np.ndarray, probabilities: np.ndarray
) -> tuple[Figure, list[tuple[Axes, np.ndarray, np.ndarray, np.ndarray]]]:
    """A 2 x 3 figure and, for the five targets and `any_injury`, the axes with truth, probability
    and weight.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = iter(figure.subplots(2, 3, sharex=True, sharey=True).flat)
    panels = []
    for name, truth, probability, weight in binary_problems(labels, probabilities):
        if name in (*TARGET_NAMES, ANY_INJURY):
            panel = next(axes)
            panel.set(title=name.replace("_", " "), xlim=(0, 1), ylim=(0, 1.02))
            panels.append((panel, truth, probability, weight))
    return figure, panels


def precision_recall(labels: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Precision over recall of injured against healthy (N, 13), with the prevalence as the line of
    a coin.
    """
    figure, panels = _questions(labels, probabilities)
    for panel, truth, probability, _ in panels:
        _, hits, starts = ranking(truth, probability)
        ends = np.append(starts[1:], len(hits)) - 1
        found = np.cumsum(hits)[ends]
        panel.step(found / max(found[-1], 1), found / (ends + 1), where="post", color="tab:blue")
        panel.axhline(truth.mean(), color="grey", linestyle=":", linewidth=1)
    figure.supxlabel("recall")
    figure.supylabel("precision")
    save(figure, path)


def reliability_curves(labels: np.ndarray, raw: np.ndarray, nested: np.ndarray, path: Path) -> None:
    """Observed frequency over predicted probability, weighted as the score weighs, before and after
    calibration.
    """
    figure, panels = _questions(labels, nested)
    before = _questions(labels, raw)[1]
    for (panel, *after), (_, *uncalibrated) in zip(panels, before, strict=True):
        panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        for name, values, colour in (
            ("raw", uncalibrated, "tab:orange"),
            ("nested", after, "tab:blue"),
        ):
            panel.plot(*reliability(*values), marker="o", markersize=3, color=colour, label=name)
    panels[0][0].legend()
    figure.supxlabel("predicted probability of injury")
    figure.supylabel("weighted share of injured")
    save(figure, path)


def confusion_tables(labels: np.ndarray, probabilities: np.ndarray, path: Path) -> None:
    """Counts of true class (row) by most probable class (column) for each target, shaded by share
    of the row.
    """
    figure = Figure(figsize=(12, 2.9), layout="constrained")
    for panel, target, where in zip(
        figure.subplots(1, 5), TARGETS, group_slices().values(), strict=True
    ):
        table = (
            labels[:, where].T @ np.eye(len(target.classes))[probabilities[:, where].argmax(axis=1)]
        )
        share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(table):
            panel.text(
                column,
                row,
                f"{count:.0f}",
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.6 else "black",
            )
        ticks = range(len(target.classes))
        panel.set_xticks(ticks, target.classes)
        panel.set_yticks(ticks, target.classes, rotation=90, va="center")
        panel.set(title=target.name, xlabel="predicted")
    figure.axes[0].set_ylabel("true")
    save(figure, path)
