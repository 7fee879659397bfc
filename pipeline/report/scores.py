"""How well a run predicts: score tables, charts of the scores, the patients it is most wrong on."""

import json
from typing import Any

import numpy as np
import polars as pl

from ..competition.metric import WEIGHTS, loss_terms
from ..competition.tables import read_slice_labels
from ..competition.targets import COLUMNS, SCORE_KEYS, TARGETS, group_slices
from ..evaluation import curves
from ..evaluation.metrics import METRICS, Interval, interval, resampled_losses
from ..run import layout
from ..system.frames import read_frame
from ..volumes.sampling import evenly
from .charts import Chart, chart
from .data import plane_pictures
from .inputs import Run

ERRORS, PLANES = 6, 4  # worst patients, planes of each


def _predictions(run: Run) -> tuple[pl.DataFrame, list[np.ndarray]]:
    """patients.parquet, and of it labels, raw and nested probabilities (N, 13)."""
    table = read_frame(run.out / layout.SCORES / "patients.parquet")
    return table, [
        table.select(pl.col(f"{kind}_{c}").cast(pl.Float64) for c in COLUMNS).to_numpy()
        for kind in ("label", "raw", "nested")
    ]


def scores(run: Run) -> dict[str, Any]:
    """Rows of the score table (`best`: position of the lowest honest value), metrics, charts and
    confusion tables.
    """
    found, options = run.scores, run.manifests[layout.SCORES]["config"]
    labels, raw, nested = _predictions(run)[1]
    columns = {**found["floors"], **{name: found[name] for name in ("raw", "nested", "in_sample")}}
    table = {key: [column[key] for column in columns.values()] for key in SCORE_KEYS}
    rows = [
        {
            "key": key,
            "values": values,
            "best": int(np.argmin(values[:-1])),
            "interval": found["intervals"]["nested"][key],
            "reduction": found["reduction"]["nested"][key],
        }
        for key, values in table.items()
    ]
    precise, calibrated = score_charts(labels, raw, nested)
    return {
        **found,
        "columns": list(columns),
        "baselines": {
            name: found["intervals"][name]["score"]
            for name in found["floors"]
            if name in found["intervals"]
        },
        "rows": rows,
        "names": METRICS,
        "curves": precise,
        "calibrated": calibrated,
        "confusion": confusion(labels, nested),
        "saved": reduction(labels, nested, options["score"]["bootstrap"], options["seed"]),
        "blend": _blend(run),
    }


def _blend(run: Run) -> list[tuple[str, list[float]]]:
    """Name and blend weights (by target, in their order) of each model; nothing of one alone."""
    path = run.out / layout.SCORES / layout.CALIBRATION
    fitted = json.loads(path.read_text(encoding="utf-8"))
    weights = zip(*(fitted["weights"][target.name] for target in TARGETS), strict=True)
    found = [(name, list(row)) for name, row in zip(fitted["models"], weights, strict=True)]
    return found if len(found) > 1 else []


def score_charts(
    labels: np.ndarray, raw: np.ndarray, nested: np.ndarray
) -> tuple[list[Chart], list[Chart]]:
    """Precision-recall and reliability charts of each target and `any_injury` for labels and
    probabilities (N, 13).
    """
    return (
        [
            chart(panel.title, "recall", panel.lines, unit=True)
            for panel in curves.precision_recall_panels(labels, nested)
        ],
        [
            chart(panel.title, "predicted probability", panel.lines, unit=True)
            for panel in curves.reliability_panels(labels, raw, nested)
        ],
    )


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """For each target (count, share of the row) of true class (row) by most probable class
    (column).
    """
    return [
        {
            "name": target.name,
            "classes": target.classes,
            "cells": np.stack([counts, share], axis=2).round(2).tolist(),
        }
        for target, counts, share in curves.confusion_counts(labels, probabilities)
    ]


