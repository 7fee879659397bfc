"""Stage 07: out-of-fold predictions to scores one can trust. Whatever a patient is scored with was
fitted without that patient.

Three score tables: `raw` (blended and aggregated, not calibrated), `nested` (calibrated; the
headline) and `in_sample` (calibrated by parameters fitted to the very patients that are scored:
what many report, shown for comparison). The blend weights of `raw` and of `oof_predictions.csv` are
the nested ones, so that table is out-of-fold in every respect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from ..competition import strict_table, tables
from ..competition.metric import (
    aggregate,
    constants,
    format_table,
    require_patients,
    score_arrays,
    value_frame,
)
from ..competition.strict_table import KEY, ROW, Table
from ..competition.targets import COLUMNS, SCORE_KEYS
from ..folds import read_folds, stratified_folds
from ..run import layout
from ..run.config import Config, ScoreConfig
from ..run.manifest import trained_files
from ..system.console import log
from ..system.errors import InputError
from ..system.frames import read_frame
from . import calibration
from .calibration import Calibration
from .metrics import extra_metrics, score_intervals

SERIES = [KEY, "series_id"]


@dataclass(frozen=True)
class Outcome:
    """What stage 07 writes: series-level OOF, one row a patient for the report, the score tables,
    the parameters.
    """

    series: pl.DataFrame
    patients: pl.DataFrame
    scores: dict[str, Any]
    parameters: dict[str, Any]


def read_oof(paths: list[Path], labels: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Series tables of several models by name, all with the rows of the first in its order.

    Raises:
        InputError: a fault of a table, a patient of `labels` missing or another one present, a
        series missing or too much.
    """
    found: dict[str, Table] = {}
    for path in paths:
        table = Table(str(path), _read(path))
        require_patients(labels, table)
        found[path.stem if path.stem not in found else str(path)] = table
    return aligned(found)


def aligned(tables: Mapping[str, Table]) -> dict[str, pl.DataFrame]:
    """The models' series tables, all with the rows of the first in its order; InputError where a
    series is missing or too much.
    """
    first, found = next(iter(tables.values())), {}
    rows = first.frame.select(SERIES)
    for name, table in tables.items():
        missing = rows.join(table.frame, on=SERIES, how="anti", maintain_order="left")
        if missing.height:
            what = f"series {missing['series_id'][0]!r} of patient {missing[KEY][0]!r} is missing"
            where = f"{table.name}, which {first.name} has"
            raise InputError(what, where, "blend predictions of the same series")
        known = pl.struct(SERIES).is_in(rows.select(pl.struct(SERIES)).to_series().implode())
        what = f"series {{value}} is not in {first.name}"
        table.refuse((~known, "series_id", what, "blend the same series"))
        found[name] = rows.join(table.frame, on=SERIES, how="left", maintain_order="left").drop(ROW)
    return found


def _read(path: Path) -> pl.DataFrame:
    return tables.check_predictions(strict_table.load_table(path, [*SERIES, *COLUMNS], ["fold"]))


def read_trained(
    folds: Path, trained: Path, volumes: Path, labels: pl.DataFrame
) -> tuple[Table, pl.DataFrame]:
    """A run's own OOF table, and `patient_id, fold`. Patients without a volume may be missing."""
    frame = pl.concat([_read(path) for path in trained_files(trained, layout.OOF)])
    table = Table(f"{trained}/fold*/oof.parquet", frame)
    strict_table.check_unique(table, *SERIES)
    index = read_frame(volumes / layout.INDEX).filter(pl.col("source") == "train")
    require_patients(labels.join(index, on=KEY, how="semi", maintain_order="left"), table)
    drawn = read_folds(folds / layout.FOLD_TABLE, labels)
    moved = frame.join(drawn, on=KEY, suffix="_drawn").filter(
        pl.col("fold") != pl.col("fold_drawn")
    )
    if moved.height:
        what = (
            f"patient {moved[KEY][0]!r} was held out in fold {moved['fold'][0]}, not"
            f" {moved['fold_drawn'][0]} as folds.csv says"
        )
        raise InputError(what, table.name, f"run {layout.script(layout.CLASSIFIERS)} again")
    return table, drawn


