"""Statistics of an ablation: every variant's figures, and paired differences to a reference with 95
percent intervals.

The bootstrap draws patients, the same for both sides of a difference: what is hard about a patient
or lucky about a seed cancels. To each resample comes a draw of the mean over seeds, by Student's t:
few seeds hardly tell their own spread, so intervals are wide.

One comparison may be named in advance and stands on its own interval. All others are exploratory:
their p-values are corrected for being many by the false discovery rate of Benjamini and Hochberg.
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
    mean_losses,
    ranking,
    resamples,
    thresholded,
)

# Names as in tables, and whether less is better.
FIGURES = {"score": True, "mAP": False, "precision": False, "recall": False}
MOST = (np.inf, 1.0, 1.0, 1.0)  # that a figure can be; the least is 0
LEVEL = 0.05  # of p-values, corrected or not
# A true difference of so many half widths of its 95 % interval is shown in 80 of 100 experiments.
DETECTABLE = 1 + float(stats.norm.ppf(0.8) / stats.norm.ppf(0.975))


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
            losses.append(mean_losses(counts, loss, weight))
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
        figures: dict[str, dict[str, Any]] = {
            figure: {name: interval(part[:, k]) for name, part in parts.items()}
            for k, figure in enumerate(FIGURES)
        }
        for k, found in enumerate(figures.values()):
            found["difference"] |= significance(
                parts["difference"][1:, k], found["difference"], len(own)
            )
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


def significance(drawn: np.ndarray, span: Interval, seeds: int) -> dict[str, float | None]:
    """`p`, twice the share of draws of a difference on the rarer side of 0, and `detectable`, how
    large it must be to be shown in 80 of 100 such experiments.

    Both None where they are not defined: one seed does not tell the spread between seeds.
    """
    drawn = drawn[np.isfinite(drawn)]
    if seeds == 1 or span["low"] is None or span["high"] is None:
        return {"p": None, "detectable": None}
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + float(rarer)) / (1 + len(drawn)))
    return {"p": p, "detectable": DETECTABLE * (span["high"] - span["low"]) / 2}


def correct(rows: Sequence[dict[str, Any]], primary: tuple[str, str] | None) -> None:
    """Give each row of `compare` its `role`, and each difference `q`: of the score of the pair
    `primary` its own p-value, of all others one corrected over the comparisons of that figure.
    """
    for row in rows:
        named = primary is not None and (row["variant"], row["reference"]) == tuple(primary)
        row["role"] = "primary" if named else "exploratory"
    for figure in FIGURES:
        many = []
        for row in rows:
            one = row["figures"][figure]["difference"]
            one["q"] = one["p"]
            if one["p"] is not None and (row["role"], figure) != ("primary", "score"):
                many.append(one)
        if many:
            qs = stats.false_discovery_control([one["p"] for one in many])
            for one, q in zip(many, qs.tolist(), strict=True):
                one["q"] = q


def verdict(difference: Mapping[str, Any], less_is_better: bool, seeds: int) -> str:
    """`better`, `worse`, or `no difference shown` where the interval holds 0 or is not defined, the
    corrected p-value `q` is above 0.05, or one seed alone speaks.
    """
    low, high = difference["low"], difference["high"]
    if seeds == 1 or low is None or high is None or low <= 0 <= high:
        return "no difference shown"
    if (difference.get("q") or 0) > LEVEL:  # tables of before had none
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
    if found["low"] <= 0 <= found["high"]:
        means = "the interval holds 0, so these runs show no difference"
    elif outcome.startswith("no"):
        means = "no longer shown after correction for so many comparisons"
    else:
        means = f"{outcome} (less is better)"
    tail = f", corrected p {found['q']:.3f}" if row.get("role") == "exploratory" else ""
    detectable = f"; {found['detectable']:.3f} would be shown in 4 of 5 such experiments"
    return f"{names}: score {span}{tail}; {means}{detectable}."


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
            own = {key: row[key] for key in ("variant", "reference", "role")}
            found = verdict(parts["difference"], FIGURES[figure], row["seeds"])
            yield {
                **own,
                "targets": " ".join(row["targets"]),
                "figure": figure,
                **spans,
                **{key: parts["difference"][key] for key in ("p", "q", "detectable")},
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
    judged, seeds = f"{result['patients']} patients judged", len(result["seeds"])
    lines = [
        f"{judged}, one seed; 95 % intervals: bootstrap over patients alone."
        if seeds == 1
        else f"{judged}, {seeds} seeds; 95 % intervals: bootstrap over patients, Student's t over"
        " seeds.",
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
    heads = ["difference", *FIGURES, "detectable score", "corrected p, score"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["compared"]:
        cells = [text(parts["difference"], signed=True) for parts in row["figures"].values()]
        found = row["figures"]["score"]["difference"]
        cells += ["–" if found[key] is None else f"{found[key]:.3f}" for key in ("detectable", "q")]
        name = f"{row['variant']} − {row['reference']}"
        lines.append(
            f"| {f'**{name}** (primary)' if row['role'] == 'primary' else name} |"
            f" {' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", *(f"- {one}" for one in result["sentences"])]) + "\n"
