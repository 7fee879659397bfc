"""What there is to convert: the series of a data set, their files and fingerprints. No pixel
library is imported.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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

# words in the names of label maps and of their folders, besides those that start with `labels`
LABELS = {"label", "mask", "masks", "seg", "segs", "gt", "annotation"}
LABELS |= {"segmentation", "segmentations"}
# files at the top of a data set, or beside its series, that everyone has or that others read
USUAL = ("README*", "LICENSE*", "*.csv", "*.parquet", "manifest.json")
FOLDERS = ("train_images", "test_images", "unlabelled", "segmentations")
DEEPEST = 8  # folders below one another that are looked into: links may lead in circles
LONGEST = 200  # bytes of <patient>_<series>, which with its endings must be a file name (255)
VERSION = 7  # raised when the same file would become another picture or another row
# raised when the same slices would become another volume; here, where stage 02 sees it without its
# libraries
VOLUME_VERSION = 3


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
    fingerprint of both; and the kinds (`kind_of`) of what else lies there, each with a number.
    """

    files: list[str]
    refused: list[tuple[str, str]]
    bytes: int
    fingerprint: str
    ignored: dict[str, int] = {}  # noqa: RUF012  # a default of a tuple, never written to


class Found(NamedTuple):
    """What of a series is there: fingerprint and number of its files, and why there is none."""

    fingerprint: str
    files: int
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
    folders, others = _series(data / "train_images")
    strangers = sorted({*map(str, folders)} - {task.path for task in tasks})
    if strangers:
        log(
            f"warning: {len(strangers)} series folders are in no row of train_series_meta.csv and"
            f" ignored, e.g. {printable(strangers[0])}"
        )
    tasks += _unlabelled(data / "unlabelled")
    _warn_of_strays(_strays(data) + others)
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
    """Series <patient>/<series> and volumes in one file, these however deep, such as those in
    FLARE's `imagesTr`; warns of label maps, by their names, and of what else is ignored.
    """
    tasks: list[SeriesTask] = []
    strays: list[Path] = []
    for path, names in _walk(folder):
        parts = path.relative_to(folder).parts
        slices = any(reader.takes(name) for reader in _readers(False) for name in names)
        if slices and len(parts) == 2:  # what lies beside the slices, stage 01 counts
            tasks.append(SeriesTask(f"unlabelled-{parts[0]}", parts[1], "unlabelled", str(path)))
            continue
        for name in names:
            reader = readers.reader_of(name)
            if reader and reader.volume:
                patient = "-".join(["unlabelled", *parts, reader.stem(name)])
                one = SeriesTask(patient, reader.title.lower(), "unlabelled", str(path / name))
                tasks.append(one)
            else:
                strays.append(path / name)
    tasks.sort(key=lambda task: (readers.reader_of(task.path) is not None, task.path))
    used = {os.path.relpath(task.path, folder).split(os.sep)[0] for task in tasks}
    useless = sorted(
        str(path) for path in folder.glob("[!.]*") if path.is_dir() and path.name not in used
    )
    maps = [task.path for task in tasks if _is_label_map(Path(task.path).relative_to(folder))]
    foreign = [task.path for task in tasks if printable(task.name) != task.name]
    endless = [task.path for task in tasks if len(os.fsencode(task.name)) > LONGEST]
    ignored = {*maps, *foreign, *endless}
    wanted = " nor ".join(
        f"{reader.title} images" if reader.volume else f"<series>/*{reader.endings[0]}"
        for reader in readers.READERS
    )
    for paths, what in (
        (useless, f"folders have neither {wanted}"),
        (maps, "files or folders are label maps by their names"),
        (foreign, "series have names not in UTF-8"),
        (endless, f"series have names of more than {LONGEST} bytes, patient and series together,"),
    ):
        if paths:
            log(f"warning: {len(paths)} {what} and are ignored, e.g. {printable(paths[0])}")
    _warn_of_strays(strays)
    return [task for task in tasks if task.path not in ignored]


