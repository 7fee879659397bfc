"""From the images to volumes without slices on disk: the same to the last bit."""

import shutil
from pathlib import Path

import polars as pl
import pytest
from helpers_dataset import make_data
from helpers_dicom import dataset, pattern, to_bytes
from helpers_faults import run_here

from pipeline.run import layout
from pipeline.run.config import decisive
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import load_config
from pipeline.slices.stage import convert_dicom
from pipeline.system.errors import InputError
from pipeline.volumes import direct
from pipeline.volumes.stage import build_volumes

KEPT = load_config("smoke", ["phantom=null"])
DIRECT = load_config("smoke", ["phantom=null", "convert.keep_png=false"])


def images(root: Path) -> Path:
    """Series with a damaged file, a flagged slice, one file of another size, and nothing usable."""
    data = make_data(root / "data", patients=6, slices=8, unlabelled=2)
    folder = data / "train_images" / "101" / "901"
    (folder / "3.dcm").write_bytes(b"no DICOM" * 100)
    stray = dataset(pattern(12), InstanceNumber=50, ImagePositionPatient=[0, 0, -3.0])
    (data / "train_images" / "102" / "902" / "50.dcm").write_bytes(to_bytes(stray))
    for path in (data / "train_images" / "103" / "903").iterdir():
        path.write_bytes(b"")
    return data


def made(folder: Path, *patterns: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


@pytest.fixture
def both(tmp_path):
    """The data, and the stages' folders with and without slices on disk."""
    data = images(tmp_path)
    kept, straight = tmp_path / "kept", tmp_path / "straight"
    convert_dicom(KEPT, data=data, out=kept, jobs=1)
    build_volumes(KEPT, data=data, out=kept, jobs=1)
    convert_dicom(DIRECT, data=data, out=straight, jobs=1)
    build_volumes(DIRECT, data=data, out=straight, jobs=1)
    return data, kept, straight


@pytest.mark.slow
def test_volumes_index_and_quarantine_are_the_same_bit_for_bit(both):
    _, kept, straight = both
    assert not (straight / layout.SLICES).exists()
    assert not list(straight.rglob("*.png"))
    ours, theirs = (out / layout.VOLUMES for out in (straight, kept))
    assert made(ours, "*.npy") == made(theirs, "*.npy")
    assert len(made(ours, "*.npy")) == 7
    assert pl.read_parquet(ours / layout.INDEX).equals(pl.read_parquet(theirs / layout.INDEX))
    slices = pl.read_parquet(kept / layout.SLICES / layout.INDEX)
    assert pl.read_parquet(ours / layout.SLICE_TABLE).equals(slices)
    quarantine = (kept / layout.SLICES / layout.QUARANTINE).read_bytes()
    assert (ours / layout.QUARANTINE).read_bytes() == quarantine
    assert quarantine.count(b"\n") > 9
    counts = read_manifest(kept / layout.SLICES)["counts"]
    found = read_manifest(ours)["counts"]["conversion"]
    rates = ("slices_per_s", "mb_per_s")
    assert {k: v for k, v in found.items() if k not in rates} == {
        k: v for k, v in counts.items() if k not in rates
    }


def test_how_the_slices_went_enters_no_fingerprint():
    assert decisive(KEPT.convert) == decisive(DIRECT.convert)


@pytest.mark.slow
def test_only_what_is_new_or_changed_is_read(both, monkeypatch, capfd):
    data, _, out = both
    folder, where = out / layout.VOLUMES, {"data": data, "out": out, "jobs": 1}
    before, read = made(folder, "*.npy", "*.parquet"), []
    real = direct.decode_series_files

    def note(listing, *more):
        read.append((listing.files or ["/none/1.dcm"])[0])
        return real(listing, *more)

    monkeypatch.setattr(direct, "decode_series_files", note)
    build_volumes(DIRECT, **where)
    assert "up to date" in capfd.readouterr().err
    (folder / "101_901.npy").unlink()
    build_volumes(DIRECT, **where)
    assert [Path(path).parent.name for path in read] == ["901"]
    assert made(folder, "*.npy", "*.parquet") == before
    read.clear()
    (folder / layout.MANIFEST).unlink()
    (folder / "104_904.json").write_text("{")
    shutil.rmtree(data / "train_images" / "105")
    build_volumes(DIRECT, **where)
    assert [Path(path).parent.name for path in read] == ["904", "none"]
    assert not (folder / "105_905.npy").exists()
    assert len(read_manifest(folder)["outputs"]) == 3 + 6


@pytest.mark.slow
def test_slices_kept_after_all_build_no_volume_again(both):
    data, _, out = both
    folder, where = out / layout.VOLUMES, {"data": data, "out": out, "jobs": 1}
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    convert_dicom(KEPT, **where)
    build_volumes(KEPT, **where)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == times
    assert not (folder / layout.SLICE_TABLE).exists()


@pytest.mark.slow
def test_a_disk_that_is_not_mounted_wipes_no_volumes(both):
    data, _, out = both
    before = made(out / layout.VOLUMES, "*")
    shutil.move(data / "train_images", data.parent / "away")
    (data / "train_images").mkdir()
    with pytest.raises(InputError, match="none of the 6 series"):
        build_volumes(DIRECT, data=data, out=out, jobs=1)
    shutil.move(data / "unlabelled", data.parent / "away")
    (data / "train_images").rmdir()
    shutil.move(data.parent / "away", data / "train_images")
    with pytest.raises(InputError, match="2 of the 2 series that the last run found"):
        build_volumes(DIRECT, data=data, out=out, jobs=1)
    assert made(out / layout.VOLUMES, "*") == before


@pytest.mark.slow
def test_report_and_slice_labels_do_without_slices(smoke, tmp_path):
    data, out = smoke / "data" / "phantom", tmp_path / "run"
    flags = ("--data", str(data), "convert.keep_png=false", "train.init=scratch", "train.epochs=1")
    for stage in ("01", "02", "03", "06", "07", "09"):
        code, text = run_here(stage, out, *flags, "score.bootstrap=0")
        assert code == 0, text
        if stage == "01":
            assert "skipped, convert.keep_png=false: stages/02_build_volumes.py reads" in text
    theirs = made(smoke / layout.VOLUMES, "*.npy", layout.INDEX)
    assert made(out / layout.VOLUMES, "*.npy", layout.INDEX) == theirs
    page = (out / layout.REPORT / layout.PAGE).read_text()
    assert "Transfer syntax" in page
    assert read_manifest(out / layout.VOLUMES)["counts"]["conversion"]["slices"] > 100
