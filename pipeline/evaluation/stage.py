"""Stage 07: scores of out-of-fold predictions."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..run import layout
from ..run.manifest import digest
from ..run.stage import Stage, stage_function
from ..system.console import log, say
from ..system.errors import InputError
from ..system.files import atomic_path, write_json

TABLES = [layout.OOF_TABLE, layout.SCORE_TABLE, layout.CALIBRATION, "patients.parquet"]
PICTURES = ["precision_recall.png", "reliability.png", "confusion.png"]


def gather(stage: Stage, oof: Sequence[Path]) -> dict[str, object]:
    """Fingerprint of what is scored."""
    labels = stage.data / "train.csv"
    if not oof:
        made = stage.inputs(layout.VOLUMES, layout.FOLDS, layout.CLASSIFIERS, files=[labels])
        return made | stage.limit
    for path in oof:
        if not path.is_file():
            raise InputError(
                f"no such OOF table: '{path}'",
                "--oof",
                "give CSV or parquet files; key=value goes before --oof",
            )
    return {
        **stage.inputs(files=[labels]),
        **stage.limit,
        "oof": [[path.name, digest(path)] for path in oof],
    }


@stage_function(layout.SCORES)
def score_oof(stage: Stage, oof: Sequence[Path | str] | None = None) -> None:
    """Score the run's predictions, or the tables `oof` of one or more models, unless these very
    ones are scored; the table is printed either way.
    """
    given = [Path(path) for path in oof or ()]
    if not given and stage.skips_unlabelled():
        return
    if stage.current(gather(stage, given), ["seed", "score"]):
        from .scoring import summary

        say(summary(json.loads((stage.folder / layout.SCORE_TABLE).read_text(encoding="utf-8"))))
        return
    from ..competition.targets import COLUMNS
    from . import baselines, figures, scoring

    labels = stage.labels()
    if given:
        series = scoring.read_oof(given, labels)
        folds = scoring.nested_folds(series, labels, stage.config)
        floors = {}
        log("baselines are left out: tables given by --oof come without volumes")
    else:
        series, folds = scoring.read_trained(
            stage.upstream(layout.FOLDS),
            stage.upstream(layout.CLASSIFIERS),
            stage.upstream(layout.VOLUMES),
            labels,
        )
        own = next(iter(series.values()))
        floors = baselines.predict(stage.upstream(layout.VOLUMES), own, labels, folds, stage.jobs)
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
