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

from ..system.machine import InputError, log
from .targets import ANY_INJURY, COLUMNS, TARGETS

ROW = "__row"
ID_BYTES = 64
KEY = "patient_id"
INJURY_NAMES = ("Active_Extravasation", "Bowel")


Rule = tuple[pl.Expr, str, str, str]
"""Which rows are wrong, the column to blame, what is wrong (may show the cell as `{value}`), the remedy."""


@dataclass(frozen=True)
class Table:
    """A frame with a `__row` column and the name to use for it in messages."""

    name: str
    frame: pl.DataFrame

    def refuse(self, *rules: Rule) -> None:
        """Raise InputError for the first rule that is broken, at the first row that breaks it."""
        broken = self.frame.select(rule[0].any().alias(str(number)) for number, rule in enumerate(rules)).row(0) if rules else ()
        for (wrong, column, what, remedy), found in zip(rules, broken, strict=True):
            if found:
                row, value = self.frame.filter(wrong).select(ROW, column).row(0)
                shown = repr("" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)[:40])
                raise InputError(what.replace("{value}", shown), f"{self.name} row {row} column {column}", remedy)


def load_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read a CSV (cells as strings) or a parquet file and keep `columns` and those of `optional` that are there.

    Raises:
        InputError: no such file, unreadable, not UTF-8, not a CSV, ragged rows, no rows, a column missing or there twice.
    """
    return frame_table(_open(Path(path)), str(path), columns, optional)


def header(path: Path) -> list[str]:
    """Column names of a table in their order."""
    return [column for column in _open(Path(path)).columns if column != ROW]


def frame_table(frame: pl.DataFrame, name: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """The same for a frame in memory: checks the columns, numbers the rows where they have no number, ids to strings."""
    for column in columns:
        if column not in frame.columns:
            near = difflib.get_close_matches(column, [other for other in frame.columns if other != ROW], n=1)
            remedy = f"rename '{near[0]}'" if near else f"add it (columns, separated by commas: {', '.join(columns)})"
            raise InputError(f"column '{column}' is missing", f"{name} row 1", remedy)
        if f"{column}_duplicated_0" in frame.columns:
            raise InputError(f"column '{column}' is there twice", f"{name} row 1", "remove one of the two")
    if frame.is_empty():
        raise InputError("the table has no rows", name, "give the whole table")
    frame = frame if ROW in frame.columns else frame.with_row_index(ROW, offset=2)
    frame = frame.select(ROW, *columns, *(column for column in optional if column in frame.columns))
    ids = [column for column in columns if column.endswith("_id")]
    for column in ids:
        if not (frame[column].dtype.is_integer() or frame[column].dtype == pl.String):
            raise InputError(f"ids are of type {frame[column].dtype}", f"{name} column {column}", "store them as integers or text")
    return Table(name, frame.with_columns(pl.col(ids).cast(pl.String)))


def _open(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise InputError(f"{path.name} is missing", str(path), "give the folder or file that holds it")
    try:
        return pl.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except OSError as fault:
        raise InputError("not readable", f"{path}: {fault.strerror}", "check the file and its permissions") from fault
    except pl.exceptions.PolarsError as fault:
        raise _explain(path, fault) from fault


def _read_csv(path: Path) -> pl.DataFrame:
    """All cells as strings with the number of the line that each row begins in; empty lines are left out."""
    frame = pl.read_csv(path.read_bytes(), infer_schema=False)
    inner = pl.sum_horizontal(pl.all().str.count_matches("\n", literal=True).fill_null(0))
    line = pl.int_range(pl.len()) + 2 + inner.cum_sum().shift(1, fill_value=0)
    return frame.with_columns(line.alias(ROW)).filter(~pl.all_horizontal(pl.all().exclude(ROW).is_null()))


def _explain(path: Path, fault: Exception) -> InputError:
    """What is wrong with a file that polars cannot read, and in which row where that can be told."""
    remedy = "save the table as CSV in UTF-8"
    try:
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        width = len(next(rows, []))
        if long := next((rows.line_num for row in rows if len(row) > width), None):
            return InputError(f"more cells than the header's {width}", f"{path} row {long}", "remove what is too much")
    except UnicodeDecodeError as wrong:
        row = 1 + path.read_bytes()[: wrong.start].count(b"\n")
        return InputError("not UTF-8 text", f"{path} row {row}", remedy)
    except csv.Error as wrong:
        fault = wrong
    return InputError(f"not readable as a table ({str(fault).splitlines()[0]})", str(path), remedy)


def check_ids(table: Table, *columns: str) -> None:
    """Ids become folder and file names: refuse what is empty, too long, hidden, or has path parts or control characters."""
    rules = []
    for column in columns:
        cell = pl.col(column)
        wrong = {
            "is empty": cell.is_null() | (cell.str.strip_chars() == ""),
            "has path parts": cell.str.contains(r"[/\\]|\.\.|^\."),
            "has control characters or outer blanks": cell.str.contains(r"[\p{C}\p{Zl}\p{Zp}]|^\s|\s$"),
            f"is longer than {ID_BYTES} bytes": cell.str.len_bytes() > ID_BYTES,
        }
        rules += [(rows, column, f"the id {{value}} {what}", "use plain ids such as 10004") for what, rows in wrong.items()]
    table.refuse(*rules)


def check_unique(table: Table, *columns: str) -> None:
    """Refuse a second row with the same `columns`."""
    noun = "patient" if columns == (KEY,) else "series"
    again = ~pl.struct(columns).is_first_distinct()
    table.refuse((again, columns[-1], f"{noun} {{value}} is there twice", "remove one of the rows"))


def numbers(table: Table, columns: Sequence[str], empty: bool = False, binary: bool = False) -> Table:
    """The table with `columns` as finite Float64, with `binary` 0 or 1; refuses other cells (empty ones too unless `empty`)."""
    values, rules = {}, []
    for column in columns:
        text = table.frame[column].dtype == pl.String
        cell = pl.col(column).str.strip_chars() if text else pl.col(column)
        value = values[column] = cell.cast(pl.Float64, strict=False)
        blank = cell.is_null() | ((cell == "") if text else False)
        if not empty:
            rules.append((blank, column, "the cell is empty", "fill in a number"))
        rules.append((value.is_null() & ~blank, column, "{value} is not a number", "write a number with a decimal point"))
        rules.append((~value.is_finite(), column, "{value} is not finite", "write a finite number"))
        if binary:
            rules.append((~value.is_in([0.0, 1.0]), column, "{value} is neither 0 nor 1", "write 0 or 1"))
    table.refuse(*rules)
    return Table(table.name, table.frame.with_columns(**values))


def check_probabilities(table: Table) -> None:
    """Refuse what the competition's metric refuses: negative values and groups that sum to 0."""
    rules = [(pl.col(column) < 0, column, "{value} is negative", "write probabilities") for column in COLUMNS]
    for target in TARGETS:
        total, what = pl.sum_horizontal(target.columns), f"the {target.name} columns"
        rules.append((total == 0, target.columns[0], f"{what} sum to 0", "write probabilities that sum to 1"))
        rules.append((total.is_infinite(), target.columns[0], f"{what} have no finite sum", "write probabilities"))
    table.refuse(*rules)


