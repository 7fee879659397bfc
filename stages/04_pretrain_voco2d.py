"""Stage 04: pretrain the 2D backbone with 2D-VoCo or another method. Labels are never read.

Reads   <out>/02_volumes/ (index.parquet and the memory-mapped volumes of all sources),
        <out>/03_folds/folds.csv where pretrain.exclude_fold leaves a fold out
Writes  <out>/04_voco2d/backbone.safetensors (of the best held-out accuracy above the baselines that
        need no network, else the last), last.ckpt, best.ckpt, log.jsonl, tensorboard/, crops.png,
        similarity.png, manifest.json
A stopped run goes on where it stopped. Several GPUs: torchrun --nproc-per-node N
stages/04_pretrain_voco2d.py ...
"""

from pipeline.run.command import main
from pipeline.voco.stage import pretrain_voco2d

if __name__ == "__main__":
    raise SystemExit(main(__file__, pretrain_voco2d, __doc__))
