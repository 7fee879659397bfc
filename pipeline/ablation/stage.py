"""Stage 10: the ablation."""

from ..run import layout
from ..run.manifest import digest, finished
from ..run.stage import Stage, stage_function
from ..system.console import say


@stage_function(layout.ABLATION)
def ablate(stage: Stage) -> None:
    """Train what is missing, then compare, unless these very cells are compared."""
    from .cells import await_cells, run_cells
    from .probe_parts import Probes
    from .summary import summarise

    cells = run_cells(stage)
    probes = Probes(stage, cells)
    probes.run()  # of this rank's share too, before it waits for others' cells
    if not stage.writer:
        return
    await_cells(stage, cells)
    parts = {cell.name: digest(finished(stage.folder / cell.name)["outputs"]) for cell in cells}
    if stage.current(parts | probes.inputs, ["seed", "ablation", "score"]):
        return
    outputs = [*summarise(stage, cells), probes.join()]
    stage.finish({"cells": len(cells), "variants": len({cell.variant for cell in cells})}, outputs)
    say((stage.folder / layout.TABLE_MD).read_text(encoding="utf-8"))
