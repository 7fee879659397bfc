"""Stage 01 as a whole: what it writes, what it skips, what it does again, on one machine and on a
Dask cluster.
"""

import csv
import ctypes
import errno
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from helpers_dicom import (
    NO_NAME,
    dataset,
    fingerprints,
    naive_window,
    pattern,
    to_bytes,
    write_series,
)
from helpers_processes import convert_or_die
from helpers_stages import content, environment

from pipeline.competition.tables import read_series as read_listed
from pipeline.run import layout
from pipeline.run.config import ConvertConfig, VolumeConfig
from pipeline.slices import dicom
from pipeline.slices import store as slice_store
from pipeline.slices.convert import decode_series_files
from pipeline.slices.sources import SeriesTask, is_whole, list_files, plan
from pipeline.slices.store import convert_all, convert_series, encode_png
from pipeline.system import contained
from pipeline.system import pool as parallel
from pipeline.system.errors import InputError
from pipeline.volumes import store as volume_store
from pipeline.volumes.store import build_all

PLAIN = ConvertConfig()
STAGE = Path(__file__).resolve().parents[2] / "stages" / "01_convert_dicom.py"
COLUMNS = [
    "patient_id",
    "series_id",
    "source",
    "instance_number",
    "order",
    "z_mm",
    "rows",
    "cols",
    "spacing_y_mm",
    "spacing_x_mm",
    "flags",
    "decoder",
    "transfer_syntax",
    "crc32",
    "png",
]


def make_data(folder: Path) -> Path:
    """Two patients with three series (RLE, JPEG 2000, RLE), one unlabelled series, one file of each
    that is damaged, meta table.
    """
    rows = ["patient_id,series_id,aortic_hu,incomplete_organ"]
    for number, (patient, series, syntax) in enumerate(
        (("10", "1", "rle"), ("10", "2", "j2k"), ("20", "3", "rle"))
    ):
        write_series(folder / "train_images" / patient / series, 5, syntax, seed=number, first=7)
        rows.append(f"{patient},{series},100.0,0")
    write_series(folder / "unlabelled" / "10" / "9", 3, "explicit", seed=9)
    bad = folder / "train_images" / "20" / "3" / "8.dcm"
    bad.write_bytes(bad.read_bytes()[:-300])
    (folder / "train_series_meta.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(data: Path, out: Path, *more: str) -> tuple[int, str]:
    """Stage 01 in a process of its own: exit code and its log."""
    command = [
        sys.executable,
        str(STAGE),
        "--config",
        "smoke",
        "--data",
        str(data),
        "--out",
        str(out),
        "--jobs",
        "1",
        *more,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment()
    )
    return done.returncode, done.stderr


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all final files of the stage but its manifest (which holds times)."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.slow
def test_the_stage_writes_pictures_index_and_quarantine(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out" / layout.SLICES
    code, log = run(data, tmp_path / "out")
    assert code == 0, log
    index = pl.read_parquet(out / "index.parquet")
    assert index.columns == COLUMNS
    assert index["patient_id"].unique(maintain_order=True).to_list() == [
        "10",
        "20",
        "unlabelled-10",
    ]
    assert index.group_by("source").len().sort("source").rows() == [
        ("train", 14),
        ("unlabelled", 3),
    ]
    first = index.filter(pl.col("series_id") == "1")
    assert first["instance_number"].to_list() == [7, 8, 9, 10, 11]
    assert first["order"].to_list() == [0, 1, 2, 3, 4]
    assert first["png"].to_list() == [f"10/1/{k}.png" for k in range(7, 12)]
    for row in index.iter_rows(named=True):
        image = cv2.imread(str(out / row["png"]), cv2.IMREAD_UNCHANGED)
        assert image.shape == (row["rows"], row["cols"]) == (32, 40)
        assert image.dtype == np.uint8
        assert zlib.crc32(image.tobytes()) == row["crc32"]
    assert (
        (out / "quarantine.csv").read_text() == "path,reason\n"
        "train_images/20/3/8.dcm,pixel data too short: a fragment is damaged or cut off\n"
    )
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["series"], counts["slices"], counts["quarantined"]) == (4, 17, 1)
    assert counts["by_decoder"] == {"dicomsdl": 5, "imagecodecs": 9, "numpy": 3}
    assert counts["by_reason"] == {"pixel data too short": 1}
    assert "slices_per_s" in log
    everything = b"".join([log.encode(), (out / "manifest.json").read_bytes(), *tree(out).values()])
    assert not any(part in everything for part in NO_NAME.encode().split(b"^"))
    code, log = run(data, tmp_path / "out")
    assert (code, "up to date" in log) == (0, True)


def convert(
    data: Path, out: Path, config: ConvertConfig = PLAIN, **more: object
) -> tuple[list[str], dict[str, object]]:
    """Convert in this process: names of the series that were made now, and the counts."""
    listed = pl.read_csv(data / "train_series_meta.csv", infer_schema=False)
    tasks = plan(data, listed)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("series.json")}
    counts = convert_all(tasks, fingerprints(tasks, data), data, out, config, **more)
    made = [
        str(path.parent.relative_to(out))
        for path in out.rglob("series.json")
        if before.get(path) != path.stat().st_mtime_ns
    ]
    return sorted(made), counts


