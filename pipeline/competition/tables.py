"""The competition's tables, read strictly: whatever is wrong is refused with file, row, column and
remedy.

Rows are numbered as an editor shows a CSV: the header is row 1. Ids are strings everywhere ("10004"
stays "10004"). Accepted and left out: columns nobody asked for, empty lines, slice labels that
repeat a row or name a series that is not listed.
"""

from pathlib import Path

import polars as pl

from ..system.console import log
from ..system.errors import InputError
from .strict_table import KEY, ROW, Table, check_ids, check_unique, load_table, numbers
from .targets import ANY_INJURY, COLUMNS, SLICE_TARGETS, TARGETS

INJURY_NAMES = sorted(SLICE_TARGETS.values())


def check_probabilities(table: Table) -> None:
    """Refuse what the competition's metric refuses: negative values and groups that sum to 0."""
    rules = [
        (pl.col(column) < 0, column, "{value} is negative", "write probabilities")
        for column in COLUMNS
    ]
    for target in TARGETS:
        total, what = pl.sum_horizontal(target.columns), f"the {target.name} columns"
        rules.append(
            (total == 0, target.columns[0], f"{what} sum to 0", "write probabilities that sum to 1")
        )
        rules.append(
            (
                total.is_infinite(),
                target.columns[0],
                f"{what} have no finite sum",
                "write probabilities",
            )
        )
    table.refuse(*rules)


def check_labels(table: Table) -> Table:
    """Numeric labels: 0 or 1, one class per target, `any_injury` (where present) as the others say;
    adds it where absent.
    """
    given = ANY_INJURY in table.frame.columns
    columns = [*COLUMNS, ANY_INJURY] if given else list(COLUMNS)
    table = numbers(table, columns, binary=True)
    rules = []
    for target in TARGETS:
        total, remedy = (
            pl.sum_horizontal(target.columns),
            f"set one of {', '.join(target.columns)} to 1",
        )
        rules.append((total == 0, target.columns[0], f"no class of {target.name} is set", remedy))
        rules.append(
            (total > 1, target.columns[0], f"two classes of {target.name} are set", remedy)
        )
    injured = pl.any_horizontal(pl.col(target.columns[0]) == 0 for target in TARGETS)
    if given:
        remedy = "it is 1 where any target is not healthy; correct it or remove the column"
        rules.append(
            (
                (pl.col(ANY_INJURY) == 1) != injured,
                ANY_INJURY,
                "{value} contradicts the other columns",
                remedy,
            )
        )
    table.refuse(*rules)
    frame = table.frame.with_columns(injured.alias(ANY_INJURY)).with_columns(
        pl.col(*COLUMNS, ANY_INJURY).cast(pl.Int8)
    )
    return Table(table.name, frame)


def read_labels(data: Path) -> pl.DataFrame:
    """`train.csv` of a data folder: `patient_id`, the 13 one-hot `COLUMNS` and `any_injury` (Int8,
    computed where absent).
    """
    table = load_table(Path(data) / "train.csv", [KEY, *COLUMNS], [ANY_INJURY])
    check_ids(table, KEY)
    check_unique(table, KEY)
    return check_labels(table).frame.drop(ROW)


def has_test(data: Path) -> bool:
    """True where the data folder has a test table (then both are needed)."""
    return any(
        (Path(data) / name).exists() for name in ("test_series_meta.csv", "sample_submission.csv")
    )


def read_series(data: Path, split: str) -> pl.DataFrame:
    """`<split>_series_meta.csv` (`train` or `test`): patient_id, series_id, and where present
    aortic_hu, incomplete_organ.

    Patients of the train table must be in `train.csv` where there is one.
    """
    table = load_table(
        Path(data) / f"{split}_series_meta.csv",
        [KEY, "series_id"],
        ["aortic_hu", "incomplete_organ"],
    )
    check_ids(table, KEY, "series_id")
    check_unique(table, KEY, "series_id")
    joined = ~pl.concat_str(KEY, pl.lit("_"), "series_id").is_first_distinct()
    table.refuse(
        (
            joined,
            "series_id",
            "patient_series of two rows spell the same name, at {value}",
            "rename one of them",
        )
    )
    given = table.frame.columns
    table = numbers(table, [column for column in ("aortic_hu",) if column in given], empty=True)
    table = numbers(
        table,
        [column for column in ("incomplete_organ",) if column in given],
        empty=True,
        binary=True,
    )
    _check_known(table, data, split)
    return table.frame.drop(ROW)


