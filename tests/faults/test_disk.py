"""A disk that is full, refuses or lies in the way: one clear line, nothing half-written, and the
run goes on once there is room.
"""

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers_faults import FOLDERS, copy, products, refused, run, run_here, temporaries

from pipeline.run import layout
from pipeline.system.errors import InputError
from pipeline.system.files import disk_errors

REMEDY = "make room or choose another --out, then run again"


# files of a stage are larger than this, so that a write of it fails: DICOM, PNG, arrays, CSV
# (Rust), checkpoint (C++), parquet (Rust)
@pytest.mark.parametrize(
    ("stage", "size"),
    [
        ("00", 5000),
        ("01", 900),
        ("02", 20000),
        ("03", 100),
        ("04", 3000),
        ("06", 3000),
        ("07", 12_000),
        ("08", 300),
        ("09", 3000),
    ],
)
def test_a_failing_write_is_one_line(smoke, tmp_path, stage, size):
    out = tmp_path / "run"
    copy(smoke, out, FOLDERS[stage]) if stage != "00" else out.mkdir()
    more = ("--jobs", "1") if stage == "06" else ()  # no process for each fold
    code, text = run(stage, out, *more, fault=f"full:{size}")
    refused(code, text, "the file is larger than", str(out), REMEDY)
    assert stage in ("00", "01", "02") or not temporaries(out), (
        "workers that another one's fault ends leave some to the rerun"
    )
    assert not (out / FOLDERS[stage] / "manifest.json").exists()
    if stage in ("01", "03"):
        assert run_here(stage, out)[0] == 0
        assert not temporaries(out)
        assert products(out) == products(smoke)


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small disk: {done.stderr.strip()}")


@pytest.mark.skipif(not shutil.which("mount"), reason="no mount command")
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(smoke, tmp_path):
    small, data = tmp_path / "disk", str(smoke / "data" / "phantom")
    mount(small, "size=300k")
    try:
        out = small / "run"
        code, text = run("01", out, "--data", data)
        refused(code, text, "01_slices needs about", str(small))
        assert not list(out.rglob("*.png"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        full = run("01", out, "--data", data, fault=f"refuse:{errno.ENOSPC}:{out}/01")
        refused(*full, "the disk is full", str(out))
        assert run("01", out, "--data", data)[0] == 0
        assert not temporaries(out)
        made = products(smoke)
        assert products(out) == {name: made[name] for name in made if name.startswith("01_")}
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        refused(*run("03", out, "--data", data), "the output is read-only", str(out))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_read_only_output_is_one_line(smoke, tmp_path):
    out, what = copy(smoke, tmp_path / "run", layout.FOLDS), "the output is read-only"
    refused(*run("03", out, fault=f"refuse:{errno.EROFS}:{out}"), what, str(out))
    refused(
        *run("03", out, fault=f"refuse:{errno.EACCES}:{out}/03"),
        "permission denied",
        str(out / layout.FOLDS),
    )
    assert not (out / layout.FOLDS).exists()
    shutil.rmtree(out / layout.SLICES)
    refused(*run("01", out, fault=f"refuse:{errno.EROFS}:{out}/01"), what, str(out / layout.SLICES))


@pytest.mark.slow
def test_a_file_where_the_output_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("something else")
    refused(
        *run("00", tmp_path / "file" / "run"),
        "a file is where a folder should be",
        str(tmp_path / "file"),
    )
    refused(*run("00", tmp_path / "file"), "something else has this name", str(tmp_path / "file"))


def test_a_full_device_is_named():
    with (
        pytest.raises(InputError, match="the disk is full, /dev/full, make room"),
        disk_errors("/dev/full"),
    ):
        Path("/dev/full").write_text("x")
