"""Small labelled tables and predictions for the tests of metric, folds, calibration and
submission.
"""

import numpy as np
import polars as pl

from pipeline.competition.targets import COLUMNS, TARGETS, group_slices
from pipeline.evaluation.calibration import softmax
from pipeline.run.presets import load_config
from pipeline.submission.decode_ahead import decode_series

HEADER = ",".join(["patient_id", *COLUMNS, "any_injury"])


def one_hot(patients: int, seed: int = 0, injured: float = 0.3) -> np.ndarray:
    """(N, 13) float64 labels; every class of every target occurs from 8 patients on."""
    random = np.random.default_rng(seed)
    parts = []
    for target in TARGETS:
        shares = [1 - injured] + [injured / (len(target.classes) - 1)] * (len(target.classes) - 1)
        drawn = random.choice(len(target.classes), patients, p=shares)
        drawn[: len(target.classes)] = range(len(target.classes))
        parts.append(np.eye(len(target.classes))[random.permutation(drawn)])
    return np.concatenate(parts, axis=1)


def label_frame(labels: np.ndarray) -> pl.DataFrame:
    """The labels as `read_labels` gives them, ids 10000 on."""
    ids = [str(10000 + i) for i in range(len(labels))]
    return pl.DataFrame({"patient_id": ids}).hstack(
        pl.DataFrame(labels.astype(np.int8), schema=list(COLUMNS), orient="row")
    )


def predicted(
    labels: np.ndarray, signal: float, seed: int = 0, sharpness: float = 1.0
) -> np.ndarray:
    """Probabilities (N, 13): posteriors of noisy evidence, exact at `sharpness` 1, overconfident
    above.
    """
    noise = np.random.default_rng(seed).normal(size=labels.shape)
    return softmax(sharpness * (np.log(labels.mean(axis=0)) + signal * (signal * labels + noise)))


def series_frame(
    labels: pl.DataFrame, probabilities: np.ndarray, per_patient: int = 1
) -> pl.DataFrame:
    """`per_patient` equal series for every patient, with the patient's probabilities."""
    one = labels.select("patient_id").hstack(
        pl.DataFrame(probabilities, schema=list(COLUMNS), orient="row")
    )
    parts = [
        one.with_columns(pl.format("{}{}", pl.col("patient_id"), pl.lit(k)).alias("series_id"))
        for k in range(per_patient)
    ]
    return pl.concat(parts).select("patient_id", "series_id", *COLUMNS)


def naive_score(labels: list[list[float]], rows: list[list[float]]) -> dict[str, float]:
    """The competition's metric read aloud: plain loops over Python floats."""
    import math

    eps, table, where = 2.0**-52, {}, group_slices()
    risks, truths = [0.0] * len(rows), [0] * len(rows)
    for target in TARGETS:
        columns = range(where[target.name].start, where[target.name].stop)
        above = below = 0.0
        for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
            total = sum(row[c] for c in columns)
            for k, c in enumerate(columns):
                if label[c] == 1:
                    p = min(max(row[c] / total, eps), 1 - eps)
                    above -= target.weights[k] * math.log(p)
                    below += target.weights[k]
                    truths[i] = truths[i] or int(k > 0)
            risks[i] = max(risks[i], 1 - row[columns[0]] / total)
        table[target.name] = above / below
    above = below = 0.0
    for truth, risk in zip(truths, risks, strict=True):
        p = min(max(risk if truth else 1 - risk, eps), 1 - eps)
        above, below = above - (6 if truth else 1) * math.log(p), below + (6 if truth else 1)
    table["any_injury"] = above / below
    table["score"] = sum(table.values()) / 6
    return table


PRIOR = np.array([0.9, 0.1, 0.5, 0.5, 0.8, 0.1, 0.1, 0.7, 0.2, 0.1, 0.6, 0.2, 0.2])
PATIENTS = ["50046", "7", "63706"]


def sample(columns=COLUMNS, patients=PATIENTS):
    return pl.DataFrame({"patient_id": patients}).with_columns(
        pl.lit(0.5).alias(name) for name in columns
    )


def patient_by_hand(series: list[list[np.ndarray]], fitted: dict) -> np.ndarray:
    """(13,) of a patient from `series[k][m]`, what model m says of series k, by the weights and the
    calibration that stage 07 `fitted`.
    """
    row = []
    for target in TARGETS:
        weights = fitted["weights"][target.name]
        logits = []
        for column in target.columns:
            k = COLUMNS.index(column)
            each = [sum(w * one[k] for w, one in zip(weights, s, strict=True)) for s in series]
            grey = max(sum(each) / len(each), 1e-7)
            logits.append(np.log(grey) / fitted["temperature"][target.name])
            logits[-1] += fitted["bias"][column]
        row += [np.exp(one) / np.exp(logits).sum() for one in logits]
    return np.array(row)


def volume_of(out, task):
    """The volume (D, H, W) that stage 08 makes of a series of a smoke run below `out`."""
    config = load_config("smoke", [])
    way = config.volume
    return decode_series(task, out / "data" / "phantom", config.convert, [way]).volumes[way]
