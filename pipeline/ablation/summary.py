"""What the finished cells say: the table of variants and of pairs, with intervals."""

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from ..competition.metric import score_arrays
from ..competition.targets import COLUMNS, SCORE_KEYS
from ..run import layout
from ..run.manifest import finished
from ..run.stage import Stage
from ..system.console import progress
from ..system.files import write_json, write_text
from ..system.frames import read_frame
from .grid import Cell, backbone_part
from .statistics import FIGURES, Draws, cell_draws, compare, long_rows, markdown, sentence


def read_cells(
    stage: Stage, cells: list[Cell]
) -> tuple[np.ndarray, dict[Cell, dict[str, np.ndarray]]]:
    """Labels (N, 13) and each cell's `raw` and `nested` probabilities (N, 13): calibrated without
    the patients that they are of.
    """
    from ..evaluation.scoring import nested
    from ..folds import read_folds

    labels = stage.labels()
    folds, found = read_folds(stage.upstream(layout.FOLDS) / layout.FOLD_TABLE, labels), {}
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
    listed = {first for first, _ in options.pairs} | {options.reference}
    pairs = [*options.pairs, *((name, options.reference) for name in targets if name not in listed)]
    compared = compare(
        draws, targets, [pair for pair in pairs if set(pair) <= set(targets)], stage.config.seed
    )
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
    write_json(stage.folder / layout.TABLE_JSON, result)
    write_text(stage.folder / layout.TABLE_MD, markdown(result))
    write_text(stage.folder / layout.TABLE, pl.DataFrame(list(long_rows(result))).write_csv())
    write_text(stage.folder / layout.CELLS, table.write_csv())
    return [layout.TABLE_JSON, layout.TABLE_MD, layout.TABLE, layout.CELLS]