@pytest.mark.slow
def test_only_what_changed_is_converted_again(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    everything = ["10/1", "10/2", "20/3", "unlabelled-10/9"]
    assert convert(data, out)[0] == everything
    clean = tree(out)
    assert convert(data, out)[0] == []
    assert tree(out) == clean
    folder = data / "train_images" / "10" / "1"
    added = to_bytes(dataset(pattern(12), InstanceNumber=50, ImagePositionPatient=[0, 0, 99]))
    (folder / "50.dcm").write_bytes(added)
    assert convert(data, out)[0] == ["10/1"]
    assert pl.read_parquet(out / "index.parquet").filter(series_id="1")[
        "instance_number"
    ].to_list() == [50, 7, 8, 9, 10, 11]
    (folder / "50.dcm").unlink()
    assert convert(data, out)[0] == ["10/1"]
    assert tree(out) == clean
    os.utime(folder / "7.dcm", (1, 1))
    assert convert(data, out)[0] == ["10/1"]
    leftover = out / "10" / ".1.tmp-123"
    leftover.mkdir()
    (leftover / "7.png").write_bytes(b"half")
    (out / "20" / "3" / "series.json").write_text('{"fingerprint": "tru')
    (out / "10" / "2" / "series.json").write_text("[]")
    assert convert(data, out)[0] == ["10/2", "20/3"]
    assert not leftover.exists()
    assert convert(data, out, force=True)[0] == everything
    assert convert(data, out, ConvertConfig(timeout_s=7))[0] == []
    assert convert(data, out, ConvertConfig(flip_hfs=True))[0] == everything


def test_series_that_are_listed_no_more_are_removed(tmp_path, capsys):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    convert(data, out)
    table = data / "train_series_meta.csv"
    table.write_text(
        "\n".join(line for line in table.read_text().splitlines() if not line.startswith("10,2"))
        + "\n20,404,1.0,0\n"
    )
    _, counts = convert(data, out)
    log = capsys.readouterr().err
    assert "1 series folders are in no row" in log
    assert "10/2" in log
    assert not (out / "10" / "2").exists()
    assert pl.read_parquet(out / "index.parquet")["series_id"].unique().sort().to_list() == [
        "1",
        "3",
        "9",
    ]
    assert (
        "train_images/20/404,no such folder: FileNotFoundError"
        in (out / "quarantine.csv").read_text()
    )
    assert counts["quarantined"] == 2


def test_links_out_of_the_image_folder_are_refused(tmp_path):
    data, away = make_data(tmp_path / "data"), tmp_path / "away"
    write_series(away, 2, "explicit")
    folder = data / "train_images" / "10" / "1"
    (folder / "90.dcm").symlink_to(away / "1.dcm")
    (folder / "91.dcm").symlink_to(folder / "7.dcm")
    (folder / "92.dcm").symlink_to(tmp_path / "nowhere.dcm")
    (folder / "93.dcm").mkdir()
    (data / "unlabelled" / "x").mkdir()
    (data / "unlabelled" / "x" / "1").symlink_to(away, target_is_directory=True)
    convert(data, tmp_path / "out")
    rows = dict(list(csv.reader((tmp_path / "out" / "quarantine.csv").open()))[1:])
    assert (
        rows["train_images/10/1/90.dcm"]
        == rows["train_images/10/1/92.dcm"]
        == "link out of the data folder"
    )
    assert rows["train_images/10/1/93.dcm"] == "not a file"
    assert rows["unlabelled/x/1"] == "link out of the data folder"
    index = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert 91 in index["instance_number"]
    assert 90 not in index["instance_number"]
    moved = tmp_path / "disk"
    (data / "train_images").rename(moved)
    (data / "train_images").symlink_to(moved, target_is_directory=True)
    assert len(list_files(data / "train_images" / "20" / "3", data).files) == 5


def test_names_that_are_no_numbers_take_the_tag_and_never_collide(tmp_path):
    folder, data = tmp_path / "data" / "unlabelled" / "a" / "b", tmp_path / "data"
    folder.mkdir(parents=True)
    for name, tags in (
        ("CT.1.2.dcm", {"InstanceNumber": 4}),
        ("CT.1.3.DCM", {"InstanceNumber": 4}),
        ("x.dcm", {"InstanceNumber": None}),
        ("y.dcm", {"InstanceNumber": None}),
        ("7.dcm", {"InstanceNumber": 1}),
    ):
        (folder / name).write_bytes(
            to_bytes(
                dataset(
                    pattern(12), **tags, ImagePositionPatient=[0, 0, -len(list(folder.iterdir()))]
                )
            )
        )
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "out").mkdir()
    sidecar = convert_series(
        SeriesTask("p", "s", "unlabelled", str(folder)), data, tmp_path / "out", ConvertConfig()
    )
    assert sidecar["rows"]["instance_number"] == [4, 4, 8, 9, 7]
    assert sidecar["rows"]["png"] == [
        "p/s/4.png",
        "p/s/4-2.png",
        "p/s/8.png",
        "p/s/9.png",
        "p/s/7.png",
    ]
    assert sidecar["quarantine"] == []


