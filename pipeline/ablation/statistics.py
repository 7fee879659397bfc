"""Statistics of an ablation: every variant's figures, and paired differences to a reference with 95
percent intervals.

The bootstrap draws patients, the same for both sides of a difference: what is hard about a patient
or lucky about a seed cancels. To each resample comes a draw of the mean over seeds, by Student's t:
few seeds hardly tell their own spread, so intervals are wide.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..competition.metric import loss_terms, normalise
from ..competition.targets import TARGET_NAMES
from ..evaluation.metrics import (
    Interval,
    auc_and_precision,
    binary_problems,
    interval,
    ranking,
    resamples,
    thresholded,
)

# Names as in tables, and whether less is better.
FIGURES = {"score": True, "mAP": False, "precision": False, "recall": False}
MOST = (np.inf, 1.0, 1.0, 1.0)  # that a figure can be; the least is 0


@dataclass(frozen=True)
class Draws:
    """Figures of one cell, (1 + resamples, targets): row 0 of all patients, the others of resampled
    ones; `loss` ends with `any_injury`.
    """

    loss: np.ndarray
    average_precision: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def figures(self, targets: Sequence[str]) -> np.ndarray:
        """(1 + resamples, 4), `FIGURES`: the official score and means over all five targets, or all
        four over fewer targets.
        """
        where = [TARGET_NAMES.index(name) for name in targets]
        score = self.loss if len(where) == len(TARGET_NAMES) else self.loss[:, where]
        parts = (
            score,
            *(part[:, where] for part in (self.average_precision, self.precision, self.recall)),
        )
        return np.stack([part.mean(axis=1) for part in parts], axis=1)


def cell_draws(labels: np.ndarray, probabilities: np.ndarray, count: int, seed: int) -> Draws:
    """One-hot labels and probabilities (N, 13) of the same patients; the same `seed` draws the same
    patients for every cell.

    Precision and recall are those of probability 0.5; precision is 0 where nothing is called
    positive.
    """
    loss, weight = loss_terms(labels, normalise(probabilities))
    problems = [
        (*one, *ranking(one[1], one[2]))
        for one in binary_problems(labels, probabilities)
        if one[0] in TARGET_NAMES
    ]
    losses, rows = [], []
    with np.errstate(divide="ignore", invalid="ignore"):
        for counts in resamples(len(labels), count, seed):
            losses.append((counts @ (loss * weight)) / (counts @ weight))
            columns = []
            for _, truth, probability, _, order, ranked, starts in problems:
                precision, recall = thresholded(counts, truth, probability)[:2]
                area = auc_and_precision(counts[:, order], ranked, starts)[1]
                columns.append((area, np.where(np.isnan(precision), 0, precision), recall))
            rows.append(np.array(columns))  # (5, 3, b)
    return Draws(np.concatenate(losses), *np.concatenate(rows, axis=2).transpose(1, 2, 0))


def over_seeds(values: np.ndarray, seed: int) -> np.ndarray:
    """(K, 1 + resamples, ...) of K cells to (1 + resamples, ...): means over the seeds, row 0 of
    all patients.

    Each other row is moved by a draw from the distribution that the mean over all seeds has around
    its expectation: Student's t with K - 1 degrees of freedom times the seeds' standard error. One
    seed tells nothing of that.
    """
    K, rows = values.shape[:2]
    everyone = values.mean(axis=0)
    if K == 1 or rows == 1:
        return everyone
    places = np.random.default_rng([seed, 1]).permutation(rows - 1)
    # evenly over the distribution, in a random order
    drawn = stats.t.ppf((places + 0.5) / (rows - 1), K - 1)
    error = values[:, 0].std(axis=0, ddof=1) / K**0.5
    everyone[1:] += drawn.reshape(-1, *[1] * (everyone.ndim - 1)) * error
    return everyone


def compare(
    draws: Mapping[str, Sequence[Draws]],
    targets: Mapping[str, Sequence[str]],
    pairs: Sequence[tuple[str, str]],
    seed: int,
) -> list[dict[str, Any]]:
    """One row for each (variant, reference) of `pairs`: both sides' figures and their difference
    over the targets that both train.

    `draws` holds the cells of each variant, seeds in the same order. Returns `variant, reference,
    targets, seeds, figures`; of each figure an interval under `own`, `other` (the reference) and
    `difference` (own minus other).
    """
    rows = []
    for variant, reference in pairs:
        shared = [
            name for name in TARGET_NAMES if name in targets[variant] and name in targets[reference]
        ]
        # (K, 1 + resamples, 4)
        own, other = (
            np.stack([one.figures(shared) for one in draws[name]]) for name in (variant, reference)
        )
        parts = {
            "own": over_seeds(own, seed).clip(0, MOST),
            "other": over_seeds(other, seed).clip(0, MOST),
            "difference": over_seeds(own - other, seed),
        }
        figures = {
            figure: {name: interval(part[:, k]) for name, part in parts.items()}
            for k, figure in enumerate(FIGURES)
        }
        rows.append(
            {
                "variant": variant,
                "reference": reference,
                "targets": shared,
                "seeds": len(own),
                "figures": figures,
            }
        )
    return rows


def verdict(difference: Interval, less_is_better: bool, seeds: int) -> str:
    """`better`, `worse`, or `no difference shown` where the interval holds 0 or is not defined, or
    speaks of one seed alone.
    """
    low, high = difference["low"], difference["high"]
    if seeds == 1 or low is None or high is None or low <= 0 <= high:
        return "no difference shown"
    return "better" if (high < 0) == less_is_better else "worse"


def sentence(row: Mapping[str, Any]) -> str:
    """What the difference in score of one row of `compare` supports, and no more."""
    found = row["figures"]["score"]["difference"]
    names = f"{row['variant']} against {row['reference']}"
    if found["low"] is None:
        return f"{names}: nothing to compare."
    value, low, high = (f"{found[key]:+.4f}".replace("-", "−") for key in ("value", "low", "high"))
    span = f"{value} (95 % interval {low} to {high})"
    outcome = verdict(found, FIGURES["score"], row["seeds"])
    if row["seeds"] == 1:
        return (
            f"{names}: score {span}; of one seed each, so nothing is known of the spread between"
            " seeds, and no difference is shown."
        )
    means = (
        "the interval holds 0, so these runs show no difference"
        if outcome.startswith("no")
        else f"{outcome} (less is better)"
    )
    return f"{names}: score {span}; {means}."


def long_rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each comparison and figure: both values and the difference with their intervals,
    verdict, seeds, patients.
    """
    for row in result["compared"]:
        for figure, parts in row["figures"].items():
            spans = {
                f"{name}_{end}": part[end]
                for name, part in parts.items()
                for end in ("value", "low", "high")
            }
            own = {key: row[key] for key in ("variant", "reference")}
            found = verdict(parts["difference"], FIGURES[figure], row["seeds"])
            yield {
                **own,
                "targets": " ".join(row["targets"]),
                "figure": figure,
                **spans,
                "verdict": found,
                "seeds": row["seeds"],
                "patients": result["patients"],
            }