def check_labels(table: Table) -> Table:
    """Numeric labels: 0 or 1, one class per target, `any_injury` (where present) as the others say; adds it where absent."""
    given = ANY_INJURY in table.frame.columns
    columns = [*COLUMNS, ANY_INJURY] if given else list(COLUMNS)
    table = numbers(table, columns, binary=True)
    rules = []
    for target in TARGETS:
        total, remedy = pl.sum_horizontal(target.columns), f"set one of {', '.join(target.columns)} to 1"
        rules.append((total == 0, target.columns[0], f"no class of {target.name} is set", remedy))
        rules.append((total > 1, target.columns[0], f"two classes of {target.name} are set", remedy))
    injured = pl.any_horizontal(pl.col(target.columns[0]) == 0 for target in TARGETS)
    if given:
        remedy = "it is 1 where any target is not healthy; correct it or remove the column"
        rules.append(((pl.col(ANY_INJURY) == 1) != injured, ANY_INJURY, "{value} contradicts the other columns", remedy))
    table.refuse(*rules)
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
    table = load_table(Path(data) / f"{split}_series_meta.csv", [KEY, "series_id"], ["aortic_hu", "incomplete_organ"])
    check_ids(table, KEY, "series_id")
    check_unique(table, KEY, "series_id")
    joined = ~pl.concat_str(KEY, pl.lit("_"), "series_id").is_first_distinct()
    table.refuse((joined, "series_id", "patient_series of two rows spell the same name, at {value}", "rename one of them"))
    given = table.frame.columns
    table = numbers(table, [column for column in ("aortic_hu",) if column in given], empty=True)
    table = numbers(table, [column for column in ("incomplete_organ",) if column in given], empty=True, binary=True)
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
    known = pl.col("injury_name").is_in(INJURY_NAMES).fill_null(False)
    table.refuse(
        (~whole, "instance_number", "{value} is no instance number", "write a whole number"),
        (~known, "injury_name", "{value} is no injury name", f"write one of {', '.join(INJURY_NAMES)}"),
    )
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
        wrong = ~pl.col(KEY).is_in(known.implode())
        table.refuse((wrong, KEY, "unknown patient {value}", "add the patient to train.csv or remove the row"))


def read_sample_submission(data: Path) -> pl.DataFrame:
    """`sample_submission.csv`: patient_id and the 13 columns in the file's own order (values as they are, Float64)."""
    path = Path(data) / "sample_submission.csv"
    table = load_table(path, [KEY, *COLUMNS])
    for column in header(path):
        if column not in table.frame.columns:
            raise InputError(f"unknown column '{column}'", f"{path} row 1", "give the competition's own sample_submission.csv")
    check_ids(table, KEY)
    check_unique(table, KEY)
    return table.frame.select(header(path)).with_columns(pl.col(COLUMNS).cast(pl.Float64, strict=False))


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
