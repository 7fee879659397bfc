"""Stage 04: pretrain the 2D backbone with 2D-VoCo. Labels are never read.

Reads   <out>/02_volumes/ (index.parquet and the memory-mapped volumes of all sources)
Writes  <out>/04_voco2d/backbone.safetensors (of the best held-out position accuracy), last.ckpt,
        best.ckpt, log.jsonl, tensorboard/, crops.png, similarity.png, manifest.json
A stopped run goes on where it stopped. Several GPUs: torchrun --nproc-per-node N
stages/04_pretrain_voco2d.py ...
"""

from pathlib import Path

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.stage import Stage


def run(stage: Stage) -> None:
    """Train, then draw what was learnt."""
    weights = [Path(stage.config.model.weights)] if stage.config.model.weights else []
    if stage.current(
        {"seed": stage.config.seed, **stage.inputs(layout.VOLUMES, files=weights)},
        ["model", "pretrain"],
    ):
        return
    from pipeline.learning.distributed import setup
    from pipeline.voco.figures import draw_all
    from pipeline.voco.pretrain import pretrain

    volumes, world = stage.upstream(layout.VOLUMES), setup(stage.device_name, stage.options.jobs)
    try:
        counts = pretrain(stage.config, volumes, stage.folder, world, fresh=stage.options.force)
        pictures = draw_all(stage.config, volumes, stage.folder, world.device) if world.main else []
        stage.finish(counts, [layout.BACKBONE, *pictures])
    finally:
        world.close()


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.VOCO, __doc__, run))
