"""Stage 07: always a valid file, every fallback reported, the same result whatever dies on the way."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from helpers_stages import ROOT, environment, run_stage
from test_submission import PRIOR, sample

from pipeline import decode_ahead, inference
from pipeline.calibration import Calibration
from pipeline.decode_ahead import Decoded
from pipeline.inference import Ensemble, predict_test
from pipeline.prediction import predict
from pipeline.presets import load_config
from pipeline.runtime import InputError
from pipeline.sources import SeriesTask
from pipeline.submission import SubmissionWriter, check_submission
from pipeline.tables import read_sample_submission
from pipeline.targets import COLUMNS

SAME = Calibration(("folds",), "mean", np.ones((5, 1)), np.ones(5), np.zeros(13), PRIOR)
FIRST, SECOND = np.full(13, 0.5), PRIOR


class Known(Ensemble):
    """An ensemble whose answer for a series is the volume itself."""

    def series(self, volume, flips):
        return volume


def predicted(monkeypatch, folder, items, budget=None):
    """`predict_test` over decoded `items` of the sample's patients; returns the submission's rows by patient, and the fallbacks."""

    def until(deadline):
        for item in items:
            if item is None or time.monotonic() > deadline:
                return
            yield item

    monkeypatch.setattr(inference, "Ahead", lambda *given: SimpleNamespace(until=until))
    listed = [("50046", "1"), ("50046", "2"), ("7", "3"), ("63706", "4")]
    tasks = [SeriesTask(patient, series, "test", "nowhere") for patient, series in listed]
    config = load_config("smoke", [] if budget is None else [f"predict.time_budget_h={budget}"])
    writer, path = SubmissionWriter(sample(), PRIOR), folder / "submission.csv"
    counts = predict_test(tasks, folder, writer, Known((), None, SAME, None, None), config, path, 1, time.monotonic())
    table = check_submission(path, sample())
    fallbacks = pl.read_csv(folder / "fallbacks.csv", schema_overrides={"patient_id": pl.String, "series_id": pl.String}).fill_null("")
    assert counts["fallbacks"] == fallbacks.height
    return {row[0]: np.array(row[1:]) for row in table.iter_rows()}, fallbacks.rows()


def test_a_series_that_cannot_be_read_falls_back_to_the_others_then_to_the_prior(tmp_path, monkeypatch):
    items = [Decoded("50046", "1", None, "no usable slice"), Decoded("7", "3", None, "no DICOM files"),
             Decoded("50046", "2", FIRST, ""), Decoded("63706", "4", FIRST, "")]  # fmt: skip
    rows, fallbacks = predicted(monkeypatch, tmp_path, items)
    share = np.concatenate([np.full(n, 1 / n) for n in (2, 2, 3, 3, 3)])
    assert rows["50046"] == pytest.approx(share)
    assert rows["63706"] == pytest.approx(share)
    assert rows["7"] == pytest.approx(PRIOR)
    assert fallbacks == [("50046", "1", "no usable slice"), ("7", "3", "no DICOM files"), ("7", "", "no readable series: prior")]


def test_a_model_that_answers_nonsense_leaves_the_prior_and_is_reported(tmp_path, monkeypatch):
    broken = FIRST.copy()
    broken[4] = np.nan
    items = [Decoded(patient, series, broken if patient == "7" else FIRST, "") for patient, series in
             (("50046", "1"), ("7", "3"), ("50046", "2"), ("63706", "4"))]  # fmt: skip
    rows, fallbacks = predicted(monkeypatch, tmp_path, items)
    assert rows["7"] == pytest.approx(PRIOR)
    assert [row[0] for row in fallbacks] == ["7"]


def test_the_budget_ends_between_two_series_of_a_patient(tmp_path, monkeypatch):
    rows, fallbacks = predicted(monkeypatch, tmp_path, [Decoded("50046", "1", FIRST, ""), None], budget=1)
    assert rows["50046"][:2] == pytest.approx([0.5, 0.5])
    assert rows["7"] == pytest.approx(PRIOR)
    assert fallbacks == [("50046", "", "time budget spent: some series only"), ("7", "", "time budget spent: prior"),
                         ("63706", "", "time budget spent: prior")]  # fmt: skip


def test_patients_without_a_series_row_have_the_prior(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "Ahead", lambda *given: SimpleNamespace(until=lambda deadline: iter(())))
    writer = SubmissionWriter(sample(), PRIOR)
    counts = predict_test([], tmp_path, writer, Known((), None, SAME, None, None), load_config("smoke"), tmp_path / "s.csv", 1, 0.0)
    assert (counts["predicted"], counts["prior"], counts["fallbacks"]) == (0, 3, 3)
    assert check_submission(tmp_path / "s.csv", sample()).height == 3


def test_any_fault_of_a_series_is_that_series_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_ahead, "read_series", lambda *given: 1 / 0)
    config = load_config("smoke")
    found = decode_ahead.decode_series(SeriesTask("7", "3", "test", str(tmp_path)), tmp_path, config.convert, config.volume)
    assert found == Decoded("7", "3", None, "ZeroDivisionError: division by zero")


def test_flips_are_averaged():
    class Corner(torch.nn.Module):
        """Answers with the first pixel of the first slice, so that every flip shows another one."""

        def forward(self, x):
            return {"bowel": x[:, 0, 0, :1]}, None

    slices = torch.arange(8, dtype=torch.uint8).reshape(1, 2, 2, 2) * 30
    one = lambda *where: predict(Corner(), slices[(slice(None), *where)][:, None, None, None])[0]  # noqa: E731
    expected = {"x": one(0, 0, 1), "y": one(0, 1, 0), "z": one(1, 0, 0)}
    for name, flipped in expected.items():
        assert torch.allclose(predict(Corner(), slices, flips=[name])[0], (one(0, 0, 0) + flipped) / 2)
    every = torch.stack([one(0, 0, 0), *expected.values()]).mean(0)
    assert torch.allclose(predict(Corner(), slices, flips=["x", "y", "z"])[0], every)


def start(smoke: Path, out: Path) -> subprocess.Popen:
    """Stage 07 on the smoke run's data and models, into another folder."""
    command = [sys.executable, str(ROOT / "stages" / "07_predict_test.py"), "--config", "smoke", "--models", str(smoke), "--jobs", "2",
               "--data", str(smoke / "data" / "phantom"), "--out", str(out), "predict.flush_every=1"]  # fmt: skip
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_as_if_nothing_had_happened(smoke: Path, out: Path) -> None:
    given = read_sample_submission(smoke / "data" / "phantom")
    pair = [check_submission(folder / "07_submission" / "submission.csv", given).select(COLUMNS).to_numpy() for folder in (smoke, out)]
    assert np.allclose(*pair, atol=1e-5)
    assert (out / "07_submission" / "fallbacks.csv").read_text() == (smoke / "07_submission" / "fallbacks.csv").read_text()


