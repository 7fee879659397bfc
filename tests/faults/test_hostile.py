"""Input from someone who means harm: paths out of the folder, bombs, code in checkpoints, HTML,
weights that do not fit.
"""

import io
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers_dicom import dataset, pattern, to_bytes
from helpers_faults import copy, refused, run, run_here
from helpers_stages import run_stage
from pydicom import dcmread
from safetensors.torch import load_file, save_file

from pipeline.run import layout
from pipeline.run.manifest import read_manifest

HTML = "<script>alert(1)<b>"
TAG = "<img src=x onerror=alert(1)>"
BOMB = 2 << 30  # bytes that a small deflated file blows up to
ROOM_MB = 900


class Code:
    """Unpickled, this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)  # noqa: PTH102


def tables(data: Path, *pairs: tuple[str, str]) -> None:
    """`train.csv` and `train_series_meta.csv` of healthy patients."""
    labels = "1,0,1,0,1,0,0,1,0,0,1,0,0"
    columns = (
        "bowel_healthy,bowel_injury,extravasation_healthy,extravasation_injury,kidney_healthy,kidney_low,kidney_high,liver_healthy,"
        "liver_low,liver_high,spleen_healthy,spleen_low,spleen_high"
    )
    (data / "train.csv").write_text(
        "\n".join([f"patient_id,{columns}", *(f"{patient},{labels}" for patient, _ in pairs)])
        + "\n"
    )
    (data / "train_series_meta.csv").write_text(
        "\n".join(["patient_id,series_id", *(",".join(pair) for pair in pairs)]) + "\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patient", "series", "column"), [("../../x", "7", "patient_id"), ("1", "a/b", "series_id")]
)
def test_ids_with_path_parts_never_become_paths(tmp_path, patient, series, column):
    data = tmp_path / "data"
    data.mkdir()
    tables(data, ("1", "5"))
    with open(data / "train_series_meta.csv", "a") as handle:
        handle.write(f"{patient},{series}\n")
    where = f"{data / 'train_series_meta.csv'} row 3 column {column}"
    refused(
        *run("01", tmp_path / "run", "--data", str(data)),
        "has path parts",
        where,
        "use plain ids such as 10004",
    )
    assert not (tmp_path / "run" / layout.SLICES).exists()


def billion(plain: bytes) -> bytes:
    """The file with Rows x Columns of a billion: 40,000 x 40,000."""
    found = dcmread(io.BytesIO(plain))
    found.Rows = found.Columns = 40_000
    return to_bytes(found)


def bomb(deflated: bytes) -> bytes:
    """The deflated file with `BOMB` zeros behind its data set: blocks that stand for themselves, so
    that one can be repeated.
    """
    start = 144 + int.from_bytes(deflated[140:144], "little")  # the length of the file's meta group
    squeeze, zeros = zlib.compressobj(9, wbits=-zlib.MAX_WBITS), bytes(1 << 24)
    blocks = [
        squeeze.compress(part) + squeeze.flush(zlib.Z_FULL_FLUSH)
        for part in (zlib.decompress(deflated[start:], -15), zeros)
    ]
    return deflated[:start] + blocks[0] + blocks[1] * (BOMB // len(zeros)) + squeeze.flush()


@pytest.mark.slow
def test_hostile_files_cost_themselves_only(tmp_path):
    data, secret = tmp_path / "data", tmp_path / "secret"
    folder, linked = data / "train_images" / HTML / "7", data / "train_images" / HTML / "8"
    folder.mkdir(parents=True)
    secret.mkdir()
    tables(data, (HTML, "7"), (HTML, "8"))
    good = dataset(pattern(12), 12, False, "explicit")
    plain = to_bytes(good)
    (folder / "1.dcm").write_bytes(plain)
    (secret / "1.dcm").write_bytes(plain)
    (folder / "2.dcm").symlink_to(secret / "1.dcm")
    linked.symlink_to(secret)
    (folder / "3.dcm").write_bytes(billion(plain))
    (folder / "4.dcm").write_bytes(bomb(to_bytes(dataset(pattern(12), 12, False, "deflated"))))
    good.PhotometricInterpretation, good.SeriesDescription = TAG[:16], TAG
    (folder / "5.dcm").write_bytes(to_bytes(good))
    out = tmp_path / "run"
    # a process that shares no memory with others: its own is looked at
    flags = ("--config", "smoke", "--out", str(out), "--data", str(data), "--jobs", "1")
    done = run_stage("01", *flags)
    assert done.returncode == 0, done.stderr
    reasons = dict(pl.read_csv(out / layout.SLICES / "quarantine.csv").iter_rows())
    base = f"train_images/{HTML}/7"
    assert pl.read_parquet(out / layout.SLICES / "index.parquet")["png"].to_list() == [
        f"{HTML}/7/1.png"
    ]
    assert (
        reasons[f"{base}/2.dcm"]
        == reasons[f"train_images/{HTML}/8"]
        == "link out of the data folder"
    )
    assert reasons[f"{base}/3.dcm"].startswith("too large: 40000 x 40000 pixels")
    assert reasons[f"{base}/4.dcm"].startswith(
        "cut off: the deflated data set has no end, or is too large"
    )
    assert reasons[f"{base}/5.dcm"].startswith("colour")
    assert read_manifest(out / layout.SLICES)["peak_mb"] < ROOM_MB, "a bomb must not go off"
    code, text = run("09", out, "--data", str(data))
    assert code == 0, text
    page = (out / layout.REPORT / "index.html").read_text()
    assert HTML not in page
    assert TAG not in page
    assert "&lt;script&gt;alert(1)&lt;b&gt;" in page


def test_code_in_a_checkpoint_is_never_run(smoke, tmp_path):
    out, mark = copy(smoke, tmp_path / "run"), tmp_path / "ran"
    for name in ("last.ckpt", "last.1.ckpt", "last.2.ckpt"):
        torch.save({"identity": Code(mark)}, out / layout.VOCO / name)
    code, text = run_here("04", out, "pretrain.steps=1")
    assert code == 0, text
    assert "last.ckpt is damaged and not used" in text
    assert not mark.exists()
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Code(mark)))
    options = ("pretrain.init=imagenet", f"model.weights={tmp_path / 'w.pth'}")
    refused(
        *run_here("04", out, *options),
        "weights not readable",
        f"{tmp_path / 'w.pth'}: more than plain tensors",
        "safetensors",
    )
    assert not mark.exists()


def spoil(path: Path, how: str) -> str:
    """Rewrite a weights file with a tensor of another shape, or with a NaN, at its old size;
    returns the tensor's name.
    """
    from safetensors import safe_open

    tensors = load_file(path)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.ndim == 4)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    tensors[name] = (
        tensors[name].reshape(-1) if how == "of another shape" else tensors[name] * np.nan
    )
    size = path.stat().st_size
    save_file(tensors, path, metadata)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    pad = size - len(data)  # of the header, so that the size alone does not give it away
    path.write_bytes(
        (header + pad).to_bytes(8, "little")
        + data[8 : 8 + header]
        + b" " * pad
        + data[8 + header :]
        if pad >= 0
        else data
    )
    return name


@pytest.mark.parametrize(
    ("stage", "file", "how"),
    [
        ("06", "04_voco2d/backbone.safetensors", "not finite"),
        ("08", "06_folds/fold0/model.safetensors", "of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(smoke, tmp_path, stage, file, how):
    out = copy(smoke, tmp_path / "run")
    path = out / file
    name = spoil(path, how)
    manifest = path.parent / "manifest.json" if stage == "06" else path.parents[1] / "manifest.json"
    entry = path.name if stage == "06" else "fold0/model.safetensors"
    text = manifest.read_text()
    bytes_before = read_manifest(manifest.parent)["outputs"][entry]["bytes"]
    manifest.write_text(text.replace(f'"bytes": {bytes_before}', f'"bytes": {path.stat().st_size}'))
    refused(
        *run_here(stage, out, "--force"),
        f"1 {how} ({name}",
        str(path),
        "give weights of this very model",
    )


def test_a_link_that_replaces_the_output_is_not_followed_out(smoke, tmp_path):
    """A temporary name that someone has made a link: the file behind it is not touched by a rerun's
    cleaning.
    """
    out, precious = copy(smoke, tmp_path / "run"), tmp_path / "precious"
    shutil.copytree(smoke / layout.FOLDS, precious)
    (out / layout.FOLDS / ".x.tmp-1").symlink_to(precious)
    code, text = run("03", out, "--force")
    assert code == 0, text
    assert not (out / layout.FOLDS / ".x.tmp-1").is_symlink()
    assert (precious / "folds.csv").is_file()
