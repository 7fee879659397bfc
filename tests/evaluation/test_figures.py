"""Pictures of scored predictions: the points are those of the metrics, the PNG holds every panel,
the same input gives the same bytes.
"""

import numpy as np
import pytest
from helpers_scores import one_hot, predicted
from sklearn.metrics import auc, average_precision_score, confusion_matrix

from pipeline.competition.metric import any_injury, normalise
from pipeline.competition.targets import TARGET_NAMES, TARGETS, group_slices
from pipeline.evaluation import figures
from pipeline.evaluation.curves import (
    Line,
    Panel,
    confusion_counts,
    precision_recall_panels,
    reliability_panels,
)

LABELS = one_hot(80)
VALUES = normalise(predicted(LABELS, 1.2))


def test_area_under_every_precision_recall_line_is_the_average_precision():
    panels = precision_recall_panels(LABELS, VALUES)
    assert [panel.title for panel in panels] == [*TARGET_NAMES, "any injury"]
    healthy = [where.start for where in group_slices().values()]
    truths = [*(1 - LABELS[:, healthy].T), any_injury(LABELS)]
    values = [*(1 - VALUES[:, healthy].T), any_injury(VALUES)]
    for panel, truth, value in zip(panels, truths, values, strict=True):
        level, line = panel.lines
        recall, precision = np.transpose(line.points)
        area = auc(recall, precision)
        assert area == pytest.approx(average_precision_score(truth, value), abs=1e-12)
        assert [y for _, y in level.points] == [truth.mean()] * 2


def test_reliability_shows_raw_beside_nested():
    for panel in reliability_panels(LABELS, np.sqrt(VALUES), VALUES):
        diagonal, raw, nested = panel.lines
        assert (raw.name, nested.name) == ("raw", "nested")
        assert not np.array_equal(raw.points, nested.points)
        assert list(diagonal.points) == [(0, 0), (1, 1)]


def test_confusion_is_that_of_scikit_learn():
    found = list(confusion_counts(LABELS, VALUES))
    assert [target for target, _, _ in found] == list(TARGETS)
    for (_, counts, share), where in zip(found, group_slices().values(), strict=True):
        true, called = LABELS[:, where].argmax(axis=1), VALUES[:, where].argmax(axis=1)
        assert np.array_equal(counts, confusion_matrix(true, called))
        assert np.allclose(share, confusion_matrix(true, called, normalize="true"))


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_every_panel_is_drawn_and_no_empty_one(count):
    line = Line("name", "c1", [(0, 0), (0.5, 1)], dots=True)
    drawn = figures._panels([Panel(f"{k}", [line]) for k in range(count)])
    assert [axis.get_title() for axis in drawn.axes] == [f"{k}" for k in range(count)]
    assert all(np.array_equal(a.lines[0].get_xydata(), line.points) for a in drawn.axes)


@pytest.mark.slow
def test_the_same_predictions_give_the_same_pictures(tmp_path):
    for name in "ab":
        figures.precision_recall(LABELS, VALUES, tmp_path / f"{name}1")
        figures.reliability_curves(LABELS, VALUES, VALUES, tmp_path / f"{name}2")
        figures.confusion_tables(LABELS, VALUES, tmp_path / f"{name}3")
    for number in "123":
        written = [(tmp_path / f"{name}{number}").read_bytes() for name in "ab"]
        assert written[0] == written[1]
        assert written[0].startswith(b"\x89PNG")
