"""What stage 05 does: masks onto volumes, a segmenter a fold, organs of all series, Dice out of
fold.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ..folds import run_folds
from ..learning.side_by_side import start_anew, train_side_by_side
from ..run import layout
from ..run.manifest import digest
from ..run.stage import Stage
from ..system.console import log, progress, say
from ..system.contained import Failure
from ..system.errors import InputError
from ..system.files import atomic_path
from ..system.frames import read_frame
from ..system.machine import pick_device
from ..system.pool import spread
from ..system.processes import parent_stage
from ..volumes.store import SLICE_COLUMNS
from .data import Masked
from .figures import draw_strip
from .find import ENDS, label_volume, organ_boxes, rows_of, without_islands
from .loss import dice_scores
from .masks import ORGANS, slice_table, store_mask, with_masks
from .model import OrganNet, load_segmenter
from .stage import SECTIONS, mask_inputs
from .train import OrganFold, train_organs

ROW_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "patient_id": pl.String,
    "series_id": pl.String,
    "fold": pl.Int64,
    "organ": pl.String,
    **dict.fromkeys(ENDS, pl.Float64),
    "voxels": pl.Int64,
    "ml": pl.Float64,
    "visible": pl.List(pl.Float64),
}
DICE_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "patient_id": pl.String,
    "series_id": pl.String,
    "fold": pl.Int64,
    "organ": pl.String,
    "dice": pl.Float64,
}


def find_all(stage: Stage, files: dict[str, Path], inputs: dict[str, Any]) -> None:
    """Everything, from the masks to the manifest; what a stopped run has finished is not done
    again.
    """
    if stage.options.jobs:
        torch.set_num_threads(stage.jobs)
    index = _labelled(stage)
    folds = sorted(index["fold"].unique())
    with_mask = set(index.filter(pl.col("series_id").is_in(list(files)))["fold"])
    if alone := [fold for fold in folds if not with_mask - {fold}]:
        log(f"{stage.name}: skipped, fold {alone[0]} would have no mask to be trained on")
        return
    if stage.options.force:
        _start_anew(stage, folds, inputs)
    masked = lay_masks(stage, files, index)
    device = pick_device(stage.device_name)
    if not train_side_by_side(stage, "pipeline.organs", folds, inputs, SECTIONS):
        for fold in folds:
            train_fold(stage, fold, masked, index, inputs, device)
    found = [find_fold(stage, fold, masked, index, inputs, device) for fold in folds]
    rows, table = (pl.concat(tables) for tables in zip(*found, strict=True))
    _write(stage.folder, rows, table)
    summary = mean_dice(table)
    say("Dice, out of fold: " + ", ".join(f"{name} {summary[name]:.3f}" for name in summary))
    counts = {"series": len(index), "masked": len(masked), "dice": summary}
    models = [f"{layout.fold_folder(fold)}/{layout.MODEL}" for fold in folds]
    stage.finish(counts, [layout.ORGAN_TABLE, layout.DICE, layout.OUTLINES, *models])


def train_one(stage: Stage, fold: int, files: dict[str, Path], inputs: dict[str, Any]) -> None:
    """Train the segmenter of one fold on the masks that are laid, unless that is done.

    Raises:
        InputError: no such fold, or the masks are not laid.
    """
    if stage.options.jobs:
        torch.set_num_threads(stage.jobs)
    index = _labelled(stage)
    if fold not in (folds := sorted(index["fold"].unique())):
        raise InputError(f"there is no fold {fold}", f"--fold {fold}", f"choose one of {folds}")
    masks = stage.part(layout.MASKS)
    if not masks.made_from(mask_inputs(stage, files), ["volume"]):
        again = f"run {layout.script(layout.ORGANS)}"
        raise InputError("the masks are not on the grids of the volumes", str(masks.folder), again)
    if not parent_stage() and stage.stale([fold], inputs, SECTIONS):
        stage.writer = True
        with stage.lock():  # the manifest of all goes before a fold changes
            stage.current(inputs, SECTIONS, whole=False)
        if stage.options.force:
            _start_anew(stage, [fold], inputs)
    masked = masked_series(stage, files, index)
    train_fold(stage, fold, masked, index, inputs, pick_device(stage.device_name))


def _start_anew(stage: Stage, folds: Sequence[int], inputs: dict[str, Any]) -> None:
    """`start_anew`, of what the segmenters found too."""
    start_anew(stage, folds, inputs, SECTIONS)
    for fold in folds:
        found = stage.part(f"{layout.fold_folder(fold)}/{layout.FOUND}")
        with found.lock():
            (found.folder / layout.MANIFEST).unlink(missing_ok=True)


def _labelled(stage: Stage) -> pl.DataFrame:
    """Rows of the volume index of the labelled series with their patients' `fold`."""
    folds = run_folds(stage)
    index = read_frame(stage.upstream(layout.VOLUMES) / layout.INDEX)
    index = index.filter(pl.col("source") == "train")
    return index.join(folds, on="patient_id", how="inner", maintain_order="left")


