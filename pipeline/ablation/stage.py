"""Stage 10: the ablation."""

from ..run import layout
from ..run.manifest import digest, finished
from ..run.stage import Stage, stage_function
from ..system.console import say


@stage_function(layout.ABLATION)
def ablate(stage: Stage) -> None:
    """Train what is missing, then compare, unless these very cells are compared."""
    from ..organs.files import mask_files
    from .cells import run_cells
    from .summary import summarise

    cells = run_cells(stage)
    if not stage.writer:
        return
    names = ("train.csv", "image_level_labels.csv", "phantom_organs.csv")
    tables = [stage.data / name for name in names]
    tables += mask_files(stage.data).values()
    parts = {cell.name: digest(finished(stage.folder / cell.name)["outputs"]) for cell in cells}
    if stage.current(
        parts | stage.inputs(layout.FOLDS, files=tables), ["seed", "ablation", "score"]
    ):
        return
    from .probes import probe_all

    outputs = [*summarise(stage, cells), *probe_all(stage, cells)]
    stage.finish({"cells": len(cells), "variants": len({cell.variant for cell in cells})}, outputs)
    say((stage.folder / layout.TABLE_MD).read_text(encoding="utf-8"))
