"""Stage 10: the ablation."""

from ..run import layout
from ..run.manifest import digest, finished
from ..run.stage import Stage, stage_function
from ..system.console import say


@stage_function(layout.ABLATION)
def ablate(stage: Stage) -> None:
    """Train what is missing, then compare, unless these very cells are compared."""
    from .cells import run_cells
    from .probe_parts import Probes
    from .summary import summarise

    cells = run_cells(stage)
    probes = Probes(stage, cells)
    probes.run()
    if not stage.writer:
        return
    parts = {cell.name: digest(finished(stage.folder / cell.name)["outputs"]) for cell in cells}
    if stage.current(parts | probes.inputs, ["seed", "ablation", "score"]):
        return
    outputs = [*summarise(stage, cells), probes.join()]
    stage.finish({"cells": len(cells), "variants": len({cell.variant for cell in cells})}, outputs)
    say((stage.folder / layout.TABLE_MD).read_text(encoding="utf-8"))
