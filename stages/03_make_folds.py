"""Divide the labelled patients into folds, once.

Reads   train.csv and train_series_meta.csv of the data folder.
Writes  03_folds/folds.csv (patient_id,fold); prints how many patients of each class every fold
        has.
"""

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.stage import Stage
from pipeline.system.files import atomic_path


def run(stage: Stage) -> None:
    """Make the folds unless they were made from these tables already."""
    data = stage.data
    if stage.current(
        stage.inputs(files=[data / "train.csv", data / "train_series_meta.csv"]), ["folds", "seed"]
    ):
        return
    from pipeline import folds
    from pipeline.competition import tables

    labels, series = tables.read_labels(data), tables.read_series(data, "train")
    table = folds.make_folds(labels, series, stage.config.folds.count, stage.config.seed)
    with atomic_path(stage.folder / layout.FOLD_TABLE) as path:
        table.write_csv(path)
    counts = folds.class_counts(
        folds.read_folds(stage.folder / layout.FOLD_TABLE, labels), labels, series
    )
    print(folds.format_counts(counts), flush=True)
    stage.finish({"patients": table.height, "folds": counts.to_dicts()}, [layout.FOLD_TABLE])


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.FOLDS, __doc__, run))