def test_png_encoder_is_lossless():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 3), (32, 40), (512, 512)):
        image = rng.integers(0, 256, shape, np.uint8)
        assert np.array_equal(
            cv2.imdecode(np.frombuffer(encode_png(image), np.uint8), cv2.IMREAD_UNCHANGED), image
        )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    real = slice_store._write_png

    def full(folder, k, image):
        if k == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        real(folder, k, image)

    monkeypatch.setattr(slice_store, "_write_png", full)
    arguments = [
        str(STAGE),
        "--config",
        "smoke",
        "--data",
        str(data),
        "--out",
        str(out),
        "--jobs",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(STAGE), run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: the disk is full, ")
    assert tree(out / layout.SLICES) == {}
    monkeypatch.undo()
    assert run(data, out)[0] == 0


def test_a_write_that_a_full_disk_cuts_is_no_picture(tmp_path):
    """The limit lies between the sizes of a picture and of the sidecar: the system takes a part of
    the picture, without an error.
    """
    folder, out = tmp_path / "data" / "train_images" / "1" / "2", tmp_path / "out"
    write_series(folder, 1, "explicit", shape=(256, 256))
    out.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(InputError, match="the file is larger than"):
            convert_series(
                SeriesTask("1", "2", "train", str(folder)), tmp_path / "data", out, ConvertConfig()
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (out / "1" / "2").exists()


def test_a_lost_picture_is_made_again_and_nothing_else(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    convert(data, out)
    clean = tree(out)
    lost, empty, odd = (
        out / "10" / "1" / "8.png",
        out / "10" / "2" / "9.png",
        out / "20" / "3" / "99.png",
    )
    lost.unlink()
    assert convert(data, out)[0] == ["10/1"]
    empty.write_bytes(b"")  # as a power failure leaves it
    odd.write_bytes(b"x")
    assert convert(data, out)[0] == ["10/2", "20/3"]
    assert tree(out) == clean


@pytest.mark.slow
def test_the_stage_notices_a_removed_picture(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    assert run(data, out)[0] == 0
    clean = tree(out / layout.SLICES)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("series.json")}
    (out / layout.SLICES / "20" / "3" / "9.png").unlink()
    code, log = run(data, out)
    assert (code, "up to date" in log) == (0, False), log
    assert tree(out / layout.SLICES) == clean
    made = [path for path in before if path.stat().st_mtime_ns != before[path]]
    assert made == [out / layout.SLICES / "20" / "3" / "series.json"]
    assert "up to date" in run(data, out)[1]


@pytest.mark.parametrize(
    "reason",
    [
        "not readable: OSError",
        "took longer than 60 s",
        "brought down by SIGKILL: the worker process",
    ],
)
def test_slices_lost_to_the_machine_are_tried_again(reason, tmp_path, monkeypatch):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    real = slice_store.pictures

    def lossy(listing, *more):
        for file, picture in real(listing, *more):
            yield file, contained.Failure(reason) if file.endswith("/10/2/7.dcm") else picture

    monkeypatch.setattr(slice_store, "pictures", lossy)
    convert(data, out)
    assert f"train_images/10/2/7.dcm,{reason}" in (out / "quarantine.csv").read_text()
    monkeypatch.undo()
    assert convert(data, out, ConvertConfig(timeout_s=7))[0] == ["10/2"]
    assert "10/2" not in (out / "quarantine.csv").read_text()
    assert convert(data, out)[0] == []


def test_a_series_that_kills_every_process_is_listed_and_tried_again(tmp_path, monkeypatch):
    """The stage is up to date with it, not before every start again at the same hopeless series;
    other work tries it once more.
    """
    data, out = make_data(tmp_path / "data"), tmp_path / "out" / layout.SLICES
    real = slice_store.spread

    def deadly(work, tasks, *more):
        for k, answer in real(work, tasks, *more):
            yield k, contained.Failure(parallel.KILLED) if tasks[k].name == "10/2" else answer

    monkeypatch.setattr(slice_store, "spread", deadly)
    convert(data, out)
    assert f"train_images/10/2,{parallel.KILLED}" in (out / "quarantine.csv").read_text()
    assert os.listdir(out / "10" / "2") == ["series.json"], "nothing of it looks like a slice"
    tasks = plan(data, read_listed(data, "train"))
    assert pl.read_parquet(out / "index.parquet").height == 5 + 4 + 3
    monkeypatch.setattr(
        "pipeline.slices.sources.read_manifest", lambda folder: {"counts": {"slices": 12}}
    )
    assert is_whole(out, tasks)
    monkeypatch.undo()
    assert convert(data, out)[0] == ["10/2"]


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [True, False])
def test_memory_that_is_short_is_no_damage(tmp_path, monkeypatch, lasting):
    """dicomsdl says the same of some damaged files: the process is given up, and only without it
    the machine is to blame.
    """
    data, real = make_data(tmp_path / "data"), dicom.picture

    def short(data, max_pixels, careful=False):
        if lasting or not careful:
            raise MemoryError
        return real(data, max_pixels, careful)

    monkeypatch.setattr(dicom, "picture", short)
    _, failed = decode_series_files(list_files(data / "train_images" / "10" / "1", data), PLAIN)
    assert {reason for _, reason in failed} == ({"not readable: MemoryError"} if lasting else set())
    assert "not readable: MemoryError".startswith(slice_store.PASSING)


def test_forced_work_that_is_stopped_goes_on_with_nothing_old(tmp_path, monkeypatch):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    convert(data, out)
    build_all(out, tmp_path / "volumes", VolumeConfig(depth=4, height=16, width=16), 1)
    monkeypatch.setattr(slice_store, "spread", lambda *_: iter(()))
    monkeypatch.setattr(volume_store, "spread", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(TypeError):  # no sidecar of any series is there to make the index of
        convert(data, out, force=True)
    with pytest.raises(KeyboardInterrupt):
        build_all(
            out, tmp_path / "volumes", VolumeConfig(depth=4, height=16, width=16), 1, force=True
        )
    assert not list(out.rglob("series.json"))
    assert not list((tmp_path / "volumes").glob("*.json"))


def test_names_that_would_be_no_file_names_are_left_out(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    write_series(data / "unlabelled" / ("p" * 130) / ("s" * 130), 1, "explicit")
    assert [task.name for task in plan(data, read_listed(data, "train"))] == [
        "10/1",
        "10/2",
        "20/3",
        "unlabelled-10/9",
    ]
    assert (
        "1 series have names of more than 200 bytes, patient and series together, and are ignored"
        in capsys.readouterr().err
    )


def test_names_that_are_not_utf8_stop_nothing(tmp_path, capsys):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    strange = os.fsdecode(b"\xe9t\xe9")
    good, bad = (data / "train_images" / "10" / "1" / f"{strange}{k}.dcm" for k in range(2))
    good.write_bytes(
        to_bytes(dataset(pattern(12), InstanceNumber=50, ImagePositionPatient=[0, 0, 99]))
    )
    bad.write_bytes(b"no DICOM")
    write_series(data / "unlabelled" / "p" / strange, 1, "explicit")
    (data / "train_images" / strange / "1").mkdir(parents=True)
    assert convert(data, out)[0] == ["10/1", "10/2", "20/3", "unlabelled-10/9"]
    assert 50 in pl.read_parquet(out / "index.parquet")["instance_number"]
    assert "train_images/10/1/\\xe9t\\xe91.dcm,not DICOM" in (out / "quarantine.csv").read_text()
    log = capsys.readouterr().err
    assert (
        f"1 series have names not in UTF-8 and are ignored, e.g. {data}/unlabelled/p/\\xe9t\\xe9"
        in log
    )
    assert convert(data, out)[0] == []


def slow_phantom(folder: Path) -> Path:
    """Six series of 60 pictures: long enough to be killed in between."""
    rows = ["patient_id,series_id,aortic_hu,incomplete_organ"]
    for series in range(6):
        write_series(
            folder / "train_images" / "1" / str(series), 12, "rle", seed=series, shape=(64, 64)
        )
        source = folder / "train_images" / "1" / str(series)
        for k in range(13, 61):
            os.link(source / f"{k % 12 + 1}.dcm", source / f"{k}.dcm")
        rows.append(f"1,{series},100.0,0")
    (folder / "train_series_meta.csv").write_text("\n".join(rows) + "\n")
    return folder


KILLER = """
import itertools, os, runpy, signal, sys
from pipeline.slices import store as slice_store
name, when, count = sys.argv[1], eval("lambda *a: " + sys.argv[2]), itertools.count(1)
real = getattr(slice_store, name)
def call(*arguments):
    if when(*arguments):
        os.killpg(0, signal.SIGKILL)
    return real(*arguments)
setattr(slice_store, name, call)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "when", "done_before"),
    [
        # between the pictures of a series
        ("_write_png", "a[0].name.startswith('.3.') and a[1] == 30", 3),
        ("arranged", "next(count) == 5", 4),  # before a series gets its name
        ("write_text", "next(count) == 1", 6),  # between index and quarantine
    ],
)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    function, when, done_before, tmp_path
):
    data, out = slow_phantom(tmp_path / "data"), tmp_path / "killed"
    assert run(data, tmp_path / "whole")[0] == 0
    command = [
        sys.executable,
        "-c",
        KILLER,
        function,
        when,
        str(STAGE),
        "--config",
        "smoke",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    killed = subprocess.run(
        [*command, "--jobs", "1"],
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.rglob("[0-9]/series.json")}
    assert len(done) == done_before
    assert not (out / layout.SLICES / "manifest.json").exists()
    code, log = run(data, out)
    assert code == 0, log
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert tree(out / layout.SLICES) == tree(tmp_path / "whole" / layout.SLICES)
    counts = json.loads((out / layout.SLICES / "manifest.json").read_text())["counts"]
    assert counts["converted_now"] == 60 * (6 - done_before)


@pytest.mark.slow
def test_processes_and_one_process_write_the_same_bytes(tmp_path):
    data = make_data(tmp_path / "data")
    convert(data, tmp_path / "one", jobs=1)
    convert(data, tmp_path / "two", jobs=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def build(slices: Path, out: Path, scheduler: str | None) -> dict[str, bytes]:
    """Stage 02's files."""
    build_all(slices, out, VolumeConfig(depth=8, height=16, width=16), 1, scheduler)
    return tree(out)


@pytest.mark.slow
def test_dask_cluster_gives_the_same_bytes_even_when_a_worker_is_killed(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    data = slow_phantom(tmp_path / "data")
    assert run(data, tmp_path / "one")[0] == 0
    expected = tree(tmp_path / "one" / layout.SLICES)
    workers = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0}
    with distributed.LocalCluster(**workers, dashboard_address=None, silence_logs=50) as cluster:
        address = cluster.scheduler_address
        code, log = run(data, tmp_path / "cluster", "--scheduler", address)
        assert code == 0, log
        assert tree(tmp_path / "cluster" / layout.SLICES) == expected
        monkeypatch.setattr(slice_store, "convert_series", convert_or_die)
        made, _ = convert(data, tmp_path / "again", scheduler=address)
        assert made == [f"1/{k}" for k in range(6)]
        assert (tmp_path / "again.mark").exists()
        volumes = [
            build(tmp_path / "again", tmp_path / name, scheduler)
            for name, scheduler in (("here", None), ("there", address))
        ]
    assert tree(tmp_path / "again") == expected
    assert len(volumes[0]) == 2 * 6 + 1
    assert volumes[0] == volumes[1]


def test_no_scheduler_is_one_clear_line(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "CONNECT_S", 0.3)
    with pytest.raises(
        InputError, match="no Dask scheduler answers, --scheduler tcp://127.0.0.1:9, "
    ):
        list(parallel.spread(len, [(), ()], 1, "tcp://127.0.0.1:9"))


def test_a_machine_without_the_shared_folder_says_so_and_quarantines_nothing(tmp_path):
    task = SeriesTask("1", "2", "train", str(tmp_path / "data" / "train_images" / "1" / "2"))
    (tmp_path / "data").mkdir()
    for data, target in ((tmp_path / "data", tmp_path / "out"), (tmp_path / "elsewhere", tmp_path)):
        with pytest.raises(
            InputError, match="no such folder, .* on .*, give a folder that all machines share"
        ):
            convert_series(task, data, target, ConvertConfig())
    assert not (tmp_path / "out").exists()


def test_monochrome1_and_orientation_reach_the_png(tmp_path):
    folder = tmp_path / "data" / "train_images" / "1" / "2"
    folder.mkdir(parents=True)
    ds = dataset(
        pattern(13),
        13,
        True,
        "rle",
        PhotometricInterpretation="MONOCHROME1",
        ImageOrientationPatient=[-1, 0, 0, 0, -1, 0],
    )
    (folder / "1.dcm").write_bytes(to_bytes(ds))
    (tmp_path / "out").mkdir()
    convert_series(
        SeriesTask("1", "2", "train", str(folder)),
        tmp_path / "data",
        tmp_path / "out",
        ConvertConfig(),
    )
    stored = pattern(13).astype(np.int64)
    stored -= (stored >> 12) << 13
    image = cv2.imread(str(tmp_path / "out" / "1" / "2" / "1.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(image, naive_window(stored, inverted=True)[::-1, ::-1])


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt"
)
@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        ("keep_memory()", (280_000, 140_000, 520_000, 260_000, 1_400_000)),
        ("pick_device('cpu')", (8_000_000,) * 5),
    ],
)
def test_a_child_and_a_training_keep_their_memory(call, sizes):
    """Buffers given back after every picture and paged in anew cost a third of the time: 46,000
    page faults in a series of 96. The activations of a training step are larger.
    """

    def faults(first: str) -> int:
        script = f"""
import resource
import numpy as np
from pipeline.system.machine import keep_memory, pick_device
{first}
def use():
    return [np.ones(size, np.uint8) for size in {sizes}]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults(call) < 0.1 * faults("")
