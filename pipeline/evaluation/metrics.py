"""What a reader asks beyond the score: AUC, average precision, precision, recall, specificity, F1,
calibration error, intervals.

Every target is read as injured or not (probability 1 - healthy), so is `any_injury`; the ordinal
targets' grades are read one against the rest as well. A case is called positive from probability
0.5 on. Probabilities that minimise the competition's weighted loss are calibrated to frequencies
weighted as the loss weighs, so the calibration error uses those weights.
"""

from collections.abc import Iterator

import numpy as np

from ..competition.metric import any_injury, loss_terms, normalise
from ..competition.targets import (
    ANY_INJURY,
    COLUMNS,
    SCORE_KEYS,
    TARGET_NAMES,
    TARGETS,
    group_slices,
)

BINS = 10
RESAMPLES_AT_ONCE = 100
METRICS = (
    "auc",
    "average_precision",
    "precision",
    "recall",
    "specificity",
    "f1",
    "calibration_error",
)
Interval = dict[str, float | None]


def binary_problems(
    labels: np.ndarray, probabilities: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield name, truth (N,) bool, probability (N,) and weight (N,) of each two-class question in
    one-hot labels (N, 13).
    """
    probabilities = normalise(probabilities)
    _, weights = loss_terms(labels, probabilities)
    where = group_slices()
    for number, target in enumerate(TARGETS):
        start = where[target.name].start
        yield target.name, labels[:, start] < 0.5, 1 - probabilities[:, start], weights[:, number]
        for column in range(start + 1, where[target.name].stop) if not target.binary else ():
            yield (
                COLUMNS[column],
                labels[:, column] > 0.5,
                probabilities[:, column],
                weights[:, number],
            )
    yield ANY_INJURY, any_injury(labels) > 0.5, any_injury(probabilities), weights[:, -1]


def resamples(patients: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn (b, N), float64: first the table as it is (1, N), then
    `count` bootstrap resamples.
    """
    yield np.ones((1, patients))
    random = np.random.default_rng(seed)
    for start in range(0, count, RESAMPLES_AT_ONCE):
        drawn = random.integers(0, patients, (min(RESAMPLES_AT_ONCE, count - start), patients))
        flat = drawn + patients * np.arange(len(drawn))[:, None]
        yield (
            np.bincount(flat.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        )


def ranking(
    truth: np.ndarray, probability: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of descending probability (N,), the sorted truth as 0/1, and where each run of equal
    values starts.

    Neighbouring runs without a positive are one run: they give the same areas, and most cases are
    negative.
    """
    order = np.argsort(-probability, kind="stable")
    hits = truth[order].astype(np.float64)
    starts = np.flatnonzero(np.diff(probability[order], prepend=np.inf))
    positive = np.add.reduceat(hits, starts) > 0
    return order, hits, starts[positive | np.concatenate([[True], positive[:-1]])]


def auc_and_precision(
    counts: np.ndarray, truth: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Area under ROC and average precision (b,) of sorted cases with multiplicities `counts` (b,
    N); ties count half.
    """
    hits = np.add.reduceat(counts * truth, starts, axis=1)
    total = np.add.reduceat(counts, starts, axis=1)
    misses = total - hits
    seen, taken = np.cumsum(total, axis=1), np.cumsum(hits, axis=1)
    positives, negatives = taken[:, -1], seen[:, -1] - taken[:, -1]
    below = negatives[:, None] - np.cumsum(misses, axis=1) + 0.5 * misses
    auc = (hits * below).sum(axis=1) / (positives * negatives)
    precision = np.divide(taken, seen, out=np.zeros_like(seen), where=seen > 0)
    return auc, (hits * precision).sum(axis=1) / positives


def thresholded(counts: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> list[np.ndarray]:
    """Precision, recall, specificity and F1 (b,) at probability 0.5; NaN where nothing is there to
    divide by.
    """
    called = probability >= 0.5
    cells = np.stack([called & truth, called & ~truth, ~called & truth, ~called & ~truth], axis=1)
    tp, fp, fn, tn = (counts @ cells.astype(np.float64)).T
    return [tp / (tp + fp), tp / (tp + fn), tn / (tn + fp), 2 * tp / (2 * tp + fp + fn)]


def calibration_error(
    counts: np.ndarray, truth: np.ndarray, probability: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Expected calibration error (b,) over ten equal bins: weighted mean distance of probability
    and frequency.
    """
    gap = _binned(probability) * (weight * (probability - truth))[:, None]
    return np.abs(counts @ gap).sum(axis=1) / (counts @ weight)


def _binned(probability: np.ndarray) -> np.ndarray:
    """The bin of each probability as (N, bins), one-hot."""
    return np.eye(BINS)[np.minimum((probability * BINS).astype(np.int64), BINS - 1)]


def reliability(
    truth: np.ndarray, probability: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean probability and frequency of every bin that holds a case: the points of a
    reliability curve.
    """
    bins = _binned(probability) * weight[:, None]
    held = bins.sum(axis=0) > 0
    total = bins.sum(axis=0)[held]
    return (probability @ bins)[held] / total, (truth.astype(np.float64) @ bins)[held] / total


def interval(values: np.ndarray) -> Interval:
    """First entry as `value`, 95 percent interval of the others; undefined resamples are left out,
    None where nothing is defined.
    """
    rest = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(rest, [2.5, 97.5]).tolist() if len(rest) else (None, None)
    return {"value": float(values[0]) if np.isfinite(values[0]) else None, "low": low, "high": high}


def mean_losses(counts: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean loss (b, targets) of draws `counts` (b, N) of patients with `loss` and `weight`
    (N, targets).
    """
    return (counts @ (loss * weight)) / (counts @ weight)


def resampled_losses(
    labels: np.ndarray, probabilities: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """The official loss of each target on all patients, and on `count` draws of as many of them:
    (1 + count, targets).
    """
    loss, weight = loss_terms(labels, normalise(probabilities))
    drawn = resamples(len(labels), count, seed)
    return np.concatenate([mean_losses(counts, loss, weight) for counts in drawn])


def score_intervals(
    labels: np.ndarray, probabilities: np.ndarray, count: int, seed: int
) -> dict[str, Interval]:
    """The official score table with bootstrap intervals over patients."""
    parts = resampled_losses(labels, probabilities, count, seed)
    parts = np.concatenate([parts, parts.mean(axis=1, keepdims=True)], axis=1)
    return {key: interval(parts[:, column]) for column, key in enumerate(SCORE_KEYS)}


def extra_metrics(
    labels: np.ndarray, probabilities: np.ndarray, count: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """`METRICS` of every two-class question with bootstrap intervals, and under `mean` the mAP and
    mean AUC over the five targets.
    """
    problems = [
        (*problem, *ranking(problem[1], problem[2]))
        for problem in binary_problems(labels, probabilities)
    ]
    rows: dict[str, list[np.ndarray]] = {problem[0]: [] for problem in problems}
    with np.errstate(divide="ignore", invalid="ignore"):
        for counts in resamples(len(labels), count, seed):
            for name, truth, probability, weight, order, ranked, starts in problems:
                ranks = auc_and_precision(counts[:, order], ranked, starts)
                error = calibration_error(counts, truth, probability, weight)
                rows[name].append(
                    np.stack([*ranks, *thresholded(counts, truth, probability), error], axis=1)
                )
    found = {name: np.concatenate(parts) for name, parts in rows.items()}
    table = {
        name: {key: interval(values[:, i]) for i, key in enumerate(METRICS)}
        for name, values in found.items()
    }
    means = np.mean([found[name] for name in TARGET_NAMES], axis=0)
    table["mean"] = {key: interval(means[:, i]) for i, key in enumerate(METRICS[:2])}
    return table
