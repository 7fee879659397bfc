"""Stage 00: the phantom data set."""

from ..run import layout
from ..run.stage import Stage, stage_function
from ..system.console import log, progress
from ..system.files import atomic_folder
from .version import DRAWING


@stage_function(layout.PHANTOM)
def make_phantom(stage: Stage) -> None:
    """Write the data set whole, under a temporary name first."""
    config = stage.config.phantom
    if stage.real_data or config is None:
        log(
            f"{stage.name}: skipped, "
            + (
                f"--data names {stage.options.data}"
                if stage.real_data
                else "the config has `phantom: null`"
            )
        )
        return
    if stage.current({"seed": stage.config.seed, **DRAWING}, ["phantom"]):
        return
    from .dataset import write_dataset

    with atomic_folder(stage.folder) as folder:
        counts, files = write_dataset(
            config,
            stage.config.seed,
            folder,
            stage.jobs,
            lambda items, n: progress(items, n, stage.name, "patients"),
        )
    log(
        f"{stage.name}: {counts['patients']} patients, {counts['series']} series,"
        f" {counts['slices']} slices"
    )
    stage.finish(counts, files)
