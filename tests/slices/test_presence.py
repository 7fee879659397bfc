"""Data that are not there: a disk that is not mounted wipes nothing, and nothing converted is no
success.
"""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from helpers_dataset import make_data, write_tables

from pipeline.run import layout
from pipeline.run.presets import load_config
from pipeline.slices.presence import out_of_reach, refuse_vanished_test
from pipeline.slices.sources import Found, SeriesTask
from pipeline.slices.stage import convert_dicom
from pipeline.system.errors import InputError
from pipeline.volumes.stage import build_volumes

CONFIG = load_config("smoke", ["phantom=null"])


def state(out: Path) -> dict[str, int]:
    """All files of a run and when they were written; locks are no results."""
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }


def convert(data: Path, out: Path, **more: object) -> pl.DataFrame:
    """Stage 01; returns the slice index."""
    folder = convert_dicom(CONFIG, data=data, out=out, jobs=1, **more)
    return pl.read_parquet(folder / layout.INDEX)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["mount point", "unlabelled", "link", "nothing"])
def test_a_disk_that_is_not_mounted_wipes_nothing(tmp_path, left):
    data, out = make_data(tmp_path / "data", unlabelled=2), tmp_path / "out"
    convert(data, out)
    build_volumes(CONFIG, data=data, out=out, jobs=1)
    before = state(out)
    name = "unlabelled" if left == "unlabelled" else "train_images"
    shutil.move(data / name, tmp_path / "away")
    if left == "mount point":
        (data / name).mkdir()
    elif left == "link":
        (data / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"{data / name}.*mount") as refusal:
        convert(data, out)
    assert "\n" not in str(refusal.value)
    assert state(out) == before
    (data / name).unlink() if left == "link" else shutil.rmtree(data / name, ignore_errors=True)
    shutil.move(tmp_path / "away", data / name)
    convert(data, out)
    assert state(out) == before, "mounted again, all is up to date"


@pytest.mark.slow
def test_nearly_all_gone_is_refused_and_a_part_is_not(tmp_path):
    data, out = make_data(tmp_path / "data", patients=12), tmp_path / "out"
    convert(data, out)
    before = state(out)
    for patient in range(101, 112):
        shutil.rmtree(data / "train_images" / str(patient))
    with pytest.raises(InputError, match="11 of the 12 series that the last run found have no"):
        convert(data, out)
    assert state(out) == before
    assert convert(data, out, force=True)["patient_id"].unique().to_list() == ["112"]