def reduction(labels: np.ndarray, probabilities: np.ndarray, count: int, seed: int) -> Interval:
    """1 - score / score of the weighted class means, with an interval: both are scored on the same
    resampled patients.
    """
    means, found = labels.mean(axis=0, keepdims=True) * WEIGHTS, []
    for values in (probabilities, np.repeat(means, len(labels), axis=0)):
        found.append(resampled_losses(labels, values, count, seed).mean(axis=1))
    return interval(1 - found[0] / found[1])


def worst(run: Run) -> list[dict[str, Any]]:
    """The patients with the largest part in the nested score: labels, probabilities and planes of
    one series.
    """
    patients, (labels, _, nested) = _predictions(run)
    loss, weight = loss_terms(labels, nested)
    part = loss * weight / weight.sum(axis=0)
    part /= part.sum()  # (N, questions): each one's share of the score, `any_injury` last
    data = run.data or run.out / "data" / "phantom"
    marks = read_slice_labels(data) if data.is_dir() else None
    return [
        {
            **patients.row(k, named=True),
            "share": part[k].sum(),
            "targets": _by_target(labels[k], nested[k], part[k]),
            "any": part[k, -1],
            "series": _marked_series(run, patients["patient_id"][k], marks),
        }
        for k in np.argsort(-part.sum(axis=1), kind="stable")[:ERRORS].tolist()
    ]


def _by_target(labels: np.ndarray, nested: np.ndarray, part: np.ndarray) -> list[dict[str, Any]]:
    """True class, probabilities by class, and share of the score for the (13,) of one patient."""
    return [
        {
            "name": target.name,
            "true": int(labels[where].argmax()),
            "share": share,
            "classes": list(zip(target.classes, nested[where].tolist(), strict=True)),
        }
        for target, where, share in zip(
            TARGETS, group_slices().values(), part[:-1].tolist(), strict=True
        )
    ]


def _marked_series(run: Run, patient: str, marks: pl.DataFrame | None) -> dict[str, Any] | None:
    """A series of the patient, one with slice labels if any: the middle slice of each injury,
    filled up with evenly chosen planes; None where no series has a volume.
    """
    own = run.index.filter(pl.col("source") == "train", pl.col("patient_id") == patient)
    if own.is_empty():
        return None
    middles = {} if marks is None else _middles(marks.filter(pl.col("patient_id") == patient))
    row = max(own.to_dicts(), key=lambda one: len(middles.get(one["series_id"], {})))
    injuries: dict[int, list[str]] = {}
    for injury, number in middles.get(row["series_id"], {}).items():
        plane = min(range(row["depth"]), key=lambda k: abs(row["plane_instances"][k] - number))
        injuries.setdefault(plane, []).append(injury)
    shown = plane_pictures(run, row, _filled_up(set(injuries), row["depth"]))
    return {
        **row,
        "pictures": [{**one, "injuries": injuries.get(one["plane"], [])} for one in shown],
    }


def _middles(marks: pl.DataFrame) -> dict[str, dict[str, int]]:
    """By series, then by injury, the instance number of the middle of its labelled slices."""
    middle = pl.col("instance_number").quantile(0.5, "nearest").cast(pl.Int64)
    table = marks.group_by("series_id", "injury_name").agg(middle)
    found: dict[str, dict[str, int]] = {}
    for series, injury, number in table.sort("series_id", "injury_name").iter_rows():
        found.setdefault(series, {})[injury.replace("_", " ").lower()] = number
    return found


def _filled_up(chosen: set[int], depth: int) -> list[int]:
    """The chosen planes and evenly spread ones, `PLANES` in all, in order."""
    planes = evenly(depth, PLANES).tolist()
    # each takes the place of the nearest that shows no labelled injury
    for plane in chosen - set(planes):
        planes.remove(min(set(planes) - chosen, key=lambda k: abs(k - plane)))
        planes.append(plane)
    return sorted(set(planes))
