"""How a run learnt: the curves of pretraining and of the folds."""

from typing import Any

import numpy as np

from ..competition.targets import TARGET_NAMES
from ..evaluation.curves import Line
from ..run import layout
from ..voco.crops import base_boxes, overlap_labels, random_boxes
from .charts import Chart, chart, colour, curve, data_uri
from .inputs import Run


def pretraining(run: Run) -> dict[str, Any]:
    """Curves and pictures of stage 04."""
    manifest, records = run.manifests[layout.VOCO], run.log(layout.VOCO)
    options = manifest["config"]["pretrain"]
    by_chance = _by_chance(options["image_size"], options["grid"])
    terms = [
        Line(name, colour(k), curve(records, "step", name))
        for k, name in enumerate(("loss", "intra", "inter", "reg"))
    ]
    level = Line("", "rule", [(0, by_chance), (options["steps"], by_chance)])
    found = Line("", "c1", curve(records, "step", "position_accuracy"), dots=True)
    alone = {
        "correlation": "Correlation of label and similarity",
        "std": "Standard deviation of embeddings",
    }
    folder = run.out / layout.VOCO
    return {
        "counts": manifest["counts"],
        "options": options,
        "chance": by_chance,
        "charts": [
            chart("Loss and its terms", "step", terms),
            chart("Position accuracy, held out", "step", [level, found]),
            *(
                chart(title, "step", [Line("", "c1", curve(records, "step", key))])
                for key, title in alone.items()
            ),
        ],
        "pictures": {
            path.stem: data_uri(path.read_bytes(), "png") for path in folder.glob("*.png")
        },
    }


def _by_chance(image_size: int, grid: int) -> float:
    """Position accuracy of a base crop chosen blindly."""
    boxes = random_boxes(image_size, grid, 4096, np.random.default_rng(0))
    overlap = overlap_labels(boxes, base_boxes(image_size, grid))
    return float((overlap >= overlap.max(axis=1, keepdims=True) - 0.1).mean())


def training(run: Run) -> dict[str, Any]:
    """Curves of stage 05: of every fold, and of every target as the mean over folds."""
    prefix = f"{layout.CLASSIFIERS}/fold"
    logs = {name: run.log(name) for name in run.manifests if name.startswith(prefix)}
    loss, held = (
        [
            Line(f"fold {name.removeprefix(prefix)}", colour(k), curve(rows, "epoch", key))
            for k, (name, rows) in enumerate(logs.items())
        ]
        for key in ("loss", "score")
    )
    epochs = [row for rows in logs.values() for row in rows]
    if layout.SCORES in run.manifests:
        floor = run.scores()["floors"]["weighted_means"]["score"]
        last = max((row["epoch"] for row in epochs), default=1)
        held.append(Line("weighted class means", "rule", [(1, floor), (last, floor)]))
    terms = [{"epoch": row["epoch"], **row["terms"]} for row in epochs]
    parts, scored = (
        [
            Line(name, colour(k), curve(table, "epoch", name))
            for k, name in enumerate((*TARGET_NAMES, "slices"))
        ]
        for table in (terms, epochs)
    )
    return {"folds": _loss_and_score(loss, held), "targets": _loss_and_score(parts, scored)}


def _loss_and_score(loss: list[Line], score: list[Line]) -> list[Chart]:
    return [
        chart("Training loss", "epoch", loss),
        chart("Official score, held out", "epoch", score),
    ]
