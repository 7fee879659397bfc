"""Stage 07: scores of out-of-fold predictions."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..run import layout
from ..run.manifest import digest
from ..run.runs import MODELS, names_of, runs_of
from ..run.stage import Stage, as_paths, stage_function
from ..system.console import log, say
from ..system.errors import InputError
from ..system.files import atomic_path, write_json

TABLES = [layout.OOF_TABLE, layout.SCORE_TABLE, layout.CALIBRATION, "patients.parquet"]
PICTURES = ["precision_recall.png", "reliability.png", "confusion.png"]


def gather(stage: Stage, oof: Sequence[Path], runs: dict[str, Stage]) -> dict[str, object]:
    """Fingerprint of what is scored."""
    labels = stage.data / "train.csv"
    if runs:
        own = {
            key: {"name": name, **run.inputs(layout.VOLUMES, layout.FOLDS)}
            for name, (key, run) in zip(names_of(runs.values()), runs.items(), strict=True)
        }
        return {**stage.inputs(files=[labels]), **stage.limit, MODELS: own}
    if not oof:
        made = stage.inputs(layout.VOLUMES, layout.FOLDS, layout.CLASSIFIERS, files=[labels])
        return made | stage.limit
    for path in oof:
        if not path.is_file():
            raise InputError(
                f"no such OOF table: '{path}'",
                "--oof",
                "give CSV or parquet files",
            )
    return {
        **stage.inputs(files=[labels]),
        **stage.limit,
        "oof": [[path.name, digest(path)] for path in oof],
    }


def read_tables(stage: Stage, oof: Sequence[Path], runs: dict[str, Stage]) -> Any:
    """Labels, the models' series tables by name, and the folds of the nested calibration.

    Raises:
        InputError: a table is wrong, or they are not of the same patients, series or folds.
    """
    from . import scoring

    labels = stage.labels()
    if oof:
        series = scoring.read_oof(list(oof), labels)
        return labels, series, scoring.nested_folds(series, labels, stage.config)
    named = dict(zip(names_of(runs.values()), runs.values(), strict=True)) or {"folds": stage}
    found = {
        name: scoring.read_trained(
            run.upstream(layout.FOLDS),
            run.upstream(layout.CLASSIFIERS),
            run.upstream(layout.VOLUMES),
            labels,
        )
        for name, run in named.items()
    }
    series = scoring.aligned({name: table for name, (table, _) in found.items()})
    drawn = [folds for _, folds in found.values()]
    return labels, series, scoring.nested_folds(series, labels, stage.config, drawn)


@stage_function(layout.SCORES)
def score_oof(stage: Stage, oof: Path | str | Sequence[Path | str] | None = None) -> None:
    """Score the run's predictions, those of the runs `models` blended, or the tables `oof` of one
    or more models, unless these very ones are scored; the table is printed either way.
    """
    given = as_paths(oof)
    if given and stage.models:
        raise InputError("tables or runs, not both", "--oof and --models", "leave one of them out")
    if not given and stage.skips_unlabelled():
        return
    runs = runs_of(stage) if stage.models else {}
    read = cache(lambda: read_tables(stage, given, runs))
    # what the tables refuse leaves the last scores as they were
    if stage.current(gather(stage, given, runs), ["seed", "score"], check=read):
        from .scoring import summary

        say(summary(json.loads((stage.folder / layout.SCORE_TABLE).read_text(encoding="utf-8"))))
        return
    from ..competition.targets import COLUMNS
    from . import baselines, figures, scoring

    labels, series, folds = read()
    if given:
        floors = {}
        log("baselines are left out: tables given by --oof come without volumes")
    else:
        volumes = next(iter(runs.values()), stage).upstream(layout.VOLUMES)
        own = next(iter(series.values()))
        floors = baselines.predict(volumes, own, labels, folds, stage.jobs)
    outcome = scoring.score_predictions(series, labels, folds, stage.config, floors)
    with atomic_path(stage.folder / TABLES[0]) as path:
        outcome.series.write_csv(path)
    write_json(stage.folder / TABLES[1], outcome.scores)
    write_json(stage.folder / TABLES[2], outcome.parameters)
    with atomic_path(stage.folder / TABLES[3]) as path:
        outcome.patients.write_parquet(path)
    truth, raw, nested = (
        outcome.patients.select(f"{kind}_{c}" for c in COLUMNS).to_numpy()
        for kind in ("label", "raw", "nested")
    )
    figures.precision_recall(truth, nested, stage.folder / PICTURES[0])
    figures.reliability_curves(truth, raw, nested, stage.folder / PICTURES[1])
    figures.confusion_tables(truth, nested, stage.folder / PICTURES[2])
    say(scoring.summary(outcome.scores))
    stage.finish(outcome.scores["counts"], [*TABLES, *PICTURES])
