"""A new kind of source file is a reader and a row of the registry: two made up here go through
stage 01.
"""

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from helpers_dicom import fingerprints, naive_window, pattern, write_series

from pipeline.run.config import ConvertConfig
from pipeline.slices import readers
from pipeline.slices.geometry import Placement
from pipeline.slices.readers import Reader, SliceRead, Unreadable, instance_of
from pipeline.slices.sources import list_files, plan
from pipeline.slices.store import convert_all
from pipeline.slices.window import HIGH_HU, LOW_HU

NOTHING = pl.DataFrame(schema=["patient_id", "series_id"])
SPACING = (0.7, 0.8)


def count_slices(file, max_pixels):
    """Planes of a `.npy` file of HU, superior first."""
    try:
        volume = np.load(file, mmap_mode="r")
    except ValueError:
        raise Unreadable("NumPy: not readable") from None
    return len(volume)


def read(file, k, config, careful):
    """Slice `k` of a `.npy` file, or the picture that a `.png` file holds already."""
    if file.endswith(".npy"):
        placement = Placement(k + 1, (0.0, 0.0, -5.0 * k), None)
        return SliceRead(np.load(file)[k], SPACING, placement, "numpy", "NumPy")
    image = cv2.imread(file, cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise Unreadable("PNG: not readable")
    placement = Placement(instance_of(Path(file).name), None, None)
    hu = LOW_HU + image * ((HIGH_HU - LOW_HU) / 255)
    return SliceRead(hu, (None, None), placement, "cv2", "PNG")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Two kinds more, read by this module."""
    more = (
        Reader("NumPy", __name__, (".npy",), volume=True),
        Reader("PNG", __name__, (".png",), volume=False),
    )
    monkeypatch.setattr(readers, "READERS", (*readers.READERS, *more))


def stage_01(data, out):
    """The index of what `data/unlabelled` becomes, its pictures by path, the quarantine's rows."""
    tasks = plan(data, NOTHING)
    convert_all(tasks, fingerprints(tasks, data), data, out, ConvertConfig())
    index = pl.read_parquet(out / "index.parquet")
    images = {png: cv2.imread(str(out / png), cv2.IMREAD_UNCHANGED) for png in index["png"]}
    with open(out / "quarantine.csv", encoding="utf-8") as handle:
        return index, images, list(csv.reader(handle))[1:]


def test_a_volume_of_a_new_kind_is_found_read_and_windowed(tmp_path):
    folder = tmp_path / "unlabelled" / "more"
    folder.mkdir(parents=True)
    hu = np.random.default_rng(0).integers(-300, 400, (4, 20, 24)).astype(np.int16)
    np.save(folder / "a.npy", hu)
    (folder / "b.npy").write_bytes(b"no array")
    index, images, quarantined = stage_01(tmp_path, tmp_path / "out")
    assert index.select("patient_id", "series_id", "source").unique().rows() == [
        ("unlabelled-more-a", "numpy", "unlabelled")
    ]
    assert index["instance_number"].to_list() == [1, 2, 3, 4]
    assert index["z_mm"].to_list() == [0.0, -5.0, -10.0, -15.0]
    assert index.select("spacing_y_mm", "spacing_x_mm").unique().rows() == [SPACING]
    for image, plane in zip(images.values(), hu, strict=True):
        assert np.array_equal(image, naive_window(plane, 1.0, 0.0))
    assert quarantined == [["unlabelled/more/b.npy", "NumPy: not readable"]]


def test_a_folder_of_a_new_kind_keeps_its_pictures_to_the_bit(tmp_path):
    folder, pictures = tmp_path / "unlabelled" / "p" / "s", {}
    folder.mkdir(parents=True)
    for number in (10, 9, 2):
        pictures[number] = np.random.default_rng(number).integers(0, 256, (20, 24), np.uint8)
        cv2.imwrite(str(folder / f"{number}.PNG"), pictures[number])
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    index, images, quarantined = stage_01(tmp_path, tmp_path / "out")
    assert index["instance_number"].to_list() == [2, 9, 10]
    for number, image in zip((2, 9, 10), images.values(), strict=True):
        assert np.array_equal(image, pictures[number])
    assert quarantined == [["unlabelled/p/s/3.png", "PNG: not readable"]]


def test_a_folder_holds_slices_of_one_kind_the_first_that_is_registered(tmp_path):
    folder = tmp_path / "unlabelled" / "p" / "s"
    write_series(folder, 3, "explicit")
    cv2.imwrite(str(folder / "1.png"), pattern(8).astype(np.uint8))
    assert [Path(file).name for file in list_files(folder, tmp_path).files] == [
        "1.dcm",
        "2.dcm",
        "3.dcm",
    ]
    shutil.rmtree(folder)
    folder.mkdir()
    assert list_files(folder, tmp_path).refused == [(str(folder), "no DICOM or PNG files")]


def test_messages_name_all_kinds(tmp_path, capsys):
    (tmp_path / "unlabelled" / "empty").mkdir(parents=True)
    assert plan(tmp_path, NOTHING) == []
    expected = "neither <series>/*.dcm nor NIfTI images nor NumPy images nor <series>/*.png and are"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "number"),
    [("12.dcm", 12), ("007.DCM", 7), ("CT.1.2.dcm", None), ("x.dcm", None), ("1.nii.gz", None)],
)
def test_the_number_in_a_name(name, number):
    assert instance_of(name) == number
    assert instance_of("1" * 13 + ".dcm") is None
