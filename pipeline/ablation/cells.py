"""Stage 09's cells: each variant of a declared grid with each seed, trained on the shared volumes and folds; pretraining is shared too.

A cell leaves its out-of-fold predictions and its log, not its weights. Everything is resumable: a finished cell or
pretraining is skipped, one that was stopped goes on from its checkpoints.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from ..competition.tables import read_labels
from ..competition.targets import COLUMNS, SCORE_KEYS
from ..metric import score_arrays
from ..run.config import Config, decisive, resolved
from ..run.presets import derive
from ..run.stage import Stage, digest, read_manifest
from ..system.machine import InputError, atomic_path, log, progress, world_size, write_json, write_text
from .statistics import FIGURES, Draws, cell_draws, compare, long_rows, markdown, sentence

SECTIONS = ("seed", "model", "train")
OOF, LOG, BACKBONE = "oof.parquet", "log.jsonl", "backbone.safetensors"


@dataclass(frozen=True, eq=False)
class Cell:
    """One variant with one seed; `config` is the whole config that it runs with, `backbone` the key of its pretraining."""

    variant: str
    seed: int
    config: Config
    backbone: str | None

    @property
    def name(self) -> str:
        """Its folder below `09_ablation`."""
        return f"{self.variant}/seed{self.seed}"

    @property
    def start(self) -> str:
        """What its first training, be it pretraining, starts from."""
        return self.config.pretrain.init if self.backbone else self.config.train.init


def declared_cells(config: Config) -> list[Cell]:
    """The whole grid, seed by seed, so that a stopped run has whole comparisons.

    Raises:
        InputError: no variants, or one that is no valid config.
    """
    options = config.ablation
    if not options.variants:
        raise InputError("no variants to compare", f"ablation.variants of config '{config.name}'", "use --config ablation_quick")
    cells = []
    for seed in options.seeds:
        for variant, changes in options.variants.items():
            own = derive(config, {**changes, "seed": seed}, f"ablation.variants.{variant}")
            cells.append(Cell(variant, seed, own, pretraining_key(own) if own.train.init == "voco2d" else None))
    return cells


def pretraining_key(config: Config) -> str:
    """Cells with the same key share one pretraining."""
    tree = resolved(config)
    return digest({name: decisive(name, tree[name]) for name in ("seed", "model", "pretrain")})[:12]


def pretrainings(cells: list[Cell]) -> dict[str, Cell]:
    """The first cell of each distinct pretraining, by key."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.backbone:
            found.setdefault(cell.backbone, cell)
    return found


def part_of(stage: Stage, name: str, config: Config) -> Stage:
    """A sub-folder of the stage with a config of its own."""
    part = stage.part(name)
    part.config = config
    return part


def backbone_part(stage: Stage, cell: Cell) -> Stage:
    """Where the cell's pretraining lies."""
    return part_of(stage, f"pretrained/{cell.backbone}", cell.config)


def backbone_is_current(part: Stage) -> bool:
    """Whether a pretraining is up to date."""
    return part.current(part.inputs("02_volumes"), ("seed", "model", "pretrain"))


def cell_is_current(stage: Stage, part: Stage, cell: Cell) -> bool:
    """Whether a cell is up to date; its pretraining must be."""
    inputs = part.inputs("02_volumes", "03_folds", files=[part.data / "train.csv", part.data / "image_level_labels.csv"])
    backbone = {"backbone": digest(backbone_part(stage, cell).folder / BACKBONE)} if cell.backbone else {}
    return part.current(inputs | backbone, SECTIONS)


def pretrain_backbone(part: Stage) -> None:
    """Pretrain for all cells that share this backbone, unless that is done; the checkpoints are removed at the end."""
    with part.lock():  # before anything is looked at: another run may be at it
        if backbone_is_current(part):
            return
        from ..learning.distributed import World
        from ..learning.optimise import read_log
        from ..system.machine import pick_device
        from ..voco.pretrain import pretrain

        world = World(0, 1, pick_device(part.device_name, int(os.environ.get("LOCAL_RANK", 0))))
        counts = pretrain(part.config, part.upstream("02_volumes"), part.folder, world, fresh=part.options.force)
        rates = pl.Series([row["samples_per_s"] for row in read_log(part.folder / LOG)])
        counts["training_s"] = round(part.config.pretrain.steps * part.config.pretrain.batch * (1 / rates).mean(), 1)
        part.finish(counts, [BACKBONE, LOG])
        for checkpoint in part.folder.rglob("*.ckpt"):
            checkpoint.unlink()


