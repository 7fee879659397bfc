"""Tables read strictly: whatever is wrong is refused with file, row, column and remedy.

Rows are numbered as an editor shows a CSV: the header is row 1. Ids are strings everywhere ("10004"
stays "10004").
"""

import codecs
import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from ..system.errors import InputError
from ..system.frames import read_frame

ROW = "__row"


ID_BYTES = 64


KEY = "patient_id"


Rule = tuple[pl.Expr, str, str, str]
"""Which rows are wrong, the column to blame, what is wrong (may show the cell as `{value}`), the
remedy.
"""


@dataclass(frozen=True)
class Table:
    """A frame with a `__row` column, the name to use for it in messages, and the columns that its
    file has, in their order.
    """

    name: str
    frame: pl.DataFrame
    header: tuple[str, ...] = ()

    def refuse(self, *rules: Rule) -> None:
        """Raise InputError for the first rule that is broken, at the first row that breaks it."""
        broken = (
            self.frame.select(
                rule[0].any().alias(str(number)) for number, rule in enumerate(rules)
            ).row(0)
            if rules
            else ()
        )
        for (wrong, column, what, remedy), found in zip(rules, broken, strict=True):
            if found:
                row, value = self.frame.filter(wrong).select(ROW, column).row(0)
                shown = repr(
                    ""
                    if value is None
                    else f"{value:.15g}"
                    if isinstance(value, float)
                    else str(value)[:40]
                )
                raise InputError(
                    what.replace("{value}", shown), f"{self.name} row {row} column {column}", remedy
                )


