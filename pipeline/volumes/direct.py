"""Stage 02 without stage 01's slices (`convert.keep_png=false`): from the images to volumes in
memory, one series after another.

Slices, quarantine and volumes are those that the two stages give. The slice index and the list of
files that became no slice lie beside the volumes.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..run import layout
from ..run.config import ConvertConfig, VolumeConfig
from ..slices.convert import decode_series_files
from ..slices.sources import SeriesTask, list_files
from ..slices.store import (
    check_shared,
    describe_lost,
    describe_series,
    is_passing,
    series_fingerprint,
    with_frame,
    write_tables,
)
from ..system.console import progress, timed
from ..system.contained import Failure
from ..system.files import remove_temporaries, write_json
from ..system.pool import spread
from .store import (
    SLICE_COLUMNS,
    prepare_folder,
    store_volume,
    volume_fingerprint,
    warn_of_none,
    write_index,
)


def _volume_path(task: SeriesTask, target: Path) -> Path:
    return target / layout.volume_file(task.patient_id, task.series_id)


def read_series(
    task: SeriesTask, data: Path, target: Path, convert: ConvertConfig, config: VolumeConfig
) -> dict[str, Any]:
    """Read one series and write its volume; returns its sidecar, written too: that of its volume
    with that of its slices (`slices`). `row` is None where no slice is usable.
    """
    check_shared(data, target)
    listing, deaths = list_files(task.path, data), list[str]()
    slices, failed = decode_series_files(listing, convert, deaths)
    found = describe_series(task, listing, slices, failed, deaths, data, convert)
    table = with_frame(task, found)["rows"].select(SLICE_COLUMNS)
    images = {name: one.image for name, one in zip(table["png"], slices, strict=True)}
    made = None
    if len(table):
        path = _volume_path(task, target)
        made = store_volume(table, lambda name: images[name], path, config)  # type: ignore[arg-type,return-value]
    return _note(task, target, found, made, volume_fingerprint(table, config))


def _note(
    task: SeriesTask,
    target: Path,
    found: dict[str, Any],
    made: dict[str, Any] | None,
    fingerprint: str,
) -> dict[str, Any]:
    """Write the sidecar of a series, in the form of `build_series` as far as that goes."""
    made = made or {"bytes": None, "row": None}
    sidecar = {"fingerprint": fingerprint, **made, "slices": found}
    write_json(_volume_path(task, target).with_suffix(".json"), sidecar)
    return sidecar


def _finished(
    task: SeriesTask, files: str, target: Path, convert: ConvertConfig, config: VolumeConfig
) -> dict[str, Any] | None:
    """The sidecar of a series that is done, from the same files and with the same settings."""
    path = _volume_path(task, target)
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found = with_frame(task, sidecar["slices"])
        table = found["rows"].select(SLICE_COLUMNS)
        if (
            found["fingerprint"] != series_fingerprint(files, convert)
            or sidecar["fingerprint"] != volume_fingerprint(table, config)
            or is_passing(found)
            or (sidecar["row"] and path.stat().st_size != sidecar["bytes"])
        ):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**sidecar, "slices": found}


def build_directly(
    tasks: Sequence[SeriesTask],
    prints: Sequence[str],
    data: Path,
    target: Path,
    convert: ConvertConfig,
    config: VolumeConfig,
    jobs: int,
    scheduler: str | None = None,
    force: bool = False,
    tidy: bool = True,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Build the volumes of the series that are new or changed; returns what `build_all` does, with
    the counts of the conversion.
    """
    prepare_folder(target, force)
    done = [
        _finished(task, files, target, convert, config)
        for task, files in zip(tasks, prints, strict=True)
    ]
    missing = [k for k, sidecar in enumerate(done) if sidecar is None]
    work = partial(read_series, data=data, target=target, convert=convert, config=config)

    def build_missing() -> None:
        answers = spread(work, [tasks[k] for k in missing], jobs, scheduler)
        for number, answer in progress(answers, len(missing), "volumes", "series"):
            k = missing[number]
            if isinstance(answer, Failure):
                found = describe_lost(tasks[k], prints[k], data, convert, answer.reason)
                answer = _note(tasks[k], target, found, None, "")
            done[k] = {**answer, "slices": with_frame(tasks[k], answer["slices"])}

    _, seconds = timed(build_missing)
    remove_temporaries(target)  # of workers that were killed
    return _write_all(done, missing, target, seconds, tidy)


def _write_all(
    done: Sequence[dict[str, Any] | None],
    missing: Sequence[int],
    target: Path,
    seconds: float,
    tidy: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tables of a run: slices, quarantine, volumes."""
    notes = [one for one in done if one]
    slices = [one["slices"] for one in notes]
    path = target / layout.SLICE_TABLE
    conversion = write_tables(path, slices, [slices[k] for k in missing], seconds)
    seen = [k for k, one in enumerate(slices) if len(one["rows"])]
    for k in seen:
        if not notes[k]["row"]:
            warn_of_none(slices[k]["rows"], "")
    counts, digests = write_index([notes[k]["row"] for k in seen], target, path, tidy)
    return {**counts, "conversion": conversion}, digests
