"""Stage 07: blend, aggregate, calibrate and score out-of-fold predictions; prints the score table
against its floors: constant predictions, and regressions on grey counts and thumbnails of volumes.

Reads   06_folds/fold<K>/oof.parquet, 03_folds/folds.csv and 02_volumes/ below <out>, or below
        each run of `--models`, and train.csv; with --oof A.csv [B.csv ...] (patient_id,
        series_id, 13 columns) those files and train.csv, no earlier stage
Writes  <out>/07_oof/: oof_predictions.csv (blended, uncalibrated, series level), scores.json,
        calibration.json, patients.parquet (labels, raw and nested predictions),
        precision_recall.png, reliability.png, confusion.png
"""

import argparse

from pipeline.evaluation.stage import score_oof
from pipeline.run.command import add_models, main


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say whose predictions are scored."""
    add_models(flags)
    flags.add_argument(
        "--oof",
        nargs="+",
        metavar="CSV",
        help="OOF tables of one or more models, to blend",
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__, score_oof, __doc__, add_flags))
