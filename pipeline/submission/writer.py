"""A submission that is valid at every moment: the sample's columns, order and patients, all at the
prior until predicted.
"""

from pathlib import Path

import numpy as np
import polars as pl

from ..competition import strict_table, tables
from ..competition.metric import normalise, value_frame
from ..competition.strict_table import KEY, ROW
from ..competition.targets import COLUMNS, TARGETS
from ..run.manifest import read_manifest
from ..system.console import log
from ..system.errors import InputError
from ..system.files import atomic_path

SUM_TOLERANCE = 1e-6


class SubmissionWriter:
    """Holds one row for every patient of `sample_submission.csv`; `update` fills in, `write` may be
    called at any time.
    """

    def __init__(self, sample: pl.DataFrame, prior: np.ndarray) -> None:
        self.columns = sample.columns
        self.rows = {patient: row for row, patient in enumerate(sample[KEY])}
        self.values = np.repeat(normalise(np.asarray(prior)[None]), len(self.rows), axis=0)
        self.predicted = np.zeros(len(self.rows), dtype=bool)

    def update(self, patient_id: str, probabilities: np.ndarray) -> bool:
        """Fill in a patient's 13 probabilities (groups are normalised).

        Returns False, and leaves what was there, for values no submission may have (not finite,
        negative, a group of zeros) and for patients that the sample does not list.
        """
        values = np.asarray(probabilities, dtype=np.float64).reshape(1, len(COLUMNS))
        if patient_id not in self.rows or (values < 0).any():
            return False
        with np.errstate(all="ignore"):
            values = normalise(values)
        if not np.isfinite(values).all():
            return False
        self.values[self.rows[patient_id]] = values
        self.predicted[self.rows[patient_id]] = True
        return True

    def table(self) -> pl.DataFrame:
        """The submission as a frame with the sample's columns, order and patients."""
        return (
            value_frame(self.values)
            .with_columns(pl.Series(KEY, list(self.rows), dtype=pl.String))
            .select(self.columns)
        )

    def write(self, path: Path) -> None:
        """Write the CSV atomically: a reader finds the last file or this one, whole."""
        with atomic_path(path) as temporary:
            self.table().write_csv(temporary)


def is_settled(folder: Path) -> bool:
    """False where the last run's model failed on series, as on a full GPU: the next one tries
    again. Says whom a spent budget left.
    """
    counts = (read_manifest(folder) or {}).get("counts", {})
    if late := counts.get("late"):
        log(
            f"{folder}: the time budget left {late} patients not or not wholly predicted; raise"
            " predict.time_budget_h, or give --force"
        )
    return not counts.get("model_failures")


def check_submission(path: Path, sample: pl.DataFrame) -> pl.DataFrame:
    """The submission at `path` as a frame; InputError unless it has the sample's columns and
    patients in order and probabilities.
    """
    table = strict_table.load_table(path, [KEY, *COLUMNS])
    if [*table.header] != sample.columns:
        raise InputError(
            "columns or their order are not the sample's",
            f"{path} row 1",
            f"write {','.join(sample.columns)}",
        )
    frame = tables.check_predictions(table)
    if frame[KEY].to_list() != sample[KEY].to_list():
        raise InputError(
            "patients or their order are not the sample's",
            f"{path} column {KEY}",
            "write the sample's patients in its order",
        )
    rules = [
        (
            (pl.sum_horizontal(target.columns) - 1).abs() > SUM_TOLERANCE,
            target.columns[0],
            f"the {target.name} columns do not sum to 1",
            "normalise the group",
        )
        for target in TARGETS
    ]
    strict_table.Table(str(path), frame).refuse(*rules)
    return frame.drop(ROW).select(sample.columns)
