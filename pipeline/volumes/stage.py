"""Stage 02: slices, or the images themselves, to volumes."""

from ..run import layout, room
from ..run.stage import Stage, stage_function


@stage_function(layout.VOLUMES)
def build_volumes(stage: Stage, scheduler: str | None = None) -> None:
    """Build the volumes of all series that are new or changed."""
    if not stage.config.convert.keep_png:
        _from_images(stage, scheduler)
        return
    from ..slices.sources import VOLUME_VERSION

    source = stage.upstream(layout.SLICES)

    def require_room() -> None:
        from ..system.frames import read_frame

        series = read_frame(source / layout.INDEX, ["patient_id", "series_id"]).unique()
        _require(stage, [layout.volume_file(*ids) for ids in series.iter_rows()])

    inputs = {**stage.inputs(layout.SLICES), "version": VOLUME_VERSION}
    if stage.current(inputs, ["volume"], check=require_room):
        return
    from .store import build_all

    counts, digests = build_all(
        source,
        stage.folder,
        stage.config.volume,
        stage.jobs,
        scheduler,
        stage.options.force,
        tidy=not stage.limit,
    )
    stage.finish(counts, outputs={layout.INDEX: "", **digests})


def _require(stage: Stage, names: list[str], largest: int = 0) -> None:
    """Say what the volumes of these names need; `largest` are the bytes of the longest series that
    each process holds.
    """
    missing = [name for name in names if not (stage.folder / name).is_file()]
    options, jobs = stage.config.volume, stage.jobs
    disk = room.volume_bytes(options, len(missing))
    # as it is read, and as it comes from the child that reads it
    memory = room.volume_memory(options, jobs) + 2 * jobs * largest
    room.require(stage.folder, stage.name, disk, memory)


def _from_images(stage: Stage, scheduler: str | None) -> None:
    """Build the volumes of the series that are new or changed without slices on disk."""
    from ..slices import presence, sources
    from ..slices.stage import sources_of

    versions, sections = [sources.VERSION, sources.VOLUME_VERSION], ["convert", "volume"]
    data, tasks, found, inputs = sources_of(stage, versions, sections)

    def require_room() -> None:
        from ..slices.preview import sizes

        pairs = list(zip(tasks, found, strict=True))
        largest = sizes(pairs, data, stage.config.convert).largest
        names = [layout.volume_file(task.patient_id, task.series_id) for task in tasks]
        _require(stage, names, largest)

    if stage.current(inputs, sections, check=require_room):
        return
    from .direct import build_directly

    counts, digests = build_directly(
        tasks,
        [one.fingerprint for one in found],
        data,
        stage.folder,
        stage.config.convert,
        stage.config.volume,
        stage.jobs,
        scheduler,
        stage.options.force,
        tidy=not stage.limit,
    )
    conversion = counts["conversion"]
    presence.refuse_nothing_converted(
        tasks, conversion["by_source"], conversion["by_reason"], stage.folder
    )
    tables = {layout.INDEX: "", layout.SLICE_TABLE: "", layout.QUARANTINE: ""}
    stage.finish(counts, outputs={**tables, **digests})
