"""The competition's tables, read strictly: whatever is wrong is refused with file, row, column and remedy.

Rows are numbered as an editor shows a CSV: the header is row 1. Ids are strings everywhere ("10004" stays "10004").
Accepted and left out: columns nobody asked for, empty lines, slice labels that repeat a row or name a series that is not listed.
"""

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from .runtime import InputError, log
from .targets import ANY_INJURY, COLUMNS, TARGETS

ROW = "__row"
ID_BYTES = 64
KEY = "patient_id"
INJURY_NAMES = ("Active_Extravasation", "Bowel")


@dataclass(frozen=True)
class Table:
    """A frame with a `__row` column and the name to use for it in messages."""

    name: str
    frame: pl.DataFrame

    def refuse(self, wrong: pl.Expr, column: str, what: str, remedy: str) -> None:
        """Raise InputError for the first row where `wrong` is true; `what` may show the cell as `{value}`."""
        found = self.frame.filter(wrong)
        if found.height:
            row, value = found[ROW][0], found[column][0]
            shown = repr("" if value is None else str(value)[:40])
            raise InputError(what.format(value=shown), f"{self.name} row {row} column {column}", remedy)


def load_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read a CSV (cells as strings) or a parquet file and keep `columns` and those of `optional` that are there.

    Raises:
        InputError: no such file, unreadable, not UTF-8, not a CSV, ragged rows, no rows, a column missing or there twice.
    """
    return frame_table(_open(Path(path)), str(path), columns, optional)


def _open(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise InputError(f"{path.name} is missing", str(path), "give the folder or file that holds it")
    try:
        return pl.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except OSError as fault:
        raise InputError("not readable", f"{path}: {fault.strerror}", "check the file and its permissions") from fault
    except pl.exceptions.PolarsError as fault:
        raise _explain(path, fault) from fault


def frame_table(frame: pl.DataFrame, name: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """The same for a frame in memory: checks the columns, numbers the rows where they have no number, ids to strings."""
    for column in columns:
        if column not in frame.columns:
            near = difflib.get_close_matches(column, [other for other in frame.columns if other != ROW], n=1, cutoff=0.6)
            hint = f"rename '{near[0]}'" if near else f"add it (columns, separated by commas: {', '.join(columns)})"
            raise InputError(f"column '{column}' is missing", f"{name} row 1", hint)
        if f"{column}_duplicated_0" in frame.columns:
            raise InputError(f"column '{column}' is there twice", f"{name} row 1", "remove one of the two")
    if frame.is_empty():
        raise InputError("the table has no rows", name, "give the whole table")
    frame = frame if ROW in frame.columns else frame.with_row_index(ROW, offset=2)
    kept = list(dict.fromkeys([*columns, *(column for column in optional if column in frame.columns)]))
    ids = [column for column in kept if column.endswith("_id")]
    for column in ids:
        if not (frame[column].dtype.is_integer() or frame[column].dtype == pl.String):
            raise InputError(f"ids are of type {frame[column].dtype}", f"{name} column {column}", "store them as integers or text")
    return Table(name, frame.select(ROW, *kept).with_columns(pl.col(ids).cast(pl.String)))


def _read_csv(path: Path) -> pl.DataFrame:
    """All cells as strings with the number of the line that each row begins in; empty lines are left out."""
    frame = pl.read_csv(path.read_bytes(), infer_schema=False)
    inner = pl.sum_horizontal(pl.all().str.count_matches("\n", literal=True).fill_null(0))
    line = pl.int_range(pl.len()) + 2 + inner.cum_sum().shift(1, fill_value=0)
    return frame.with_columns(line.alias(ROW)).filter(~pl.all_horizontal(pl.all().exclude(ROW).is_null()))


def _explain(path: Path, fault: Exception) -> InputError:
    """What is wrong with a file that polars cannot read, and in which row where that can be told."""
    try:
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        width = len(next(rows, []))
        long = next((rows.line_num for row in rows if len(row) > width), None)
    except UnicodeDecodeError as wrong:
        row = 1 + path.read_bytes()[: wrong.start].count(b"\n")
        return InputError("not UTF-8 text", f"{path} row {row}", "save the table as CSV in UTF-8")
    except csv.Error:
        long = None
    if not path.stat().st_size:
        return InputError("the file is empty", str(path), "give the whole table")
    if long:
        return InputError(f"more cells than the header's {width}", f"{path} row {long}", "remove what is too much")
    return InputError("not readable as a table", f"{path}: {str(fault).splitlines()[0]}", "save it as CSV in UTF-8")


def check_ids(table: Table, *columns: str) -> None:
    """Ids become folder and file names: refuse what is empty, too long, hidden, or has path parts or control characters."""
    for column in columns:
        cell, remedy = pl.col(column), "use plain ids such as 10004"
        table.refuse(cell.is_null() | (cell.str.strip_chars() == ""), column, "the id is empty", remedy)
        table.refuse(cell.str.contains(r"[/\\]|\.\.|^\."), column, "the id {value} has path parts", remedy)
        table.refuse(
            cell.str.contains(r"[\p{C}\p{Zl}\p{Zp}]|^\s|\s$"), column, "the id {value} has control characters or outer blanks", remedy
        )
        table.refuse(cell.str.len_bytes() > ID_BYTES, column, f"the id {{value}} is longer than {ID_BYTES} bytes", remedy)


def check_unique(table: Table, *columns: str) -> None:
    """Refuse a second row with the same `columns`."""
    noun = "patient" if columns == (KEY,) else "series"
    again = ~pl.struct(columns).is_first_distinct()
    table.refuse(again, columns[-1], f"{noun} {{value}} is there twice", "remove one of the rows")


def numbers(table: Table, columns: Sequence[str], empty: bool = False) -> Table:
    """The table with `columns` as finite Float64; refuses other cells (empty ones too unless `empty`)."""
    values = {}
    for column in columns:
        text = table.frame[column].dtype == pl.String
        cell = pl.col(column).str.strip_chars() if text else pl.col(column)
        value = values[column] = cell.cast(pl.Float64, strict=False)
        blank = cell.is_null() | ((cell == "") if text else False)
        if not empty:
            table.refuse(blank, column, "the cell is empty", "fill in a number")
        table.refuse(value.is_null() & ~blank, column, "{value} is not a number", "write a number with a decimal point")
        table.refuse(~value.is_finite(), column, "{value} is not finite", "write a finite number")
    return Table(table.name, table.frame.with_columns(**values))


def check_zero_one(table: Table, columns: Sequence[str]) -> None:
    """Refuse numbers that are neither 0 nor 1."""
    for column in columns:
        table.refuse(~pl.col(column).is_in([0.0, 1.0]), column, "{value} is neither 0 nor 1", "write 0 or 1")


def check_probabilities(table: Table) -> None:
    """Refuse what the competition's metric refuses: negative values and groups that sum to 0."""
    for target in TARGETS:
        for column in target.columns:
            table.refuse(pl.col(column) < 0, column, "{value} is negative", "write probabilities")
        total = pl.sum_horizontal(target.columns)
        table.refuse(total == 0, target.columns[0], f"the {target.name} columns sum to 0", "write probabilities that sum to 1")
        table.refuse(total.is_infinite(), target.columns[0], f"the {target.name} columns have no finite sum", "write probabilities")


