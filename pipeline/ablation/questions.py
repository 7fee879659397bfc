"""The questions that a view of planes is asked: which organ lies where, which planes show it, and
who is injured.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..competition.targets import SLICE_TARGETS
from ..organs.masks import ORGANS
from .dense import dense_probe
from .probe_cases import Case
from .probe_views import View

ALL = "all"  # hospitals
Rows = list[dict[str, Any]]


def linear_scores(features: np.ndarray, truth: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Log-odds (N,) of `truth` (N,) bool by logistic regressions on features (N, F) of the other
    folds; NaN where those are all true or all false.
    """
    from sklearn.linear_model import LogisticRegression

    return _out_of_fold(LogisticRegression(C=0.01, max_iter=300), features, truth, folds)


def _out_of_fold(
    model: Any, features: np.ndarray, truth: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores, whole = np.full(len(truth), np.nan), make_pipeline(StandardScaler(), model)
    for fold in np.unique(folds):
        away = folds == fold
        if truth[~away].any() and not truth[~away].all():
            answer = whole.fit(features[~away], truth[~away]).predict_proba(features[away])[:, 1]
            scores[away] = np.log(np.maximum(answer, 1e-12) / np.maximum(1 - answer, 1e-12))
    return scores


def mean_auc(scores: np.ndarray, truth: np.ndarray, groups: np.ndarray) -> float:
    """Mean AUC of the groups (N,) that hold both answers and have scores; NaN where none does."""
    from sklearn.metrics import roc_auc_score

    asked = [groups == group for group in np.unique(groups)]
    found = [
        roc_auc_score(truth[own], scores[own])
        for own in asked
        if 0 < truth[own].mean() < 1 and np.isfinite(scores[own]).all()
    ]
    return float(np.mean(found)) if found else float("nan")


def _joined(cases: Sequence[Case], name: str) -> np.ndarray:
    """A fact of each case, once for every plane."""
    return np.repeat([getattr(case, name) for case in cases], [len(c.images) for c in cases])


def _row(question: str, probe: str, hospital: str, value: float, patients: int) -> dict[str, Any]:
    figure = "Dice" if probe == "dense" else "AUC"
    return {
        "question": question,
        "probe": probe,
        "figure": figure,
        "hospital": hospital,
        "value": value,
        "patients": patients,
    }


def _answers(
    question: str,
    probe: str,
    scores: np.ndarray,
    truth: np.ndarray,
    folds: np.ndarray,
    patients: np.ndarray,
    hospitals: np.ndarray,
) -> Iterator[dict[str, Any]]:
    """Rows of AUC: the mean over the folds, and in every hospital over its patients."""
    yield _row(question, probe, ALL, mean_auc(scores, truth, folds), len(np.unique(patients)))
    for name in sorted({*hospitals.tolist()} - {""}):
        own = hospitals == name
        value = mean_auc(scores[own], truth[own], np.zeros(own.sum()))
        yield _row(question, probe, name, value, len(np.unique(patients[own])))


def judge_planes(view: View, cases: Sequence[Case], neighbours: int) -> Iterator[dict[str, Any]]:
    """Which planes show an organ, by a linear and a k-nearest-neighbour probe."""
    from sklearn.neighbors import KNeighborsClassifier

    described = [(case, view.planes(case.images, case.height)) for case in cases if case.shown]
    for organ in sorted({name for case in cases for name in case.shown}):
        asked = [case for case, _ in described if organ in case.shown]
        features = np.concatenate([own for case, own in described if organ in case.shown])
        truth = np.concatenate([case.shown[organ] for case in asked])
        folds, *groups = (_joined(asked, name) for name in ("fold", "patient", "hospital"))
        scores = linear_scores(features, truth, folds)
        yield from _answers(organ, "planes", scores, truth, folds, *groups)
        near = KNeighborsClassifier(min(neighbours, 1 + len(truth) // 4))
        scores = _out_of_fold(near, features, truth, folds)
        yield from _answers(organ, "neighbours", scores, truth, folds, *groups)


def judge_inside(view: View, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Who is injured, from the inside of the organ's mask on every plane that shows it (of
    extravasation: of the body). Planes of a target without slice labels are judged together, a
    patient a case.
    """
    for target in sorted({name for case in cases for name in case.injured}):
        parts = [part for case in cases if (part := _inside(view, case, target))]
        if not parts:
            continue
        features, truth, *facts = (np.concatenate(part) for part in zip(*parts, strict=True))
        folds, patients, hospitals = facts
        scores = linear_scores(features, truth, folds)
        if target not in SLICE_TARGETS:
            _, first, own = np.unique(patients, return_index=True, return_inverse=True)
            scores = np.bincount(own, scores) / np.bincount(own)
            truth, folds, patients, hospitals = (
                one[first] for one in (truth, folds, patients, hospitals)
            )
        yield from _answers(target, "inside", scores, truth, folds, patients, hospitals)


def _inside(view: View, case: Case, target: str) -> tuple[np.ndarray, ...] | None:
    """Features and truth of the planes that show what a target is about, with fold, patient and
    hospital; None where there are none.
    """
    if case.masks is None or target not in case.injured:
        return None
    mask = case.masks == ORGANS.index(target) + 1 if target in ORGANS else case.images > 0
    seen = mask.any((1, 2))
    if not seen.any():
        return None
    features = view.inside(case.images[seen], case.height[seen], mask[seen])
    facts = (np.repeat(one, seen.sum()) for one in (case.fold, case.patient, case.hospital))
    return features, case.injured[target][seen], *facts


def judge_dense(view: View, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Which organ lies where: mean Dice over all patients, and over those of every hospital."""
    masked = [case for case in cases if case.masks is not None]
    if len({case.fold for case in masked}) < 2:
        return
    dice = dense_probe(view, masked)
    hospitals = {case.patient: case.hospital for case in masked}
    names = sorted({*hospitals.values()} - {""})
    for name in (ALL, *names):
        own = np.array([d for p, d in dice.items() if name in (ALL, hospitals[p])])
        for organ, values in zip(ORGANS, own.T, strict=True):
            seen = values[~np.isnan(values)]
            value = float(seen.mean()) if len(seen) else float("nan")
            yield _row(organ, "dense", name, value, len(seen))


def judge(view: View, cases: Sequence[Case], neighbours: int) -> Rows:
    """The answers to all questions that the cases can be asked."""
    found = [
        *judge_dense(view, cases),
        *judge_planes(view, cases, neighbours),
        *judge_inside(view, cases),
    ]
    return [row for row in found if not np.isnan(row["value"])]
