"""Paths that a library takes for patterns, names that are no text, and readers who have gone."""

import os
import subprocess
import sys

import pytest
from helpers_dataset import make_data
from helpers_faults import run_here
from helpers_stages import ROOT, environment, run_stage

from pipeline.run import layout
from pipeline.run.manifest import read_manifest

ODD = "out [1] *?%20 'a' \"b\" #{x} ü"


@pytest.mark.slow
def test_patterns_and_blanks_in_paths_are_names(tmp_path):
    data, out = make_data(tmp_path / f"data {ODD}", patients=8, unlabelled=2), tmp_path / ODD
    more = ("train.slice_loss=0", "train.epochs=1", "pretrain.steps=2", "score.bootstrap=0")
    for number in ("01", "02", "03", "04", "05", "06", "07", "08", "09"):
        code, text = run_here(number, out, "--data", str(data), *more)
        assert code == 0, text
    assert read_manifest(out / layout.VOLUMES)["counts"]["volumes"] == 10
    assert str(out) in run_here("09", out, "--data", str(data), "--force")[1]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--out", "--data"])
def test_a_folder_whose_name_is_no_text_is_one_line(tmp_path, flag):
    good, odd = make_data(tmp_path / "data"), os.fsencode(tmp_path) + b"/lat\xe9"
    folders = {"--out": tmp_path / "out", "--data": good}
    os.rename(good, odd) if flag == "--data" else None
    folders[flag] = os.fsdecode(odd)
    given = [part for name, folder in folders.items() for part in (name, str(folder))]
    done = run_stage("01", "--config", "smoke", *given)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        f"error: the path is not UTF-8, {flag} {tmp_path}/lat\\xe9, rename it or choose another"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("pipe", ["| true", "2>&1 >/dev/null | true"])
def test_a_reader_who_has_gone_loses_no_work(tmp_path, pipe):
    """Standard output and standard error."""
    data, out = make_data(tmp_path / "data", patients=6), tmp_path / "out"
    script = f"sleep 1; exec {sys.executable} {ROOT}/stages/03_make_folds.py"
    command = f"({script} --config smoke --data {data} --out {out}) {pipe}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "0\n", done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert read_manifest(out / layout.FOLDS)["counts"]["patients"] == 6