def _readers(volume: bool) -> list[readers.Reader]:
    return [reader for reader in readers.READERS if reader.volume == volume]


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `folder` down with the sorted names of its files, through links, but in no
    circle; nothing hidden.
    """
    real = os.path.realpath(folder)
    if real in above or len(above) > DEEPEST or not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        there = sorted((one.name, one.is_dir()) for one in entries if not one.name.startswith("."))
    yield folder, [name for name, is_folder in there if not is_folder]
    for name, is_folder in there:
        if is_folder:
            yield from _walk(folder / name, (*above, real))


def _is_label_map(path: Path) -> bool:
    """True where a word of a path is one of `LABELS`, as in KiTS, LiTS, BTCV, FLARE and MSD:
    `labelsTr`, `segmentation-0.nii`, `liver_seg`, `LiverMask`, `label0001`.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", str(path))
    return any(word.lower() in LABELS or word.lower().startswith("labels") for word in words)


def _strays(data: Path) -> list[Path]:
    """What lies at the top of a data set, or beside its patients, and is none of it."""
    top: list[Path] = [
        path
        for path in data.glob("[!.]*")
        if path.name not in FOLDERS and not any(path.match(usual) for usual in USUAL)
    ]
    return top + [path for path in (data / "train_images").glob("[!.]*") if not path.is_dir()]


def _warn_of_strays(paths: Sequence[Path]) -> None:
    """One line that counts by kind what is not recognised."""
    if paths:
        kinds = Counter("folder" if path.is_dir() else kind_of(path.name) for path in paths)
        counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        example = printable(str(min(paths)))
        log(f"warning: not recognised and ignored: {counted}, e.g. {example}")


def kind_of(name: str) -> str:
    """The ending of a file's name, by which files that nothing reads are counted."""
    ending = os.path.splitext(name)[1].lower()
    return ending if re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", ending) else "without ending"


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
    return sorted(map(str, _series(folder)[0]))


def _series(folder: Path) -> tuple[list[Path], list[Path]]:
    """<folder>/<patient>/<series>, and what lies beside these and is no folder."""
    folders: list[Path] = []
    others: list[Path] = []
    for path in folder.glob("[!.]*/[!.]*"):
        (folders if path.is_dir() else others).append(path)
    return folders, others


def look_at(tasks: Sequence[SeriesTask], data: Path) -> list[Found]:
    """Every series' input files. Threads, because a shared file system answers slowly; no list of
    names is kept: there may be millions.
    """

    def look(task: SeriesTask) -> Found:
        listing = list_files(task.path, data)
        reason = "" if listing.files else listing.refused[0][1]
        return Found(listing.fingerprint, len(listing.files), reason)

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(look, tasks))


def list_files(path: str | Path, data: str | Path) -> Listing:
    """The slices' files of a series folder, from one scan of it, or the one file of a volume.

    A link that leads out of the image folder (the first folder below `data`, which itself may be a
    link) is refused.
    """
    path = str(path)
    found: list[tuple[str, int, int]] = []
    refused: list[tuple[str, str]] = []
    ignored: dict[str, int] = {}
    top = os.path.realpath(os.path.join(data, os.path.relpath(path, data).split(os.sep)[0]))
    reader = readers.reader_of(path)
    single = reader is not None and reader.volume
    folder = os.path.dirname(path) if single else path

    def outside(link: str) -> bool:
        return os.path.commonpath((os.path.realpath(link), top)) != top

    try:
        given = contextlib.nullcontext([Path(path)]) if single else os.scandir(folder)
        with given as entries:
            there: list[Any] = [] if outside(folder) else list(entries)  # paths or folder entries
            slices = _of_one_kind(there, single)
            ignored = Counter(
                "folder" if entry.is_dir() else kind_of(entry.name)
                for entry in {*there} - {*slices}
                if not entry.name.startswith(".")
            )
            for entry in slices:
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
    found.sort(key=lambda item: ((number := instance_of(item[0])) is None, number, item[0]))
    return Listing(
        [os.path.join(folder, name) for name, _, _ in found],
        sorted(refused),
        sum(size for _, size, _ in found),
        digest({"found": found, "refused": sorted(refused)}),
        dict(sorted(ignored.items())),
    )


def _of_one_kind(there: Sequence[Any], volume: bool) -> list[Any]:
    """What the first reader that takes any of them takes: notes and previews beside are no
    slices.
    """
    kinds = ([entry for entry in there if reader.takes(entry.name)] for reader in _readers(volume))
    return next(filter(None, kinds), [])
