"""Stage 01's files: one folder of PNG slices a series with a sidecar, their index, and the list of
files that became no slice.
"""

import csv
import io
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..run import layout
from ..run.config import ConvertConfig, decisive
from ..run.manifest import digest
from ..system.console import log, printable, progress, timed
from ..system.contained import Failure
from ..system.errors import InputError
from ..system.files import atomic_folder, atomic_path, remove_folder, remove_temporaries, write_text
from ..system.pool import KILLED, spread
from .convert import Picture, SliceImage, arranged, pictures
from .geometry import NO_AIR, UNPLACED
from .png import encode_png
from .sources import VERSION, Listing, SeriesTask, list_files, series_folders

IDS = {"patient_id": pl.String, "series_id": pl.String, "source": pl.String}
COLUMNS = {
    "instance_number": pl.Int64,
    "order": pl.Int32,
    "z_mm": pl.Float64,
    "rows": pl.Int32,
    "cols": pl.Int32,
    "spacing_y_mm": pl.Float64,
    "spacing_x_mm": pl.Float64,
    "flags": pl.String,
    "decoder": pl.String,
    "transfer_syntax": pl.String,
    "crc32": pl.Int64,
    "png": pl.String,
}
# reasons of the machine (network, load, memory), not the file
PASSING = ("not readable:", "took longer than", "brought down by SIGKILL", KILLED)


def _write_png(folder: Path, k: int, image: np.ndarray) -> None:
    # buffered: writes on where a full disk took only a part, and so meets its error
    with open(folder / f"{k}.part", "wb") as handle:
        handle.write(encode_png(image))


def slice_names(slices: Sequence[SliceImage]) -> Iterator[str]:
    """`<instance>.png`; a number that is there again gets `-2`, `-3` and so on."""
    seen: Counter[int] = Counter()
    for item in slices:
        seen[item.instance_number] += 1
        again = seen[item.instance_number]
        yield f"{item.instance_number}{f'-{again}' if again > 1 else ''}.png"


def series_fingerprint(files: str, config: ConvertConfig) -> str:
    """Of all that a series' pictures and rows depend on."""
    return digest({"files": files, "version": VERSION, **decisive(config), "timeout_s": None})


