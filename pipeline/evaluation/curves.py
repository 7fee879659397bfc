"""What the charts of scored predictions show, as points and counts: `figures` draws them as PNG,
the report as SVG that follows the reader's theme.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..competition.targets import ANY_INJURY, TARGET_NAMES, TARGETS, Target, group_slices
from .metrics import binary_problems, ranking, reliability


class Line(NamedTuple):
    """Points (K, 2) of one line; `style` is c1 to c6 or rule (dotted), `name` goes to the legend
    ("": it does not).
    """

    name: str
    style: str
    points: Sequence[Sequence[float]] | np.ndarray
    dots: bool = False


class Panel(NamedTuple):
    """One chart whose axes are both 0 to 1."""

    title: str
    lines: list[Line]


def _problems(
    labels: np.ndarray, probabilities: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Title, truth, probability and weight (N,) of each target and `any_injury`, injured or not."""
    for name, truth, probability, weight in binary_problems(labels, probabilities):
        if name in (*TARGET_NAMES, ANY_INJURY):
            yield name.replace("_", " "), truth, probability, weight


def precision_recall_panels(labels: np.ndarray, probabilities: np.ndarray) -> list[Panel]:
    """Precision over recall of each target and `any_injury` for (N, 13), as steps whose area is the
    average precision; dotted the share of injured, which a coin reaches.
    """
    panels = []
    for title, truth, probability, _ in _problems(labels, probabilities):
        _, hits, starts = ranking(truth, probability)
        ends = np.append(starts[1:], len(hits)) - 1
        found = np.cumsum(hits)[ends]
        recall = np.repeat(found / max(hits.sum(), 1), 2)
        steps = np.stack([np.insert(recall, 0, 0)[:-1], np.repeat(found / (ends + 1), 2)], axis=1)
        level = Line("", "rule", [(0, truth.mean()), (1, truth.mean())])
        panels.append(Panel(title, [level, Line("", "c1", steps)]))
    return panels


def reliability_panels(labels: np.ndarray, raw: np.ndarray, nested: np.ndarray) -> list[Panel]:
    """Observed frequency over predicted probability of each target and `any_injury`, weighted as
    the score weighs, before and after calibration (N, 13); dotted where both agree.
    """
    panels = []
    for before, after in zip(_problems(labels, raw), _problems(labels, nested), strict=True):
        points = [np.stack(reliability(*problem[1:]), axis=1) for problem in (before, after)]
        lines = [
            Line("", "rule", [(0, 0), (1, 1)]),
            Line("raw", "c2", points[0], dots=True),
            Line("nested", "c1", points[1], dots=True),
        ]
        panels.append(Panel(after[0], lines))
    return panels


def confusion_counts(
    labels: np.ndarray, probabilities: np.ndarray
) -> Iterator[tuple[Target, np.ndarray, np.ndarray]]:
    """Each target with counts (classes, classes) of true class (row) by most probable class
    (column) for (N, 13), and those as share of the row.
    """
    for target, where in zip(TARGETS, group_slices().values(), strict=True):
        called = np.eye(len(target.classes))[probabilities[:, where].argmax(axis=1)]
        counts = labels[:, where].T @ called
        yield target, counts, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
