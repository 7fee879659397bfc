"""Stage 01: DICOM and NIfTI series to PNG slices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run import layout, room
from ..run.manifest import digest
from ..run.stage import Stage, stage_function
from ..system.console import log
from ..system.errors import InputError
from .sources import Found, SeriesTask, plan


def tasks_of(stage: Stage) -> tuple[list[SeriesTask], list[SeriesTask]]:
    """All series of the data set, and those of the patients that `data.limit` leaves: of the
    unlabelled ones the first.
    """
    import polars as pl

    from ..competition import tables

    data, nothing = stage.data, pl.DataFrame(schema=["patient_id", "series_id"])
    listed = nothing if stage.unlabelled_alone else tables.read_series(data, "train")
    planned = plan(data, listed)
    if not planned:
        raise InputError("nothing to convert", str(data), "see docs/real-data.md for the layout")
    if not stage.limit:
        return planned, planned
    others = [task.patient_id for task in planned if task.source != "train"]
    kept = {*list(dict.fromkeys(others))[: stage.config.data.limit]}
    kept |= set() if stage.unlabelled_alone else set(stage.series()["patient_id"])
    tasks = [task for task in planned if task.patient_id in kept]
    log(f"data.limit={stage.config.data.limit}: {len(tasks)} of {len(planned)} series are used")
    return planned, tasks


def sources_of(
    stage: Stage, version: int | list[int], sections: Sequence[str]
) -> tuple[Path, list[SeriesTask], list[Found], dict[str, Any]]:
    """The data folder, the series to read, what is there of them, and the inputs of a stage that
    was made by the code of `version`.

    Raises:
        InputError: nothing is there, or nearly nothing of what the stage was made from.
    """
    from . import presence, sources

    data = stage.image_data
    planned, tasks = tasks_of(stage)
    found = sources.look_at(tasks, data)
    presence.refuse_absent(tasks, found, data)
    named = [
        [task.name, task.source, one.fingerprint] for task, one in zip(tasks, found, strict=True)
    ]
    inputs = {"series": digest(named), "version": version}
    if not stage.options.force and not stage.made_from(inputs, sections):
        presence.refuse_vanished(planned, tasks, found, stage.folder / layout.INDEX, data)
    return data, tasks, found, inputs


@stage_function(layout.SLICES)
def convert_dicom(stage: Stage, scheduler: str | None = None) -> None:
    """Convert the series of the table and the unlabelled ones that are new or changed."""
    if not stage.config.convert.keep_png:
        script = layout.script(layout.VOLUMES)
        log(f"{stage.name}: skipped, convert.keep_png=false: {script} reads the images itself")
        return
    from . import presence, sources

    data, tasks, found, inputs = sources_of(stage, sources.VERSION, ["convert"])

    def require_room() -> None:
        from .preview import sizes

        missing = [
            (task, one)
            for task, one in zip(tasks, found, strict=True)
            if not (stage.folder / task.name).is_dir()
        ]
        disk = sizes(missing, data, stage.config.convert).png_bytes
        room.require(stage.folder, stage.name, disk, room.convert_memory(stage.jobs))

    whole = sources.is_whole(stage.folder, tasks)
    if stage.current(inputs, ["convert"], whole, require_room):
        return
    from . import store as slice_store

    counts = slice_store.convert_all(
        tasks,
        [one.fingerprint for one in found],
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
