"""Blend weights and calibration that minimise the official score, fitted with analytic gradients in
float64.

Models are blended at series level with weights of their own for every target (a model may be good
at one and not at another), series are aggregated to patients, and of each target's
log-probabilities x the calibrated ones are softmax(x / temperature + bias). All parameters are
fitted together on the mean of the six losses, so that `any_injury`, a maximum over the targets, is
weighed against them; the start is the optimum of the five targets alone, which is smooth. A ridge
penalty towards "leave it as it is" of weight `STRENGTH / patients` acts as a prior whose say fades
with data: it keeps the parameters finite where a class is rare or absent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..competition.metric import (
    EPSILON,
    HEALTHY,
    WEIGHTS,
    aggregate,
    any_injury,
    loss_terms,
    normalise,
    value_frame,
)
from ..competition.targets import COLUMNS, TARGET_NAMES, TARGETS, group_slices
from ..run import layout
from ..run.manifest import read_manifest
from ..system.errors import InputError

STRENGTH = 0.2
SMALLEST = 1e-7
GROUP_SLICES = list(group_slices().values())
GROUP_OF = np.repeat(np.arange(len(TARGETS)), [len(target.classes) for target in TARGETS])
FREE_COLUMNS = np.array([column for column in range(len(COLUMNS)) if column not in HEALTHY])


@dataclass(frozen=True)
class Calibration:
    """Fitted parameters: `weights` (5, M), `temperature` (5,), `bias` (13,; healthy 0), `prior`
    (13,) for who has no series.
    """

    models: tuple[str, ...]
    aggregate: str
    weights: np.ndarray
    temperature: np.ndarray
    bias: np.ndarray
    prior: np.ndarray

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (N, 13) of blended, aggregated ones (N, 13)."""
        return softmax(logarithm(normalise(probabilities)) / self.temperature[GROUP_OF] + self.bias)

    def predict(self, series: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """`patient_id` and calibrated columns of every patient in the models' series tables (same
        rows in each, M of them).
        """
        if len(series) != len(self.models):
            what = (
                f"the calibration is of {len(self.models)} models, predictions are of {len(series)}"
            )
            raise InputError(
                what,
                layout.CALIBRATION,
                f"run {layout.script(layout.SCORES)} on the models that predict",
            )
        patients = aggregate(blend(series, self.weights), self.aggregate)
        return with_values(patients, self.apply(patients.select(COLUMNS).to_numpy()))

    @classmethod
    def of_run(cls, folder: Path, trained: str) -> "Calibration":
        """What stage 06 left in `folder` for the models that `Stage.inputs` knows as `trained`;
        InputError where it is of others.
        """
        path = folder / layout.CALIBRATION
        try:
            found = cls.from_json(json.loads(path.read_text(encoding="utf-8")), path)
        except ValueError as fault:
            raise InputError(
                f"not a calibration ({fault})",
                str(path),
                f"run {layout.script(layout.SCORES)} again",
            ) from fault
        if len(found.models) > 1:
            what = (
                f"the calibration blends {len(found.models)} models ({', '.join(found.models)}),"
                " which one run's models cannot reproduce"
            )
            raise InputError(
                what,
                str(path),
                f"run {layout.script(layout.SCORES)} --force without --oof,"
                " and blend submissions instead",
            )
        if (read_manifest(folder) or {"inputs": {}})["inputs"].get(layout.CLASSIFIERS) != trained:
            what = (
                "the calibration is of other predictions than those of the models that"
                f" {layout.CLASSIFIERS} holds now"
            )
            raise InputError(what, str(path), f"run {layout.script(layout.SCORES)} without --oof")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values by target and column name."""
        return {
            "models": list(self.models),
            "aggregate": self.aggregate,
            "weights": dict(zip(TARGET_NAMES, self.weights.tolist(), strict=True)),
            "temperature": dict(zip(TARGET_NAMES, self.temperature.tolist(), strict=True)),
            "bias": dict(zip(COLUMNS, self.bias.tolist(), strict=True)),
            "prior": dict(zip(COLUMNS, self.prior.tolist(), strict=True)),
        }

    @classmethod
    def from_json(
        cls, values: dict[str, Any], path: Path | str = layout.CALIBRATION
    ) -> "Calibration":
        """The inverse of `to_json`; InputError where a key is missing or a value is no finite
        number.
        """
        try:
            arrays = {
                "weights": TARGET_NAMES,
                "temperature": TARGET_NAMES,
                "bias": COLUMNS,
                "prior": COLUMNS,
            }
            parts = {
                key: np.array([values[key][name] for name in names], dtype=np.float64)
                for key, names in arrays.items()
            }
            found = cls(models=tuple(values["models"]), aggregate=values["aggregate"], **parts)
        except (KeyError, TypeError, ValueError) as fault:
            raise InputError(
                f"not a calibration ({fault})",
                str(path),
                f"run {layout.script(layout.SCORES)} again",
            ) from fault
        if found.weights.shape != (len(TARGETS), len(found.models)) or not all(
            np.isfinite(part).all() for part in parts.values()
        ):
            raise InputError(
                "not a calibration (wrong number of weights, or not finite)",
                str(path),
                f"run {layout.script(layout.SCORES)} again",
            )
        return found


def with_values(frame: pl.DataFrame, values: np.ndarray) -> pl.DataFrame:
    """The frame with its 13 columns replaced by `values` (N, 13)."""
    return frame.with_columns(value_frame(values))


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, 13) logits to probabilities, each target's group by itself."""
    parts = [
        np.exp(logits[:, where] - logits[:, where].max(axis=1, keepdims=True))
        for where in GROUP_SLICES
    ]
    return normalise(np.concatenate(parts, axis=1))


def logarithm(probabilities: np.ndarray) -> np.ndarray:
    """Natural logarithm with probabilities below `SMALLEST` raised to it."""
    return np.log(np.maximum(probabilities, SMALLEST))


def mix(stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probabilities (M, N, 13) of M models and weights (5, M) -> (N, 13)."""
    return np.einsum("mnc,cm->nc", stack, weights[GROUP_OF])


def blend(series: Sequence[pl.DataFrame], weights: np.ndarray) -> pl.DataFrame:
    """Weighted mean of the models' normalised series tables (same rows in each); keeps the id
    columns of the first.
    """
    stack = np.stack([normalise(table.select(COLUMNS).to_numpy()) for table in series])
    return with_values(series[0], mix(stack, weights))


def _unpack(vector: np.ndarray, models: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (5, M), inverse temperatures (5,) and biases (13,) of the free parameters, all zero
    for "leave it as it is".
    """
    shares = np.exp(vector[: 5 * models].reshape(5, models))
    bias = np.zeros(len(COLUMNS))
    bias[FREE_COLUMNS] = vector[5 * models + 5 :]
    return (
        shares / shares.sum(axis=1, keepdims=True),
        np.exp(vector[5 * models : 5 * models + 5]),
        bias,
    )


def loss_and_slope(
    labels: np.ndarray, probabilities: np.ndarray, joint: bool
) -> tuple[float, np.ndarray]:
    """Official score of (N, 13) softmax outputs and its gradient by their logits (N, 13); without
    `any_injury` unless `joint`.
    """
    loss, weight = loss_terms(labels, probabilities)
    weight = weight / weight.sum(axis=0) / weight.shape[1]
    if not joint:
        weight[:, -1] = 0.0
    slope = (probabilities - labels) * weight[:, GROUP_OF]
    risks, rows = 1.0 - probabilities[:, HEALTHY], np.arange(len(labels))
    top = risks.argmax(axis=1)
    risk = np.clip(risks[rows, top], EPSILON, 1.0 - EPSILON)
    outer = weight[:, -1] * np.where(any_injury(labels) > 0.5, -1.0 / risk, 1.0 / (1.0 - risk))
    chosen = GROUP_OF[None] == top[:, None]
    healthy = np.isin(np.arange(len(COLUMNS)), HEALTHY)
    slope += chosen * (outer * (1.0 - risk))[:, None] * (probabilities - healthy)
    return float((loss * weight).sum()), slope


def objective(
    vector: np.ndarray, stack: np.ndarray, labels: np.ndarray, joint: bool = True
) -> tuple[float, np.ndarray]:
    """Penalised score of the free parameters and its gradient, for normalised model outputs (M, N,
    13) and labels (N, 13).
    """
    models = len(stack)
    weights, sharpness, bias = _unpack(vector, models)
    mixed = mix(stack, weights)
    x = logarithm(mixed)
    value, slope = loss_and_slope(labels, softmax(x * sharpness[GROUP_OF] + bias), joint)
    by_column = (slope * x).sum(axis=0)
    by_sharpness = sharpness * np.array([by_column[where].sum() for where in GROUP_SLICES])
    by_mixed = slope * sharpness[GROUP_OF] * (mixed > SMALLEST) / np.maximum(mixed, SMALLEST)
    columns = np.einsum("nc,mnc->cm", by_mixed, stack)
    by_weight = np.stack([columns[where].sum(axis=0) for where in GROUP_SLICES])
    by_share = weights * (by_weight - (weights * by_weight).sum(axis=1, keepdims=True))
    gradient = np.concatenate([by_share.ravel(), by_sharpness, slope.sum(axis=0)[FREE_COLUMNS]])
    penalty = STRENGTH / len(labels)
    return value + penalty * float(vector @ vector), gradient + 2 * penalty * vector


def _minimise(stack: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from scipy.optimize import minimize

    start = np.zeros(5 * len(stack) + 5 + len(FREE_COLUMNS))
    for joint in (False, True):
        found = minimize(
            objective,
            start,
            args=(stack, labels, joint),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-8, 8)] * len(start),
            options={"maxiter": 500},
        )
        start = found.x
    return _unpack(start, len(stack))


def fit_prior(labels: np.ndarray) -> np.ndarray:
    """The constant prediction (13,) of least score on labels (N, 13), from the weighted class means
    with half a case added to each.
    """
    start = normalise((labels.sum(axis=0, keepdims=True) + 0.5) * WEIGHTS)
    _, sharpness, bias = _minimise(np.repeat(start[None], len(labels), axis=1), labels)
    return softmax(logarithm(start) * sharpness[GROUP_OF] + bias)[0]


def fit(
    series: dict[str, pl.DataFrame], labels: pl.DataFrame, how: str, calibrate: bool = True
) -> Calibration:
    """Parameters from the models' series tables (same rows) of labelled patients; equal weights and
    no change unless `calibrate`.

    The blend weights are found on each model's aggregated table (exact for the mean), then
    temperatures and biases once more on the aggregated blend. The prior is fitted to all of
    `labels`, with or without series.
    """
    tables = list(series.values())
    weights, sharpness, bias = _unpack(
        np.zeros(5 * len(tables) + 5 + len(FREE_COLUMNS)), len(tables)
    )
    truth = labels.select(COLUMNS).cast(pl.Float64).to_numpy()
    if calibrate:
        patients = [aggregate(table, how) for table in tables]
        known = (
            patients[0]
            .select("patient_id")
            .join(labels, on="patient_id", how="left", maintain_order="left")
        )
        held = known.select(COLUMNS).cast(pl.Float64).to_numpy()
        if len(tables) > 1:
            weights = _minimise(
                np.stack([table.select(COLUMNS).to_numpy() for table in patients]), held
            )[0]
        mixed = aggregate(blend(tables, weights), how).select(COLUMNS).to_numpy()
        _, sharpness, bias = _minimise(mixed[None], held)
    return Calibration(tuple(series), how, weights, 1.0 / sharpness, bias, fit_prior(truth))