def masked_series(stage: Stage, files: dict[str, Path], index: pl.DataFrame) -> dict[str, Masked]:
    """Volumes with a mask, by series id, in the order of the index."""
    volumes, masks = stage.upstream(layout.VOLUMES), stage.folder / layout.MASKS
    chosen = index.filter(pl.col("series_id").is_in(list(files)))
    return {
        row["series_id"]: Masked(
            row["patient_id"], row["series_id"], volumes / row["path"], masks / row["path"]
        )
        for row in chosen.iter_rows(named=True)
    }


def lay_masks(stage: Stage, files: dict[str, Path], index: pl.DataFrame) -> dict[str, Masked]:
    """Bring the masks onto their volumes' grids, unless that is done; returns `masked_series`.

    Raises:
        InputError: a mask does not fit its series.
    """
    part, found = stage.part(layout.MASKS), masked_series(stage, files, index)
    with part.lock():
        if not part.current(mask_inputs(stage, files), ["volume"]):
            part.finish(
                {"masks": len(found)}, _lay(part, files, index, stage.upstream(layout.VOLUMES))
            )
    if lost := len(files) - len(found):
        log(f"warning: {lost} masks are of series without a volume, and are not used")
    return found


def _lay(part: Stage, files: dict[str, Path], index: pl.DataFrame, volumes: Path) -> list[str]:
    slices = read_frame(slice_table(volumes, part.out / layout.SLICES), SLICE_COLUMNS)
    items, config = with_masks(files, index, slices), part.config
    part.folder.mkdir(parents=True, exist_ok=True)
    work = partial(
        store_mask,
        target=part.folder,
        config=config.volume,
        max_pixels=config.convert.max_pixels,
    )
    names: set[str] = set()
    answers = spread(work, items, part.jobs)
    for k, answer in progress(answers, len(items), "masks", "masks"):
        if isinstance(answer, Failure):
            raise InputError(answer.reason, str(items[k][0]), "give --jobs 1, or remove the file")
        names.add(answer)
    for path in part.folder.glob("*.npy"):
        if path.name not in names:  # of a mask that is gone
            path.unlink()
    return sorted(names)


def train_fold(
    stage: Stage,
    fold: int,
    masked: dict[str, Masked],
    index: pl.DataFrame,
    inputs: dict[str, Any],
    device: torch.device,
) -> None:
    """Train the segmenter of one fold, unless that is done."""
    held_out = set(index.filter(fold=fold)["patient_id"])
    train = [one for one in masked.values() if one.patient_id not in held_out]
    part = stage.part(layout.fold_folder(fold))
    with part.lock():
        if part.current(inputs, SECTIONS):
            return
        init = stage.config.organs.init
        pretrained = stage.upstream(layout.VOCO) / layout.BACKBONE if init == "voco2d" else None
        data = OrganFold(fold, train, part.fingerprint)
        train_organs(stage.config, data, part.folder, device, pretrained)
        part.finish({"fold": fold, "train_series": len(train)}, [layout.MODEL, layout.LOG])


