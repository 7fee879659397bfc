"""Stage 02's files: slices on disk to `<patient>_<series>.npy` with a sidecar each, series by
series, and their index.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from ..run import layout
from ..run.config import VolumeConfig, resolved
from ..run.manifest import digest
from ..slices.geometry import PIXEL_MM, RESCALED, USABLE, typical_mm
from ..slices.sources import VOLUME_VERSION
from ..system.console import log, progress
from ..system.contained import Failure
from ..system.errors import InputError
from ..system.files import atomic_path, remove_temporaries, write_json
from ..system.frames import read_frame
from ..system.pool import spread
from .build import Volume, build_volume, common_size, resample_labels

SLICE_COLUMNS = (
    "patient_id",
    "series_id",
    "source",
    "instance_number",
    "order",
    "z_mm",
    "rows",
    "cols",
    "spacing_y_mm",
    "spacing_x_mm",
    "flags",
    "png",
    "crc32",
)


def usable(slices: pl.DataFrame) -> pl.DataFrame:
    """Slices of one series that go into its volume: those without a flag that leaves them out,
    superior first.
    """
    return slices.filter(pl.col("flags").is_in(USABLE)).sort("order")


def volume_of(images: Iterator[np.ndarray], slices: pl.DataFrame, config: VolumeConfig) -> Volume:
    """`build_volume` for the usable `slices` of one series (rows of the slice index) and their
    images in the same order.
    """
    sizes = list(slices.select("rows", "cols").iter_rows())
    spacing = _common_mm(slices)
    return build_volume(images, sizes, heights(slices), spacing, config, _plausible(slices).rows())


def labels_of(
    labels: Sequence[np.ndarray],
    count: int,
    slices: pl.DataFrame,
    row: dict[str, Any],
    config: VolumeConfig,
) -> np.ndarray:
    """`resample_labels` for the usable `slices` of one series and labels (rows, cols) of each, onto
    the volume of the index row `row`.
    """
    box = row["box_y0"], row["box_y1"], row["box_x0"], row["box_x1"]
    return resample_labels(labels, count, heights(slices), _common_mm(slices), box, config)


def heights(slices: pl.DataFrame) -> np.ndarray:
    """Positions (N,) of slices along their normal in mm, NaN where unknown."""
    return slices["z_mm"].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _plausible(slices: pl.DataFrame) -> pl.DataFrame:
    """Pixel spacings (y, x), NaN where they are none."""
    mm = pl.col("spacing_y_mm", "spacing_x_mm").cast(pl.Float64)
    return slices.select(pl.when(mm.is_between(*PIXEL_MM)).then(mm).otherwise(float("nan")))


def _common_mm(slices: pl.DataFrame) -> tuple[float, float]:
    """The most common plausible pixel spacing (y, x) of the slices of the common size, so that no
    single damaged file rules the series; 1 where there is none.
    """
    rows, cols = common_size(list(slices.select("rows", "cols").iter_rows()))
    common = slices.filter(rows=rows, cols=cols)
    y, x = (typical_mm(common[name].to_list()) for name in ("spacing_y_mm", "spacing_x_mm"))
    return y or 1.0, x or 1.0


def read_slice(path: Path) -> np.ndarray:
    """One grey PNG (rows, cols) uint8."""
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise InputError(
            "slice missing or damaged", str(path), f"run {layout.script(layout.SLICES)} again"
        )
    return image


def build_series(
    slices: pl.DataFrame, source: Path, target: Path, config: VolumeConfig
) -> dict[str, Any] | None:
    """Build, store and describe the volume of one series; reuse it where slices and config are the
    same as last time.

    Returns the row of the volume index, or None where no slice is usable.
    """
    ids = slices["patient_id"][0], slices["series_id"][0]
    path, fingerprint = target / layout.volume_file(*ids), volume_fingerprint(slices, config)
    known = _known(path, fingerprint)
    if known is not None:
        return known
    try:
        made = store_volume(slices, lambda png: read_slice(source / png), path, config)
    except InputError:
        with contextlib.suppress(OSError):  # of a read-only folder
            # so that stage 01 makes this series again
            source.joinpath(*ids, layout.SIDECAR).unlink()
        raise
    if made:
        write_json(path.with_suffix(".json"), {"fingerprint": fingerprint, **made})
    return made["row"] if made else None


def volume_fingerprint(slices: pl.DataFrame, config: VolumeConfig) -> str:
    """Of all that a volume depends on."""
    return digest(
        {"version": VOLUME_VERSION, "slices": slices.write_csv(), "config": resolved(config)}
    )


def store_volume(
    slices: pl.DataFrame, image: Callable[[str], np.ndarray], path: Path, config: VolumeConfig
) -> dict[str, Any] | None:
    """Build and write the volume of one series, whose pictures `image` gives by their names; bytes
    and index row, None where no slice is usable.
    """
    used = usable(slices)
    if used.is_empty():
        return None
    # it must not vouch for another volume if this run is killed between the two
    path.with_suffix(".json").unlink(missing_ok=True)
    cv2.setNumThreads(1)
    volume = volume_of(map(image, used["png"]), used, config)
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, volume.array)
    row = _describe(volume, used, len(slices) - len(used), path)
    return {"bytes": path.stat().st_size, "row": row}


def _known(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The index row of a volume that is there whole, made from the same slices and config; None
    where it is to be built.
    """
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    same = (
        isinstance(known, dict)
        and known.get("fingerprint") == fingerprint
        and known.get("bytes") == size
    )
    return known["row"] if same else None


