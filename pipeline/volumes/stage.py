"""Stage 02: slices to volumes."""

from ..run import layout
from ..run.stage import Stage, stage_function


@stage_function(layout.VOLUMES)
def build_volumes(stage: Stage, scheduler: str | None = None) -> None:
    """Build the volumes of all series that are new or changed."""
    from ..slices.sources import VOLUME_VERSION

    if stage.current({**stage.inputs(layout.SLICES), "version": VOLUME_VERSION}, ["volume"]):
        return
    from .store import build_all

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
