"""Stage 01: DICOM (and unlabelled NIfTI) series to 8-bit PNG slices, fixed window -150..250 HU.

Reads   <data>/train_series_meta.csv, <data>/train_images/<patient>/<series>/*.dcm,
        <data>/unlabelled/<patient>/<series>/*.dcm and <data>/unlabelled/[<folder>/]*.nii[.gz]
Writes  <out>/01_slices/<patient>/<series>/<instance>.png, index.parquet, quarantine.csv,
        manifest.json

Series that are done and unchanged are skipped. --scheduler tcp://HOST:PORT converts on a Dask
cluster; data and output folders must be on a file system that all its machines share under the
same path.
"""

import argparse

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.manifest import digest
from pipeline.run.stage import Stage


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only stages 01 and 02 have."""
    flags.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Dask scheduler to work on (default: processes on this machine)",
    )


def run(stage: Stage) -> None:
    """Convert the series of the table and the unlabelled ones that are new or changed."""
    from pipeline.competition import tables
    from pipeline.slices import sources

    data = stage.image_data
    tasks = sources.plan(data, tables.read_series(data, "train"))
    prints = sources.fingerprints(tasks, data)
    series = digest(
        [[task.name, task.source, files] for task, files in zip(tasks, prints, strict=True)]
    )
    if stage.current(
        {"series": series, "version": sources.VERSION},
        ["convert"],
        sources.is_whole(stage.folder, tasks),
    ):
        return
    from pipeline.slices import store as slice_store

    counts = slice_store.convert_all(
        tasks,
        prints,
        data,
        stage.folder,
        stage.config.convert,
        stage.jobs,
        stage.options.scheduler,
        stage.options.force,
    )
    stage.finish(counts, outputs=[layout.INDEX, layout.QUARANTINE])


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.SLICES, __doc__, run, add_flags))
