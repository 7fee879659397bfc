"""Wrong tables are refused with file, row, column and remedy; right ones are read exactly."""

import os
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers_scores import HEADER, label_frame, one_hot, predicted, series_frame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.competition import tables
from pipeline.competition.strict_table import ROW, load_table
from pipeline.competition.targets import COLUMNS, TARGETS
from pipeline.system.errors import InputError

HEALTHY = "1,0,1,0,1,0,0,1,0,0,1,0,0,0"
INJURED = "1,0,0,1,0,1,0,1,0,0,0,0,1,1"
ROWS = [HEADER, f"10004,{INJURED}", f"10005,{HEALTHY}", f"10007,{HEALTHY}", f"10009,{INJURED}"]
COLUMN_NAMES = HEADER.split(",")
SERIES = [
    "patient_id,series_id,aortic_hu,incomplete_organ",
    "10004,21057,146.0,0",
    "10004,51033,,1",
    "10005,18667,-1024.0,0",
]
SLICES = [
    "patient_id,series_id,instance_number,injury_name",
    "10004,21057,362,Active_Extravasation",
    "10004,21057,363,Bowel",
]


def write(folder: Path, name: str, rows: list[str] | bytes) -> Path:
    path = folder / name
    path.write_bytes(rows if isinstance(rows, bytes) else ("\n".join(rows) + "\n").encode())
    return path


def labels_of(folder: Path, text: bytes) -> pl.DataFrame:
    write(folder, "train.csv", text)
    return tables.read_labels(folder)


def read_predictions(path: Path, series: bool) -> pl.DataFrame:
    keys = ["patient_id", "series_id"] if series else ["patient_id"]
    return tables.check_predictions(load_table(path, [*keys, *COLUMNS], ["fold"])).drop(ROW)


def refused(read, *parts: str) -> str:
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_reads_labels_with_string_ids(tmp_path):
    write(tmp_path, "train.csv", ROWS)
    found = tables.read_labels(tmp_path)
    assert found.columns == ["patient_id", *COLUMNS, "any_injury"]
    assert found["patient_id"].to_list() == ["10004", "10005", "10007", "10009"]
    assert found["any_injury"].to_list() == [1, 0, 0, 1]
    assert found.row(0)[1:14] == (1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    "rows",
    [
        [row.rsplit(",", 1)[0] for row in ROWS],  # no any_injury
        # a column of one's own
        [f"{row},{'note' if i == 0 else 'x'}" for i, row in enumerate(ROWS)],
        [*ROWS[:2], "", *ROWS[2:], "", ""],
        [row.replace(",1", ",1.0") for row in ROWS],
    ],
    ids=["no any_injury", "extra column", "empty lines", "floats"],
)
def test_accepts_what_means_the_same(tmp_path, rows):
    expected = labels_of(tmp_path, "\n".join(ROWS).encode())
    assert labels_of(tmp_path, "\n".join(rows).encode()).equals(expected)


def test_accepts_byte_order_mark_and_windows_line_ends(tmp_path):
    expected = labels_of(tmp_path, "\n".join(ROWS).encode())
    found = labels_of(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(ROWS).encode())
    assert found.equals(expected)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (b"", ["not readable as a table (empty", "train.csv"]),
        ([HEADER], ["no rows"]),
        (("\n".join(ROWS) + "\n10010,").encode() + b"\xe9\n", ["not UTF-8", "row 6"]),
        ([*ROWS, f"10010,{HEALTHY},1"], ["more cells than the header's 15", "row 6"]),
        ([*ROWS, "10010,1,0"], ["the cell is empty", "row 6", "column extravasation_healthy"]),
        (
            [ROWS[0].replace("liver_low", "liver_lo"), *ROWS[1:]],
            ["column 'liver_low' is missing", "row 1", "rename 'liver_lo'"],
        ),
        (
            # what is near is needed itself
            [ROWS[0].replace("liver_low", "other"), *ROWS[1:]],
            ["column 'liver_low' is missing", "add it (columns"],
        ),
        (
            [ROWS[0].replace("liver_low", "liver_high"), *ROWS[1:]],
            ["column 'liver_low' is missing"],
        ),
        (
            [ROWS[0].replace("any_injury", "liver_low"), *ROWS[1:]],
            ["column 'liver_low' is there twice"],
        ),
        (
            [row.replace(",", "|") for row in ROWS],
            ["column 'patient_id' is missing", "separated by commas"],
        ),
        (
            [*ROWS[:3], "", *ROWS[3:], ROWS[1]],
            ["patient '10004' is there twice", "row 7", "column patient_id"],
        ),
        ([*ROWS, f"10010,{HEALTHY[:-1]}1"], ["'1' contradicts", "row 6", "column any_injury"]),
    ],
)
def test_refuses_broken_tables(tmp_path, rows, parts):
    path = write(tmp_path, "train.csv", rows)
    refused(lambda: tables.read_labels(tmp_path), str(path), *parts)