def nested_folds(
    series: dict[str, pl.DataFrame],
    labels: pl.DataFrame,
    config: Config,
    drawn: Sequence[pl.DataFrame] = (),
) -> pl.DataFrame:
    """`patient_id, fold`: the models' own folds where all have the same, else new ones, stratified
    and seeded. The own ones are those of the OOF tables, or `drawn`, which have patients without a
    series too.
    """
    known = drawn or list(series.values())
    if all("fold" in frame.columns for frame in known):
        own = [frame.select(KEY, "fold").unique().sort(KEY, "fold") for frame in known]
        if (
            all(one.equals(own[0]) for one in own)
            and own[0][KEY].is_unique().all()
            and own[0]["fold"].n_unique() > 1
        ):
            return own[0]
    log(
        "the models do not share their folds: nested ones are drawn"
        f" (score.nested_folds={config.score.nested_folds})"
    )
    return stratified_folds(
        labels,
        next(iter(series.values())),
        config.score.nested_folds,
        config.seed,
        "score.nested_folds",
    )


def complete(labels: pl.DataFrame, predicted: pl.DataFrame, prior: np.ndarray) -> pl.DataFrame:
    """`patient_id` and the 13 columns for every patient of `labels`, in that order; the prior for
    those without a prediction.
    """
    frame = labels.select(KEY).join(
        predicted.select(KEY, *COLUMNS), on=KEY, how="left", maintain_order="left"
    )
    return frame.with_columns(
        pl.col(column).fill_null(value)
        for column, value in zip(COLUMNS, prior.tolist(), strict=True)
    )


def nested(
    series: dict[str, pl.DataFrame], labels: pl.DataFrame, folds: pl.DataFrame, options: ScoreConfig
) -> dict[str, Any]:
    """Blend, aggregate and calibrate every fold by parameters fitted to the other folds.

    Returns `series` (blended), `raw` and `nested` (13 columns a patient, in the order of `labels`)
    and `fits` by fold.
    """
    parts: list[dict[str, pl.DataFrame]] = []
    fits: dict[int, Calibration] = {}
    for fold in folds["fold"].unique().sort():
        held_out = labels.join(
            folds.filter(pl.col("fold") == fold), on=KEY, how="semi", maintain_order="left"
        )
        others = labels.join(held_out, on=KEY, how="anti", maintain_order="left")
        fitted = fits[fold] = calibration.fit(
            _of(series, others), others, options.aggregate, options.calibrate
        )
        blended = calibration.blend(list(_of(series, held_out).values()), fitted.weights)
        raw = aggregate(blended, options.aggregate)
        calibrated = raw.with_columns(value_frame(fitted.apply(raw.select(COLUMNS).to_numpy())))
        parts.append(
            {
                "series": blended.select(*SERIES, *COLUMNS),
                "raw": complete(held_out, raw, fitted.prior),
                "nested": complete(held_out, calibrated, fitted.prior),
            }
        )
    patients, rows = labels.select(KEY), next(iter(series.values())).select(SERIES)
    joined = {
        name: ids.join(
            pl.concat([part[name] for part in parts]),
            on=ids.columns,
            how="left",
            maintain_order="left",
        )
        for name, ids in (("series", rows), ("raw", patients), ("nested", patients))
    }
    return {**joined, "fits": fits}


