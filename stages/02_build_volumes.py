"""Stage 02: resample each series to one D x H x W volume.

Reads   <out>/01_slices/ (index.parquet and the PNG slices)
Writes  <out>/02_volumes/<patient>_<series>.npy (uint8, superior first), index.parquet,
        manifest.json
"""

import argparse

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.stage import Stage


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only stages 01 and 02 have."""
    flags.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Dask scheduler to work on (default: processes on this machine)",
    )


def run(stage: Stage) -> None:
    """Build the volumes of all series that are new or changed."""
    from pipeline.slices.sources import VOLUME_VERSION

    if stage.current({**stage.inputs(layout.SLICES), "version": VOLUME_VERSION}, ["volume"]):
        return
    from pipeline.volumes.store import build_all

    counts, digests = build_all(
        stage.upstream(layout.SLICES),
        stage.folder,
        stage.config.volume,
        stage.jobs,
        stage.options.scheduler,
        stage.options.force,
    )
    stage.finish(counts, outputs={layout.INDEX: "", **digests})


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.VOLUMES, __doc__, run, add_flags))