def test_a_damaged_index_is_made_again(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    whole = convert(data, out)
    path = out / layout.SLICES / layout.INDEX
    path.write_bytes(path.read_bytes()[:-7])
    assert convert(data, out).equals(whole)


@pytest.mark.slow
def test_series_that_the_table_no_longer_lists_are_removed_as_ever(tmp_path):
    data, out = make_data(tmp_path / "data", patients=12), tmp_path / "out"
    convert(data, out)
    write_tables(data, [("101", "901")])
    assert convert(data, out)["series_id"].unique().to_list() == ["901"]


@pytest.mark.slow
def test_a_part_that_is_gone_is_removed_with_a_warning(tmp_path):
    data, out = make_data(tmp_path / "data", patients=12), tmp_path / "out"
    convert(data, out)
    for patient in (101, 102, 103):
        shutil.rmtree(data / "train_images" / str(patient))
    assert convert(data, out)["series_id"].n_unique() == 9


def away(data: Path) -> None:
    shutil.rmtree(data / "train_images")


def deeper(data: Path) -> None:
    shutil.move(data / "train_images", data / "images")
    (data / "train_images").mkdir()
    shutil.move(data / "images", data / "train_images" / "train_images")


def bare(data: Path) -> None:
    for path in data.rglob("*.dcm"):
        path.rename(path.with_suffix(""))


def linked(data: Path) -> None:
    shutil.move(data / "train_images", data / "store")
    (data / "train_images").mkdir()
    for path in (data / "store").iterdir():
        (data / "train_images" / path.name).symlink_to(path)


def zeros(data: Path) -> None:
    for path in (data / "train_images").iterdir():
        path.rename(path.with_name(f"0{path.name}"))


@pytest.mark.parametrize(
    ("change", "why", "way_out"),
    [
        (away, "no such folder", "mount or unpack train_images"),
        (deeper, "no such folder", "move the patients out of the inner train_images"),
        (bare, "no DICOM files", "give the files names such as 12.dcm"),
        (linked, "link out of the data folder", "copy or mount the images there"),
        (zeros, "no such folder", "write the ids in the table as the folders are named, e.g. "),
    ],
)
def test_none_of_the_tables_series_is_one_line(tmp_path, change, why, way_out):
    data = make_data(tmp_path / "data")
    change(data)
    with pytest.raises(InputError) as refusal:
        convert(data, tmp_path / "out")
    text = str(refusal.value)
    assert text.startswith(f"none of the 4 series of train_series_meta.csv was found ({why}"), (
        "the count, and why"
    )
    assert f"), {data / 'train_images' / '101' / '901'}, {way_out}" in text
    assert not (tmp_path / "out" / layout.SLICES).exists()


def test_ids_with_leading_zeros_are_read_as_they_are(tmp_path):
    data = make_data(tmp_path / "data")
    zeros(data)
    write_tables(data, [(f"0{101 + k}", str(901 + k)) for k in range(4)])
    assert convert(data, tmp_path / "out")["patient_id"].unique().sort().to_list() == [
        "0101",
        "0102",
        "0103",
        "0104",
    ]


def test_some_series_without_files_are_a_warning(tmp_path, capfd):
    data = make_data(tmp_path / "data")
    shutil.rmtree(data / "train_images" / "101")
    assert convert(data, tmp_path / "out")["series_id"].n_unique() == 3
    assert (
        "warning: 1 of the 4 series of train_series_meta.csv have no files, e.g."
        f" {data / 'train_images' / '101' / '901'}" in capfd.readouterr().err
    )


def test_files_of_which_none_is_readable_are_no_success(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    for path in data.rglob("*.dcm"):
        path.write_bytes(b"no DICOM at all" * 100)
    with pytest.raises(
        InputError,
        match=f"not one slice of 4 series could be read .*{out / layout.SLICES}/quarantine.csv",
    ):
        convert(data, out)
    assert len((out / layout.SLICES / layout.QUARANTINE).read_text().splitlines()) == 13
    assert not (out / layout.SLICES / layout.MANIFEST).exists()


def test_slices_of_which_none_is_usable_are_no_success(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    index = convert(data, out).with_columns(flags=pl.lit("partial"))
    path = out / layout.SLICES / layout.INDEX
    index.write_parquet(path)
    manifest = path.with_name(layout.MANIFEST)
    tree = json.loads(manifest.read_text())
    tree["outputs"][layout.INDEX]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="not one of 4 series gives a volume"):
        build_volumes(CONFIG, data=data, out=out, jobs=1)


def test_a_test_set_that_is_gone_is_refused_and_one_that_never_was_there_is_not(tmp_path):
    tasks = [SeriesTask(str(k), "1", "test", str(tmp_path / str(k))) for k in range(10)]
    gone = [Found("", 0, "no such folder")] * 10
    refuse_vanished_test(tasks, gone, 0, tmp_path)
    refuse_vanished_test(tasks, [Found("x", 3, "")] * 10, 10, tmp_path)
    with pytest.raises(
        InputError, match=f"0 test patients are there, the last run predicted 10, {tmp_path}"
    ):
        refuse_vanished_test(tasks, gone, 10, tmp_path)


def test_what_counts_as_out_of_reach():
    assert [out_of_reach(left, 20) for left in (0, 2, 3, 20)] == [True, True, False, False]
    assert not out_of_reach(0, 0)
    assert out_of_reach(0, 1)