def train_cell(stage: Stage, cell: Cell) -> None:
    """Train the folds of one cell unless it is up to date, and join their out-of-fold rows and logs."""
    part = part_of(stage, cell.name, cell.config)
    with part.lock():
        if cell_is_current(stage, part, cell):
            return
        from ..classifier.train import run_fold

        pretrained = backbone_part(stage, cell).folder / BACKBONE if cell.backbone else None
        _forget_another_run(part.folder, part.fingerprint)
        folds = [part.part(f"fold{fold}") for fold in range(cell.config.folds.count)]
        for fold in folds:
            fold.config = cell.config
        counts = [run_fold(fold, number, pretrained) for number, fold in enumerate(folds)]
        rows = list(_logs([fold.folder / LOG for fold in folds]))
        with atomic_path(part.folder / OOF) as path:
            pl.concat([pl.read_parquet(fold.folder / OOF) for fold in folds]).write_parquet(path)
        write_text(part.folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))
        seconds = round(sum(row["seconds"] for row in rows), 1)
        part.finish({"training_s": seconds, "train_series": sum(one["train_series"] for one in counts)}, [OOF, LOG])
        for fold in folds:
            shutil.rmtree(fold.folder)


def _forget_another_run(folder: Path, identity: str) -> None:
    """Remove what a run with other inputs or another config left half-done, and say whose the folder is now."""
    mark = folder / "identity.txt"
    if folder.is_dir() and not (mark.is_file() and mark.read_text(encoding="utf-8") == identity):
        shutil.rmtree(folder)
    write_text(mark, identity)


def _logs(paths: list[Path]) -> Iterator[dict]:
    for number, path in enumerate(paths):
        yield from ({"fold": number, **json.loads(line)} for line in path.read_text(encoding="utf-8").splitlines())


def wait_for(part: Stage, current: Callable[[Stage], bool], every_s: float = 1.0) -> None:
    """Return when another rank has finished `part` by the inputs and config of this run; torchrun ends all ranks when one fails."""
    part.writer = False
    if current(part):
        return
    log(f"waiting for {part.name}, which another rank makes")
    while not part.whole:
        time.sleep(every_s)


def startable(stage: Stage, cells: list[Cell]) -> list[Cell]:
    """The cells without those that start from ImageNet weights which are out of reach; what is left out is logged.

    Rank 0 of torchrun finds out for all: ranks that disagreed would each wait for cells that none trains.
    """
    if all(cell.start != "imagenet" for cell in cells):
        return cells
    from ..learning.distributed import of_rank_0

    left_out = of_rank_0(_out_of_reach(stage, cells) if stage.rank == 0 else {})
    if stage.config.ablation.reference in left_out:
        raise InputError("the reference starts from weights that are out of reach", "ablation.reference", "give model.weights=FILE")
    return [cell for cell in cells if cell.variant not in left_out]


def _out_of_reach(stage: Stage, cells: list[Cell]) -> dict[str, str]:
    """Variants whose ImageNet weights are neither here nor to be had, and why."""
    from ..learning.backbone import create_backbone

    left_out: dict[str, str] = {}
    for cell in cells:
        if cell.start != "imagenet" or cell.variant in left_out or read_manifest(stage.folder / cell.name):
            continue
        try:
            create_backbone(cell.config.model.backbone, cell.start, cell.config.model.weights)
        except InputError as fault:
            left_out[cell.variant] = str(fault)
            log(f"variant {cell.variant} is left out: {fault}")
    return left_out