def test_killed_at_any_moment_the_file_is_valid_and_the_next_run_completes_it(smoke, tmp_path):
    path, given = tmp_path / "07_submission" / "submission.csv", read_sample_submission(smoke / "data" / "phantom")
    for pause_s in (0.0, 3.0):  # once with the prior only, once somewhere in loading or predicting
        run = start(smoke, tmp_path)
        while not path.exists() and run.poll() is None:
            time.sleep(0.01)
        end = time.monotonic() + pause_s
        while time.monotonic() < end and run.poll() is None:
            time.sleep(0.01)
        children = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        run.kill()
        run.communicate()
        psutil.wait_procs(children, timeout=60)
        left = check_submission(path, given).select(COLUMNS)
        assert pause_s or left.n_unique() == 1, "everyone has the prior before the models are loaded"
        path.unlink()
    last = start(smoke, tmp_path)
    assert last.wait(timeout=300) == 0, last.stderr.read()
    assert_as_if_nothing_had_happened(smoke, tmp_path)
    assert not [name for name in tmp_path.rglob("*") if ".tmp-" in name.name]


def test_decoding_processes_that_are_killed_change_nothing(smoke, tmp_path):
    run, killed = start(smoke, tmp_path), 0
    while run.poll() is None and killed < 2:
        for child in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end before we ask
                if killed < 2 and any("LokyProcess" in part for part in child.cmdline()):
                    child.kill()
                    killed += 1
                    time.sleep(0.3)
        time.sleep(0.02)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert killed
    assert_as_if_nothing_had_happened(smoke, tmp_path)


def copy_models(smoke: Path, folder: Path) -> Path:
    for name in ("05_folds", "06_oof"):
        shutil.copytree(smoke / name, folder / name)
    return folder


def test_a_calibration_of_a_blend_is_refused_before_anything_is_predicted(smoke, tmp_path):
    models, oof = copy_models(smoke, tmp_path / "models"), smoke / "06_oof" / "oof_predictions.csv"
    data = str(smoke / "data" / "phantom")
    shutil.copy(oof, tmp_path / "other.csv")
    blended = run_stage("06", "--config", "smoke", "--data", data, "--out", str(models), "--oof", str(oof), str(tmp_path / "other.csv"))
    assert blended.returncode == 0, blended.stderr
    done = run_stage("07", "--config", "smoke", "--data", data, "--out", str(tmp_path / "out"), "--models", str(models))
    assert done.returncode == 2
    assert re.fullmatch(r"error: the calibration blends 2 models \(oof_predictions, other\), .*calibration.json, run .*\n", done.stderr)
    assert not (tmp_path / "out" / "07_submission" / "submission.csv").exists()


def test_models_of_other_volumes_are_refused(smoke, tmp_path):
    done = run_stage("07", "--config", "smoke", "--data", str(smoke / "data" / "phantom"), "--out", str(tmp_path), "--models", str(smoke),
                     "volume.aspect=stretch")  # fmt: skip
    assert done.returncode == 2
    assert "trained on volumes made otherwise" in done.stderr
    assert "volume.aspect=letterbox" in done.stderr


def test_broken_calibration_is_one_line(tmp_path):
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(InputError, match="not a calibration .*stages/06_score_oof.py"):
        Calibration.of_run(tmp_path / "calibration.json")
