"""What the folds share: the series that each trains on and holds out, and the manifest of all of
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ..competition import metric
from ..competition.subset import label_subset
from ..competition.tables import require_slice_labels
from ..competition.targets import COLUMNS
from ..folds import run_folds
from ..learning.optimise import NonFiniteLoss
from ..organs.find import read_organs
from ..run import layout
from ..run.config import Config
from ..run.manifest import finished, read_manifest
from ..run.stage import Stage
from ..system.errors import InputError
from ..system.files import atomic_path, remove_folder
from ..system.frames import read_frame
from .data import Series, labelled_series
from .views import MASKS, VIEWS, beside_training, uses_organs


@dataclass(frozen=True)
class FoldData:
    """Series of one fold: those trained on and those held out."""

    fold: int
    train: list[Series]
    held_out: list[Series]
    # of everything that training depends on: a checkpoint of other inputs is not taken up
    fingerprint: str = ""
    second_fingerprint: str = ""  # and of the second level


def gather_fold(part: Stage, fold: int) -> FoldData:
    """Fold `fold` of stage 03's table, with the volumes and the labels that `part` may read.

    Raises:
        InputError: no such fold, a patient in two folds or in none, no series on one side, slice
        labels or masks asked for and absent.
    """
    labels = part.labels()
    folds = dict(run_folds(part, labels).iter_rows())
    if fold not in folds.values():
        raise InputError(
            f"there is no fold {fold}",
            f"--fold {fold}",
            f"choose one of {sorted(set(folds.values()))}",
        )
    wanted = part.config.train.needs_slice_labels
    slice_labels = require_slice_labels(part.data) if wanted else None
    organs = {}
    if uses_organs(part):
        organs = read_organs(part.upstream(layout.ORGANS) / layout.ORGAN_TABLE)
    masks = {}
    if part.config.train.dice_loss:
        folder = part.upstream(MASKS)
        masks = {name: folder / name for name in finished(folder)["outputs"]}
    series = labelled_series(part.upstream(layout.VOLUMES), labels, slice_labels, organs, masks)
    held_out = [one for one in series if folds[one.patient_id] == fold]
    train = [one for one in series if folds[one.patient_id] != fold]
    for side, name in ((held_out, "held-out"), (train, "training")):
        if not side:
            raise InputError(
                f"fold {fold} has no {name} series",
                str(part.out / layout.VOLUMES),
                "check stage 01's quarantine.csv",
            )
    train = _subset(train, part.config)
    if part.config.train.dice_loss and not any(one.mask for one in train):
        raise InputError(
            f"no training series of fold {fold} has an organ mask",
            f"train.dice_loss={part.config.train.dice_loss}",
            "set train.dice_loss=0, or give masks of more patients",
        )
    return FoldData(
        fold,
        train,
        held_out,
        part.fingerprint_without(*beside_training(part.config)),
        part.fingerprint_without(VIEWS),
    )


def _subset(train: list[Series], config: Config) -> list[Series]:
    """The series of the share `train.label_fraction` of the patients."""
    if config.train.label_fraction == 1:
        return train
    patients = {one.patient_id: one.labels for one in train}
    chosen = label_subset(
        list(patients), np.stack(list(patients.values())), config.train.label_fraction, config.seed
    )
    return [one for one in train if one.patient_id in chosen]


def fold_rows(data: FoldData, values: np.ndarray) -> pl.DataFrame:
    """OOF rows of the held-out series: `patient_id, series_id, fold` and the 13 columns, whose
    `values` are (series, 13).

    Raises:
        NonFiniteLoss: a value is not finite.
    """
    series, fine = data.held_out, np.isfinite(values).all(1)
    if wrong := [one.series_id for one, good in zip(series, fine, strict=True) if not good]:
        raise NonFiniteLoss(
            f"non-finite predictions of held-out series {', '.join(wrong[:9])} of fold {data.fold};"
            " the last checkpoint is kept"
        )
    ids = {
        "patient_id": [one.patient_id for one in series],
        "series_id": [one.series_id for one in series],
        "fold": [data.fold] * len(series),
    }
    return pl.DataFrame(ids).hstack(metric.value_frame(values))


def held_out_score(data: FoldData, rows: pl.DataFrame, aggregate: str) -> dict[str, float]:
    """The official score of a fold's OOF rows, series of a patient aggregated by `aggregate`."""
    table = metric.aggregate(rows, aggregate)
    truth = {series.patient_id: series.labels for series in data.held_out}
    labels = np.stack([truth[patient] for patient in table["patient_id"]])
    return metric.score_arrays(labels, table.select(COLUMNS).to_numpy())


def finish_folds(stage: Stage, inputs: dict[str, Any], sections: Sequence[str]) -> None:
    """Write the manifest of all folds, unless a fold is not done; folds that the config no longer
    has go.
    """
    names = [layout.fold_folder(fold) for fold in range(stage.config.folds.count)]
    if not all(stage.part(name).made_from(inputs, sections) for name in names):
        return
    for path in stage.folder.glob("fold*"):
        if path.name not in names:
            with stage.part(path.name).lock():
                remove_folder(path)
    manifests = {name: read_manifest(stage.folder / name) for name in names}
    if None in manifests.values():  # another rank has begun to train it again
        return
    counts = {name: (manifest or {})["counts"] for name, manifest in manifests.items()}
    files, joined = [layout.OOF, layout.MODEL], []
    if stage.config.train.second_level.enabled:
        files += [layout.SECOND_MODEL, layout.FIRST_OOF]
        joined = [_join_first_level(stage, names)]
    else:
        (stage.folder / layout.FIRST_TABLE).unlink(missing_ok=True)
    stage.finish(counts, [*(f"{name}/{file}" for name in names for file in files), *joined])


def _join_first_level(stage: Stage, names: Sequence[str]) -> str:
    """Write what the classifiers alone predict into one table, which stage 07 scores by itself
    (`--oof`); returns its name.
    """
    tables = [read_frame(stage.folder / name / layout.FIRST_OOF) for name in names]
    with atomic_path(stage.folder / layout.FIRST_TABLE) as path:
        pl.concat(tables).write_parquet(path)
    return layout.FIRST_TABLE
