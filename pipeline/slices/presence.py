"""Is what a run reads there? A disk that is not mounted must not look like data that were removed,
nor a folder that is named otherwise like data without a slice.
"""

from collections.abc import Sequence
from pathlib import Path

from polars.exceptions import PolarsError

from ..run import layout
from ..system.console import log, printable
from ..system.errors import InputError
from ..system.frames import read_frame
from .sources import Found, SeriesTask, series_folders

# share of what an earlier run had at which the rest is taken to be out of reach, not removed
NEARLY = 0.1
FOLDERS = {"train": "train_images", "test": "test_images", "unlabelled": "unlabelled"}


def out_of_reach(left: int, before: int) -> bool:
    """True where all or nearly all of what was there `before` is gone."""
    return before > 0 and left <= NEARLY * before


def refuse_absent(tasks: Sequence[SeriesTask], found: Sequence[Found], data: Path) -> None:
    """Warn of series of the training table that have no files.

    Raises:
        InputError: none of them has.
    """
    listed = [(task, one) for task, one in zip(tasks, found, strict=True) if task.source == "train"]
    empty = [(task, one) for task, one in listed if not one.files]
    if not empty:
        return
    (task, one), where = empty[0], "series of train_series_meta.csv"
    if len(empty) == len(listed):
        raise InputError(
            f"none of the {len(listed)} {where} was found ({one.reason})",
            printable(task.path),
            _way_out(data / FOLDERS["train"], one),
        )
    log(
        f"warning: {len(empty)} of the {len(listed)} {where} have no files, e.g."
        f" {printable(task.path)} ({one.reason})"
    )


def _way_out(folder: Path, one: Found) -> str:
    """What to do where no series of the table is below `folder`, after what lies there instead."""
    if (folder / folder.name).is_dir():
        return f"move the patients out of the inner {folder.name}"
    there = series_folders(folder)
    if not there:
        return f"mount or unpack {folder.name} there, or give --data the folder that holds it"
    if "link" in one.reason:
        return f"copy or mount the images there, or make {folder.name} itself the link"
    if one.reason.startswith("no such folder"):
        return f"write the ids in the table as the folders are named, e.g. {printable(there[0])}"
    return "give the files names such as 12.dcm"


def refuse_vanished(
    planned: Sequence[SeriesTask],
    tasks: Sequence[SeriesTask],
    found: Sequence[Found],
    index: Path,
    data: Path,
) -> None:
    """Compare with the series in `index`, of an earlier run: what seems removed loses its results.

    `planned` are all series of the data set, `tasks` and `found` those that were looked at.

    Raises:
        InputError: all or nearly all of one source that are still listed are gone.
    """
    try:
        known = read_frame(index, ["patient_id", "series_id", "source"]).unique()
    except (FileNotFoundError, PolarsError):  # none, or damaged: it is about to be made again
        return
    listed = {task.name for task in planned}
    empty = {task.name for task, one in zip(tasks, found, strict=True) if not one.files}
    for source in ("train", "unlabelled"):
        rows = known.filter(source=source).select("patient_id", "series_id").iter_rows()
        before = {f"{patient}/{series}" for patient, series in rows}
        # nothing but the folders lists unlabelled series; the table is the word on the others
        before &= before if source == "unlabelled" else listed
        left = (before & listed) - empty
        if out_of_reach(len(left), len(before)):
            raise InputError(
                f"{len(before) - len(left)} of the {len(before)} series that the last run found"
                " have no files now",
                str(data / FOLDERS[source]),
                "mount the disk, or give --force if they are gone for good; nothing was touched",
            )


def refuse_nothing_converted(
    tasks: Sequence[SeriesTask], slices: dict[str, int], reasons: dict[str, int], where: Path
) -> None:
    """Judge the counts of a conversion: slices by source, quarantined files by reason.

    Raises:
        InputError: no slice at all, or none of the table's series.
    """
    wanted = "train" if any(task.source == "train" for task in tasks) else "unlabelled"
    if slices.get(wanted):
        return
    most = max(reasons, key=lambda reason: reasons[reason], default="no files")
    raise InputError(
        f"not one slice of {len(tasks)} series could be read (most often: {most})",
        str(where / layout.QUARANTINE),
        "see the reasons listed there",
    )


def refuse_vanished_test(
    tasks: Sequence[SeriesTask], found: Sequence[Found], predicted: int, data: Path
) -> None:
    """The same for the test set, of whose patients the last run `predicted` so many."""
    left = len({task.patient_id for task, one in zip(tasks, found, strict=True) if one.files})
    if out_of_reach(left, predicted):
        raise InputError(
            f"images of {left} test patients are there, the last run predicted {predicted}",
            str(data / FOLDERS["test"]),
            "mount the disk, or give --force if they are gone for good; nothing was touched",
        )
