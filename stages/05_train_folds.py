"""Stage 05: train one CNN-LSTM per fold; with `--fold K` that one only. On a CPU folds train side
by side, one process each, on `--jobs` cores together; on GPUs one after the other, or spread
over the ranks of torchrun.

Reads   <out>/02_volumes/, <out>/03_folds/folds.csv, <out>/04_voco2d/backbone.safetensors
        (train.init=voco2d), train.csv and, where present, image_level_labels.csv of the data folder
Writes  <out>/05_folds/fold<K>/: model.safetensors, last.ckpt, log.jsonl, oof.parquet (series
        level), manifest.json
"""

import argparse
from pathlib import Path
from typing import Any

from pipeline.classifier.side_by_side import train_side_by_side
from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.manifest import read_manifest
from pipeline.run.stage import Stage
from pipeline.system.errors import InputError
from pipeline.system.processes import parent_stage

SECTIONS = ("seed", "model", "train")
# another process may be at another fold, and write the manifest of all at the same time
PATIENCE_S = 10.0


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only this stage has."""
    flags.add_argument("--fold", type=int, help="train this fold only")


def run(stage: Stage) -> None:
    """Train the folds that are not up to date; of several processes the one that ends last writes
    the manifest of all.
    """
    config, folds = stage.config, range(stage.config.folds.count)
    if stage.options.fold not in (None, *folds):
        raise InputError(
            f"there is no fold {stage.options.fold}",
            f"--fold {stage.options.fold}",
            f"choose one of {[*folds]}",
        )
    upstream = [layout.VOLUMES, layout.FOLDS] + (
        [layout.VOCO] if config.train.init == "voco2d" else []
    )
    weights = (
        [Path(config.model.weights)]
        if config.model.weights and config.train.init == "imagenet"
        else []
    )
    inputs = stage.inputs(
        *upstream, files=[stage.data / "train.csv", stage.data / "image_level_labels.csv", *weights]
    )
    if config.train.patience:
        inputs["aggregate"] = config.score.aggregate  # the score that chooses the epoch
    # whatever the rank: any may be the first to change a fold and the last to end
    stage.writer = True
    with stage.lock(PATIENCE_S):
        known = all(
            (stage.folder / layout.fold_folder(fold) / layout.MANIFEST).is_file() for fold in folds
        )
        stage.current(inputs, SECTIONS, known)  # a stale manifest goes before a fold changes
    mine = stage.share(folds) if stage.options.fold is None else [stage.options.fold]
    if stage.options.force and not parent_stage():
        from pipeline.classifier.fold import start_anew

        start_anew(stage, mine, inputs, SECTIONS)
    if not train_side_by_side(stage, mine, inputs, SECTIONS):
        for fold in mine:
            _train(stage, fold, inputs)
    with stage.lock(PATIENCE_S):
        if read_manifest(stage.folder) is None and not parent_stage():
            from pipeline.classifier.fold import finish_folds

            finish_folds(stage, inputs, SECTIONS)


def _train(stage: Stage, fold: int, inputs: dict[str, Any]) -> None:
    part = stage.part(layout.fold_folder(fold))
    with part.lock():
        if part.current(inputs, SECTIONS):
            return
        with stage.lock(PATIENCE_S):
            # also one that another rank has written since
            stage.current(inputs, SECTIONS, whole=False)
        from pipeline.classifier.train import run_fold

        part.finish(run_fold(part, fold), outputs=[layout.MODEL, layout.OOF, layout.LOG])


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.CLASSIFIERS, __doc__, run, add_flags, exclusive=False))