def test_missing_files_say_what_to_do(tmp_path):
    refused(
        lambda: tables.read_labels(tmp_path),
        "train.csv is missing",
        str(tmp_path),
        "give the folder",
    )
    refused(lambda: tables.read_series(tmp_path, "test"), "test_series_meta.csv is missing")
    assert tables.read_slice_labels(tmp_path) is None
    assert not tables.has_test(tmp_path)


bad_cells = st.sampled_from(
    ["x", "", "2", "-1", "nan", "inf", "0.5", "1,5", "one", "1e400", "--", "0x1", "\u0661"]
)
bad_ids = st.sampled_from(
    [
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "",
        " ",
        "a\tb",
        "x" * 65,
        "\x00",
        "\x7f",
        "a\u2028b",
        " 5",
        "5 ",
        "/etc",
    ]
)
tidy = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@tidy
@given(row=st.integers(1, 4), column=st.sampled_from(COLUMN_NAMES[1:]), cell=bad_cells)
def test_any_wrong_cell_is_named(tmp_path, row, column, cell):
    rows = [line.split(",") for line in ROWS]
    rows[row][COLUMN_NAMES.index(column)] = f'"{cell}"'
    path = write(tmp_path, "train.csv", [",".join(line) for line in rows])
    refused(lambda: tables.read_labels(tmp_path), f"{path} row {row + 1} column {column}")


@tidy
@given(row=st.integers(1, 4), cell=bad_ids)
def test_any_hostile_id_is_named(tmp_path, row, cell):
    rows = list(ROWS)
    rows[row] = f'"{cell}"' + rows[row][5:]
    path = write(tmp_path, "train.csv", rows)
    message = refused(
        lambda: tables.read_labels(tmp_path), "the id", f"{path} row {row + 1} column patient_id"
    )
    assert message.isprintable(), "nothing of the id may reach a terminal as it is"