def check_shared(*folders: Path) -> None:
    """InputError where a machine of a cluster does not see a folder."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                "no such folder",
                f"{folder} on {socket.gethostname()}",
                "give a folder that all machines share under one path",
            )


def describe_series(
    task: SeriesTask,
    listing: Listing,
    slices: Sequence[SliceImage],
    failed: Iterable[tuple[str, str]],
    deaths: Sequence[str],
    data: Path,
    config: ConvertConfig,
) -> dict[str, Any]:
    """The sidecar of a series: fingerprint, bytes read, causes of lost children, rows of the index
    and quarantine.
    """
    rows = {
        column: [getattr(item, column) for item in slices] for column in COLUMNS if column != "png"
    }
    return {
        "fingerprint": series_fingerprint(listing.fingerprint, config),
        "bytes": listing.bytes,
        "ignored": listing.ignored,
        "deaths": list(deaths),
        "rows": {**rows, "png": [f"{task.name}/{name}" for name in slice_names(slices)]},
        "quarantine": sorted({(os.path.relpath(file, data), reason) for file, reason in failed}),
    }


def convert_series(
    task: SeriesTask, data: Path, target: Path, config: ConvertConfig
) -> dict[str, Any]:
    """Convert one series into `<target>/<patient>/<series>/` and return its sidecar.

    That is: fingerprint, bytes read, causes of lost children, rows of the index, bytes of each
    picture, and quarantine.
    """
    check_shared(data, target)
    listing = list_files(task.path, data)
    deaths: list[str] = []
    with atomic_folder(target / task.name) as folder:
        found: list[tuple[str, Picture]] = []
        failed = [*listing.refused]
        for k, (file, picture) in enumerate(
            pictures(listing, config, partial(_write_png, folder), deaths)
        ):
            if isinstance(picture, Failure):
                failed.append((file, picture.reason))
                (folder / f"{k}.part").unlink(missing_ok=True)
            else:
                found.append((f"{k}.part", picture))
        slices = arranged(found, config)
        for item, name in zip(slices, slice_names(slices), strict=True):
            os.rename(folder / item.file, folder / name)
        sidecar = describe_series(task, listing, slices, failed, deaths, data, config)
        sidecar["pictures"] = _picture_bytes(folder)
        (folder / layout.SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
    return sidecar


def describe_lost(
    task: SeriesTask, files: str, data: Path, config: ConvertConfig, reason: str
) -> dict[str, Any]:
    """The sidecar of a series that killed every process: no slice, all of it in quarantine."""
    nothing = Listing([], [], 0, files, {})
    return describe_series(task, nothing, [], [(task.path, reason)], [], data, config)


def _lost(
    task: SeriesTask, files: str, data: Path, target: Path, config: ConvertConfig, reason: str
) -> dict[str, Any]:
    sidecar = {**describe_lost(task, files, data, config, reason), "pictures": {}}
    with atomic_folder(target / task.name) as folder:
        (folder / layout.SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
    return sidecar


def _picture_bytes(folder: Path) -> dict[str, int]:
    """Sizes of the PNGs of a series by name."""
    with os.scandir(folder) as entries:
        return {
            entry.name: entry.stat().st_size
            for entry in sorted(entries, key=lambda entry: entry.name)
            if entry.name.endswith(".png")
        }


def _finished(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The sidecar of a series that is done, with all its pictures, and whose files and settings are
    the same as then.

    A series that lost slices for a `PASSING` reason is not done: whenever the stage works at all,
    it is tried again. A stage that is up to date does not work, lest it wait for the same hopeless
    files at every start; a raised convert.timeout_s, other data or --force make it work.
    """
    try:
        sidecar = json.loads((folder / layout.SIDECAR).read_text(encoding="utf-8"))
        pictures = _picture_bytes(folder)
    except (OSError, ValueError):
        return None
    done = (
        isinstance(sidecar, dict)
        and sidecar.get("fingerprint") == fingerprint
        and sidecar["pictures"] == pictures
        and not is_passing(sidecar)
    )
    return sidecar if done else None


def is_passing(sidecar: dict[str, Any]) -> bool:
    """True for a series that lost slices to the machine, not to damage."""
    return any(reason.startswith(PASSING) for _, reason in sidecar["quarantine"])


def convert_all(
    tasks: Sequence[SeriesTask],
    prints: Sequence[str],
    data: Path,
    target: Path,
    config: ConvertConfig,
    jobs: int = 1,
    scheduler: str | None = None,
    force: bool = False,
    tidy: bool = True,
) -> dict[str, Any]:
    """Convert the series that are new or changed, remove those that are gone (with `tidy`), write
    index and quarantine; returns the counts.
    """
    target.mkdir(parents=True, exist_ok=True)
    remove_temporaries(target, depth=1)
    if tidy:
        _remove_others(target, {task.name for task in tasks})

    def known(task: SeriesTask, files: str) -> dict[str, Any] | None:
        sidecar = (
            None if force else _finished(target / task.name, series_fingerprint(files, config))
        )
        return sidecar and with_frame(task, sidecar)

    with ThreadPoolExecutor(16) as threads:  # a shared file system answers slowly
        if force:  # now, lest a stopped run goes on with old ones
            list(
                threads.map(
                    lambda task: (target / task.name / layout.SIDECAR).unlink(missing_ok=True),
                    tasks,
                )
            )
        done: list[Any] = list(threads.map(known, tasks, prints))
    missing = [k for k, sidecar in enumerate(done) if sidecar is None]
    work = partial(convert_series, data=data, target=target, config=config)

    def convert_missing() -> None:
        answers = spread(work, [tasks[k] for k in missing], jobs, scheduler)
        for k, answer in progress(answers, len(missing), "slices", "series"):
            task = tasks[missing[k]]
            if isinstance(answer, Failure):
                answer = _lost(task, prints[missing[k]], data, target, config, answer.reason)
            done[missing[k]] = with_frame(task, answer)

    _, seconds = timed(convert_missing)
    if missing:
        os.sync()  # no picture was synced by itself, and soon a manifest vouches for all
    remove_temporaries(target, depth=1)  # of workers that were killed
    return write_tables(target / layout.INDEX, done, [done[k] for k in missing], seconds)