def check_labels(table: Table) -> Table:
    """Numeric labels: 0 or 1, one class per target, `any_injury` (where present) as the others say; adds it where absent."""
    given = ANY_INJURY in table.frame.columns
    columns = [*COLUMNS, ANY_INJURY] if given else list(COLUMNS)
    table = numbers(table, columns)
    check_zero_one(table, columns)
    for target in TARGETS:
        total = pl.sum_horizontal(target.columns)
        last = next(iter(target.columns))
        table.refuse(total == 0, last, f"no class of {target.name} is set", f"set one of {', '.join(target.columns)} to 1")
        table.refuse(total > 1, last, f"two classes of {target.name} are set", f"set one of {', '.join(target.columns)} to 1")
    injured = pl.any_horizontal(pl.col(target.columns[0]) == 0 for target in TARGETS)
    if given:
        remedy = "it is 1 where any target is not healthy; correct it or remove the column"
        table.refuse((pl.col(ANY_INJURY) == 1) != injured, ANY_INJURY, "{value} contradicts the other columns", remedy)
    frame = table.frame.with_columns(injured.alias(ANY_INJURY)).with_columns(pl.col(*COLUMNS, ANY_INJURY).cast(pl.Int8))
    return Table(table.name, frame)


def read_labels_file(path: Path) -> pl.DataFrame:
    """Columns `patient_id`, the 13 one-hot `COLUMNS` and `any_injury` (Int8, computed where absent) of a labels CSV."""
    table = load_table(path, [KEY, *COLUMNS], [ANY_INJURY])
    check_ids(table, KEY)
    check_unique(table, KEY)
    return check_labels(table).frame.drop(ROW)


def read_labels(data: Path) -> pl.DataFrame:
    """`train.csv` of a data folder, see `read_labels_file`."""
    return read_labels_file(Path(data) / "train.csv")


