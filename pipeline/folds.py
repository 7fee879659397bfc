"""Cross-validation folds over patients: stratified by all five targets and the number of series, or
one a hospital.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from .competition import strict_table
from .competition.strict_table import KEY, ROW
from .competition.targets import COLUMNS
from .run import layout
from .run.stage import Stage, stage_function
from .system.console import log, say
from .system.errors import InputError
from .system.files import atomic_path

SEEDS = 16
CLASS_TOLERANCE = 0.15


def strata(labels: pl.DataFrame, series: pl.DataFrame) -> pl.DataFrame:
    """Patients in order of their ids with one 0/1 column per class (13) and per series count (0, 1,
    2, 3 or more) that occurs.
    """
    counts = series.group_by(KEY).len("series")
    frame = labels.select(KEY, *COLUMNS).join(counts, on=KEY, how="left").sort(KEY)
    number = frame["series"].fill_null(0).clip(0, 3)
    columns = [
        (number == value).cast(pl.Int8).alias(f"series_{value}")
        for value in sorted(number.unique())
    ]
    return frame.drop("series").with_columns(columns)


def imbalance(folds: np.ndarray, matrix: np.ndarray, count: int) -> float:
    """Largest distance of a class count from its share of a fold, in units of the larger of 15
    percent and one patient.
    """
    share = matrix.sum(axis=0) / count
    counts = np.stack([matrix[folds == fold].sum(axis=0) for fold in range(count)])
    return float((np.abs(counts - share) / np.maximum(1.0, CLASS_TOLERANCE * share)).max())


def stratified_folds(
    labels: pl.DataFrame, series: pl.DataFrame, count: int, seed: int, key: str = "folds.count"
) -> pl.DataFrame:
    """`patient_id, fold` (0..count-1) of the labelled patients; the same for any order of the rows.
    `key` is where `count` comes from.

    MultilabelStratifiedKFold draws ties at random, which small tables feel: of up to `SEEDS` seeds
    derived from `seed` the first within 15 percent (or one patient) of every share is taken, else
    the best.
    """
    _refuse_too_few(labels, count, key)
    frame = strata(labels, series)
    matrix = frame.drop(KEY).to_numpy().astype(np.int64)
    best, least = None, np.inf
    for folds in _splits(matrix, count, seed):
        excess = imbalance(folds, matrix, count)
        if excess < least:
            best, least = folds, excess
        if least <= 1:
            break
    return frame.select(KEY).with_columns(pl.Series("fold", best, dtype=pl.Int64))


def _refuse_too_few(labels: pl.DataFrame, count: int, key: str = "folds.count") -> None:
    if labels.height < 2 * count:
        raise InputError(
            f"{labels.height} patients are too few for {count} folds",
            key,
            "use fewer folds or more patients",
        )


def _splits(matrix: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    for state in np.random.SeedSequence(seed).generate_state(SEEDS):
        folds = np.empty(len(matrix), dtype=np.int64)
        splitter = MultilabelStratifiedKFold(count, shuffle=True, random_state=int(state))
        for fold, (_, held_out) in enumerate(splitter.split(matrix, matrix)):
            folds[held_out] = fold
        yield folds


def read_hospitals(data: Path, labels: pl.DataFrame) -> pl.DataFrame:
    """`patient_id, hospital` of the labelled patients, from column `hospital` of a data folder's
    train_series_meta.csv, which the competition's own lacks.

    Raises:
        InputError: no such column, an empty cell, a patient of two hospitals or without series.
    """
    path, patients = data / "train_series_meta.csv", "or set folds.by=patient"
    table = strict_table.load_table(path, [KEY], ["hospital"])
    if "hospital" not in table.frame.columns:
        what = "column 'hospital' is missing, which folds.by=hospital needs"
        raise InputError(what, f"{path} row 1", f"add it, {patients}")
    cell = pl.col("hospital").str.strip_chars()
    second = "{value} is not the hospital of the patient's series above"
    table.refuse(
        (cell.is_null() | (cell == ""), "hospital", "the cell is empty", f"fill it in, {patients}"),
        (cell != cell.first().over(KEY), "hospital", second, f"give each patient one, {patients}"),
    )
    known = table.frame.select(KEY, cell).unique(KEY)
    found = labels.select(KEY).join(known, on=KEY, how="left", maintain_order="left")
    if (absent := found.filter(pl.col("hospital").is_null())).height:
        what = f"patient {absent[KEY][0]!r} has no series and so no hospital"
        raise InputError(what, str(path), f"list a series, {patients}")
    return found


def hospital_folds(hospitals: pl.DataFrame, count: int) -> pl.DataFrame:
    """`patient_id, fold` with one fold a hospital, in the order of their names; InputError unless
    there are `count` of them.
    """
    names = _hospital_names(hospitals, count)
    log(", ".join(f"fold {fold}: hospital {name}" for fold, name in enumerate(names)))
    fold = pl.col("hospital").replace_strict(names, range(count), return_dtype=pl.Int64)
    return hospitals.select(KEY, fold=fold).sort(KEY)


def _hospital_names(hospitals: pl.DataFrame, count: int) -> list[str]:
    names = hospitals["hospital"].unique().sort().to_list()
    if len(names) != count:
        remedy = f"set folds.count={len(names)}" if len(names) > 1 else "set folds.by=patient"
        raise InputError(f"{count} folds for {len(names)} hospitals", "folds.count", remedy)
    return names


def check_folds(stage: Stage) -> None:
    """Raises InputError where a table of the labelled patients is wrong, or where the config cannot
    divide them: too few, or of another number of hospitals.
    """
    options, data, labels = stage.config.folds, stage.data, stage.labels()
    stage.series()
    if options.by == "hospital":
        _hospital_names(read_hospitals(data, labels), options.count)
    else:
        _refuse_too_few(labels, options.count)


def run_folds(stage: Stage, labels: pl.DataFrame | None = None) -> pl.DataFrame:
    """`read_folds` of the table that stage 03 has made for a run."""
    return read_folds(stage.upstream(layout.FOLDS) / layout.FOLD_TABLE, labels)


def read_folds(path: Path, labels: pl.DataFrame | None = None) -> pl.DataFrame:
    """`patient_id, fold` of a folds table; InputError where a patient is in two folds or (with
    `labels`) in none.
    """
    table = strict_table.load_table(path, [KEY, "fold"])
    strict_table.check_ids(table, KEY)
    distinct = strict_table.Table(
        table.name, table.frame.unique([KEY, "fold"], keep="first", maintain_order=True)
    )
    distinct.refuse(
        (
            ~pl.col(KEY).is_first_distinct(),
            KEY,
            "patient {value} is in two folds",
            "remove the file and run stage 03 again",
        )
    )
    strict_table.check_unique(table, KEY)
    frame = (
        strict_table.numbers(table, ["fold"])
        .frame.with_columns(pl.col("fold").cast(pl.Int64))
        .drop(ROW)
    )
    if labels is None:
        return frame
    missing = labels.join(frame, on=KEY, how="anti", maintain_order="left")[KEY]
    if len(missing):
        raise InputError(
            f"patient {missing[0]!r} is in no fold",
            str(path),
            "remove the file and run stage 03 again",
        )
    return frame


def class_counts(folds: pl.DataFrame, labels: pl.DataFrame, series: pl.DataFrame) -> pl.DataFrame:
    """One row a fold: patients, then the count of each class and series number."""
    frame = folds.join(strata(labels, series), on=KEY)
    counts = [pl.len().alias("patients"), pl.all().exclude(KEY, "fold").cast(pl.Int64).sum()]
    return frame.group_by("fold").agg(*counts).sort("fold")


def format_counts(counts: pl.DataFrame) -> str:
    """The counts as aligned text, one line a class and one column a fold."""
    heads = [f"fold {fold}" for fold in counts["fold"]]
    lines = [f"{'':<24}" + "".join(f"{head:>9}" for head in heads)]
    lines += [
        f"{name:<24}" + "".join(f"{value:>9}" for value in counts[name])
        for name in counts.columns[1:]
    ]
    return "\n".join(lines)


@stage_function(layout.FOLDS)
def make_folds(stage: Stage) -> None:
    """Stage 03: divide the labelled patients into folds unless that was done from these tables."""
    if stage.skips_unlabelled():
        return
    data = stage.data
    inputs = stage.inputs(files=[data / "train.csv", data / "train_series_meta.csv"])
    options = stage.config.folds
    if stage.current(inputs | stage.limit, ["folds", "seed"], check=lambda: check_folds(stage)):
        return
    labels, series = stage.labels(), stage.series()
    if options.by == "hospital":
        table = hospital_folds(read_hospitals(data, labels), options.count)
    else:
        table = stratified_folds(labels, series, options.count, stage.config.seed)
    with atomic_path(stage.folder / layout.FOLD_TABLE) as path:
        table.write_csv(path)
    counts = class_counts(read_folds(stage.folder / layout.FOLD_TABLE, labels), labels, series)
    say(format_counts(counts))
    stage.finish({"patients": table.height, "folds": counts.to_dicts()}, [layout.FOLD_TABLE])
