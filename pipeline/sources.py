"""What there is to convert: the series of a data set, their files and fingerprints. No pixel library is imported."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .artifacts import digest
from .runtime import InputError, log

NIFTI = (".nii", ".nii.gz")
SIDECAR = "series.json"  # marks a finished series folder of stage 01
VERSION = 4  # raised when the same file would become another picture or another row


@dataclass(frozen=True)
class SeriesTask:
    """One series to convert: its ids in the index, and the folder of DICOM files or NIfTI file that it is."""

    patient_id: str
    series_id: str
    source: str
    path: str

    @property
    def name(self) -> str:
        """Its folder below 01_slices."""
        return f"{self.patient_id}/{self.series_id}"


class Listing(NamedTuple):
    """The files of one series in the order of their numbers, (path, reason) of those refused, and a fingerprint of all."""

    files: list[str]
    refused: list[tuple[str, str]]
    bytes: int
    fingerprint: str


def test_tasks(data: Path, listed: Any) -> list[SeriesTask]:
    """The test series of the table (`patient_id`, `series_id`)."""
    return _listed(data / "test_images", listed, "test")


def _listed(folder: Path, listed: Any, source: str) -> list[SeriesTask]:
    pairs = listed.select("patient_id", "series_id").iter_rows()
    return [SeriesTask(patient, series, source, str(folder / patient / series)) for patient, series in pairs]


def plan(data: Path, listed: Any) -> list[SeriesTask]:
    """The series of the table (`patient_id`, `series_id`), then what lies in `unlabelled/`; warns of folders that no row names.

    Raises:
        InputError: two inputs of one name, such as `a.nii` and `a.nii.gz`.
    """
    tasks = _listed(data / "train_images", listed, "train")
    strangers = sorted(set(series_folders(data / "train_images")) - {task.path for task in tasks})
    if strangers:
        log(f"warning: {len(strangers)} series folders are in no row of train_series_meta.csv and ignored, e.g. {strangers[0]}")
    for path in series_folders(data / "unlabelled"):
        patient, series = path.split(os.sep)[-2:]
        tasks.append(SeriesTask(f"unlabelled-{patient}", series, "unlabelled", path))
    for path in sorted(path for path in (data / "unlabelled").glob("*") if path.name.endswith(NIFTI)):
        tasks.append(SeriesTask(f"unlabelled-{path.name.partition('.nii')[0]}", "nifti", "unlabelled", str(path)))
    seen: dict[str, str] = {}
    for task in tasks:
        if seen.setdefault(task.name, task.path) != task.path:
            raise InputError("two inputs would share a folder", f"{seen[task.name]} and {task.path}", "rename or remove one of them")
    return tasks


def series_folders(folder: Path) -> list[str]:
    """Paths <folder>/<patient>/<series>, sorted."""
    return sorted(str(path) for path in folder.glob("[!.]*/[!.]*") if path.is_dir())


def fingerprints(tasks: Sequence[SeriesTask], data: Path) -> list[str]:
    """Of every series' input files: names, sizes and times. Threads, because a shared file system answers slowly."""
    with ThreadPoolExecutor(16) as threads:
        return [listing.fingerprint for listing in threads.map(partial(list_files, data=data), [task.path for task in tasks])]


def list_files(path: str | Path, data: str | Path) -> Listing:
    """The `.dcm` files of a series folder, or one NIfTI file, from one scan of its folder.

    A link that leads out of the image folder (the first folder below `data`, which itself may be a link) is refused.
    """
    path, found, refused = str(path), [], []
    top = os.path.realpath(os.path.join(data, os.path.relpath(path, data).split(os.sep)[0]))
    folder, single = os.path.split(path) if path.endswith(NIFTI) else (path, "")

    def outside(link: str) -> bool:
        return os.path.commonpath((os.path.realpath(link), top)) != top

    try:
        with os.scandir(folder) as entries:
            for entry in [] if outside(folder) else entries:
                if entry.name != single if single else not entry.name.lower().endswith(".dcm"):
                    continue
                if entry.is_symlink() and outside(entry.path):
                    refused.append((entry.path, "link out of the data folder"))
                elif not entry.is_file():
                    refused.append((entry.path, "not a file"))
                else:
                    found.append((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
        if not found and not refused:
            refused.append((path, "link out of the data folder" if outside(folder) else "no DICOM files"))
    except OSError as fault:
        found, refused = [], [(path, f"no such folder: {type(fault).__name__}")]
    found.sort(key=lambda item: (instance_of(item[0]) is None, instance_of(item[0]), item[0]))
    files, size = [os.path.join(folder, name) for name, _, _ in found], sum(size for _, size, _ in found)
    return Listing(files, sorted(refused), size, digest({"found": found, "refused": sorted(refused)}))


def instance_of(name: str) -> int | None:
    """Instance number that the name of a DICOM file says, None where it says none."""
    return int(name[:-4]) if re.fullmatch(r"[0-9]{1,12}\.dcm", name, re.IGNORECASE) else None
