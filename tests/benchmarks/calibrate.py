"""Ways to blend and calibrate OOF tables, by the nested score over many draws:
`python tests/benchmarks/calibrate.py [--data FOLDER] [--draws 5]`.

A draw is four models of the same patients, differently noisy, sure and biased target by target,
such that raw, nested and in-sample scores lie as far apart as those of a public set of OOF files.
Labels are those of `--data`'s train.csv, or drawn anew each time with prevalences near the
competition's. Every variant sees the same draws and the same five folds of patients; its paired
difference to what `pipeline.evaluation.calibration` does has a 95 percent interval over draws.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy.optimize import minimize
from scipy.stats import t as student
from score import draw_labels
from threadpoolctl import threadpool_limits

from pipeline.competition.metric import WEIGHTS, score_arrays
from pipeline.competition.tables import read_labels
from pipeline.competition.targets import COLUMNS, TARGETS
from pipeline.evaluation import calibration
from pipeline.evaluation.calibration import FREE_COLUMNS, GROUP_OF, logarithm, mix, softmax

MODELS, FOLDS, INNER = 4, 5, 3
T, B = len(TARGETS), len(FREE_COLUMNS)


class Variant(NamedTuple):
    """`blend` and `scale` are strengths of the penalty of the blend weights and of temperatures and
    biases (None: left as they are); `tied`: one weight a model for all targets.
    """

    blend: float | None
    scale: float | None
    tied: bool = False
    parts: str = "temperature, bias"


SHIPPED = Variant(calibration.STRENGTH, calibration.STRENGTH)
VARIANTS = {
    "as it is": SHIPPED,
    "penalty of blend weights times 5": Variant(1.0, 0.2),
    "penalty of blend weights times 25": Variant(5.0, 0.2),
    "one weight a model for all targets": Variant(0.2, 0.2, tied=True),
    "equal weights": Variant(None, 0.2),
    "equal weights, no calibration": Variant(None, None),
    "equal weights, temperatures alone": Variant(None, 0.2, parts="temperature"),
    "equal weights, biases alone": Variant(None, 0.2, parts="bias"),
    "equal weights, penalty of the others times 10": Variant(None, 2.0),
    "penalty of temperatures and biases times 10": Variant(0.2, 2.0),
    "penalties times 25 and 10": Variant(5.0, 2.0),
}
CHOICES = [Variant(blend, scale) for blend in (0.2, 5.0, None) for scale in (0.2, 2.0)]
CROSS_VALIDATED = "cross-validated choice among six of these"


class Fitted(NamedTuple):
    """Blend weights (5, M), inverse temperatures (5,), biases (13,)."""

    weights: np.ndarray
    sharpness: np.ndarray
    bias: np.ndarray

    def predict(self, stack: np.ndarray) -> np.ndarray:
        """(N, 13) of model outputs (M, N, 13)."""
        return softmax(logarithm(mix(stack, self.weights)) * self.sharpness[GROUP_OF] + self.bias)


def draw_models(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outputs (M, N, 13) of the models for one-hot labels (N, 13)."""
    shared, outputs = rng.normal(size=labels.shape), []
    for _ in range(MODELS):
        signal, own, sure = (
            np.exp(spread * rng.normal(size=T))[GROUP_OF] for spread in (0.06, 0.15, 0.08)
        )
        noise = 0.92 * shared + 0.4 * own * rng.normal(size=labels.shape)
        evidence = 1.12 * signal * (1.12 * signal * labels + noise)
        prior = np.log(labels.mean(axis=0) * WEIGHTS) + 0.12 * rng.normal(size=labels.shape[1])
        outputs.append(softmax(sure * (prior + evidence)))
    return np.stack(outputs)