def has_test(data: Path) -> bool:
    """True where the data folder has a test table (then both are needed)."""
    return any((Path(data) / name).exists() for name in ("test_series_meta.csv", "sample_submission.csv"))


def read_series(data: Path, split: str) -> pl.DataFrame:
    """`<split>_series_meta.csv` (`train` or `test`): patient_id, series_id, and where present aortic_hu, incomplete_organ.

    Patients of the train table must be in `train.csv` where there is one.
    """
    optional = ["aortic_hu", "incomplete_organ"]
    table = load_table(Path(data) / f"{split}_series_meta.csv", [KEY, "series_id"], optional)
    check_ids(table, KEY, "series_id")
    check_unique(table, KEY, "series_id")
    joined = ~pl.concat_str(KEY, pl.lit("_"), "series_id").is_first_distinct()
    table.refuse(joined, "series_id", "patient_series of two rows spell the same name, at {value}", "rename one of them")
    table = numbers(table, [column for column in optional if column in table.frame.columns], empty=True)
    if optional[1] in table.frame.columns:
        check_zero_one(table, optional[1:])
    _check_known(table, data, split)
    return table.frame.drop(ROW)


def read_slice_labels(data: Path) -> pl.DataFrame | None:
    """`image_level_labels.csv`: patient_id, series_id, instance_number (Int64), injury_name; None where there is none."""
    path = Path(data) / "image_level_labels.csv"
    if not path.exists():
        return None
    table = load_table(path, [KEY, "series_id", "instance_number", "injury_name"])
    check_ids(table, KEY, "series_id")
    table = numbers(table, ["instance_number"])
    number = pl.col("instance_number")
    whole = (number >= 0) & (number == number.floor()) & (number < 2**53)
    table.refuse(~whole, "instance_number", "{value} is no instance number", "write a whole number")
    known = pl.col("injury_name").is_in(INJURY_NAMES).fill_null(False)
    table.refuse(~known, "injury_name", "{value} is no injury name", f"write one of {', '.join(INJURY_NAMES)}")
    _check_known(table, data, "train")
    frame = table.frame.drop(ROW).with_columns(number.cast(pl.Int64)).unique(maintain_order=True)
    if not (Path(data) / "train_series_meta.csv").is_file():
        return frame
    listed = frame.join(read_series(data, "train"), on=[KEY, "series_id"], how="semi", maintain_order="left")
    if listed.height < frame.height:
        log(f"{path}: {frame.height - listed.height} slice labels of series that train_series_meta.csv does not list are left out")
    return listed


def _check_known(table: Table, data: Path, split: str) -> None:
    if split == "train" and (Path(data) / "train.csv").is_file():
        known = load_table(Path(data) / "train.csv", [KEY]).frame[KEY]
        table.refuse(~pl.col(KEY).is_in(known.implode()), KEY, "unknown patient {value}", "add the patient to train.csv or remove the row")


def read_sample_submission(data: Path) -> pl.DataFrame:
    """`sample_submission.csv`: patient_id and the 13 columns in the file's own order (values as they are, Float64)."""
    path = Path(data) / "sample_submission.csv"
    frame = _open(path)
    columns = [column for column in frame.columns if column != ROW]
    table = frame_table(frame, str(path), [KEY, *COLUMNS], columns)
    unknown = [column for column in columns if column not in (KEY, *COLUMNS)]
    if unknown:
        raise InputError(f"unknown column '{unknown[0]}'", f"{path} row 1", "give the competition's own sample_submission.csv")
    check_ids(table, KEY)
    check_unique(table, KEY)
    return table.frame.select(columns).with_columns(pl.col(COLUMNS).cast(pl.Float64, strict=False))


def read_predictions(path: Path, series: bool) -> pl.DataFrame:
    """An OOF (`series`) or submission table, CSV or parquet: patient_id[, series_id], 13 Float64 columns[, fold Int64].

    Values are checked as the metric does (finite, not negative, no group that sums to 0) and returned as they are.
    """
    keys = [KEY, "series_id"] if series else [KEY]
    return check_predictions(load_table(path, [*keys, *COLUMNS], ["fold"])).drop(ROW)


def check_predictions(table: Table) -> pl.DataFrame:
    """Checks of `read_predictions` on a loaded table; the frame keeps its `__row` column."""
    keys = [column for column in (KEY, "series_id") if column in table.frame.columns]
    check_ids(table, *keys)
    check_unique(table, *keys)
    folds = [column for column in table.frame.columns if column == "fold"]
    table = numbers(table, [*COLUMNS, *folds])
    check_probabilities(table)
    return table.frame.with_columns(pl.col(folds).cast(pl.Int64))
