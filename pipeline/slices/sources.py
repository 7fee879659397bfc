"""What there is to convert: the series of a data set, their files and fingerprints. No pixel
library is imported.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..run import layout
from ..run.manifest import digest, read_manifest
from ..system.console import log, printable
from ..system.errors import InputError
from . import readers
from .readers import instance_of

LABELS = "labels"  # folders of label maps, `labelsTr` and so on, start with this
LONGEST = 200  # bytes of <patient>_<series>, which with its endings must be a file name (255)
VERSION = 5  # raised when the same file would become another picture or another row
# raised when the same slices would become another volume; here, where stage 02 sees it without its
# libraries
VOLUME_VERSION = 2


@dataclass(frozen=True)
class SeriesTask:
    """One series to convert: its ids in the index, and the folder of slices or the volume's file
    that it is.
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


class Found(NamedTuple):
    """What of a series is there: fingerprint, number and bytes of its files, the name of one of
    them, and why there is none.
    """

    fingerprint: str
    files: int
    bytes: int
    example: str
    reason: str


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
    """Series <patient>/<series> and volumes in one file, also those in a folder such as FLARE's
    `imagesTr`; warns of what is ignored.
    """
    tasks = []
    for path in series_folders(folder):
        patient, series = path.split(os.sep)[-2:]
        tasks.append(SeriesTask(f"unlabelled-{patient}", series, "unlabelled", path))
    tasks += _volumes(folder)
    used = {os.path.relpath(task.path, folder).split(os.sep)[0] for task in tasks}
    useless = sorted(
        str(path) for path in folder.glob("[!.]*") if path.is_dir() and path.name not in used
    )
    foreign = [task.path for task in tasks if printable(task.name) != task.name]
    endless = [task.path for task in tasks if len(os.fsencode(task.name)) > LONGEST]
    ignored = {*foreign, *endless}
    wanted = " nor ".join(
        f"{reader.title} images" if reader.volume else f"<series>/*{reader.endings[0]}"
        for reader in readers.READERS
    )
    for paths, what in (
        (useless, f"folders have neither {wanted}"),
        (foreign, "series have names not in UTF-8"),
        (endless, f"series have names of more than {LONGEST} bytes, patient and series together,"),
    ):
        if paths:
            log(f"warning: {len(paths)} {what} and are ignored, e.g. {printable(paths[0])}")
    return [task for task in tasks if task.path not in ignored]


def _volumes(folder: Path) -> list[SeriesTask]:
    """The files in a folder, or one folder deeper, that are a whole series each; label maps are
    none.
    """
    tasks = []
    for path in sorted(
        path for pattern in ("[!.]*", "[!.]*/[!.]*") for path in folder.glob(pattern)
    ):
        reader = readers.reader_of(path.name)
        *parents, name = path.relative_to(folder).parts
        if reader and reader.volume and not (parents and parents[0].startswith(LABELS)):
            patient = "-".join(["unlabelled", *parents, name.partition(reader.endings[0])[0]])
            tasks.append(SeriesTask(patient, reader.title.lower(), "unlabelled", str(path)))
    return tasks


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


def look_at(tasks: Sequence[SeriesTask], data: Path) -> list[Found]:
    """Every series' input files. Threads, because a shared file system answers slowly; no list of
    names is kept: there may be millions.
    """

    def look(task: SeriesTask) -> Found:
        listing = list_files(task.path, data)
        files = listing.files
        return Found(
            listing.fingerprint,
            len(files),
            listing.bytes,
            files[len(files) // 2] if files else "",
            "" if files else listing.refused[0][1],
        )

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(look, tasks))


def fingerprints(tasks: Sequence[SeriesTask], data: Path) -> list[str]:
    """Of every series' input files: names, sizes and times."""
    return [found.fingerprint for found in look_at(tasks, data)]


def list_files(path: str | Path, data: str | Path) -> Listing:
    """The slices' files of a series folder, from one scan of it, or the one file of a volume.

    A link that leads out of the image folder (the first folder below `data`, which itself may be a
    link) is refused.
    """
    path = str(path)
    found: list[tuple[str, int, int]] = []
    refused: list[tuple[str, str]] = []
    top = os.path.realpath(os.path.join(data, os.path.relpath(path, data).split(os.sep)[0]))
    reader = readers.reader_of(path)
    single = reader is not None and reader.volume
    folder = os.path.dirname(path) if single else path

    def outside(link: str) -> bool:
        return os.path.commonpath((os.path.realpath(link), top)) != top

    try:
        with contextlib.nullcontext([Path(path)]) if single else os.scandir(folder) as entries:
            for entry in _of_one_kind([] if outside(folder) else entries, single):
                if entry.is_symlink() and outside(os.fspath(entry)):
                    refused.append((os.fspath(entry), "link out of the data folder"))
                elif not entry.is_file():
                    refused.append((os.fspath(entry), "not a file"))
                else:
                    found.append((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
        if not found and not refused:
            kinds = " or ".join(one.title for one in readers.READERS if not one.volume)
            refused.append(
                (path, "link out of the data folder" if outside(folder) else f"no {kinds} files")
            )
    except OSError as fault:
        found, refused = [], [(path, f"no such folder: {type(fault).__name__}")]
    found.sort(key=lambda item: (instance_of(item[0]) is None, instance_of(item[0]), item[0]))
    return Listing(
        [os.path.join(folder, name) for name, _, _ in found],
        sorted(refused),
        sum(size for _, size, _ in found),
        digest({"found": found, "refused": sorted(refused)}),
    )


def _of_one_kind(entries: Iterable[Any], volume: bool) -> list[Any]:
    """What the first reader that takes any of them takes: notes and previews beside are no
    slices.
    """
    there = list(entries)
    kinds = (
        [entry for entry in there if reader.takes(entry.name)]
        for reader in readers.READERS
        if reader.volume == volume
    )
    return next(filter(None, kinds), [])
