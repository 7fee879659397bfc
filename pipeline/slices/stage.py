"""Stage 01: DICOM and NIfTI series to PNG slices."""

from ..run import layout
from ..run.manifest import digest
from ..run.stage import Stage, stage_function


@stage_function(layout.SLICES)
def convert_dicom(stage: Stage, scheduler: str | None = None) -> None:
    """Convert the series of the table and the unlabelled ones that are new or changed."""
    from ..competition import tables
    from . import sources

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
    from . import store as slice_store

    counts = slice_store.convert_all(
        tasks,
        prints,
        data,
        stage.folder,
        stage.config.convert,
        stage.jobs,
        scheduler,
        stage.options.force,
    )
    stage.finish(counts, outputs=[layout.INDEX, layout.QUARANTINE])
