"""Stage 06: train one CNN-LSTM per fold; with `--fold K` that one only. On a CPU folds train side
by side, one process each, on `--jobs` cores together; on GPUs one after the other, or spread
over the ranks of torchrun.

Reads   <out>/02_volumes/, <out>/03_folds/folds.csv, <out>/04_voco2d/backbone.safetensors
        (train.init=voco2d), <out>/05_organs/ where a key asks for organs, train.csv and, where
        present, image_level_labels.csv of the data folder
Writes  <out>/06_folds/fold<K>/: model.safetensors, last.ckpt, log.jsonl, oof.parquet (series
        level), manifest.json; with train.second_level.enabled also second_level/, and
        <out>/06_folds/first_level.parquet, what the classifiers alone predict
"""

from pipeline.classifier.stage import train_folds
from pipeline.run.command import add_fold, main

if __name__ == "__main__":
    raise SystemExit(main(__file__, train_folds, __doc__, add_fold))
