"""Tables of our own on disk."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl


def read_frame(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A parquet file, or those of its `columns`. Opened here: polars takes a path with `[`, `*` or
    `?` in it for a pattern.
    """
    with open(path, "rb") as handle:
        return pl.read_parquet(handle, columns=list(columns) if columns else None)
