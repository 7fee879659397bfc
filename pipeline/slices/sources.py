"""What there is to convert: the series of a data set, their files and fingerprints. No pixel
library is imported.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..run import layout
from ..run.manifest import digest, read_manifest
from ..system.console import log
from ..system.errors import InputError

NIFTI = (".nii", ".nii.gz")
LABELS = "labels"  # folders of label maps, `labelsTr` and so on, start with this
LONGEST = 200  # bytes of <patient>_<series>, which with its endings must be a file name (255)
VERSION = 5  # raised when the same file would become another picture or another row
# raised when the same slices would become another volume; here, where stage 02 sees it without its
# libraries
VOLUME_VERSION = 2


@dataclass(frozen=True)
class SeriesTask:
    """One series to convert: its ids in the index, and the folder of DICOM files or NIfTI file that
    it is.
    """

    patient_id: str
    series_id: str
    source: str
    path: str

    @property
    def name(self) -> str:
        """Its folder below 01_slices."""
        return f"{self.patient_id}/{self.series_id}"


class Listing(NamedTuple):
    """The files of one series in the order of their numbers, (path, reason) of those refused, and a
    fingerprint of all.
    """

    files: list[str]
    refused: list[tuple[str, str]]
    bytes: int
    fingerprint: str


def test_tasks(data: Path, listed: Any) -> list[SeriesTask]:
    """The test series of the table (`patient_id`, `series_id`)."""
    return _listed(data / "test_images", listed, "test")


def _listed(folder: Path, listed: Any, source: str) -> list[SeriesTask]:
    pairs = listed.select("patient_id", "series_id").iter_rows()
    return [
        SeriesTask(patient, series, source, str(folder / patient / series))
        for patient, series in pairs
    ]


def plan(data: Path, listed: Any) -> list[SeriesTask]:
    """The series of the table (`patient_id`, `series_id`), then what lies in `unlabelled/`; warns
    of folders that no row names.

    Raises:
        InputError: two inputs of one name, such as `a.nii` and `a.nii.gz`, or `a_b/c` and `a/b_c`,
        whose volumes would share a file.
    """
    tasks = _listed(data / "train_images", listed, "train")
    strangers = sorted(set(series_folders(data / "train_images")) - {task.path for task in tasks})
    if strangers:
        log(
            f"warning: {len(strangers)} series folders are in no row of train_series_meta.csv and"
            f" ignored, e.g. {printable(strangers[0])}"
        )
    tasks += _unlabelled(data / "unlabelled")
    seen: dict[str, str] = {}
    for task in tasks:
        other = seen.setdefault(f"{task.patient_id}_{task.series_id}", task.path)
        if other != task.path:
            raise InputError(
                "two inputs would share a name",
                f"{other} and {task.path}",
                "rename or remove one of them",
            )
    return tasks


def _unlabelled(folder: Path) -> list[SeriesTask]:
    """DICOM series <patient>/<series> and NIfTI volumes, also those in a folder such as FLARE's
    `imagesTr`; warns of what is ignored.
    """
    tasks = []
    for path in series_folders(folder):
        patient, series = path.split(os.sep)[-2:]
        tasks.append(SeriesTask(f"unlabelled-{patient}", series, "unlabelled", path))
    for path in sorted(
        path
        for pattern in ("[!.]*", "[!.]*/[!.]*")
        for path in folder.glob(pattern)
        if path.name.endswith(NIFTI)
    ):
        *parents, name = path.relative_to(folder).parts
        if not (parents and parents[0].startswith(LABELS)):
            tasks.append(
                SeriesTask(
                    "-".join(["unlabelled", *parents, name.partition(".nii")[0]]),
                    "nifti",
                    "unlabelled",
                    str(path),
                )
            )
    used = {os.path.relpath(task.path, folder).split(os.sep)[0] for task in tasks}
    useless = sorted(
        str(path) for path in folder.glob("[!.]*") if path.is_dir() and path.name not in used
    )
    foreign = [task.path for task in tasks if printable(task.name) != task.name]
    endless = [task.path for task in tasks if len(os.fsencode(task.name)) > LONGEST]
    ignored = {*foreign, *endless}
    for paths, what in (
        (useless, "folders have neither <series>/*.dcm nor NIfTI images"),
        (foreign, "series have names not in UTF-8"),
        (endless, f"series have names of more than {LONGEST} bytes, patient and series together,"),
    ):
        if paths:
            log(f"warning: {len(paths)} {what} and are ignored, e.g. {printable(paths[0])}")
    return [task for task in tasks if task.path not in ignored]


def printable(text: str) -> str:
    """A text with names of files in it, whose bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def is_whole(target: Path, tasks: Sequence[SeriesTask]) -> bool:
    """True where every series has its folder and sidecar, and these hold as many pictures as the
    manifest of stage 01 counts.

    One listing a folder and no look at the files themselves, because every start of the stage asks.
    """

    def pictures(task: SeriesTask) -> int | None:
        try:
            names = os.listdir(target / task.name)
        except OSError:
            return None
        return sum(name.endswith(".png") for name in names) if layout.SIDECAR in names else None

    manifest = read_manifest(target)
    if manifest is None:
        return False
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(pictures, tasks))
    return None not in found and sum(filter(None, found)) == manifest.get("counts", {}).get(
        "slices"
    )


