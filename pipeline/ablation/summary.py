"""What the finished cells say: the table of variants and of pairs, with intervals."""

from collections.abc import Collection

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from ..competition.metric import score_arrays
from ..competition.targets import COLUMNS, SCORE_KEYS
from ..run import layout
from ..run.config import AblationConfig
from ..run.manifest import finished
from ..run.stage import Stage
from ..system.console import progress
from ..system.files import write_json, write_text
from ..system.frames import read_frame
from .grid import Cell, backbone_part
from .statistics import (
    FIGURES,
    Draws,
    cell_draws,
    compare,
    correct,
    long_rows,
    markdown,
    sentence,
)


def read_cells(
    stage: Stage, cells: list[Cell]
) -> tuple[np.ndarray, dict[Cell, dict[str, np.ndarray]]]:
    """Labels (N, 13) of the judged patients, and each cell's `raw` and `nested` probabilities
    (N, 13): calibrated without the patients that they are of.
    """
    from ..evaluation.scoring import nested

    labels, folds = judged_patients(stage)
    found = {}
    with threadpool_limits(1):
        for cell in progress(cells, len(cells), "calibration", "cells"):
            frames = nested(
                {"cell": read_frame(stage.folder / cell.name / layout.OOF)},
                labels,
                folds,
                stage.config.score,
            )
            found[cell] = {
                name: frames[name].select(COLUMNS).to_numpy() for name in ("raw", "nested")
            }
    return labels.select(pl.col(COLUMNS).cast(pl.Float64)).to_numpy(), found


def judged_patients(stage: Stage) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Labels of the patients of `ablation.folds`, and the folds within which calibration is nested:
    the run's own where all of them are judged, else new ones (`score.nested_folds`).
    """
    from ..folds import run_folds, stratified_folds

    labels, config = stage.labels(), stage.config
    folds = run_folds(stage, labels)
    if not config.ablation.folds:
        return labels, folds
    held_out = folds.filter(pl.col("fold").is_in(config.ablation.folds))
    labels = labels.join(held_out, on="patient_id", how="semi", maintain_order="left")
    count = config.score.nested_folds
    return labels, stratified_folds(
        labels, stage.series(), count, config.seed, "score.nested_folds"
    )


def seconds_of(stage: Stage, cell: Cell) -> dict[str, float]:
    """Seconds spent in training steps: of the cell's folds, and of the pretraining that it starts
    from.
    """
    own = finished(stage.folder / cell.name)["counts"]["training_s"]
    before = (
        finished(backbone_part(stage, cell).folder)["counts"]["training_s"]
        if cell.backbone
        else 0.0
    )
    return {"training_s": own, "pretraining_s": before}


def declared_pairs(options: AblationConfig, variants: Collection[str]) -> list[tuple[str, str]]:
    """What is compared, the primary pair first: of `options.pairs` and of every variant that is
    first in none of them with the reference, those of `variants`. No two variants are compared
    twice, in whatever order.
    """
    listed = {first for first, _ in options.named_pairs} | {options.reference}
    others = [(name, options.reference) for name in variants if name not in listed]
    once: dict[frozenset[str], tuple[str, str]] = {}
    for pair in (*options.named_pairs, *others):
        if set(pair) <= set(variants):
            once.setdefault(frozenset(pair), pair)
    return list(once.values())


def summarise(stage: Stage, cells: list[Cell]) -> list[str]:
    """Score every cell, compare the variants, write table.json, table.csv, table.md and cells.csv;
    returns these names.
    """
    options, (labels, probabilities) = stage.config.ablation, read_cells(stage, cells)
    draws: dict[str, list[Draws]] = {}
    rows = []
    for cell in cells:
        found = cell_draws(
            labels, probabilities[cell]["nested"], options.bootstrap, stage.config.seed
        )
        draws.setdefault(cell.variant, []).append(found)
        figures = dict(
            zip(FIGURES, found.figures(cell.config.train.targets)[0].tolist(), strict=True)
        )
        losses = dict(
            zip((f"loss_{name}" for name in SCORE_KEYS[:-1]), found.loss[0].tolist(), strict=True)
        )
        raw = score_arrays(labels, probabilities[cell]["raw"])["score"]
        rows.append(
            {
                "variant": cell.variant,
                "seed": cell.seed,
                **figures,
                "raw_score": raw,
                **losses,
                **seconds_of(stage, cell),
            }
        )
    table = pl.DataFrame(rows)
    targets = {cell.variant: cell.config.train.targets for cell in cells}
    compared = compare(draws, targets, declared_pairs(options, targets), stage.config.seed)
    correct(compared, options.primary)
    own = compare(draws, targets, [(name, name) for name in targets], stage.config.seed)
    costs = table.group_by("variant", maintain_order=True).agg(
        pl.col("training_s", "pretraining_s").mean().round(1)
    )
    result = {
        "patients": len(labels),
        "seeds": list(options.seeds),
        "reference": options.reference,
        "variants": own,
        "compared": compared,
        "costs": costs.to_dicts(),
        "sentences": [sentence(row) for row in compared],
    }
    return write_tables(stage, result, table)


def write_tables(stage: Stage, result: dict, cells: pl.DataFrame) -> list[str]:
    """Write table.json, table.md, table.csv and cells.csv, and the same below `grids/`, where no
    other grid in this folder writes over them; returns their paths within the stage's folder.
    """
    texts = {
        layout.TABLE_MD: markdown(result),
        layout.TABLE: pl.DataFrame(list(long_rows(result))).write_csv(),
        layout.CELLS: cells.write_csv(),
    }
    written = []
    for folder in ("", f"{layout.GRIDS}/{stage.config.name}/"):
        write_json(stage.folder / f"{folder}{layout.TABLE_JSON}", result)
        for name, text in texts.items():
            write_text(stage.folder / f"{folder}{name}", text)
        written += [folder + name for name in (layout.TABLE_JSON, *texts)]
    return written
