"""Any wrong cell in any table: refused with file, row and column. Cells, rows and columns are
hypothesis'.
"""

from pathlib import Path

import pytest
from helpers_faults import refused
from helpers_stages import run_stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.competition import tables
from pipeline.competition.strict_table import load_table
from pipeline.competition.targets import COLUMNS
from pipeline.system.errors import InputError

HEALTHY, PRIOR = "1,0,1,0,1,0,0,1,0,0,1,0,0", ",".join(["0.5"] * 13)
TABLES = {
    "train.csv": [
        ",".join(["patient_id", *COLUMNS]),
        *(f"{patient},{HEALTHY}" for patient in (1, 2, 3)),
    ],
    "train_series_meta.csv": [
        "patient_id,series_id,aortic_hu,incomplete_organ",
        "1,11,150.5,0",
        "2,12,80,1",
        "3,13,-20,0",
    ],
    "test_series_meta.csv": ["patient_id,series_id", "7,71", "8,81", "9,91"],
    "image_level_labels.csv": [
        "patient_id,series_id,instance_number,injury_name",
        "1,11,3,Bowel",
        "2,12,4,Bowel",
        "3,13,5,Bowel",
    ],
    "sample_submission.csv": [
        ",".join(["patient_id", *COLUMNS]),
        *(f"{patient},{PRIOR}" for patient in (7, 8, 9)),
    ],
    "oof.csv": [
        ",".join(["patient_id", "series_id", *COLUMNS]),
        *(f"{patient},1{patient},{PRIOR}" for patient in (1, 2, 3)),
    ],
}
READ = {
    "train.csv": tables.read_labels,
    "train_series_meta.csv": lambda data: tables.read_series(data, "train"),
    "test_series_meta.csv": lambda data: tables.read_series(data, "test"),
    "image_level_labels.csv": tables.read_slice_labels,
    "sample_submission.csv": tables.read_sample_submission,
    "oof.csv": lambda data: tables.check_predictions(
        load_table(data / "oof.csv", ["patient_id", "series_id", *COLUMNS])
    ),
}
IDS = st.sampled_from(["", "..", "a\\b", ".x", "x" * 65, "a\tb", "\x7f", " 5"]) | st.from_regex(
    r"\A[a-z]{1,4}(/|\.\.)[a-z]{0,4}\Z"
)
NUMBERS = st.sampled_from(
    ["x", "nan", "inf", "-inf", "1e999", "1,5", "0x1", "--", "one"]
) | st.text("abc_-", min_size=1, max_size=6)
CELLS = {
    "aortic_hu": NUMBERS,
    "incomplete_organ": NUMBERS | st.just("2"),
    "injury_name": st.sampled_from(["", "bowel", "Bowels", "Liver"]),
    "instance_number": NUMBERS | st.sampled_from(["", "1.5", "-1", "1e16"]),
}
bounded = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def write(data: Path, **changed: list[str]) -> None:
    for name, rows in {**TABLES, **changed}.items():
        (data / name).write_text("\n".join(rows) + "\n")


def cells_of(name: str, column: str) -> st.SearchStrategy[str]:
    """Wrong cells of a column."""
    if column.endswith("_id"):
        return IDS
    if name == "train.csv":
        return NUMBERS | st.sampled_from(["", "2", "-1", "0.5"])
    return CELLS.get(column, NUMBERS | st.sampled_from(["", "-0.5"]))


@pytest.mark.parametrize("name", list(TABLES))
@bounded
@given(choice=st.data())
def test_any_wrong_cell_of_any_table_is_named(tmp_path, name, choice):
    columns = TABLES[name][0].split(",")
    # its other values are never used
    known = columns if name != "sample_submission.csv" else ["patient_id"]
    column, row = choice.draw(st.sampled_from(known)), choice.draw(st.integers(1, 3))
    cells = TABLES[name][row].split(",")
    cells[columns.index(column)] = f'"{choice.draw(cells_of(name, column))}"'
    rows = list(TABLES[name])
    rows[row] = ",".join(cells)
    write(tmp_path, **{name: rows})
    with pytest.raises(InputError) as refusal:
        READ[name](tmp_path)
    assert f"{tmp_path / name} row {row + 1} column {column}, " in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("name", list(TABLES))
@bounded
@given(choice=st.data())
def test_a_missing_column_and_a_doubled_row_are_named(tmp_path, name, choice):
    columns = TABLES[name][0].split(",")
    optional = ("aortic_hu", "incomplete_organ")
    column = choice.draw(st.sampled_from([one for one in columns if one not in optional]))
    rows = [
        ",".join(cell for cell, one in zip(row.split(","), columns, strict=True) if one != column)
        for row in TABLES[name]
    ]
    write(tmp_path, **{name: rows})
    with pytest.raises(InputError, match=f"column '{column}' is missing, .*{name} row 1"):
        READ[name](tmp_path)
    row = choice.draw(st.integers(1, 3))
    write(tmp_path, **{name: [*TABLES[name], TABLES[name][row]]})
    if name == "image_level_labels.csv":  # a repeated label says nothing new
        assert READ[name](tmp_path).height == 3
        return
    with pytest.raises(
        InputError, match=rf"is there twice, .*{name} row 5 column (patient|series)_id"
    ):
        READ[name](tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row", "parts"),
    [
        (
            "train.csv",
            f"4,{HEALTHY.replace('1,0,0', '1,1,0', 1)}",
            ["two classes of kidney are set", "row 5 column kidney_healthy"],
        ),
        ("train_series_meta.csv", "99,1,1,0", ["unknown patient '99'", "row 5 column patient_id"]),
    ],
)
def test_the_stage_scripts_say_so(tmp_path, name, row, parts):
    write(tmp_path, **{name: [*TABLES[name], row]})
    done = run_stage(
        "03", "--config", "smoke", "--data", str(tmp_path), "--out", str(tmp_path / "run")
    )
    refused(done.returncode, done.stderr, str(tmp_path / name), *parts)


@pytest.mark.slow
def test_a_mistyped_key_names_the_nearest(tmp_path):
    done = run_stage("03", "--config", "smoke", "--out", str(tmp_path), "train.epoch=3")
    refused(
        done.returncode,
        done.stderr,
        "unknown config key 'train.epoch'",
        "did you mean 'train.epochs'?",
    )
