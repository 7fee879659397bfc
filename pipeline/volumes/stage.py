"""Stage 02: slices to volumes."""

from ..run import layout, room
from ..run.stage import Stage, stage_function


@stage_function(layout.VOLUMES)
def build_volumes(stage: Stage, scheduler: str | None = None) -> None:
    """Build the volumes of all series that are new or changed."""
    from ..slices.sources import VOLUME_VERSION

    if stage.current({**stage.inputs(layout.SLICES), "version": VOLUME_VERSION}, ["volume"]):
        return
    from ..system.frames import read_frame
    from .store import build_all

    series = read_frame(
        stage.upstream(layout.SLICES) / layout.INDEX, ["patient_id", "series_id"]
    ).unique()
    missing = [
        name
        for name in series.iter_rows()
        if not (stage.folder / f"{'_'.join(name)}.npy").is_file()
    ]
    options = stage.config.volume
    room.require(
        stage.folder,
        stage.name,
        room.volume_bytes(options, len(missing)),
        room.volume_memory(options, stage.jobs),
    )
    counts, digests = build_all(
        stage.upstream(layout.SLICES),
        stage.folder,
        stage.config.volume,
        stage.jobs,
        scheduler,
        stage.options.force,
        tidy=not stage.limit,
    )
    stage.finish(counts, outputs={layout.INDEX: "", **digests})
