"""Stage 01's files: one folder of PNG slices a series with a sidecar, their index, and the list of files that became no slice."""

import csv
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from .artifacts import digest
from .config import ConvertConfig, resolved
from .convert import SliceImage, arranged, pictures
from .parallel import Failure, spread
from .runtime import atomic_folder, atomic_path, log, progress, remove_temporaries, timed, write_text
from .sources import SIDECAR, VERSION, SeriesTask, list_files, series_folders

INDEX, QUARANTINE = "index.parquet", "quarantine.csv"
COLUMNS = {
    "instance_number": pl.Int64, "order": pl.Int32, "z_mm": pl.Float64, "rows": pl.Int32, "cols": pl.Int32, "spacing_y_mm": pl.Float64,
    "spacing_x_mm": pl.Float64, "flags": pl.String, "decoder": pl.String, "transfer_syntax": pl.String, "png": pl.String,
}  # fmt: skip
PNG = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # older ones use SUB when no level is named
    PNG += [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG]


def _settings(config: ConvertConfig) -> dict[str, Any]:
    """What pictures and rows depend on besides the files."""
    return {"version": VERSION, **{key: value for key, value in resolved(config).items() if key != "timeout_s"}}


def _sidecar(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """A series' sidecar where the series is done and its files and settings are the same as then."""
    try:
        found = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("fingerprint") == fingerprint else None


def _write_png(path: Path, image: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", image, PNG)[1])


def convert_series(task: SeriesTask, data: Path, target: Path, config: ConvertConfig) -> dict[str, Any]:
    """Convert one series into `<target>/<patient>/<series>/` and return its sidecar: fingerprint, rows, quarantine, deaths, bytes."""
    listing = list_files(task.path, data)
    deaths: list[str] = []
    with atomic_folder(target / task.name) as folder:
        found, quarantined = [], [*listing.refused]
        for k, (file, picture) in enumerate(pictures(listing, config, lambda k, image: _write_png(folder / f"{k}.part", image), deaths)):
            if isinstance(picture, Failure):
                quarantined.append((file, picture.reason))
                (folder / f"{k}.part").unlink(missing_ok=True)
            else:
                found.append((f"{k}.part", picture))
        slices = arranged(found, config)
        names = _names(slices)
        for item, name in zip(slices, names, strict=True):
            os.rename(folder / item.file, folder / name)
        rows = {column: [getattr(item, column) for item in slices] for column in COLUMNS if column != "png"}
        rows["png"] = [f"{task.name}/{name}" for name in names]
        sidecar = {"fingerprint": _fingerprint(listing.fingerprint, config), "bytes": listing.bytes, "deaths": deaths, "rows": rows,
                   "quarantine": sorted({(os.path.relpath(file, data), reason) for file, reason in quarantined})}  # fmt: skip
        (folder / SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
    return sidecar


def _fingerprint(files: str, config: ConvertConfig) -> str:
    return digest({"files": files, **_settings(config)})


def _names(slices: Sequence[SliceImage]) -> list[str]:
    """`<instance>.png`; a number that is there again gets `-2`, `-3` and so on."""
    seen: Counter[int] = Counter()
    names = []
    for item in slices:
        seen[item.instance_number] += 1
        again = seen[item.instance_number]
        names.append(f"{item.instance_number}{f'-{again}' if again > 1 else ''}.png")
    return names


def convert_all(tasks: Sequence[SeriesTask], prints: Sequence[str], data: Path, target: Path, config: ConvertConfig, jobs: int,
                scheduler: str | None = None, force: bool = False) -> dict[str, Any]:  # fmt: skip
    """Convert every series that is new or changed, remove those that are gone, write index and quarantine; returns the counts."""
    target.mkdir(parents=True, exist_ok=True)
    remove_temporaries(target, depth=1)
    _remove_orphans(target, {task.name for task in tasks})
    done = {k: None if force else _sidecar(target / tasks[k].name, _fingerprint(prints[k], config)) for k in range(len(tasks))}
    missing = [k for k, sidecar in done.items() if sidecar is None]
    work = partial(convert_series, data=data, target=target, config=config)

    def run() -> list[dict[str, Any]]:
        made = []
        for k, answer in progress(spread(work, [tasks[k] for k in missing], jobs, scheduler), len(missing), "slices", "series"):
            if isinstance(answer, Failure):
                lost = [(os.path.relpath(tasks[missing[k]].path, data), answer.reason)]
                answer = {"rows": {}, "quarantine": lost, "deaths": [], "bytes": 0}
            done[missing[k]] = answer
            made.append(answer)
        return made

    made, seconds = timed(run)
    index = _index(tasks, done)
    with atomic_path(target / INDEX) as temporary:
        index.write_parquet(temporary)
    rows = sorted(tuple(row) for sidecar in done.values() for row in sidecar["quarantine"])
    write_text(target / QUARANTINE, _csv([("path", "reason"), *rows]))
    return _summary(index, rows, made, seconds)


def _index(tasks: Sequence[SeriesTask], done: dict[int, Any]) -> pl.DataFrame:
    """All rows in the order of the tasks."""
    schema = {"patient_id": pl.String, "series_id": pl.String, "source": pl.String, **COLUMNS}
    frames = [
        pl.DataFrame(done[k]["rows"], schema=COLUMNS).with_columns(
            patient_id=pl.lit(task.patient_id), series_id=pl.lit(task.series_id), source=pl.lit(task.source)
        )
        for k, task in enumerate(tasks)
    ]
    return pl.concat([pl.DataFrame(schema=schema), *(frame.select(list(schema)) for frame in frames)])


def _csv(rows: Sequence[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _remove_orphans(target: Path, names: set[str]) -> None:
    """Remove the slices of series that are listed no more."""
    for path in series_folders(target):
        if "/".join(path.split(os.sep)[-2:]) not in names:
            log(f"{path}: listed no more, removed")
            shutil.rmtree(path)


def _summary(index: pl.DataFrame, quarantine: Sequence[tuple[str, str]], made: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The counts of the manifest, also logged. Rates are of what this run converted."""
    slices = sum(len(sidecar["rows"].get("png", ())) for sidecar in made)
    deaths = Counter(cause for sidecar in made for cause in sidecar["deaths"])
    counts = {
        "series": index.select("patient_id", "series_id").n_unique(),
        "slices": len(index),
        "by_source": _count(index["source"]), "by_decoder": _count(index["decoder"]),
        "by_transfer_syntax": _count(index["transfer_syntax"]), "by_flags": _count(index["flags"].replace("", "none")),
        "quarantined": len(quarantine), "by_reason": _count([reason.partition(":")[0] for _, reason in quarantine]),
        "converted_now": {"series": len(made), "slices": slices, "worker_deaths": dict(sorted(deaths.items())),
                          "slices_per_s": round(slices / seconds, 1), "mb_per_s": round(sum(s["bytes"] for s in made) / 1e6 / seconds, 1)},
    }  # fmt: skip
    for name, value in counts.items():
        log(f"{name}: " + (", ".join(f"{key} {number}" for key, number in value.items()) if isinstance(value, dict) else str(value)))
    return counts


def _count(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