def require_slice_labels(data: Path) -> pl.DataFrame:
    """`read_slice_labels`; InputError where there is no `image_level_labels.csv`."""
    found = read_slice_labels(data)
    if found is None:
        raise InputError(
            "train.slice_loss needs slice labels",
            str(Path(data) / "image_level_labels.csv"),
            "add the table or set train.slice_loss=0",
        )
    return found


def read_slice_labels(data: Path) -> pl.DataFrame | None:
    """`image_level_labels.csv`: patient_id, series_id, instance_number (Int64), injury_name; None
    where there is none.
    """
    path = Path(data) / "image_level_labels.csv"
    if not path.exists():
        return None
    table = load_table(path, [KEY, "series_id", "instance_number", "injury_name"])
    check_ids(table, KEY, "series_id")
    table = numbers(table, ["instance_number"])
    number = pl.col("instance_number")
    whole = (number >= 0) & (number == number.floor()) & (number < 2**53)
    known = pl.col("injury_name").is_in(INJURY_NAMES).fill_null(False)
    table.refuse(
        (~whole, "instance_number", "{value} is no instance number", "write a whole number"),
        (
            ~known,
            "injury_name",
            "{value} is no injury name",
            f"write one of {', '.join(INJURY_NAMES)}",
        ),
    )
    _check_known(table, data, "train")
    frame = table.frame.drop(ROW).with_columns(number.cast(pl.Int64)).unique(maintain_order=True)
    if not (Path(data) / "train_series_meta.csv").is_file():
        return frame
    listed = frame.join(
        read_series(data, "train"), on=[KEY, "series_id"], how="semi", maintain_order="left"
    )
    if listed.height < frame.height:
        log(
            f"{path}: {frame.height - listed.height} slice labels of series that"
            " train_series_meta.csv does not list are left out"
        )
    return listed


def _check_known(table: Table, data: Path, split: str) -> None:
    if split == "train" and (Path(data) / "train.csv").is_file():
        known = load_table(Path(data) / "train.csv", [KEY]).frame[KEY]
        wrong = ~pl.col(KEY).is_in(known.implode())
        table.refuse(
            (
                wrong,
                KEY,
                "unknown patient {value}",
                "add the patient to train.csv or remove the row",
            )
        )


def read_sample_submission(data: Path) -> pl.DataFrame:
    """`sample_submission.csv`: patient_id and the 13 columns in the file's own order (values as
    they are, Float64).
    """
    path = Path(data) / "sample_submission.csv"
    table = load_table(path, [KEY, *COLUMNS])
    for column in table.header:
        if column not in table.frame.columns:
            raise InputError(
                f"unknown column '{column}'",
                f"{path} row 1",
                "give the competition's own sample_submission.csv",
            )
    check_ids(table, KEY)
    check_unique(table, KEY)
    return table.frame.select(table.header).with_columns(
        pl.col(COLUMNS).cast(pl.Float64, strict=False)
    )


def check_predictions(table: Table) -> pl.DataFrame:
    """A loaded OOF (with `series_id`) or submission table: 13 Float64 columns, a `fold` as Int64.

    Values are checked as the metric does (finite, not negative, no group that sums to 0) and
    returned as they are; the frame keeps its `__row` column.
    """
    keys = [column for column in (KEY, "series_id") if column in table.frame.columns]
    check_ids(table, *keys)
    check_unique(table, *keys)
    folds = [column for column in table.frame.columns if column == "fold"]
    table = numbers(table, [*COLUMNS, *folds])
    check_probabilities(table)
    return table.frame.with_columns(pl.col(folds).cast(pl.Int64))