def load_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read a CSV (cells as strings) or a parquet file and keep `columns` and those of `optional`
    that are there.

    Raises:
        InputError: no such file, unreadable, not UTF-8, not a CSV, ragged rows, no rows, a column
        missing or there twice.
    """
    return frame_table(_open(Path(path)), str(path), columns, optional)


def frame_table(
    frame: pl.DataFrame, name: str, columns: Sequence[str], optional: Sequence[str] = ()
) -> Table:
    """The same for a frame in memory: checks the columns, numbers the rows where they have no
    number, ids to strings.
    """
    for column in columns:
        if column not in frame.columns:
            spare = [other for other in frame.columns if other not in (ROW, *columns)]
            near = difflib.get_close_matches(column, spare, n=1)
            remedy = (
                f"rename '{near[0]}'"
                if near
                else f"add it (columns, separated by commas: {', '.join(columns)})"
            )
            raise InputError(f"column '{column}' is missing", f"{name} row 1", remedy)
        if f"{column}_duplicated_0" in frame.columns:
            raise InputError(
                f"column '{column}' is there twice", f"{name} row 1", "remove one of the two"
            )
    if frame.is_empty():
        raise InputError("the table has no rows", name, "give the whole table")
    header = tuple(column for column in frame.columns if column != ROW)
    frame = frame if ROW in frame.columns else frame.with_row_index(ROW, offset=2)
    frame = frame.select(ROW, *columns, *(column for column in optional if column in frame.columns))
    ids = [column for column in columns if column.endswith("_id")]
    for column in ids:
        if not (frame[column].dtype.is_integer() or frame[column].dtype == pl.String):
            raise InputError(
                f"ids are of type {frame[column].dtype}",
                f"{name} column {column}",
                "store them as integers or text",
            )
    return Table(name, frame.with_columns(pl.col(ids).cast(pl.String)), header)


def _open(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise InputError(
            f"{path.name} is missing", str(path), "give the folder or file that holds it"
        )
    try:
        return read_frame(path) if path.suffix == ".parquet" else _read_csv(path)
    except OSError as fault:
        raise InputError(
            "not readable", f"{path}: {fault.strerror}", "check the file and its permissions"
        ) from fault
    except pl.exceptions.PolarsError as fault:
        raise _explain(path, fault) from fault


def _plain(path: Path) -> bytes:
    """The bytes of a table as UTF-8 without a mark, lines ending in `\\n`; spreadsheets write
    UTF-16 too.
    """
    data = path.read_bytes()
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if wide or b"\0" in data[:2]:
        kind = "utf-16" if wide else "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
        data = data.decode(kind, "replace").encode()
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    return data if b"\n" in data else data.replace(b"\r", b"\n")


def _separator(data: bytes) -> str:
    """What stands between the names in the first line: a comma, else semicolons or tabs, as
    spreadsheets write them.
    """
    head = data.partition(b"\n")[0].decode("utf-8", "replace")
    return next((one for one in ",;\t" if one in head), ",")


def _read_csv(path: Path) -> pl.DataFrame:
    """All cells as strings with the number of the line that each row begins in; empty lines are
    left out.
    """
    data = _plain(path)
    frame = pl.read_csv(data, infer_schema=False, separator=(separator := _separator(data)))
    if separator != ",":  # whose spreadsheet may write a comma for the decimal point
        cells = pl.all().exclude("^.*_id$")
        frame = frame.with_columns(cells.str.replace(r"^(\s*[+-]?\d+),(\d+\s*)$", "$1.$2"))
    inner = pl.sum_horizontal(pl.all().str.count_matches("\n", literal=True).fill_null(0))
    line = pl.int_range(pl.len()) + 2 + inner.cum_sum().shift(1, fill_value=0)
    return frame.with_columns(line.alias(ROW)).filter(
        ~pl.all_horizontal(pl.all().exclude(ROW).is_null())
    )


def _explain(path: Path, fault: Exception) -> InputError:
    """What is wrong with a file that polars cannot read, and in which row where that can be
    told.
    """
    remedy = "save the table as CSV in UTF-8"
    try:
        text = (data := _plain(path)).decode()
        rows = csv.reader(io.StringIO(text), delimiter=_separator(data))
        width = len(next(rows, []))
        if long := next((rows.line_num for row in rows if len(row) > width), None):
            return InputError(
                f"more cells than the header's {width}",
                f"{path} row {long}",
                "remove what is too much",
            )
    except UnicodeDecodeError as wrong:
        row = 1 + path.read_bytes()[: wrong.start].count(b"\n")
        return InputError("not UTF-8 text", f"{path} row {row}", remedy)
    except csv.Error as wrong:
        fault = wrong
    return InputError(f"not readable as a table ({str(fault).splitlines()[0]})", str(path), remedy)


def check_ids(table: Table, *columns: str) -> None:
    """Ids become folder and file names: refuse what is empty, too long, hidden, or has path parts
    or control characters.
    """
    rules = []
    for column in columns:
        cell = pl.col(column)
        # what pandas makes of whole numbers beside an empty cell
        floats = cell.str.contains(r"^[0-9]+\.0$").fill_null(True)
        rules.append(
            (
                floats.all() & cell.is_not_null(),
                column,
                "the ids were written as floating-point numbers, e.g. {value}",
                "write whole numbers such as 10004 (pandas: dtype=str)",
            )
        )
        wrong = {
            "is empty": cell.is_null() | (cell.str.strip_chars() == ""),
            "has path parts": cell.str.contains(r"[/\\]|\.\.|^\."),
            "has control characters or outer blanks": cell.str.contains(
                r"[\p{C}\p{Zl}\p{Zp}]|^\s|\s$"
            ),
            f"is longer than {ID_BYTES} bytes": cell.str.len_bytes() > ID_BYTES,
        }
        rules += [
            (rows, column, f"the id {{value}} {what}", "use plain ids such as 10004")
            for what, rows in wrong.items()
        ]
    table.refuse(*rules)


def check_unique(table: Table, *columns: str) -> None:
    """Refuse a second row with the same `columns`."""
    noun = "patient" if columns == (KEY,) else "series"
    again = ~pl.struct(columns).is_first_distinct()
    table.refuse((again, columns[-1], f"{noun} {{value}} is there twice", "remove one of the rows"))


def numbers(
    table: Table, columns: Sequence[str], empty: bool = False, binary: bool = False
) -> Table:
    """The table with `columns` as finite Float64, with `binary` 0 or 1; refuses other cells (empty
    ones too unless `empty`).
    """
    values, rules = {}, []
    for column in columns:
        text = table.frame[column].dtype == pl.String
        cell = pl.col(column).str.strip_chars() if text else pl.col(column)
        value = values[column] = cell.cast(pl.Float64, strict=False)
        blank = cell.is_null() | ((cell == "") if text else False)
        if not empty:
            rules.append((blank, column, "the cell is empty", "fill in a number"))
        rules.append(
            (
                value.is_null() & ~blank,
                column,
                "{value} is not a number",
                "write a number with a decimal point",
            )
        )
        rules.append((~value.is_finite(), column, "{value} is not finite", "write a finite number"))
        if binary:
            rules.append(
                (~value.is_in([0.0, 1.0]), column, "{value} is neither 0 nor 1", "write 0 or 1")
            )
    table.refuse(*rules)
    return replace(table, frame=table.frame.with_columns(**values))