def series_folders(folder: Path) -> list[str]:
    """Paths <folder>/<patient>/<series>, sorted."""
    return sorted(str(path) for path in folder.glob("[!.]*/[!.]*") if path.is_dir())


def fingerprints(tasks: Sequence[SeriesTask], data: Path) -> list[str]:
    """Of every series' input files: names, sizes and times. Threads, because a shared file system
    answers slowly.
    """
    with ThreadPoolExecutor(16) as threads:
        return [
            listing.fingerprint
            for listing in threads.map(
                partial(list_files, data=data), [task.path for task in tasks]
            )
        ]


def list_files(path: str | Path, data: str | Path) -> Listing:
    """The `.dcm` files of a series folder, from one scan of it, or one NIfTI file.

    A link that leads out of the image folder (the first folder below `data`, which itself may be a
    link) is refused.
    """
    path, found, refused = str(path), [], []
    top = os.path.realpath(os.path.join(data, os.path.relpath(path, data).split(os.sep)[0]))
    single = path.endswith(NIFTI)
    folder = os.path.dirname(path) if single else path

    def outside(link: str) -> bool:
        return os.path.commonpath((os.path.realpath(link), top)) != top

    try:
        with contextlib.nullcontext([Path(path)]) if single else os.scandir(folder) as entries:
            for entry in [] if outside(folder) else entries:
                if not single and not entry.name.lower().endswith(".dcm"):
                    continue
                if entry.is_symlink() and outside(os.fspath(entry)):
                    refused.append((os.fspath(entry), "link out of the data folder"))
                elif not entry.is_file():
                    refused.append((os.fspath(entry), "not a file"))
                else:
                    found.append((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
        if not found and not refused:
            refused.append(
                (path, "link out of the data folder" if outside(folder) else "no DICOM files")
            )
    except OSError as fault:
        found, refused = [], [(path, f"no such folder: {type(fault).__name__}")]
    found.sort(key=lambda item: (instance_of(item[0]) is None, instance_of(item[0]), item[0]))
    files, size = (
        [os.path.join(folder, name) for name, _, _ in found],
        sum(size for _, size, _ in found),
    )
    return Listing(
        files, sorted(refused), size, digest({"found": found, "refused": sorted(refused)})
    )


def instance_of(name: str) -> int | None:
    """Instance number that the name of a DICOM file says, None where it says none."""
    return int(name[:-4]) if re.fullmatch(r"[0-9]{1,12}\.dcm", name, re.IGNORECASE) else None
