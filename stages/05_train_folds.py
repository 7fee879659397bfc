"""Stage 05: train one CNN-LSTM per fold; with `--fold K` that one only. Under torchrun, folds spread over the ranks.

Reads   <out>/02_volumes/, <out>/03_folds/folds.csv, <out>/04_voco2d/backbone.safetensors (train.init=voco2d),
        train.csv and, where present, image_level_labels.csv of the data folder
Writes  <out>/05_folds/fold<K>/: model.safetensors, last.ckpt, log.jsonl, oof.parquet (series level), manifest.json
"""

import argparse

from pipeline.artifacts import Stage, read_manifest
from pipeline.command import main

SECTIONS = ("seed", "model", "train")
PATIENCE_S = 10.0  # another process may be at another fold, and write the manifest of all at the same time


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only this stage has."""
    flags.add_argument("--fold", type=int, help="train this fold only")


def run(stage: Stage) -> None:
    """Train the folds that are not up to date."""
    config = stage.config
    upstream = ["02_volumes", "03_folds"] + (["04_voco2d"] if config.train.init == "voco2d" else [])
    inputs = stage.inputs(*upstream, files=[stage.data / "train.csv", stage.data / "image_level_labels.csv"])
    with stage.lock(PATIENCE_S):
        known = all((stage.folder / f"fold{k}" / "manifest.json").is_file() for k in range(config.folds.count))
        whole = stage.current(inputs, SECTIONS, known)  # a stale manifest goes before a fold changes
    wanted = range(config.folds.count) if stage.options.fold is None else [stage.options.fold]
    for fold in stage.share(wanted):
        part = stage.part(f"fold{fold}")
        with part.lock():
            if part.current(inputs, SECTIONS):
                continue
            from pipeline.training import LOG, MODEL, OOF, run_fold

            part.finish(run_fold(part, fold), outputs=[MODEL, OOF, LOG])
    parts = {f"fold{k}": read_manifest(stage.folder / f"fold{k}") for k in range(config.folds.count)}
    if not whole and all(part and part["inputs"] == inputs and part["config"] == stage.settings for part in parts.values()):
        counts = {name: manifest["counts"] for name, manifest in parts.items()}
        with stage.lock(PATIENCE_S):
            stage.finish(counts, outputs=[f"{name}/{file}" for name in parts for file in ("oof.parquet", "model.safetensors")])


if __name__ == "__main__":
    raise SystemExit(main(__file__, "05_folds", __doc__, run, add_flags, exclusive=False))
