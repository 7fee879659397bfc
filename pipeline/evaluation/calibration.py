"""Blend weights and calibration that minimise the official score, fitted with exact gradients
(torch's autograd) in float64.

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
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from ..competition.metric import (
    EPSILON,
    HEALTHY,
    WEIGHTS,
    aggregate,
    normalise,
    value_frame,
)
from ..competition.targets import ANY_INJURY_WEIGHTS, COLUMNS, TARGET_NAMES, TARGETS, group_slices
from ..run import layout
from ..run.manifest import read_manifest
from ..run.runs import MODELS
from ..system.errors import InputError

if TYPE_CHECKING:
    import torch

STRENGTH = 0.2
SMALLEST = 1e-7
GROUP_SLICES = list(group_slices().values())
SIZES = [len(target.classes) for target in TARGETS]
GROUP_OF = np.repeat(np.arange(len(TARGETS)), SIZES)
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
        return patients.with_columns(value_frame(self.apply(patients.select(COLUMNS).to_numpy())))

    @classmethod
    def of_runs(cls, folder: Path, trained: Sequence[str], maker: str) -> "Calibration":
        """What stage 07 left in `folder` for the runs whose models `Stage.inputs` knows as
        `trained`, in this order; InputError, to run `maker`, where it is of others.
        """
        path = folder / layout.CALIBRATION
        try:
            found = cls.from_json(json.loads(path.read_text(encoding="utf-8")), path)
        except ValueError as fault:
            raise _not_one(fault, path) from fault
        made = (read_manifest(folder) or {"inputs": {}})["inputs"]
        if sorted(made.get(MODELS) or [made.get(layout.CLASSIFIERS)]) != list(trained):
            what = (
                f"the calibration is of other predictions ({', '.join(found.models)}) than those of"
                f" the models that {layout.CLASSIFIERS} {'holds' if len(trained) == 1 else 'hold'}"
                " now"
            )
            raise InputError(what, str(path), f"run {maker}, without --oof")
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
            raise _not_one(fault, path) from fault
        if found.weights.shape != (len(TARGETS), len(found.models)) or not all(
            np.isfinite(part).all() for part in parts.values()
        ):
            raise _not_one("wrong number of weights, or not finite", path)
        return found


def _not_one(reason: object, path: Path | str) -> InputError:
    maker = layout.script(layout.SCORES)
    return InputError(f"not a calibration ({reason})", str(path), f"run {maker} again")


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
    return series[0].with_columns(value_frame(mix(stack, weights)))


def _unpack(
    vector: "torch.Tensor", models: int
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Weights (5, M), inverse temperatures (5,) and biases (13,) of the free parameters, all zero
    for "leave it as it is".
    """
    targets = len(TARGETS)
    shares, sharpness, free = vector.split([targets * models, targets, len(FREE_COLUMNS)])
    bias = vector.new_zeros(len(COLUMNS))
    bias[FREE_COLUMNS] = free
    return shares.reshape(targets, models).softmax(dim=1), sharpness.exp(), bias


def score_of_logits(
    logits: "torch.Tensor", labels: "torch.Tensor", joint: bool = True
) -> "torch.Tensor":
    """Official score, to be differentiated, of logits and labels (13, N); without `any_injury`
    unless `joint`.
    """
    import torch

    probabilities = torch.cat([part.softmax(dim=0) for part in logits.split(SIZES)])
    weights = labels * torch.from_numpy(WEIGHTS)[:, None]
    true = [part.sum(dim=0) for part in (labels * probabilities).split(SIZES)]
    weight = [part.sum(dim=0) for part in weights.split(SIZES)]
    if joint:
        injured = (labels[HEALTHY] < 0.5).any(dim=0)
        risk = (1.0 - probabilities[HEALTHY]).max(dim=0).values
        true.append(torch.where(injured, risk, 1.0 - risk))
        weight.append(torch.from_numpy(np.array(ANY_INJURY_WEIGHTS))[injured.long()])
    loss = -torch.stack(true).clamp(EPSILON, 1.0 - EPSILON).log()
    means = (loss * torch.stack(weight)).sum(dim=1) / torch.stack(weight).sum(dim=1)
    return means.sum() / (len(TARGETS) + 1)


def objective(
    vector: np.ndarray, stack: np.ndarray, labels: np.ndarray, joint: bool = True
) -> tuple[float, np.ndarray]:
    """Penalised score of the free parameters and its gradient, for normalised model outputs (M, N,
    13) and labels (N, 13).
    """
    import torch

    free = torch.tensor(vector, requires_grad=True)
    weights, sharpness, bias = _unpack(free, len(stack))
    # patients last: the few classes of a target are summed over, so long rows are far quicker
    mixed = (torch.from_numpy(stack).mT * weights[GROUP_OF].T[:, :, None]).sum(dim=0)
    logits = mixed.clamp(min=SMALLEST).log() * sharpness[GROUP_OF, None] + bias[:, None]
    value = score_of_logits(logits, torch.from_numpy(labels).T, joint)
    value = value + STRENGTH / len(labels) * free.square().sum()
    (gradient,) = torch.autograd.grad(value, free)
    return value.item(), gradient.numpy()


def _minimise(stack: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best weights (5, M), inverse temperatures (5,) and biases (13,)."""
    import torch
    from scipy.optimize import minimize

    stack, labels = np.array(stack), np.array(labels)  # polars' own memory is read-only
    found = np.zeros(len(TARGETS) * (len(stack) + 1) + len(FREE_COLUMNS))
    # one thread: sums over more would depend on their number
    with threadpool_limits(1):
        for joint in (False, True):
            found = minimize(
                objective,
                found,
                args=(stack, labels, joint),
                jac=True,
                method="L-BFGS-B",
                bounds=[(-8, 8)] * len(found),
                options={"maxiter": 500},
            ).x
    weights, sharpness, bias = _unpack(torch.from_numpy(found), len(stack))
    return weights.numpy(), sharpness.numpy(), bias.numpy()


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
    weights = np.full((len(TARGETS), len(tables)), 1.0 / len(tables))
    sharpness, bias = np.ones(len(TARGETS)), np.zeros(len(COLUMNS))
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
