"""A dense linear probe: which organ fills a cell of the plane, from the features of that cell, as
Dice per organ and patient.

The classifier is linear discriminant analysis: class means and one covariance, which add up over
series, so that no more than one series' features are in memory and every fold is left out at no
cost. An organ's threshold is the one of `THRESHOLDS` with the best mean Dice on the other folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from .probe_cases import LABELS, Case
from .probe_views import View

SHRINKAGE = 0.01
SAMPLE = 1024  # cells of a series that the classifier is fitted on, drawn
PLANES = 12  # described at a time
THRESHOLDS = np.linspace(0.05, 0.95, 19)


@dataclass
class Moments:
    """Sums over cells: number of each class (K,), features of each (K, F), products (F, F)."""

    count: np.ndarray
    total: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, classes: int) -> "Moments":
        """Of features (N, F) with labels (N,)."""
        member = np.equal.outer(np.arange(classes), labels).astype(np.float64)
        values = features.astype(np.float64)
        return cls(member.sum(1), member @ values, values.T @ values)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    def discriminant(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights (F, K) and biases (K,) of the classes' log-probabilities, up to a constant; a
        class without a cell has no probability.
        """
        count = np.maximum(self.count, 1)
        means, N = self.total / count[:, None], self.count.sum()
        middle = self.total.sum(0) / N
        square = np.diag(self.products) / N
        spread = square - middle**2
        # what is the same in all cells tells nothing, and gets no weight
        scale = np.where(spread > 1e-10 * square, np.sqrt(np.maximum(spread, 0)), np.inf)
        within = (self.products - (means.T * self.count) @ means) / N / np.outer(scale, scale)
        level = np.trace(within) / max(1, np.isfinite(scale).sum())
        within = (1 - SHRINKAGE) * within + (SHRINKAGE * level + 1e-9) * np.eye(len(within))
        standard = (means - middle) / scale
        weights = np.linalg.solve(within, standard.T)
        with np.errstate(divide="ignore"):
            prior = np.log(self.count / N)
        bias = prior - 0.5 * np.einsum("kf,fk->k", standard, weights)
        weights /= scale[:, None]
        return weights, bias - middle @ weights


def _described(view: View, case: Case) -> np.ndarray:
    """(S h' w', F) of the cells of a series, some planes at a time."""
    parts = [slice(k, k + PLANES) for k in range(0, len(case.images), PLANES)]
    found = [view.cells(case.images[part], case.height[part]) for part in parts]
    return np.concatenate([one.reshape(-1, one.shape[-1]) for one in found])


def _overlaps(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of probabilities (N, K) and labels (N,), background first: by organ and threshold the cells
    that are predicted, and those of them that are true, (2, K - 1, T).
    """
    found = np.empty((2, probability.shape[1] - 1, len(THRESHOLDS)))
    for k, own in enumerate(probability.T[1:], 1):
        bins = np.searchsorted(THRESHOLDS, own, side="right")
        for which, kept in ((0, bins), (1, bins[truth == k])):
            counts = np.bincount(kept, minlength=len(THRESHOLDS) + 1)
            found[which, k - 1] = counts[::-1].cumsum()[-2::-1]
    return found


def dense_probe(view: View, cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """Dice (organs,) by patient, each judged by a classifier and thresholds that did not see the
    patient's fold; NaN where the patient's planes show no such organ.

    Args:
        view: what describes a cell.
        cases: series with masks.
    """
    moments: dict[int, Moments] = {}
    for k, case in enumerate(cases):
        features, truth = _described(view, case), case.cells.ravel()
        chosen = np.random.default_rng(k).permutation(len(truth))[:SAMPLE]
        own = Moments.of(features[chosen], truth[chosen], len(LABELS))
        moments[case.fold] = moments[case.fold] + own if case.fold in moments else own
    whole = sum(list(moments.values())[1:], start=next(iter(moments.values())))
    models = {fold: _without(whole, own).discriminant() for fold, own in moments.items()}
    weights = np.concatenate([w for w, _ in models.values()], 1)
    bias = np.concatenate([b for _, b in models.values()])
    counts: dict[str, np.ndarray] = {}
    for case in cases:
        features, truth = _described(view, case), case.cells.ravel()
        answers = np.split(features @ weights + bias, len(models), 1)
        found = [_overlaps(softmax(own, 1), truth) for own in answers]
        size = np.bincount(truth, minlength=len(LABELS))[1:, None]
        stack = np.stack([np.stack([p, t, size + 0 * t]) for p, t in found])
        counts[case.patient] = counts.get(case.patient, 0) + stack
    return _dice(counts, {case.patient: case.fold for case in cases}, list(models))


def _without(whole: Moments, part: Moments) -> Moments:
    return Moments(
        whole.count - part.count, whole.total - part.total, whole.products - part.products
    )


def _dice(
    counts: dict[str, np.ndarray], folds: dict[str, int], models: list[int]
) -> dict[str, np.ndarray]:
    """Dice (organs,) by patient from cells (folds, 3, organs, thresholds): predicted, of them true,
    and all true ones.
    """
    predicted, right, there = np.moveaxis(np.stack(list(counts.values())), 2, 0)
    dice = np.where(there > 0, 2 * right / np.maximum(predicted + there, 1), np.nan)
    own, found = np.array([folds[patient] for patient in counts]), {}
    organs = np.arange(dice.shape[2])
    for k, fold in enumerate(models):
        others = dice[own != fold, k]
        seen = ~np.isnan(others)
        mean = np.where(seen, others, 0).sum(0) / np.maximum(seen.sum(0), 1)
        best = mean.argmax(1)
        for p in np.flatnonzero(own == fold):
            found[list(counts)[p]] = dice[p, k, organs, best]
    return found
