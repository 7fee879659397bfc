"""Compare a declared grid of variants (config section `ablation`), each with several seeds, on this
run's volumes and folds.

Reads   <out>/02_volumes/, <out>/03_folds/folds.csv, train.csv and, where present,
        image_level_labels.csv of the data folder
Writes  <out>/09_ablation/<variant>/seed<K>/ (oof.parquet, log.jsonl), pretrained/<key>/
        (backbone.safetensors, log.jsonl), table.json, table.csv, table.md (figures, paired
        differences, intervals), cells.csv, probes.csv, probes.png
A stopped run goes on where it stopped; finished cells are skipped. Several devices: torchrun
--nproc-per-node N stages/09_ablate.py ... Run stages/08_report.py again to have the tables in the
report. ./run_all.sh does not run this stage.
"""

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.manifest import digest, read_manifest
from pipeline.run.stage import Stage


def run(stage: Stage) -> None:
    """Train what is missing, then compare, unless these very cells are compared."""
    from pipeline.ablation.cells import run_cells
    from pipeline.ablation.summary import summarise

    cells = run_cells(stage)
    if not stage.writer:
        return
    tables = [
        stage.data / name for name in ("train.csv", "image_level_labels.csv", "phantom_organs.csv")
    ]
    parts = {
        cell.name: digest(read_manifest(stage.folder / cell.name)["outputs"]) for cell in cells
    }
    if stage.current(
        parts | stage.inputs(layout.FOLDS, files=tables), ["seed", "ablation", "score"]
    ):
        return
    from pipeline.ablation.probes import probe_all

    outputs = [*summarise(stage, cells), *probe_all(stage, cells)]
    stage.finish({"cells": len(cells), "variants": len({cell.variant for cell in cells})}, outputs)
    print((stage.folder / layout.TABLE_MD).read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.ABLATION, __doc__, run))
