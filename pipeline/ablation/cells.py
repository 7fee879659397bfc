"""Stage 10's cells: each variant of a declared grid with each seed, trained on the shared volumes
and folds; pretraining is shared too.

A cell leaves its out-of-fold predictions and its log, not its weights. Everything is resumable: a
finished cell or pretraining is skipped, one that was stopped goes on from its checkpoints.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from statistics import fmean

import polars as pl

from ..classifier.stage import SECTIONS, training_inputs
from ..learning.log import read_log
from ..run import layout
from ..run.manifest import digest, read_manifest
from ..run.stage import Stage
from ..system.console import log
from ..system.errors import InputError
from ..system.files import atomic_path, keep_only, remove_folder, write_text
from ..system.frames import read_frame
from ..system.machine import world_size
from .grid import Cell, backbone_part, declared_cells, part_with, pretrainings, trained_folds


def backbone_is_current(part: Stage) -> bool:
    """Whether a pretraining is up to date."""
    from ..voco.stage import inputs

    return part.current(inputs(part), ("seed", "model", "pretrain"))


def cell_is_current(stage: Stage, part: Stage, cell: Cell) -> bool:
    """Whether a cell is up to date; its pretraining must be."""
    inputs = training_inputs(part)
    backbone = (
        {"backbone": digest(backbone_part(stage, cell).folder / layout.BACKBONE)}
        if cell.backbone
        else {}
    )
    some = {"judged_folds": cell.config.ablation.folds} if cell.config.ablation.folds else {}
    return part.current(inputs | backbone | some, SECTIONS)


def pretrain_backbone(part: Stage) -> None:
    """Pretrain for all cells that share this backbone, unless that is done; the checkpoints are
    removed at the end.
    """
    with part.lock():  # before anything is looked at: another run may be at it
        if backbone_is_current(part):
            return
        from ..learning.distributed import World
        from ..system.machine import pick_device
        from ..voco.pretrain import pretrain
        from ..voco.stage import excluded_patients

        world = World(0, 1, pick_device(part.device_name, int(os.environ.get("LOCAL_RANK", 0))))
        volumes, fresh = part.upstream(layout.VOLUMES), part.options.force
        excluded = excluded_patients(part)
        counts = pretrain(part.config, volumes, part.folder, world, fresh, excluded)
        rates = [row["samples_per_s"] for row in read_log(part.folder / layout.LOG)]
        seconds = fmean(1 / rate for rate in rates)  # of a sample
        options = part.config.pretrain
        counts["training_s"] = round(options.steps * options.batch * seconds, 1)
        part.finish(counts, [layout.BACKBONE, layout.LOG])
        for checkpoint in part.folder.rglob("*.ckpt"):
            checkpoint.unlink()


def train_cell(stage: Stage, cell: Cell) -> None:
    """Train the folds of one cell unless it is up to date, and join their out-of-fold rows and
    logs.
    """
    part = part_with(stage, cell.name, cell.config)
    with part.lock():
        if cell_is_current(stage, part, cell):
            return
        from ..classifier.train import run_fold

        pretrained = backbone_part(stage, cell).folder / layout.BACKBONE if cell.backbone else None
        keep_only(part.folder, part.fingerprint)  # not what another run left half-done
        numbers = trained_folds(cell.config)
        folds = [part.part(layout.fold_folder(number)) for number in numbers]
        counts = [
            run_fold(fold, number, pretrained) for number, fold in zip(numbers, folds, strict=True)
        ]
        rows = [
            {"fold": number, **row}
            for number, fold in zip(numbers, folds, strict=True)
            for row in read_log(fold.folder / layout.LOG)
        ]
        with atomic_path(part.folder / layout.OOF) as path:
            pl.concat([read_frame(fold.folder / layout.OOF) for fold in folds]).write_parquet(path)
        write_text(part.folder / layout.LOG, "".join(json.dumps(row) + "\n" for row in rows))
        second = [one.get("second_level", {}) for one in counts]
        seconds = sum(row["seconds"] for row in rows)
        seconds += sum(one.get("features_s", 0) + one.get("training_s", 0) for one in second)
        series = sum(one["train_series"] for one in counts)
        totals = {"training_s": round(seconds, 1), "train_series": series}
        part.finish(totals, [layout.OOF, layout.LOG])
        for fold in folds:
            shutil.rmtree(fold.folder)


def wait_for(part: Stage, current: Callable[[Stage], bool]) -> None:
    """Return when another rank has finished `part` by the inputs and config of this run; torchrun
    ends all ranks when one fails.
    """
    part.writer = False
    if current(part):
        return
    log(f"waiting for {part.name}, which another rank makes")
    while not part.whole:
        time.sleep(1)


def startable(stage: Stage, cells: list[Cell]) -> list[Cell]:
    """The cells without those that start from ImageNet weights which are out of reach; what is left
    out is logged.

    Rank 0 of torchrun finds out for all: ranks that disagreed would each wait for cells that none
    trains.
    """
    if all(cell.start != "imagenet" for cell in cells):
        return cells
    from ..learning.distributed import of_rank_0

    left_out = of_rank_0(_out_of_reach(stage, cells) if stage.rank == 0 else {})
    if stage.config.ablation.reference in left_out:
        raise InputError(
            "the reference starts from weights that are out of reach",
            "ablation.reference",
            "give model.weights=FILE",
        )
    return [cell for cell in cells if cell.variant not in left_out]


def _out_of_reach(stage: Stage, cells: list[Cell]) -> dict[str, str]:
    """Variants whose ImageNet weights are neither here nor to be had, and why."""
    from ..learning.backbone import create_backbone

    left_out: dict[str, str] = {}
    for cell in cells:
        if (
            cell.start != "imagenet"
            or cell.variant in left_out
            or read_manifest(stage.folder / cell.name)
        ):
            continue
        try:
            model, size = cell.config.model, cell.config.train.image_size
            create_backbone(model.backbone, cell.start, model.weights, size)
        except InputError as fault:
            left_out[cell.variant] = str(fault)
            log(f"variant {cell.variant} is left out: {fault}")
    return left_out


def _check_models(stage: Stage, cells: list[Cell]) -> None:
    """Raises InputError where a cell that is still to be trained names a model that timm lacks, or
    that does not take its images' sizes.
    """
    missing = [cell for cell in cells if read_manifest(stage.folder / cell.name) is None]
    if missing:  # the libraries take seconds
        from ..learning.sizes import check_pretraining, check_training

        for cell in missing:
            if cell.backbone:
                check_pretraining(cell.config)
            check_training(cell.config)


def _start_anew(stage: Stage, cells: list[Cell], shared: list[Cell]) -> None:
    """Remove all that is to be made again at once: what a stopped `--force` did not come to must
    not look finished.
    """
    (stage.folder / layout.MANIFEST).unlink(missing_ok=True)
    parts = [part_with(stage, cell.name, cell.config) for cell in cells]
    for part in [*parts, *(backbone_part(stage, cell) for cell in shared)]:
        with part.lock():
            remove_folder(part.folder)


def run_cells(stage: Stage) -> list[Cell]:
    """Pretrain and train everything of this rank's share that is not up to date; returns the grid
    when all pretrainings are there.
    """
    # a rank that waits would take an old result for the new one
    if stage.options.force and world_size() > 1:
        raise InputError(
            "--force works in a single process only", "torchrun", f"remove {stage.folder} instead"
        )
    trained_folds(stage.config)  # refused before anything is trained
    declared = declared_cells(stage.config)
    _check_models(stage, declared)
    if any(cell.start == "imagenet" for cell in declared):
        stage.upstream(layout.VOLUMES)  # before the hub is asked, which takes its time
    cells = startable(stage, declared)
    shared = list(pretrainings(cells).values())
    if stage.options.force:
        _start_anew(stage, cells, shared)
    own, mine = stage.share(shared), stage.share(cells)
    for cell in own:
        pretrain_backbone(backbone_part(stage, cell))
    others = {cell.backbone: cell for cell in shared if cell not in own}

    def await_backbone(key: str | None) -> None:
        if cell := others.pop(key, None):
            wait_for(backbone_part(stage, cell), backbone_is_current)

    # what needs no pretraining first, while another rank may still be at one
    for cell in sorted(mine, key=lambda cell: cell.backbone is not None):
        await_backbone(cell.backbone)
        train_cell(stage, cell)
    for key in [*others]:  # the probes ask for all of them
        await_backbone(key)
    return cells


def await_cells(stage: Stage, cells: list[Cell]) -> None:
    """Return when all ranks have trained their cells."""
    mine = stage.share(cells)
    for cell in cells:
        if cell not in mine:
            wait_for(
                part_with(stage, cell.name, cell.config), partial(cell_is_current, stage, cell=cell)
            )
