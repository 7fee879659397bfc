"""The competition's score in float64: weighted log loss per target and for `any_injury`, and their
plain mean.
"""

import numpy as np
import polars as pl

from ..system.errors import InputError
from . import tables
from .strict_table import KEY, Table, check_unique, frame_table
from .targets import ANY_INJURY, ANY_INJURY_WEIGHTS, COLUMNS, SCORE_KEYS, TARGETS, group_slices

EPSILON = float(np.finfo(np.float64).eps)


GROUPS = group_slices()


WEIGHTS = np.concatenate([target.weights for target in TARGETS])


HEALTHY = [GROUPS[target.name].start for target in TARGETS]


def normalise(probabilities: np.ndarray) -> np.ndarray:
    """(N, 13) non-negative values with every target's group divided by its sum."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    parts = [
        probabilities[:, where] / probabilities[:, where].sum(axis=1, keepdims=True)
        for where in GROUPS.values()
    ]
    return np.concatenate(parts, axis=1)


def any_injury(values: np.ndarray) -> np.ndarray:
    """(N, 13) labels or normalised probabilities -> (N,): the largest 1 - healthy over the five
    targets.
    """
    return (1.0 - values[:, HEALTHY]).max(axis=1)


def value_frame(values: np.ndarray) -> pl.DataFrame:
    """(N, 13) as a frame with the 13 columns. Rows are rows: polars takes 13 x 13 in Fortran order
    for its transpose unless told.
    """
    return pl.DataFrame(values, schema=list(COLUMNS), orient="row")


def aggregate(series: pl.DataFrame, how: str) -> pl.DataFrame:
    """The one way from series to patients: `mean` or `max` of the series' normalised probabilities,
    groups normalised again.

    Takes `patient_id` and the 13 columns, any rows; returns them with one row a patient, in order
    of first appearance.
    """
    values = value_frame(normalise(series.select(COLUMNS).to_numpy()))
    column = pl.col(COLUMNS)
    grouped = (
        values.with_columns(series[KEY])
        .group_by(KEY, maintain_order=True)
        .agg(column.max() if how == "max" else column.mean())
    )
    return grouped.select(KEY).hstack(value_frame(normalise(grouped.select(COLUMNS).to_numpy())))


def loss_terms(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One-hot labels and normalised probabilities (N, 13) -> -log p of the true class (N, 6) and
    its weight (N, 6).

    Columns are the five targets, then `any_injury`; p is clipped to [eps, 1 - eps] of float64 as
    scikit-learn's log loss does.
    """
    true = [(labels[:, where] * probabilities[:, where]).sum(axis=1) for where in GROUPS.values()]
    weight = [(labels[:, where] * WEIGHTS[where]).sum(axis=1) for where in GROUPS.values()]
    injured, risk = any_injury(labels) > 0.5, any_injury(probabilities)
    true.append(np.where(injured, risk, 1.0 - risk))
    weight.append(np.where(injured, ANY_INJURY_WEIGHTS[1], ANY_INJURY_WEIGHTS[0]))
    return -np.log(np.clip(np.stack(true, axis=1), EPSILON, 1.0 - EPSILON)), np.stack(
        weight, axis=1
    )


def score_arrays(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Score table (`SCORE_KEYS`) of one-hot labels (N, 13) and non-negative predictions (N, 13) of
    the same patients.
    """
    loss, weight = loss_terms(np.asarray(labels, dtype=np.float64), normalise(probabilities))
    parts = (loss * weight).sum(axis=0) / weight.sum(axis=0)
    return dict(zip(SCORE_KEYS, [*parts.tolist(), float(parts.mean())], strict=True))


def constants(labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Score tables of one constant prediction for everyone: uniform, class means, class means times
    the metric's weights.
    """
    labels = np.asarray(labels, dtype=np.float64)
    means = labels.mean(axis=0, keepdims=True)
    constants = {
        "uniform": np.ones_like(means),
        "class_means": means,
        "weighted_means": means * WEIGHTS,
    }
    return {
        name: score_arrays(labels, np.repeat(row, len(labels), axis=0))
        for name, row in constants.items()
    }


def align(solution: Table, submission: Table) -> tuple[np.ndarray, np.ndarray]:
    """Checked labels and predictions (N, 13) of two tables joined on `patient_id`, in the
    solution's order.

    Raises:
        InputError: any fault of either table, patients missing from the submission or not in the
        solution.
    """
    check_unique(solution, KEY)
    labels = tables.check_labels(solution).frame
    predictions = tables.check_predictions(submission)
    require_patients(labels, Table(submission.name, predictions))
    joined = labels.select(KEY).join(predictions, on=KEY, how="left", maintain_order="left")
    return labels.select(COLUMNS).cast(pl.Float64).to_numpy(), joined.select(COLUMNS).to_numpy()


def require_patients(expected: pl.DataFrame, table: Table) -> None:
    """InputError unless `table` has exactly the patients of `expected`: names the first that is
    missing or too much.
    """
    missing = expected.join(table.frame, on=KEY, how="anti", maintain_order="left")[KEY]
    if len(missing):
        what = f"patient {missing[0]!r} is missing" + (
            f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        )
        raise InputError(what, f"{table.name} column {KEY}", "predict every patient")
    unknown = ~pl.col(KEY).is_in(expected[KEY].implode())
    table.refuse((unknown, KEY, "patient {value} is not expected", "remove the row"))


def score(solution: pl.DataFrame, submission: pl.DataFrame) -> dict[str, float]:
    """Score table of a submission frame against a labels frame (`patient_id` and the 13 columns),
    in any row order.
    """
    columns = [KEY, *COLUMNS]
    solved = frame_table(solution, "solution", columns, [ANY_INJURY])
    return score_arrays(*align(solved, frame_table(submission, "submission", columns)))


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Score tables as aligned text: one line a row, one column a key of `SCORE_KEYS`."""
    width = max([len(name) for name in rows] + [10])
    lines = [" " * width + "".join(f"{key:>15}" for key in SCORE_KEYS)]
    lines += [
        f"{name:<{width}}" + "".join(f"{table[key]:15.4f}" for key in SCORE_KEYS)
        for name, table in rows.items()
    ]
    return "\n".join(lines)