def _remove_others(target: Path, names: set[str]) -> None:
    """Remove the folders of series that are listed no more."""
    for path in series_folders(target):
        if os.path.relpath(path, target) not in names:
            log(f"{path}: listed no more, removed")
            remove_folder(Path(path))


def write_tables(
    path: Path, done: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Write the slice index at `path`, and the quarantine beside it, from the sidecars of all
    series; returns the counts, rates of those that were `made` in `seconds`.
    """
    index = pl.concat([sidecar["rows"] for sidecar in done])
    quarantine = sorted(tuple(row) for sidecar in done for row in sidecar["quarantine"])
    with atomic_path(path) as temporary:
        index.write_parquet(temporary)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *quarantine])
    write_text(path.with_name(layout.QUARANTINE), printable(text.getvalue()))
    _warn(index)
    ignored: Counter[str] = sum((Counter(sidecar["ignored"]) for sidecar in done), Counter())
    return _summary(index, quarantine, ignored, made, seconds)


def with_frame(task: SeriesTask, sidecar: dict[str, Any]) -> dict[str, Any]:
    """The sidecar with its rows as a part of the index: a tenth of the memory of lists."""
    ids = {name: [getattr(task, name)] * len(sidecar["rows"]["png"]) for name in IDS}
    return {**sidecar, "rows": pl.DataFrame({**ids, **sidecar["rows"]}, {**IDS, **COLUMNS})}


def _warn(index: pl.DataFrame) -> None:
    """Name what is in the index but not in the volumes, and hardly meant to be so."""
    for flag, column, what in (
        (
            NO_AIR,
            "name",
            "series hold no value below -500 HU: label maps, windowed exports or a lost intercept,"
            " not used; correct or remove them",
        ),
        (UNPLACED, "png", "slices have no position, or none that can be meant, and are not used"),
    ):
        flagged = index.filter(pl.col("flags").str.split(",").list.contains(flag))
        names = flagged.select("png", name=pl.concat_str("patient_id", "series_id", separator="/"))[
            column
        ].unique(maintain_order=True)
        if len(names):
            shown = ", ".join(names.head(5)) + (", ..." if len(names) > 5 else "")
            log(f"warning: {len(names)} {what}: {shown}")


def _summary(
    index: pl.DataFrame,
    quarantine: Sequence[tuple[str, ...]],
    ignored: dict[str, int],
    made: Sequence[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The counts of the manifest, also logged. Rates are of what this run converted."""

    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(sorted(pl.Series("value", values, pl.String).value_counts().iter_rows()))

    slices, size = sum(len(one["rows"]) for one in made), sum(one["bytes"] for one in made)
    counts = {
        "series": index.select("patient_id", "series_id").n_unique(),
        "slices": len(index),
        "by_source": count(index["source"]),
        "by_decoder": count(index["decoder"]),
        "by_transfer_syntax": count(index["transfer_syntax"]),
        "by_flags": count(index["flags"].replace("", "none")),
        "quarantined": len(quarantine),
        "by_reason": count([reason.partition(":")[0] for _, reason in quarantine]),
        "not_recognised": dict(sorted(ignored.items())),
        "worker_deaths": count([cause for one in made for cause in one["deaths"]]),
        "converted_now": slices,
        "slices_per_s": round(slices / max(seconds, 1e-9), 1),
        "mb_per_s": round(size / max(seconds, 1e-9) / 1e6, 1),
    }
    for name, value in counts.items():
        log(
            f"{name}: "
            + (
                ", ".join(f"{key} {number}" for key, number in value.items())
                if isinstance(value, dict)
                else str(value)
            )
        )
    return counts