def _minimum(
    stack: np.ndarray, labels: np.ndarray, strength: float, tie: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """All parameters of least penalised score where they are `tie @ free`; `start` is all zero, or
    the solution of a like problem.
    """
    calibration.STRENGTH = strength
    free = tie.T @ start
    for joint in (True,) if start.any() else (False, True):

        def value(free: np.ndarray, joint: bool = joint) -> tuple[float, np.ndarray]:
            score, gradient = calibration.objective(tie @ free, stack, labels, joint)
            return score, tie.T @ gradient

        bounds = [(-8, 8)] * len(free)
        options = {"maxiter": 500}
        free = minimize(value, free, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return tie @ free


def _unpacked(parameters: np.ndarray, models: int) -> Fitted:
    return Fitted(*(p.numpy() for p in calibration._unpack(torch.tensor(parameters), models)))


def fit_weights(
    stack: np.ndarray, labels: np.ndarray, variant: Variant, start: np.ndarray
) -> np.ndarray:
    """All parameters of a fit whose blend weights are then kept."""
    count = T * MODELS
    tie = np.eye(count + T + B)
    if variant.tied:
        tie = np.hstack([np.tile(np.eye(MODELS), (T, 1)), np.zeros((count, T + B))])
        tie = np.vstack([tie, np.hstack([np.zeros((T + B, MODELS)), np.eye(T + B)])])
        start = np.zeros(len(tie))
    return _minimum(stack, labels, variant.blend, tie, start)


def fit(stack: np.ndarray, labels: np.ndarray, variant: Variant, weights: np.ndarray) -> Fitted:
    """Temperatures and biases of the blend by `weights` (5, M)."""
    if variant.scale is None:
        return Fitted(weights, np.ones(T), np.zeros(len(COLUMNS)))
    kept = np.r_[
        np.zeros(T, bool),
        np.full(T, "temperature" in variant.parts),
        np.full(B, "bias" in variant.parts),
    ]
    mixed, tie = mix(stack, weights)[None], np.eye(len(kept))[:, kept]
    found = _unpacked(_minimum(mixed, labels, variant.scale, tie, np.zeros(len(kept))), 1)
    return Fitted(weights, found.sharpness, found.bias)


def fit_all(
    stack: np.ndarray, labels: np.ndarray, variants: list[Variant]
) -> dict[Variant, Fitted]:
    """Every variant; those with the same blend weights share one fit of them."""
    known = {(None, False): np.full((T, MODELS), 1 / MODELS)}
    start, found = np.zeros(T * MODELS + T + B), {}
    for variant in variants:
        key = variant.blend, variant.tied
        if key not in known:
            parameters = fit_weights(stack, labels, variant, start)
            known[key] = _unpacked(parameters, MODELS).weights
            start = start if variant.tied else parameters
        found[variant] = fit(stack, labels, variant, known[key])
    return found


def best_choice(stack: np.ndarray, labels: np.ndarray) -> Variant:
    """The one of CHOICES of least score on held-out parts of these patients."""
    part, held = np.arange(len(labels)) % INNER, np.empty((len(CHOICES), *labels.shape))
    for fold in range(INNER):
        away = part == fold
        fitted = fit_all(stack[:, ~away], labels[~away], CHOICES)
        for k, choice in enumerate(CHOICES):
            held[k, away] = fitted[choice].predict(stack[:, away])
    return CHOICES[int(np.argmin([score_arrays(labels, one)["score"] for one in held]))]


def draw_scores(
    seed: int, labels: np.ndarray | None, cross_validate: bool
) -> dict[str, tuple[float, float]]:
    """Nested and in-sample score of every variant in one draw."""
    rng = np.random.default_rng(seed)
    labels = draw_labels(rng) if labels is None else labels
    stack, folds = draw_models(labels, rng), rng.permutation(len(labels)) % FOLDS
    variants = list(VARIANTS.values())
    names = [*VARIANTS, CROSS_VALIDATED] if cross_validate else list(VARIANTS)
    held = {name: np.empty(labels.shape) for name in names}
    with threadpool_limits(1):
        for fold in range(FOLDS):
            away = folds == fold
            fitted = fit_all(stack[:, ~away], labels[~away], variants)
            for name in names:
                variant = VARIANTS.get(name) or best_choice(stack[:, ~away], labels[~away])
                held[name][away] = fitted[variant].predict(stack[:, away])
        whole = fit_all(stack, labels, variants)
    inside = {name: whole[variant].predict(stack) for name, variant in VARIANTS.items()}
    return {
        name: (
            score_arrays(labels, values)["score"],
            score_arrays(labels, inside[name])["score"] if name in inside else float("nan"),
        )
        for name, values in held.items()
    }


def main() -> None:
    """Print one Markdown table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", type=Path, help="folder with the competition's train.csv")
    flags.add_argument("--draws", type=int, default=5, help="of seeds 0, 1, 2, ...")
    flags.add_argument("--jobs", type=int, default=2)
    flags.add_argument(
        "--cross-validate", action="store_true", help="the last variant, twice the time"
    )
    options = flags.parse_args()
    labels = None
    if options.data:
        labels = read_labels(options.data).select(COLUMNS).to_numpy().astype(np.float64)
    tasks = (
        delayed(draw_scores)(seed, labels, options.cross_validate) for seed in range(options.draws)
    )
    draws = []
    for draw in Parallel(options.jobs, return_as="generator")(tasks):
        draws.append(draw)
        print(len(draws), draw["as it is"], file=sys.stderr, flush=True)
    print("| variant | nested | in sample | nested - as it is |\n|---|---|---|---|")
    base = np.array([draw["as it is"][0] for draw in draws])
    wide = student.ppf(0.975, len(draws) - 1) / np.sqrt(len(draws))
    for name in draws[0]:
        nested, inside = np.array([draw[name] for draw in draws]).T
        gap = nested - base
        span = wide * gap.std(ddof=1)
        print(
            f"| {name} | {nested.mean():.4f} | {inside.mean():.4f} | {gap.mean():+.4f}"
            f" ({gap.mean() - span:+.4f} to {gap.mean() + span:+.4f}) |"
        )


if __name__ == "__main__":
    main()