def _of(series: dict[str, pl.DataFrame], patients: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {
        name: frame.join(patients, on=KEY, how="semi", maintain_order="left")
        for name, frame in series.items()
    }


def score_predictions(
    series: dict[str, pl.DataFrame],
    labels: pl.DataFrame,
    folds: pl.DataFrame,
    config: Config,
    baselines: Mapping[str, pl.DataFrame] = {},  # noqa: B006 (read only)
) -> Outcome:
    """Everything that stage 07 reports, from aligned series tables, labels and `patient_id,
    fold`; each table of `baselines` is calibrated and scored as the models' blend is.
    """
    # the matrices are small: threads of the linear algebra would only wait for each other
    with threadpool_limits(1):
        return _score(series, labels, folds, config, baselines)


def _score(
    series: dict[str, pl.DataFrame],
    labels: pl.DataFrame,
    folds: pl.DataFrame,
    config: Config,
    baselines: Mapping[str, pl.DataFrame],
) -> Outcome:
    options = config.score
    parts = nested(series, labels, folds, options)
    final = calibration.fit(series, labels, options.aggregate, options.calibrate)
    in_sample = complete(labels, final.predict(list(series.values())), final.prior)
    truth = labels.select(COLUMNS).cast(pl.Float64).to_numpy()
    values = {"raw": parts["raw"], "nested": parts["nested"], "in_sample": in_sample}
    arrays = {name: frame.select(COLUMNS).to_numpy() for name, frame in values.items()}
    scores: dict[str, Any] = {name: score_arrays(truth, array) for name, array in arrays.items()}
    scores["floors"] = constants(truth)
    base = scores["floors"]["weighted_means"]
    scores["reduction"] = {
        name: {key: 1 - scores[name][key] / base[key] for key in SCORE_KEYS} for name in arrays
    }
    scores["intervals"] = {
        name: score_intervals(truth, arrays[name], options.bootstrap, config.seed)
        for name in ("raw", "nested")
    }
    for name, table in baselines.items():
        found = nested({name: table}, labels, folds, options)["nested"].select(COLUMNS).to_numpy()
        scores["floors"][name] = score_arrays(truth, found)
        scores["intervals"][name] = score_intervals(truth, found, options.bootstrap, config.seed)
    scores["metrics"] = extra_metrics(truth, arrays["nested"], options.bootstrap, config.seed)
    first = next(iter(series.values()))
    scores["counts"] = {
        "patients": labels.height,
        "series": first.height,
        "without_series": labels.height - first[KEY].n_unique(),
        "models": len(series),
        "nested_folds": len(parts["fits"]),
        "bootstrap": options.bootstrap,
    }
    parameters = {
        **final.to_json(),
        "nested": {str(fold): fitted.to_json() for fold, fitted in parts["fits"].items()},
    }
    return Outcome(parts["series"], _patients(labels, folds, parts), scores, parameters)


def _patients(labels: pl.DataFrame, folds: pl.DataFrame, parts: dict[str, Any]) -> pl.DataFrame:
    """`patient_id, fold`, then the 13 columns as `label_*`, `raw_*` and `nested_*`."""
    frame = labels.select(KEY, *COLUMNS).rename({column: f"label_{column}" for column in COLUMNS})
    frame = frame.join(folds, on=KEY, how="left", maintain_order="left").select(
        KEY, "fold", pl.exclude(KEY, "fold")
    )
    for name in ("raw", "nested"):
        frame = frame.hstack(parts[name].select(pl.col(COLUMNS).name.prefix(f"{name}_")))
    return frame


def summary(scores: dict[str, Any]) -> str:
    """The score table against its floors, and a sentence on the headline."""
    rows = {name.replace("_", " "): table for name, table in scores["floors"].items()}
    rows |= {"raw": scores["raw"], "nested": scores["nested"], "in-sample": scores["in_sample"]}
    headline, count = scores["intervals"]["nested"]["score"], scores["counts"]
    span = (
        f" (95 % interval {headline['low']:.4f} to {headline['high']:.4f})"
        if headline["low"] is not None
        else ""
    )
    saved = 100 * scores["reduction"]["nested"]["score"]
    line = (
        f"nested score {headline['value']:.4f}{span}: {abs(saved):.1f} %"
        f" {'below' if saved >= 0 else 'above'} weighted means"
    )
    for name in [name for name in scores["floors"] if name in scores["intervals"]]:
        ratio = 1 - scores["nested"]["score"] / scores["floors"][name]["score"]
        line += f", {abs(100 * ratio):.1f} % {'below' if ratio >= 0 else 'above'} the {name}"
    return (
        f"{format_table(rows)}\n{line}; {count['patients']} patients, {count['series']} series,"
        f" {count['models']} model(s)"
    )
