"""Stage 04: pretraining of the backbone."""

from pathlib import Path

from ..run import layout
from ..run.stage import Stage, stage_function


@stage_function(layout.VOCO)
def pretrain_voco2d(stage: Stage) -> None:
    """Train, then draw what was learnt."""
    weights = [Path(stage.config.model.weights)] if stage.config.model.weights else []
    if stage.current(
        {"seed": stage.config.seed, **stage.inputs(layout.VOLUMES, files=weights)},
        ["model", "pretrain"],
    ):
        return
    from ..learning.distributed import setup
    from .figures import draw_all
    from .pretrain import pretrain

    volumes, world = stage.upstream(layout.VOLUMES), setup(stage.device_name, stage.options.jobs)
    try:
        counts = pretrain(stage.config, volumes, stage.folder, world, fresh=stage.options.force)
        pictures = draw_all(stage.config, volumes, stage.folder, world.device) if world.main else []
        stage.finish(counts, [layout.BACKBONE, *pictures])
    finally:
        world.close()
