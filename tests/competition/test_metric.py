"""The official score against hand-computed cases and plain loops; its errors; the extra metrics
against scikit-learn.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers_scores import label_frame, naive_score, one_hot, predicted
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.competition import metric
from pipeline.competition.metric import aggregate, constants, score, score_arrays
from pipeline.competition.tables import read_labels
from pipeline.competition.targets import COLUMNS, SCORE_KEYS
from pipeline.evaluation import metrics as metric_extra
from pipeline.system.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
HEALTHY_ROW = [1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]


def frame(rows, ids=None):
    ids = ids or [str(i) for i in range(len(rows))]
    return pl.DataFrame(
        {"patient_id": ids, **{name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}}
    )


def test_hand_computed_scores():
    uniform = [[0.5, 0.5, 0.5, 0.5, *[1 / 3] * 9]]
    table = score(frame([HEALTHY_ROW]), frame(uniform))
    assert table["bowel"] == pytest.approx(math.log(2))
    assert table["liver"] == pytest.approx(math.log(3))
    assert table["any_injury"] == pytest.approx(math.log(3)), (
        "the largest 1 - healthy is 2/3, the patient is healthy"
    )
    assert table["score"] == pytest.approx((2 * math.log(2) + 4 * math.log(3)) / 6)
    # two patients: high-grade spleen (weight 4, any_injury 6) and a healthy one (weight 1)
    injured = [1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    rows = [
        [0.9, 0.1, 0.9, 0.1, 0.8, 0.1, 0.1, 0.8, 0.1, 0.1, 0.2, 0.3, 0.5],
        [0.9, 0.1, 0.6, 0.4, 2.0, 1.0, 1.0, 0.8, 0.1, 0.1, 0.7, 0.2, 0.1],
    ]
    table = score(frame([injured, HEALTHY_ROW]), frame(rows))
    assert table["spleen"] == pytest.approx(-(4 * math.log(0.5) + math.log(0.7)) / 5)
    assert table["kidney"] == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2), (
        "groups are divided by their sum"
    )
    assert table["any_injury"] == pytest.approx(-(6 * math.log(0.8) + math.log(0.5)) / 7)
    assert tuple(table) == SCORE_KEYS


def test_certain_and_wrong_is_clipped_at_float64_epsilon():
    wrong = [[0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]]
    table = score(frame([HEALTHY_ROW]), frame(wrong))
    assert table["bowel"] == pytest.approx(-math.log(np.finfo(np.float64).eps))
    assert table["any_injury"] == pytest.approx(-math.log(np.finfo(np.float64).eps))
    assert 0 < table["liver"] < 1e-15


@pytest.mark.slow
def test_equals_plain_loops_on_1000_submissions_in_any_row_order():
    random = np.random.default_rng(0)
    for case in range(1000):
        labels = one_hot(8, seed=case)
        rows = random.random((8, 13)) * random.choice([1e-9, 1.0, 50.0], (8, 13)) + 1e-300
        expected = naive_score(labels.tolist(), rows.tolist())
        order = random.permutation(8)
        ids = [f"p{i}" for i in range(8)]
        shuffled = frame(rows[order].tolist(), [ids[i] for i in order])
        found = score(frame(labels.astype(int).tolist(), ids), shuffled)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[:-1], "patient '2' is missing"),
        (
            lambda f: pl.concat([f, f[:1].with_columns(patient_id=pl.lit("9"))]),
            "patient '9' is not expected, submission row 5 column patient_id",
        ),
        (
            lambda f: pl.concat([f, f[:1]]),
            "patient '0' is there twice, submission row 5 column patient_id",
        ),
        (lambda f: f.drop("liver_low"), "column 'liver_low' is missing, submission row 1"),
        (
            lambda f: f.with_columns(liver_low=pl.Series(["0.1", "x", "0.1"])),
            "'x' is not a number, submission row 3 column liver_low",
        ),
        (
            lambda f: f.with_columns(liver_low=pl.Series([0.1, 0.1, math.inf])),
            "'inf' is not finite, submission row 4 column liver_low",
        ),
        (
            lambda f: f.with_columns(liver_low=pl.Series([0.1, None, 0.1])),
            "the cell is empty, submission row 3 column liver_low",
        ),
        (
            lambda f: f.with_columns(liver_low=pl.Series([0.1, -0.1, 0.1])),
            "'-0.1' is negative, submission row 3 column liver_low",
        ),
        (
            lambda f: f.with_columns(bowel_healthy=0.0, bowel_injury=0.0),
            "bowel columns sum to 0, submission row 2 column bowel_healthy",
        ),
        (
            lambda f: f.with_columns(bowel_healthy=1e308, bowel_injury=1e308),
            "no finite sum, submission row 2 column bowel_healthy",
        ),
    ],
)
def test_errors_name_row_and_column(change, message):
    solution = frame([HEALTHY_ROW] * 3)
    with pytest.raises(InputError, match=re.escape(message)):
        score(solution, change(solution.with_columns(pl.col(COLUMNS).cast(pl.Float64))))


def test_wrong_solutions_are_refused_too():
    solution = frame([HEALTHY_ROW] * 3)
    with pytest.raises(
        InputError, match="patient '0' is there twice, solution row 5 column patient_id"
    ):
        score(pl.concat([solution, solution[:1]]), solution)
    with pytest.raises(
        InputError, match="two classes of bowel are set, solution row 2 column bowel_healthy"
    ):
        score(solution.with_columns(bowel_injury=1), solution)


@pytest.mark.slow
def test_command_prints_the_table_and_refuses_in_one_line(tmp_path):
    labels = one_hot(12)
    label_frame(labels).write_csv(tmp_path / "train.csv")
    guess = label_frame(labels).with_columns(
        pl.DataFrame(predicted(labels, 1.0), schema=list(COLUMNS), orient="row")
    )
    guess.sample(fraction=1, shuffle=True, seed=1).write_csv(tmp_path / "guess.csv")
    command = [sys.executable, "-m", "pipeline.metric", "train.csv", "guess.csv"]

    def run(*more):
        return subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    found = json.loads(run("--json").stdout)
    assert found == pytest.approx(score_arrays(labels, guess.select(COLUMNS).to_numpy()))
    assert f"{found['score']:.4f}" in run().stdout
    guess[1:].write_csv(tmp_path / "guess.csv")
    refused = run()
    assert refused.returncode == 2
    assert (
        refused.stderr
        == "error: patient '10000' is missing, guess.csv column patient_id, predict every patient\n"
    )


def test_floors_are_constant_predictions():
    labels = one_hot(50)
    found = constants(labels)
    assert found["uniform"]["bowel"] == pytest.approx(math.log(2))
    assert found["uniform"]["liver"] == pytest.approx(math.log(3))
    p = labels[:, 1].mean()
    counts = labels[:, 1].sum(), labels[:, 0].sum()
    assert found["class_means"]["bowel"] == pytest.approx(
        -(2 * counts[0] * math.log(p) + counts[1] * math.log(1 - p)) / (2 * counts[0] + counts[1])
    )
    q = 2 * p / (2 * p + 1 - p)
    assert found["weighted_means"]["bowel"] == pytest.approx(
        -(2 * counts[0] * math.log(q) + counts[1] * math.log(1 - q)) / (2 * counts[0] + counts[1])
    )


@pytest.mark.skipif(
    "VOCO2D_RSNA_META" not in os.environ,
    reason="VOCO2D_RSNA_META names no folder with the real tables",
)
def test_floors_of_the_real_table():
    labels = (
        read_labels(Path(os.environ["VOCO2D_RSNA_META"])).select(COLUMNS).to_numpy().astype(float)
    )
    found = {name: round(table["score"], 4) for name, table in constants(labels).items()}
    assert found == {"uniform": 0.8836, "class_means": 0.7861, "weighted_means": 0.6091}
    constant = labels.mean(axis=0) * metric.WEIGHTS
    constant[COLUMNS.index("extravasation_injury")] *= 2.35
    assert (
        round(score_arrays(labels, np.repeat(constant[None], len(labels), axis=0))["score"], 4)
        == 0.5794
    )


@pytest.mark.parametrize(
    ("how", "expected"), [("mean", (0.75 + 0.25) / 2), ("max", 0.75 / (0.75 + 0.75))]
)
def test_aggregation_normalises_series_then_patients(how, expected):
    rows = [[0.25, 0.75] + [1.0] * 11, [3.0, 1.0] + [1.0] * 11, [3.0, 1.0] + [2.0] * 11]
    table = frame(rows, ["b", "a", "b"])
    found = aggregate(table, how)
    assert found["patient_id"].to_list() == ["b", "a"]
    assert found.select(COLUMNS).to_numpy()[:, 4:].sum(axis=1) == pytest.approx([3, 3])
    assert found["bowel_injury"][0] == pytest.approx(expected)
    assert found["bowel_healthy"][1] == pytest.approx(0.75)


def test_thirteen_rows_of_thirteen_columns_are_not_transposed():
    table = frame((one_hot(13) + 0.5).tolist())
    assert aggregate(table, "mean").select(COLUMNS).to_numpy() == pytest.approx(
        metric.normalise(table.select(COLUMNS).to_numpy())
    )


def test_extra_metrics_equal_scikit_learn_with_ties():
    labels = one_hot(300)
    probabilities = np.round(predicted(labels, 1.0), 1) + 1e-3
    found = metric_extra.extra_metrics(labels, probabilities, 0, 0)
    for name, truth, probability, _ in metric_extra.binary_problems(labels, probabilities):
        assert found[name]["auc"]["value"] == pytest.approx(roc_auc_score(truth, probability))
        assert found[name]["average_precision"]["value"] == pytest.approx(
            average_precision_score(truth, probability)
        )
        assert found[name]["auc"]["low"] is None
        called = probability >= 0.5
        assert found[name]["recall"]["value"] == pytest.approx((called & truth).sum() / truth.sum())
        assert found[name]["specificity"]["value"] == pytest.approx(
            (~called & ~truth).sum() / (~truth).sum()
        )
    aps = [
        found[name]["average_precision"]["value"]
        for name in ("bowel", "extravasation", "kidney", "liver", "spleen")
    ]
    assert found["mean"]["average_precision"]["value"] == pytest.approx(np.mean(aps))


def test_bootstrap_counts_equal_resampled_tables():
    labels = one_hot(60)
    probabilities = np.round(predicted(labels, 1.0), 1) + 1e-3
    _, counts = metric_extra.resamples(60, 1, 3)
    rows = np.repeat(np.arange(60), counts[0].astype(int))
    assert counts.sum() == 60
    name, truth, probability, weight = next(metric_extra.binary_problems(labels, probabilities))
    order, ranked, starts = metric_extra.ranking(truth, probability)
    auc, ap = metric_extra.auc_and_precision(counts[:, order], ranked, starts)
    assert auc[0] == pytest.approx(roc_auc_score(truth[rows], probability[rows]))
    assert ap[0] == pytest.approx(average_precision_score(truth[rows], probability[rows]))
    interval = metric_extra.score_intervals(labels, probabilities, 1, 3)["score"]
    assert interval["low"] == pytest.approx(
        score_arrays(labels[rows], probabilities[rows])["score"]
    )


@pytest.mark.slow
def test_interval_covers_as_often_as_it_says():
    hits = 0
    truth = score_arrays(labels := one_hot(20_000, seed=99), predicted(labels, 1.0, seed=99))[
        "score"
    ]
    for seed in range(60):
        rows = np.random.default_rng(seed).integers(0, 20_000, 150)
        found = metric_extra.score_intervals(
            labels[rows], predicted(labels, 1.0, seed=99)[rows], 300, seed
        )["score"]
        hits += found["low"] <= truth <= found["high"]
    assert 50 <= hits <= 60


def test_calibration_error_sees_the_weights():
    truth, weight = np.array([True, False, False, False]), np.array([3.0, 1.0, 1.0, 1.0])
    exact = np.full(4, 0.5)
    assert metric_extra.calibration_error(np.ones((1, 4)), truth, exact, weight)[
        0
    ] == pytest.approx(0)
    assert metric_extra.calibration_error(np.ones((1, 4)), truth, np.full(4, 0.25), weight)[
        0
    ] == pytest.approx(0.25)
    assert metric_extra.reliability(truth, exact, weight) == (
        pytest.approx([0.5]),
        pytest.approx([0.5]),
    )


def test_a_target_without_injuries_is_undefined_not_wrong():
    labels = one_hot(40)
    labels[:, 0], labels[:, 1] = 1, 0
    found = metric_extra.extra_metrics(labels, predicted(one_hot(40), 1.0), 20, 0)
    assert found["bowel"]["auc"] == {"value": None, "low": None, "high": None}
    assert found["bowel"]["specificity"]["value"] is not None
    json.dumps(found, allow_nan=False)
