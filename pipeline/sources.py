"""What there is to convert: the series of a data set, their files and fingerprints. Light: no pixel library is imported."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .artifacts import digest
from .runtime import log

NIFTI = (".nii", ".nii.gz")
SIDECAR = "series.json"  # marks a finished series folder of stage 01
VERSION = 1  # raised when the same file would become another picture or another row


@dataclass(frozen=True)
class Listing:
    """The files of one series in the order of their numbers, the (path, reason) of those refused, and a fingerprint of all."""

    files: list[str]
    refused: list[tuple[str, str]]
    bytes: int
    fingerprint: str


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


def plan(data: Path, series: Any) -> list[SeriesTask]:
    """The series of the table (`patient_id`, `series_id`), then what lies in `unlabelled/`; warns of folders that no row names."""
    tasks = [SeriesTask(patient, number, "train", str(data / "train_images" / patient / number))
             for patient, number in series.select("patient_id", "series_id").iter_rows()]  # fmt: skip
    listed = {task.path for task in tasks}
    strangers = [path for path in series_folders(data / "train_images") if path not in listed]
    if strangers:
        log(f"warning: {len(strangers)} folders in train_images are in no row of train_series_meta.csv and ignored, e.g. {strangers[0]}")
    for path in series_folders(data / "unlabelled"):
        patient, number = path.split(os.sep)[-2:]
        tasks.append(SeriesTask(f"unlabelled-{patient}", number, "unlabelled", path))
    for path in sorted(str(path) for path in (data / "unlabelled").glob("*") if path.name.endswith(NIFTI)):
        tasks.append(SeriesTask(f"unlabelled-{os.path.basename(path).split('.nii')[0]}", "nifti", "unlabelled", path))
    return tasks


def series_folders(folder: Path) -> list[str]:
    """Paths <folder>/<patient>/<series>, sorted."""
    return sorted(str(path) for path in folder.glob("*/*") if path.is_dir() and not path.name.startswith("."))


def fingerprints(tasks: Sequence[SeriesTask], data: Path) -> list[str]:
    """Of every series' input files: names, sizes and times. Threads, because a shared file system answers slowly."""
    with ThreadPoolExecutor(16) as threads:
        return [listing.fingerprint for listing in threads.map(partial(list_files, data=data), [task.path for task in tasks])]


def is_whole(tasks: Sequence[SeriesTask], target: Path) -> bool:
    """True where every series has its sidecar."""
    return all((target / task.name / SIDECAR).is_file() for task in tasks)


def list_files(path: str | Path, data: str | Path) -> Listing:
    """Names, sizes and times of the `.dcm` files of a series folder, or of one NIfTI file, from one scan of its folder.

    A link that leads out of the image folder (the first folder below `data`, which itself may be a link) is refused.
    """
    path = str(path)
    top = os.path.realpath(os.path.join(data, os.path.relpath(path, data).split(os.sep)[0])) + os.sep
    folder, single = os.path.split(path) if path.endswith(NIFTI) else (path, "")
    refused, found = [], []
    try:
        if not os.path.realpath(folder).startswith(top) and folder + os.sep != top and not single:
            return _listing(folder, [], [(path, "link out of the data folder")])
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name != single if single else not entry.name.lower().endswith(".dcm"):
                    continue
                if entry.is_symlink() and not os.path.realpath(entry.path).startswith(top):
                    refused.append((entry.path, "link out of the data folder"))
                elif not entry.is_file():
                    refused.append((entry.path, "not a file"))
                else:
                    found.append((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
    except OSError as fault:
        return _listing(folder, [], [(path, f"no such folder: {type(fault).__name__}")])
    return _listing(folder, found, refused or ([] if found else [(path, "no DICOM files")]))


def _listing(folder: str, found: list[tuple[str, int, int]], refused: list[tuple[str, str]]) -> Listing:
    found.sort(key=lambda item: (instance_of(item[0]) is None, instance_of(item[0]) or 0, item[0]))
    print_ = digest({"found": found, "refused": sorted(refused)})
    return Listing([os.path.join(folder, name) for name, _, _ in found], sorted(refused), sum(size for _, size, _ in found), print_)


def instance_of(name: str) -> int | None:
    """Instance number that the name of a DICOM file says, None where it is none."""
    return int(name[:-4]) if re.fullmatch(r"[0-9]{1,12}\.dcm", name, re.IGNORECASE) else None
