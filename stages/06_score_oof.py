"""Stage 06: blend, aggregate, calibrate and score out-of-fold predictions; prints the score table
against its floors.

Reads   <out>/05_folds/fold<K>/oof.parquet, <out>/03_folds/folds.csv,
        <out>/02_volumes/index.parquet and train.csv; with --oof A.csv [B.csv ...] (patient_id,
        series_id, 13 columns) those files and train.csv, no earlier stage
Writes  <out>/06_oof/: oof_predictions.csv (blended, uncalibrated, series level), scores.json,
        calibration.json, patients.parquet (labels, raw and nested predictions),
        precision_recall.png, reliability.png, confusion.png
"""

import argparse
import json
from pathlib import Path

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.manifest import digest
from pipeline.run.stage import Stage
from pipeline.system.errors import InputError
from pipeline.system.files import atomic_path, write_json

TABLES = [layout.OOF_TABLE, layout.SCORE_TABLE, layout.CALIBRATION, "patients.parquet"]
PICTURES = ["precision_recall.png", "reliability.png", "confusion.png"]


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only this stage has."""
    flags.add_argument(
        "--oof",
        nargs="+",
        type=Path,
        metavar="CSV",
        help="OOF tables of one or more models, to blend",
    )


def gather(stage: Stage) -> dict[str, object]:
    """Fingerprint of what is scored."""
    labels = stage.data / "train.csv"
    if not stage.options.oof:
        return stage.inputs(layout.VOLUMES, layout.FOLDS, layout.CLASSIFIERS, files=[labels])
    for path in stage.options.oof:
        if not path.is_file():
            raise InputError(
                f"no such OOF table: '{path}'",
                "--oof",
                "give CSV or parquet files; key=value goes before --oof",
            )
    return {
        **stage.inputs(files=[labels]),
        "oof": [[path.name, digest(path)] for path in stage.options.oof],
    }


def run(stage: Stage) -> None:
    """Score unless these very predictions are scored; the table is printed either way."""
    if stage.current(gather(stage), ["seed", "score"]):
        from pipeline.evaluation.scoring import summary

        print(
            summary(json.loads((stage.folder / layout.SCORE_TABLE).read_text(encoding="utf-8"))),
            flush=True,
        )
        return
    from pipeline.competition import tables
    from pipeline.competition.targets import COLUMNS
    from pipeline.evaluation import figures, scoring

    labels = tables.read_labels(stage.data)
    if stage.options.oof:
        series = scoring.read_oof(stage.options.oof, labels)
        folds = scoring.nested_folds(series, labels, stage.config)
    else:
        series, folds = scoring.read_trained(
            *(stage.upstream(name) for name in (layout.FOLDS, layout.CLASSIFIERS, layout.VOLUMES)),
            labels,
        )
    outcome = scoring.score_oof(series, labels, folds, stage.config)
    with atomic_path(stage.folder / TABLES[0]) as path:
        outcome.series.write_csv(path)
    write_json(stage.folder / TABLES[1], outcome.scores)
    write_json(stage.folder / TABLES[2], outcome.parameters)
    with atomic_path(stage.folder / TABLES[3]) as path:
        outcome.patients.write_parquet(path)
    truth, raw, nested = (
        outcome.patients.select(f"{kind}_{c}" for c in COLUMNS).to_numpy()
        for kind in ("label", "raw", "nested")
    )
    figures.precision_recall(truth, nested, stage.folder / PICTURES[0])
    figures.reliability_curves(truth, raw, nested, stage.folder / PICTURES[1])
    figures.confusion_tables(truth, nested, stage.folder / PICTURES[2])
    print(scoring.summary(outcome.scores), flush=True)
    stage.finish(outcome.scores["counts"], [*TABLES, *PICTURES])


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.SCORES, __doc__, run, add_flags))
