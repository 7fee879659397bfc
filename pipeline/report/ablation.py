"""The report's sections on stage 10: tables, forest plots and probes as plain values."""

import json
from typing import Any

import polars as pl

from ..ablation.statistics import FIGURES, text, verdict
from ..competition.targets import TARGETS
from ..run import layout
from .charts import ticks
from .inputs import Run

STYLES = {"better": "c3", "worse": "c2", "no difference shown": "soft"}


def comparison(run: Run) -> dict[str, Any]:
    """Figures and cost of every variant, differences of every pair, forest plots, and the sentences
    that they support.
    """
    path = run.out / layout.ABLATION / layout.TABLE_JSON
    found = json.loads(path.read_text(encoding="utf-8"))
    costs = {row["variant"]: row for row in found["costs"]}
    variants = [
        {
            "name": row["variant"],
            "only": [] if len(row["targets"]) == len(TARGETS) else row["targets"],
            "cells": [text(part["own"]) for part in row["figures"].values()],
            **costs[row["variant"]],
        }
        for row in found["variants"]
    ]
    pairs = [
        {
            "name": f"{row['variant']} − {row['reference']}"
            + (" (primary)" if row.get("role") == "primary" else ""),
            "cells": [
                (
                    text(part["difference"], signed=True),
                    STYLES[verdict(part["difference"], FIGURES[figure], row["seeds"])],
                )
                for figure, part in row["figures"].items()
            ],
        }
        for row in found["compared"]
    ]
    forests = [forest(found["compared"], figure) for figure in ("score", "mAP")]
    return {**found, "figures": list(FIGURES), "rows": variants, "pairs": pairs, "forests": forests}


def forest(compared: list[dict[str, Any]], figure: str) -> dict[str, Any]:
    """Differences of one figure with intervals on a common axis: positions 0 to 100 around `zero`,
    and the axis' ticks.
    """
    parts = [(row, row["figures"][figure]["difference"]) for row in compared]
    parts = [(row, part) for row, part in parts if part["low"] is not None]
    reach = [part[end] for _, part in parts for end in ("low", "value", "high")]
    low, high = min([0.0, *reach]), max([0.0, *reach]) + 1e-9

    def at(value: float) -> float:
        return round(4 + 92 * (value - low) / (high - low), 2)

    rows = [
        {
            "name": f"{row['variant']} − {row['reference']}",
            "text": text(part, signed=True),
            "style": STYLES[verdict(part, FIGURES[figure], row["seeds"])],
            **{end: at(part[end]) for end in ("low", "value", "high")},
        }
        for row, part in parts
    ]
    marks = [(at(x), f"{x:g}".replace("-", "−")) for x in ticks(low, high)]
    return {
        "figure": figure,
        "side": "left" if FIGURES[figure] else "right",
        "zero": at(0.0),
        "rows": rows,
        "ticks": marks,
    }


def probe_table(run: Run) -> dict[str, Any]:
    """Probe values by question and probe for every backbone and kind of statistics: mean, least and
    most over the seeds.
    """
    table = pl.read_csv(
        (run.out / layout.ABLATION / layout.PROBES).read_bytes(),
        schema_overrides={"value": pl.Float64},
    ).with_columns(pl.col("statistics").fill_null(""))
    if "hospital" in table.columns:
        table = table.filter(pl.col("hospital") == "all")
    keys, value = ["backbone", "statistics"], pl.col("value")
    spread = [value.mean().alias("mean"), value.min().alias("low"), value.max().alias("high")]
    found = table.group_by("question", "probe", "figure", *keys, maintain_order=True).agg(spread)
    columns = found.select(keys).unique(maintain_order=True).rows()
    cells = {
        tuple(row[:5]): dict(zip(("mean", "low", "high"), row[5:], strict=True))
        for row in found.iter_rows()
    }
    rows = [
        {
            "question": key[0],
            "probe": key[1],
            "figure": key[2],
            "cells": [cells.get((*key, *column)) for column in columns],
        }
        for key in found.select("question", "probe", "figure").unique(maintain_order=True).rows()
    ]
    means = (
        table.filter(pl.col("figure") == "Dice")
        .group_by(keys, maintain_order=True)
        .agg(value.mean())
    )
    return {
        "columns": columns,
        "rows": rows,
        "means": means.rows(),
        "seeds": table.filter(pl.col("statistics") != "")["seed"].n_unique(),
    }
