"""How a run learnt: the curves of pretraining and of the folds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from ..competition.targets import TARGET_NAMES
from ..evaluation.curves import Line
from ..run import layout
from ..voco.crops import base_boxes, hits, overlap_labels, random_boxes
from .charts import Chart, chart, colour, curve, data_uri
from .inputs import Run, read_csv


def pretraining(run: Run) -> dict[str, Any]:
    """Curves and pictures of stage 04."""
    manifest, records = run.manifests[layout.VOCO], run.log(layout.VOCO)
    options, counts = manifest["config"]["pretrain"], manifest["counts"]
    merit = counts.get("merit", "position_accuracy")
    drawn = [
        ("Loss and its terms", ("loss", "intra", "inter", "reg")),
        ("Correlation of label and similarity", ("correlation",)),
        ("Standard deviation of embeddings", ("std",)),
    ]
    curves = [
        chart(title, "step", [*_curves(records, names)])
        for title, names in drawn
        if names[0] in ("loss", *(records[-1] if records else ()))
    ]
    folder = run.out / layout.VOCO
    return {
        "counts": counts,
        "options": options,
        "merit": merit,
        "figures": _figures(options, counts, records, merit),
        "charts": [curves[0], _held_out(options, counts, records, merit), *curves[1:]],
        "pictures": {
            path.stem: data_uri(path.read_bytes(), "png") for path in folder.glob("*.png")
        },
    }


def _curves(records: list[dict[str, Any]], names: tuple[str, ...]) -> Iterator[Line]:
    """One line for each of `names` that is logged; a single one needs no label."""
    found = [name for name in names if records and name in records[-1]]
    for k, name in enumerate(found):
        label, shade = (name, colour(k)) if len(names) > 1 else ("", "c1")
        yield Line(label, shade, curve(records, "step", name))


def _held_out(
    options: dict[str, Any], counts: dict[str, Any], records: list[dict[str, Any]], merit: str
) -> Chart:
    """The figure that the backbone is chosen by, beside its baselines and chance."""
    levels = {
        name.removesuffix(f"_{merit}").replace("_", " "): value
        for name, value in counts.get("baselines", {}).items()
        if name.endswith(f"_{merit}")
    }
    rules = [("chance" if levels else "", "rule", _by_chance(options).get(merit))]
    rules += [(name, colour(1 + k), value) for k, (name, value) in enumerate(levels.items())]
    lines = [
        Line(name, style, [(0, value), (options["steps"], value)])
        for name, style, value in rules
        if value is not None
    ]
    label = "network" if levels else ""
    lines.append(Line(label, "c1", curve(records, "step", merit), dots=True))
    return chart(f"{merit.replace('_', ' ').capitalize()}, held out", "step", lines)


def _figures(
    options: dict[str, Any], counts: dict[str, Any], records: list[dict[str, Any]], merit: str
) -> list[dict[str, Any]]:
    """Rows of the table of held-out figures: of the exported network (figures beside `merit`: of
    the step that had its merit), of the baselines, and by chance.
    """
    best = next((row for row in reversed(records) if row.get(merit) == counts[merit]), {}) | {
        merit: counts[merit]
    }
    baselines, chance = counts.get("baselines", {}), _by_chance(options)
    names = [merit, *(name for name in (*chance, "position_accuracy") if name in best)]
    return [
        {
            "name": name.replace("_", " "),
            "network": best[name],
            "baselines": {
                key.removesuffix(f"_{name}").replace("_", " "): value
                for key, value in baselines.items()
                if key.endswith(f"_{name}")
            },
            "chance": chance.get(name),
        }
        for name in dict.fromkeys(names)
    ]


def _by_chance(options: dict[str, Any]) -> dict[str, float]:
    """Position accuracies of a base crop chosen blindly; of other methods nothing."""
    if options.get("method", "voco2d") != "voco2d":
        return {}
    size, grid, Z = options["image_size"], options["grid"], options.get("z_bins", 1)
    boxes = random_boxes(size, grid, 4096, np.random.default_rng(0))
    overlap = overlap_labels(boxes, base_boxes(size, grid))
    # the first slab stands for all
    whole = np.concatenate([overlap, np.zeros((len(boxes), overlap.shape[1] * (Z - 1)))], 1)
    found = [hits(np.full(len(boxes), k), whole, Z) for k in range(whole.shape[1])]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def organs(run: Run) -> dict[str, Any]:
    """Dice of stage 05 by organ, out of fold, and a picture of what was found."""
    folder = run.out / layout.ORGANS
    table = read_csv(folder / layout.DICE)
    dice = pl.col("dice").cast(pl.Float64, strict=False)
    patients = table.group_by("patient_id", "organ").agg(dice.mean()).drop_nulls("dice")
    rows = [
        {
            "organ": organ,
            "patients": len(values),
            "mean": float(values.mean()),
            "low": float(np.quantile(values, 0.1)),
            "high": float(np.quantile(values, 0.9)),
        }
        for organ in table["organ"].unique(maintain_order=True)
        if len(values := patients.filter(pl.col("organ") == organ)["dice"].to_numpy())
    ]
    picture = data_uri((folder / layout.OUTLINES).read_bytes(), "png")
    return {"counts": run.manifests[layout.ORGANS]["counts"], "rows": rows, "picture": picture}


def training(run: Run) -> dict[str, Any]:
    """Curves of stage 06: of every fold, and of every target as the mean over folds."""
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
        floor = run.scores["floors"]["weighted_means"]["score"]
        last = max((row["epoch"] for row in epochs), default=1)
        held.append(Line("weighted class means", "rule", [(1, floor), (last, floor)]))
    terms = [{"epoch": row["epoch"], **row["terms"]} for row in epochs]
    parts, scored = (
        [
            Line(name, colour(k), curve(table, "epoch", name))
            for k, name in enumerate((*TARGET_NAMES, "slices", "visible"))
        ]
        for table in (terms, epochs)
    )
    return {"folds": _loss_and_score(loss, held), "targets": _loss_and_score(parts, scored)}


def _loss_and_score(loss: list[Line], score: list[Line]) -> list[Chart]:
    return [
        chart("Training loss", "epoch", loss),
        chart("Official score, held out", "epoch", score),
    ]
