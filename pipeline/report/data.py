"""What a run made of its data: conversion, a montage of volumes, the predicted test patients."""

from collections import Counter
from typing import Any

import numpy as np
import polars as pl

from ..run import layout
from ..volumes.sampling import evenly
from .charts import jpeg_uri
from .inputs import Run, read_csv

SERIES = {"train": 4, "unlabelled": 2}  # of the montage by source
PLANES = 6  # of a series
REASONS = 6  # paths a quarantine reason, reasons of fallbacks


def conversion(run: Run) -> dict[str, Any] | None:
    """Counts of the conversion, and the quarantined files by reason."""
    from pydicom.uid import UID

    found = run.conversion()
    if found is None:
        return None
    folder, counts = found
    lost = read_csv(run.out / folder / layout.QUARANTINE)
    kind = pl.col("reason").str.split(":").list.first().alias("kind")
    files = pl.struct("path", "reason").head(REASONS).alias("files")
    reasons = lost.group_by(kind, maintain_order=True).agg(pl.len(), files)
    syntaxes = {
        UID(name).name if name[:1].isdigit() else name: number
        for name, number in counts["by_transfer_syntax"].items()
    }
    tables = {
        "Transfer syntax": syntaxes,
        "Decoder": counts["by_decoder"],
        "Flags": counts["by_flags"],
    }
    quarantine = reasons.sort("len", descending=True).to_dicts()
    return {"counts": counts, "tables": tables, "quarantine": quarantine}


def montage(run: Run) -> list[dict[str, Any]]:
    """Evenly chosen series of each source with evenly chosen planes from top to bottom."""
    rows = []
    for source, count in SERIES.items():
        part = run.index.filter(pl.col("source") == source)
        chosen = sorted(set(evenly(len(part), count).tolist())) if len(part) else []
        rows += [part.row(k, named=True) for k in chosen]
    return [
        {**row, "pictures": plane_pictures(run, row, evenly(row["depth"], PLANES).tolist())}
        for row in rows
    ]


def plane_pictures(run: Run, row: dict[str, Any], planes: list[int]) -> list[dict[str, Any]]:
    """Planes of the volume of an index row, each with the instance number of its nearest slice;
    none where the file is gone.
    """
    path = run.out / layout.VOLUMES / row["path"]
    if not path.is_file():
        return []
    volume = np.load(path, mmap_mode="r")
    return [
        {
            "uri": jpeg_uri(volume[plane]),
            "plane": plane,
            "instance": row["plane_instances"][plane],
        }
        for plane in planes
    ]


def test_predictions(run: Run) -> dict[str, Any]:
    """Counts of stage 08, and its fallbacks by reason."""
    fallbacks = read_csv(run.out / layout.SUBMISSION / layout.FALLBACKS)
    return {
        "counts": run.manifests[layout.SUBMISSION]["counts"],
        "reasons": Counter(fallbacks["reason"].to_list()).most_common(REASONS),
    }