def text(found: Interval, signed: bool = False) -> str:
    """`0.512 (0.480 to 0.541)`, an en dash where it is not defined."""
    if found["value"] is None or found["low"] is None:
        return "–"
    value, low, high = (
        format(found[name], "+.3f" if signed else ".3f").replace("-", "−")
        for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def markdown(result: Mapping[str, Any]) -> str:
    """Both tables as Markdown: figures and cost of each variant, differences of each pair; and the
    sentences that they support.
    """
    costs = {row["variant"]: row for row in result["costs"]}
    drawn = f"{result['patients']} patients, {len(result['seeds'])} seeds"
    lines = [
        f"{drawn}; 95 % intervals: bootstrap over patients, Student's t over seeds.",
        "",
        f"| variant | {' | '.join(FIGURES)} | training, s | pretraining, s |",
        "|---" * (len(FIGURES) + 3) + "|",
    ]
    for row in result["variants"]:
        cells, cost = (
            [text(parts["own"]) for parts in row["figures"].values()],
            costs[row["variant"]],
        )
        name = (
            row["variant"]
            if len(row["targets"]) == len(TARGET_NAMES)
            else f"{row['variant']} ({', '.join(row['targets'])} only)"
        )
        lines.append(
            f"| {name} | {' | '.join(cells)} | {cost['training_s']:.0f} |"
            f" {cost['pretraining_s']:.0f} |"
        )
    lines += ["", f"| difference | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 1) + "|"]
    for row in result["compared"]:
        cells = [text(parts["difference"], signed=True) for parts in row["figures"].values()]
        lines.append(f"| {row['variant']} − {row['reference']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {one}" for one in result["sentences"])]) + "\n"
