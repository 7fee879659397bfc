"""Pretraining on unlabelled data alone: no tables, no labelled series."""

import shutil

import pytest
from helpers_dataset import make_data
from helpers_faults import refused, run_here

from pipeline.run import layout
from pipeline.run.manifest import read_manifest


@pytest.mark.slow
def test_unlabelled_data_alone_are_pretrained_on(tmp_path):
    data, out = make_data(tmp_path / "data", patients=1, unlabelled=10), tmp_path / "run"
    for path in data.iterdir():
        if path.name != "unlabelled":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = ("--data", str(data), "pretrain.steps=2", "pretrain.workers=0")
    for stage in ("01", "02", "03", "04", "05", "06", "07", "08", "09"):
        code, text = run_here(stage, out, *flags)
        assert code == 0, text
        if stage in ("03", "05", "06", "07"):
            assert f"skipped, {data} has unlabelled/ alone, no train.csv" in text
    assert read_manifest(out / layout.VOLUMES)["counts"]["volumes"] == 10
    assert (out / layout.VOCO / layout.BACKBONE).is_file()
    (data / "train_images").mkdir()
    refused(*run_here("01", out, *flags), "train_series_meta.csv is missing")
