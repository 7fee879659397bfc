"""Stage 05: find liver, spleen, kidneys and bowel in every labelled series, by one small 2.5D U-Net
a fold on stage 04's backbone; skipped where there are no masks.

Reads   segmentations/<series_id>.nii[.gz] of the data folder, <out>/02_volumes/, the slice index
        that they were made from, <out>/03_folds/folds.csv, <out>/04_voco2d/backbone.safetensors
        (organs.init=voco2d)
Writes  <out>/05_organs/fold<K>/: model.safetensors, last.ckpt, log.jsonl, manifest.json; masks/
        (the masks on the grids of their volumes); organs.parquet (for every series and organ its
        box, size and visible share of each plane, by the model that has not seen the patient);
        dice.csv (out of fold); manifest.json
A stopped run goes on where it stopped.
"""

from pipeline.organs.stage import segment_organs
from pipeline.run.command import main

if __name__ == "__main__":
    raise SystemExit(main(__file__, segment_organs, __doc__))