def _describe(volume: Volume, used: pl.DataFrame, left_out: int, path: Path) -> dict[str, Any]:
    depth, height, width = volume.array.shape
    instances, sizes = (
        used["instance_number"].to_list(),
        list(used.select("rows", "cols").iter_rows()),
    )
    common = common_size(sizes)
    z_mm, y_mm, x_mm = (round(mm, 4) if np.isfinite(mm) else None for mm in volume.spacing_mm)
    return {
        **{name: used[name][0] for name in ("patient_id", "series_id", "source")},
        "path": path.name,
        "depth": depth,
        "height": height,
        "width": width,
        "slices_used": len(used),
        "slices_left_out": left_out,
        "slices_resized": sum(
            size != common or flags == RESCALED
            for size, flags in zip(sizes, used["flags"], strict=True)
        ),
        **dict(zip(("box_y0", "box_y1", "box_x0", "box_x1"), volume.box, strict=True)),
        "spacing_z_mm": z_mm,
        "spacing_y_mm": y_mm,
        "spacing_x_mm": x_mm,
        "plane_instances": [instances[i] for i in volume.plane_sources],
        "digest": digest(path),
    }


def build_all(
    source: Path,
    target: Path,
    config: VolumeConfig,
    jobs: int,
    scheduler: str | None = None,
    force: bool = False,
    tidy: bool = True,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Build every series of `source`'s slice index into `target`, here or on a Dask cluster; with
    `tidy` the volumes of other series go.

    Returns the manifest's counts and the digest of every volume by file name.
    """
    slices = read_frame(source / layout.INDEX, SLICE_COLUMNS)
    prepare_folder(target, force)
    groups = slices.partition_by("patient_id", "series_id", maintain_order=True)
    work = partial(build_series, source=source, target=target, config=config)
    rows: list[dict[str, Any] | None] = [None] * len(groups)
    for k, row in progress(spread(work, groups, jobs, scheduler), len(groups), "volumes", "series"):
        rows[k] = None if isinstance(row, Failure) else row
        if rows[k] is None:
            warn_of_none(groups[k], row.reason if isinstance(row, Failure) else "")
    remove_temporaries(target)  # of workers that were killed
    (target / layout.SLICE_TABLE).unlink(missing_ok=True)  # of volumes made without slices
    (target / layout.QUARANTINE).unlink(missing_ok=True)
    return write_index(rows, target, source / layout.INDEX, tidy)


def prepare_folder(target: Path, force: bool) -> None:
    """Make the folder of the volumes, without what a killed run left; with `force` nothing in it is
    taken for done.
    """
    target.mkdir(parents=True, exist_ok=True)
    remove_temporaries(target)
    # now, lest a stopped run goes on with old ones
    for sidecar in target.glob("*.json") if force else ():
        sidecar.unlink()


def warn_of_none(slices: pl.DataFrame, reason: str) -> None:
    """Name a series that gives no volume."""
    flags = ", ".join(slices["flags"].unique().sort().to_list())
    name = f"{slices['patient_id'][0]}/{slices['series_id'][0]}"
    log(f"warning: no volume of series {name}: {reason or f'no usable slice ({flags})'}")


def write_index(
    rows: Sequence[dict[str, Any] | None], target: Path, slice_table: Path, tidy: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the volume index from the rows of all series; returns what `build_all` does.

    Raises:
        InputError: there is no volume at all.
    """
    if not any(rows):
        raise InputError(
            f"not one of {len(rows)} series gives a volume",
            str(slice_table),
            "see the flags of its slices",
        )
    table = pl.DataFrame([row for row in rows if row], schema=INDEX_SCHEMA)
    with atomic_path(target / layout.INDEX) as temporary:
        table.write_parquet(temporary)
    if tidy:
        for path in set(target.glob("*.npy")) - {target / name for name in table["path"]}:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    counts = {
        "series": len(rows),
        "volumes": len(table),
        "slices_used": int(table["slices_used"].sum()),
        "slices_left_out": int(table["slices_left_out"].sum()),
        "bytes": sum(row["depth"] * row["height"] * row["width"] for row in rows if row),
    }
    return counts, dict(table.select("path", "digest").iter_rows())


INDEX_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "patient_id": pl.String,
    "series_id": pl.String,
    "source": pl.String,
    "path": pl.String,
    "depth": pl.Int32,
    "height": pl.Int32,
    "width": pl.Int32,
    "slices_used": pl.Int32,
    "slices_left_out": pl.Int32,
    "slices_resized": pl.Int32,
    "box_y0": pl.Int32,
    "box_y1": pl.Int32,
    "box_x0": pl.Int32,
    "box_x1": pl.Int32,
    "spacing_z_mm": pl.Float64,
    "spacing_y_mm": pl.Float64,
    "spacing_x_mm": pl.Float64,
    "plane_instances": pl.List(pl.Int64),
    "digest": pl.String,
}
