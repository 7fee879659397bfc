"""The questions that a view of planes is asked: which organ lies where, which planes show it, and
who is injured.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..competition.targets import SLICE_TARGETS
from ..organs.masks import ORGANS
from .dense import dense_probe
from .probe_cases import Case
from .probe_views import KEPT, View

ALL = "all"  # hospitals
Rows = list[dict[str, Any]]
# features (S, F), answers, fold, patient and hospital (S,) of the planes of a case
Inside = tuple[np.ndarray, ...]


# (fitted on (N, F), their answers (N, K), asked (M, F)) -> probabilities (M, K)
Answers = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def linear(fitted: np.ndarray, truths: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of a logistic regression for each of the K questions."""
    from sklearn.linear_model import LogisticRegression

    models = [LogisticRegression(C=0.01, max_iter=300).fit(fitted, own) for own in truths.T]
    return np.stack([model.predict_proba(asked)[:, 1] for model in models], 1)


def nearest(count: int) -> Answers:
    """Shares among the `count` nearest neighbours, which are the same for all questions."""
    from sklearn.neighbors import NearestNeighbors

    def answers(fitted: np.ndarray, truths: np.ndarray, asked: np.ndarray) -> np.ndarray:
        index = NearestNeighbors(n_neighbors=count).fit(fitted)
        return truths[index.kneighbors(asked, return_distance=False)].mean(1)

    return answers


def out_of_fold(
    answers: Answers, features: np.ndarray, truths: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Log-odds (N, K) of `truths` (N, K) bool by `answers` from the standardised features (N, F) of
    the other folds; NaN where those are all true or all false.
    """
    from sklearn.preprocessing import StandardScaler

    scores = np.full(truths.shape, np.nan)
    for fold in np.unique(folds):
        away = folds == fold
        known = truths[~away]
        told = known.any(0) & ~known.all(0)
        if told.any():
            scaler = StandardScaler()
            fitted, asked = scaler.fit_transform(features[~away]), scaler.transform(features[away])
            answer = answers(fitted, known[:, told], asked)
            odds = np.log(np.maximum(answer, 1e-12) / np.maximum(1 - answer, 1e-12))
            scores[np.ix_(away, told)] = odds
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


def judge_planes(
    described: Sequence[tuple[Case, np.ndarray]], neighbours: int
) -> Iterator[dict[str, Any]]:
    """Which planes show an organ, by a linear and a k-nearest-neighbour probe of cases and their
    planes (S, F).
    """
    alike: dict[tuple[int, ...], list[str]] = {}  # organs that the same cases know of
    for organ in sorted({name for case, _ in described for name in case.shown}):
        known = tuple(k for k, (case, _) in enumerate(described) if organ in case.shown)
        alike.setdefault(known, []).append(organ)
    for known, organs in alike.items():
        cases = [described[k][0] for k in known]
        features = np.concatenate([described[k][1] for k in known])
        truths = np.concatenate([np.stack([c.shown[name] for name in organs], 1) for c in cases])
        folds, *groups = (_joined(cases, name) for name in ("fold", "patient", "hospital"))
        near = nearest(min(neighbours, 1 + len(truths) // 4))
        for probe, answers in (("planes", linear), ("neighbours", near)):
            scores = out_of_fold(answers, features, truths, folds)
            for k, organ in enumerate(organs):
                yield from _answers(organ, probe, scores[:, k], truths[:, k], folds, *groups)


def judge_inside(described: Mapping[str, Sequence[Inside]]) -> Iterator[dict[str, Any]]:
    """Who is injured, by target from the inside of the organ's mask on every plane that shows it
    (of extravasation: of the body). Planes of a target without slice labels are judged together, a
    patient a case.
    """
    for target, parts in sorted(described.items()):
        features, truth, *facts = (np.concatenate(part) for part in zip(*parts, strict=True))
        folds, patients, hospitals = facts
        scores = out_of_fold(linear, features, truth[:, None], folds)[:, 0]
        if target not in SLICE_TARGETS:
            _, first, own = np.unique(patients, return_index=True, return_inverse=True)
            scores = np.bincount(own, scores) / np.bincount(own)
            truth, folds, patients, hospitals = (
                one[first] for one in (truth, folds, patients, hospitals)
            )
        yield from _answers(target, "inside", scores, truth, folds, patients, hospitals)


def _inside(view: View, case: Case, target: str) -> Inside | None:
    """Features and truth of the planes that show what a target is about, with fold, patient and
    hospital; None where there are none.
    """
    if case.masks is None:
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


def _groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases in order, as many at once as a network keeps the planes of."""
    group: list[Case] = []
    for case in cases:
        if group and sum(len(one.images) for one in (*group, case)) > KEPT:
            yield group
            group = []
        group.append(case)
    if group:
        yield group


def judge_together(views: Sequence[View], cases: Sequence[Case], neighbours: int) -> list[Rows]:
    """The answers of each view to all questions that the cases can be asked. The views are asked
    about some cases in turn: they may share what one of them found out.
    """
    planes: list[list[tuple[Case, np.ndarray]]] = [[] for _ in views]
    inside = [defaultdict[str, list[Inside]](list) for _ in views]
    for group in _groups(cases):
        images = np.concatenate([case.images for case in group])
        height = np.concatenate([case.height for case in group])
        ends = np.cumsum([len(case.images) for case in group])[:-1]
        for k, view in enumerate(views):
            described = np.split(view.planes(images, height), ends)
            planes[k] += [pair for pair in zip(group, described, strict=True) if pair[0].shown]
            for case in group:
                for target in case.injured:
                    if part := _inside(view, case, target):
                        inside[k][target].append(part)
    found = [
        [*judge_dense(view, cases), *judge_planes(planes[k], neighbours), *judge_inside(inside[k])]
        for k, view in enumerate(views)
    ]
    return [[row for row in rows if not np.isnan(row["value"])] for rows in found]


def judge(view: View, cases: Sequence[Case], neighbours: int) -> Rows:
    """`judge_together` of a single view."""
    return judge_together([view], cases, neighbours)[0]