def find_fold(
    stage: Stage,
    fold: int,
    masked: dict[str, Masked],
    index: pl.DataFrame,
    inputs: dict[str, Any],
    device: torch.device,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The organs of the series that one fold holds out, and the Dice of each where they have masks:
    tables of `ROW_SCHEMA` and `DICE_SCHEMA`, made unless that is done.
    """
    own, shown = index.filter(fold=fold), next(iter(masked))  # of which a picture is drawn
    model = stage.folder / layout.fold_folder(fold) / layout.MODEL
    part = stage.part(f"{layout.fold_folder(fold)}/{layout.FOUND}")
    drawn = shown not in set(own["series_id"]) or (stage.folder / layout.OUTLINES).is_file()
    with part.lock():
        if not part.current(inputs | {layout.MODEL: digest(model)}, SECTIONS, drawn):
            rows: list[dict[str, Any]] = []
            dice: list[dict[str, Any]] = []
            series = _found(stage, own, masked, load_segmenter(model, device)[0], shown)
            for row, organs, scores in progress(series, len(own), part.name, "series"):
                ids = {name: row[name] for name in ("patient_id", "series_id", "fold")}
                spacing = [row[f"spacing_{axis}_mm"] for axis in "zyx"]
                rows += [ids | one for one in rows_of(organs, spacing)]
                named = zip(ORGANS, scores, strict=False)
                dice += [ids | {"organ": name, "dice": score} for name, score in named]
            tables = pl.DataFrame(rows, ROW_SCHEMA), pl.DataFrame(dice, DICE_SCHEMA)
            _write(part.folder, *tables)
            part.finish({"series": len(own)}, [layout.ORGAN_TABLE, layout.DICE])
    scores_of = pl.read_csv(part.folder / layout.DICE, schema=DICE_SCHEMA)
    return read_frame(part.folder / layout.ORGAN_TABLE), scores_of


def _write(folder: Path, rows: pl.DataFrame, dice: pl.DataFrame) -> None:
    with atomic_path(folder / layout.ORGAN_TABLE) as path:
        rows.write_parquet(path)
    with atomic_path(folder / layout.DICE) as path:
        dice.write_csv(path)


def _found(
    stage: Stage, index: pl.DataFrame, masked: dict[str, Masked], model: OrganNet, shown: str
) -> Iterator[tuple[dict[str, Any], Sequence[Any], list[float | None]]]:
    """Every series of `index`: its row, its organs, and the Dice of each where it has a mask. On a
    CPU in threads, a series each: threads within one gain little.
    """
    import joblib

    volumes, options = stage.upstream(layout.VOLUMES), stage.config.organs
    device = next(model.parameters()).device

    def find(row: dict[str, Any]) -> tuple[Any, ...]:
        volume = np.load(volumes / row["path"], mmap_mode="r")
        labels = without_islands(label_volume([model], volume, options, device))
        scores: list[float | None] = []
        if one := masked.get(row["series_id"]):
            truth = np.load(one.mask)
            scores = dice_scores(labels, truth, len(ORGANS))
            if row["series_id"] == shown:
                draw_strip(volume, labels, truth, stage.folder / layout.OUTLINES)
        return row, organ_boxes(labels), scores

    threads, before = stage.jobs if device.type == "cpu" else 1, torch.get_num_threads()
    pool = joblib.Parallel(threads, require="sharedmem", return_as="generator")
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield from pool(joblib.delayed(find)(row) for row in index.iter_rows(named=True))
    finally:
        torch.set_num_threads(before)


def mean_dice(table: pl.DataFrame) -> dict[str, float]:
    """Mean Dice of each organ over patients, of each the mean over series; `table` has the columns
    of `dice.csv`.
    """
    patients = table.group_by("patient_id", "organ").agg(pl.col("dice").mean())
    means = dict(patients.group_by("organ").agg(pl.col("dice").mean()).iter_rows())
    return {name: round(means[name], 4) for name in ORGANS if means.get(name) is not None}
