"""Stage 10: compare a declared grid of variants (config section `ablation`), each with several
seeds, on this run's volumes and folds.

Reads   <out>/02_volumes/, <out>/03_folds/folds.csv, train.csv and, where present,
        image_level_labels.csv, segmentations/ (probes) and a phantom's phantom_organs.csv of the
        data folder; 05_organs/ where a variant looks at organs
Writes  <out>/10_ablation/<variant>/seed<K>/ (oof.parquet, log.jsonl), pretrained/<key>/
        (backbone.safetensors, log.jsonl), table.json, table.csv, table.md (figures, paired
        differences, intervals), cells.csv, probes.csv; grids/<config name>/ has the same tables of
        every grid that was run into this folder
A stopped run goes on where it stopped; finished cells are skipped. Several devices: torchrun
--nproc-per-node N stages/10_ablate.py ... Run stages/09_report.py again to have the tables in the
report. ./run_all.sh does not run this stage.
"""

from pipeline.ablation.stage import ablate
from pipeline.run.command import main

if __name__ == "__main__":
    raise SystemExit(main(__file__, ablate, __doc__))
