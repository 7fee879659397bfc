"""Stage 01: DICOM and NIfTI series to PNG slices."""

from ..run import layout
from ..run.manifest import digest
from ..run.stage import Stage, stage_function
from ..system.console import log
from .sources import SeriesTask


def limited(stage: Stage, planned: list[SeriesTask]) -> list[SeriesTask]:
    """The series of the patients that `data.limit` leaves: the first of the unlabelled ones."""
    if not stage.limit:
        return planned
    others = [task.patient_id for task in planned if task.source != "train"]
    kept = {*list(dict.fromkeys(others))[: stage.config.data.limit]}
    kept |= set(stage.series()["patient_id"])
    tasks = [task for task in planned if task.patient_id in kept]
    log(f"data.limit={stage.config.data.limit}: {len(tasks)} of {len(planned)} series are used")
    return tasks


@stage_function(layout.SLICES)
def convert_dicom(stage: Stage, scheduler: str | None = None) -> None:
    """Convert the series of the table and the unlabelled ones that are new or changed."""
    from ..competition import tables
    from . import presence, sources

    data = stage.image_data
    planned = sources.plan(data, tables.read_series(data, "train"))
    tasks = limited(stage, planned)
    found = sources.look_at(tasks, data)
    presence.refuse_absent(tasks, found, data)
    prints = [one.fingerprint for one in found]
    series = digest(
        [[task.name, task.source, files] for task, files in zip(tasks, prints, strict=True)]
    )
    inputs = {"series": series, "version": sources.VERSION}
    if not stage.options.force and not stage.made_from(inputs, ["convert"]):
        presence.refuse_vanished(planned, tasks, found, stage.folder / layout.INDEX, data)
    if stage.current(inputs, ["convert"], sources.is_whole(stage.folder, tasks)):
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
        tidy=not stage.limit,  # a trial with few patients leaves what is there of the others
    )
    presence.refuse_nothing_converted(tasks, counts["by_source"], counts["by_reason"], stage.folder)
    stage.finish(counts, outputs=[layout.INDEX, layout.QUARANTINE])