@tidy
@given(
    row=st.integers(1, 4),
    target=st.sampled_from(TARGETS),
    chosen=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_not_exactly_one_class_is_named(tmp_path, row, target, chosen):
    cells = [int(value) for value in chosen[: len(target.classes)]]
    rows = [line.split(",") for line in ROWS]
    rows[row][
        COLUMN_NAMES.index(target.columns[0]) : COLUMN_NAMES.index(target.columns[-1]) + 1
    ] = map(str, cells)
    rows = [",".join(line[:-1]) for line in rows]  # without any_injury, which would contradict
    path = write(tmp_path, "train.csv", rows)
    if sum(cells) == 1:
        assert tables.read_labels(tmp_path).height == 4
    else:
        what = (
            f"two classes of {target.name} are set"
            if sum(cells)
            else f"no class of {target.name} is set"
        )
        refused(
            lambda: tables.read_labels(tmp_path),
            what,
            f"{path} row {row + 1} column {target.columns[0]}",
        )


@tidy
@given(data=st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    write(tmp_path, "train.csv", data)
    refused(lambda: tables.read_labels(tmp_path), "train.csv")


def test_series_are_read_and_checked(tmp_path):
    write(tmp_path, "train.csv", ROWS)
    write(tmp_path, "train_series_meta.csv", SERIES)
    found = tables.read_series(tmp_path, "train")
    assert found.rows() == [
        ("10004", "21057", 146.0, 0.0),
        ("10004", "51033", None, 1.0),
        ("10005", "18667", -1024.0, 0.0),
    ]
    for line, parts in (
        ("10004,21057,1,0", ["series '21057' is there twice", "row 5 column series_id"]),
        ("77,1,1,0", ["unknown patient '77'", "row 5 column patient_id"]),
        ("10005,../../x,1,0", ["has path parts", "row 5 column series_id"]),
        ("10005,2,x,0", ["'x' is not a number", "row 5 column aortic_hu"]),
        ("10005,2,1,2", ["'2' is neither 0 nor 1", "row 5 column incomplete_organ"]),
    ):
        path = write(tmp_path, "train_series_meta.csv", [*SERIES, line])
        refused(lambda: tables.read_series(tmp_path, "train"), str(path), *parts)
    write(tmp_path, "test_series_meta.csv", ["patient_id,series_id", "9,1", "9,2"])
    assert tables.read_series(tmp_path, "test").rows() == [("9", "1"), ("9", "2")]
    assert tables.has_test(tmp_path)


def test_two_series_may_not_share_a_file_name(tmp_path):
    write(tmp_path, "test_series_meta.csv", ["patient_id,series_id", "a_b,c", "a,b_c"])
    refused(lambda: tables.read_series(tmp_path, "test"), "spell the same name", "row 3")


def test_slice_labels_are_read_and_checked(tmp_path, capfd):
    write(tmp_path, "train.csv", ROWS)
    write(tmp_path, "train_series_meta.csv", SERIES)
    write(tmp_path, "image_level_labels.csv", [*SLICES, SLICES[1], "10005,999,3,Bowel"])
    found = tables.read_slice_labels(tmp_path)
    assert found.rows() == [
        ("10004", "21057", 362, "Active_Extravasation"),
        ("10004", "21057", 363, "Bowel"),
    ]
    assert (
        "1 slice labels of series that train_series_meta.csv does not list are left out"
        in capfd.readouterr().err
    )
    for line, parts in (
        ("77,21057,1,Bowel", ["unknown patient '77'", "row 4 column patient_id"]),
        ("10004,21057,1.5,Bowel", ["'1.5' is no instance number", "row 4 column instance_number"]),
        ("10004,21057,-1,Bowel", ["'-1' is no instance number", "row 4 column instance_number"]),
        ("10004,21057,,Bowel", ["the cell is empty", "row 4 column instance_number"]),
        (
            "10004,21057,1,Bowl",
            ["'Bowl' is no injury name", "row 4 column injury_name", "Active_Extravasation, Bowel"],
        ),
        ("10004,21057,1", ["'' is no injury name", "row 4 column injury_name"]),
    ):
        path = write(tmp_path, "image_level_labels.csv", [*SLICES, line])
        refused(lambda: tables.read_slice_labels(tmp_path), str(path), *parts)


def test_sample_submission_keeps_its_order(tmp_path):
    columns = ["patient_id", *reversed(COLUMNS)]
    write(
        tmp_path,
        "sample_submission.csv",
        [",".join(columns), "9," + ",".join(["0.5"] * 13), "3," + ",".join([""] * 13)],
    )
    found = tables.read_sample_submission(tmp_path)
    assert found.columns == columns
    assert found["patient_id"].to_list() == ["9", "3"]
    write(
        tmp_path,
        "sample_submission.csv",
        [",".join([*columns, "extra"]), "9," + ",".join(["0.5"] * 14)],
    )
    refused(lambda: tables.read_sample_submission(tmp_path), "unknown column 'extra'", "row 1")


def test_predictions_of_both_kinds_and_formats(tmp_path):
    labels = one_hot(9)
    frame = series_frame(label_frame(labels), predicted(labels, 1.0), per_patient=2)
    frame.write_csv(tmp_path / "oof.csv")
    frame.with_columns(
        pl.col("patient_id", "series_id").cast(pl.Int64), fold=pl.lit(1)
    ).write_parquet(tmp_path / "oof.parquet")
    read = read_predictions(tmp_path / "oof.csv", series=True)
    assert read.equals(frame)
    assert read_predictions(tmp_path / "oof.parquet", series=True).equals(
        frame.with_columns(fold=pl.lit(1, dtype=pl.Int64))
    )
    refused(
        lambda: read_predictions(tmp_path / "oof.csv", series=False),
        "patient '10000' is there twice",
        "row 11",
    )
    frame.with_columns(pl.col("patient_id").cast(pl.Float64)).write_parquet(
        tmp_path / "float.parquet"
    )
    refused(
        lambda: read_predictions(tmp_path / "float.parquet", series=True),
        "ids are of type Float64",
        "column patient_id",
    )
    write(tmp_path, "bad.parquet", b"PAR1 no parquet")
    refused(
        lambda: read_predictions(tmp_path / "bad.parquet", series=True),
        "not readable as a table",
        "bad.parquet",
    )


def test_rows_are_counted_past_cells_with_line_breaks(tmp_path):
    rows = [
        f"{row},{'note' if i == 0 else chr(34) + 'two' + chr(10) + 'lines' + chr(34)}"
        for i, row in enumerate(ROWS)
    ]
    write(tmp_path, "train.csv", [*rows, f"x/y,{HEALTHY},"])
    refused(lambda: tables.read_labels(tmp_path), "row 10 column patient_id")
    assert (tmp_path / "train.csv").read_text().split("\n")[9].startswith("x/y")


def test_rows_are_not_walked_in_python(tmp_path):
    """A table may have 1.5 million rows; no clock here, but fewer calls than rows."""
    import sys

    number = 20_000
    ids = np.arange(number) % 4
    frame = pl.DataFrame(
        {"patient_id": [ROWS[1 + i][:5] for i in ids], "series_id": np.arange(number) // 4}
    )
    write(tmp_path, "train.csv", ROWS)
    frame.write_csv(tmp_path / "train_series_meta.csv")
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        tables.read_series(tmp_path, "train")
    finally:
        sys.setprofile(None)
    assert calls < number


@pytest.mark.skipif(
    "VOCO2D_RSNA_META" not in os.environ,
    reason="VOCO2D_RSNA_META names no folder with the real tables",
)
def test_the_real_tables_pass():
    data = Path(os.environ["VOCO2D_RSNA_META"])
    assert tables.read_labels(data).height == 3147
    assert tables.read_series(data, "train").height == 4711
    assert tables.read_slice_labels(data).height == 12029
    assert re.fullmatch(r"\d+", tables.read_sample_submission(data)["patient_id"][0])
    assert tables.read_series(data, "test").height == 6


def test_ids_that_pandas_wrote_as_floats_are_named_as_such(tmp_path):
    rows = (f"{patient}.0,{series}.0" for patient, series in ((101, 901), (102, 902)))
    (tmp_path / "test_series_meta.csv").write_text("\n".join(["patient_id,series_id", *rows]))
    with pytest.raises(
        InputError,
        match=r"floating-point numbers, e.g. '101.0', .*test_series_meta.csv row 2 column patient",
    ):
        tables.read_series(tmp_path, "test")
    (tmp_path / "test_series_meta.csv").write_text("patient_id,series_id\n1.0,a\nb,c\n")
    assert tables.read_series(tmp_path, "test")["patient_id"].to_list() == ["1.0", "b"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_as_spreadsheets_save_them_are_read_right(tmp_path, encoding, separator, end):
    plain = ["patient_id,series_id,aortic_hu", "0010004,1.2.840,146.5", '"10005",18667,-80']
    decimal = [row.replace("146.5", "146|5") if separator != "," else row for row in plain]
    text = end.join(row.replace(",", separator).replace("|", ",") for row in decimal) + end
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    write(tmp_path, "test_series_meta.csv", (mark + text).encode(encoding))
    found = tables.read_series(tmp_path, "test")
    assert found.rows() == [("0010004", "1.2.840", 146.5), ("10005", "18667", -80.0)]
    write(tmp_path, "test_series_meta.csv", (mark + text.replace("80", "x")).encode(encoding))
    with pytest.raises(InputError, match="'-x' is not a number, .*row 3 column aortic_hu"):
        tables.read_series(tmp_path, "test")


def test_utf_16_without_a_mark_is_read_and_long_rows_are_named(tmp_path):
    text = "patient_id;series_id\n1;2\n"
    write(tmp_path, "test_series_meta.csv", text.encode("utf-16-le"))
    assert tables.read_series(tmp_path, "test").rows() == [("1", "2")]
    write(tmp_path, "test_series_meta.csv", (text + "3;4;5\n").encode("utf-16"))
    with pytest.raises(InputError, match="more cells than the header's 2, .*csv row 3"):
        tables.read_series(tmp_path, "test")