def run_cells(stage: Stage) -> list[Cell]:
    """Pretrain and train everything that is not up to date, shared out over the ranks; returns the grid when all of it is there."""
    if stage.options.force and world_size() > 1:  # a rank that waits would take an old result for the new one
        raise InputError("--force works in a single process only", "torchrun", f"remove {stage.folder} instead")
    cells = startable(stage, declared_cells(stage.config))
    shared = list(pretrainings(cells).values())
    own, mine = stage.share(shared), stage.share(cells)
    for cell in own:
        pretrain_backbone(backbone_part(stage, cell))
    for cell in shared:
        if cell not in own:
            wait_for(backbone_part(stage, cell), backbone_is_current)
    for cell in mine:
        train_cell(stage, cell)
    for cell in cells if stage.writer else ():
        if cell not in mine:
            wait_for(part_of(stage, cell.name, cell.config), partial(cell_is_current, stage, cell=cell))
    return cells


def read_cells(stage: Stage, cells: list[Cell]) -> tuple[np.ndarray, dict[Cell, dict[str, np.ndarray]]]:
    """Labels (N, 13) and each cell's `raw` and `nested` probabilities (N, 13): calibrated without the patients that they are of."""
    from ..evaluation.scoring import nested
    from ..folds import read_folds

    labels = read_labels(stage.data)
    folds, found = read_folds(stage.upstream("03_folds") / "folds.csv", labels), {}
    with threadpool_limits(1):
        for cell in progress(cells, len(cells), "calibration", "cells"):
            frames = nested({"cell": pl.read_parquet(stage.folder / cell.name / OOF)}, labels, folds, stage.config.score)
            found[cell] = {name: frames[name].select(COLUMNS).to_numpy() for name in ("raw", "nested")}
    return labels.select(pl.col(COLUMNS).cast(pl.Float64)).to_numpy(), found


def seconds_of(stage: Stage, cell: Cell) -> dict[str, float]:
    """Seconds spent in training steps: of the cell's folds, and of the pretraining that it starts from."""
    own = read_manifest(stage.folder / cell.name)["counts"]["training_s"]
    before = read_manifest(backbone_part(stage, cell).folder)["counts"]["training_s"] if cell.backbone else 0.0
    return {"training_s": own, "pretraining_s": before}


def summarise(stage: Stage, cells: list[Cell]) -> list[str]:
    """Score every cell, compare the variants, write table.json, table.csv, table.md and cells.csv; returns these names."""
    options, (labels, probabilities) = stage.config.ablation, read_cells(stage, cells)
    draws: dict[str, list[Draws]] = {}
    rows = []
    for cell in cells:
        targets = cell.config.train.targets
        found = cell_draws(labels, probabilities[cell]["nested"], options.bootstrap, stage.config.seed)
        draws.setdefault(cell.variant, []).append(found)
        figures = dict(zip(FIGURES, found.figures(targets)[0].tolist(), strict=True))
        losses = dict(zip((f"loss_{name}" for name in SCORE_KEYS[:-1]), found.loss[0].tolist(), strict=True))
        raw = score_arrays(labels, probabilities[cell]["raw"])["score"]
        rows.append({"variant": cell.variant, "seed": cell.seed, **figures, "raw_score": raw, **losses, **seconds_of(stage, cell)})
    table = pl.DataFrame(rows)
    targets = {cell.variant: cell.config.train.targets for cell in cells}
    listed = {first for first, _ in options.pairs} | {options.reference}
    pairs = [*options.pairs, *((name, options.reference) for name in targets if name not in listed)]
    compared = compare(draws, targets, [pair for pair in pairs if set(pair) <= set(targets)], stage.config.seed)
    own = compare(draws, targets, [(name, name) for name in targets], stage.config.seed)
    costs = table.group_by("variant", maintain_order=True).agg(pl.col("training_s", "pretraining_s").mean().round(1))
    result = {"patients": len(labels), "seeds": list(options.seeds), "reference": options.reference, "variants": own, "compared": compared,
              "costs": costs.to_dicts(), "sentences": [sentence(row) for row in compared]}  # fmt: skip
    write_json(stage.folder / "table.json", result)
    write_text(stage.folder / "table.md", markdown(result))
    write_text(stage.folder / "table.csv", pl.DataFrame(list(long_rows(result))).write_csv())
    write_text(stage.folder / "cells.csv", table.write_csv())
    return ["table.json", "table.md", "table.csv", "cells.csv"]
