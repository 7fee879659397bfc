"""Stage 08: always a valid file, every fallback reported, the same result whatever dies on the
way.
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from helpers_faults import start
from helpers_scores import PRIOR, sample
from helpers_stages import ROOT, environment, stage_here
from scipy.optimize import minimize

from pipeline.classifier.predict import load_classifier, mean_logits, predict
from pipeline.competition.metric import aggregate, value_frame
from pipeline.competition.tables import read_sample_submission, read_series
from pipeline.competition.targets import COLUMNS, TARGET_NAMES, group_slices
from pipeline.evaluation.calibration import Calibration
from pipeline.learning.backbone import GREY_MEAN, GREY_STD
from pipeline.run import layout
from pipeline.run.command import add_models, main
from pipeline.run.config import TrainConfig
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import load_config
from pipeline.slices.sources import SeriesTask
from pipeline.slices.sources import test_tasks as tasks_of
from pipeline.submission import decode_ahead, inference
from pipeline.submission.inference import Blend, Ensemble, fill_submission
from pipeline.submission.stage import predict_test
from pipeline.submission.writer import SubmissionWriter, check_submission, is_settled
from pipeline.system.errors import InputError
from pipeline.volumes.sampling import slice_positions, take_slices

SAME = Calibration(("folds",), "mean", np.ones((5, 1)), np.ones(5), np.zeros(13), PRIOR)
TWO = Calibration(tuple("ab"), "mean", np.full((5, 2), 0.5), np.ones(5), np.zeros(13), PRIOR)
FIRST = np.full(13, 0.5)
HALF = np.concatenate([np.full(n, 1 / n) for n in (2, 2, 3, 3, 3)])  # FIRST, each group normalised
LISTED = (("50046", "1"), ("50046", "2"), ("7", "3"), ("63706", "4"))
TASKS = [SeriesTask(patient, series, "test", "nowhere") for patient, series in LISTED]


def decoded(patient, series, volume, problem):
    """A decoded series, for ensembles of `known`."""
    volumes = {} if volume is None else {None: volume}
    return decode_ahead.Decoded(patient, series, volumes, problem)


class Known(Ensemble):
    """An ensemble whose answer for a series is the volume itself, raised where it is an
    exception.
    """

    def series(self, volume, flips, phases):
        if isinstance(volume, BaseException):
            raise volume
        return volume


def known(names=("run",), calibration=SAME):
    """Runs that answer so."""
    return Blend({name: Known((), None, None, None, None) for name in names}, calibration)


def predicted(monkeypatch, folder, items, budget=None):
    """`predict_test` over decoded `items` of the sample's patients; returns the submission's rows
    by patient, and the fallbacks.
    """

    def until(deadline):
        for item in items:
            if item is None or time.monotonic() > deadline:
                return
            yield item

    monkeypatch.setattr(inference, "Ahead", lambda *given: SimpleNamespace(until=until))
    config = load_config("smoke", [] if budget is None else [f"predict.time_budget_h={budget}"])
    writer, path = SubmissionWriter(sample(), PRIOR), folder / "submission.csv"
    counts = fill_submission(TASKS, folder, writer, known(), config, path, 1, time.monotonic())
    rows, fallbacks = written(folder)
    assert counts["fallbacks"] == len(fallbacks)
    assert counts["late"] == sum("time budget spent" in reason for _, _, reason in fallbacks)
    return rows, fallbacks


def written(folder):
    """The submission's rows by patient, and the fallbacks; every patient with the prior is among
    them.
    """
    rows = {
        row[0]: np.array(row[1:])
        for row in check_submission(folder / "submission.csv", sample()).iter_rows()
    }
    ids = {"patient_id": pl.String, "series_id": pl.String}
    fallbacks = pl.read_csv(folder / "fallbacks.csv", schema_overrides=ids).fill_null("").rows()
    alone = {
        patient
        for patient, series, reason in fallbacks
        if not series and reason.endswith(": prior")
    }
    assert alone == {patient for patient, values in rows.items() if np.allclose(values, PRIOR)}
    return rows, fallbacks


def test_a_series_that_cannot_be_read_falls_back_to_the_others_then_to_the_prior(
    tmp_path, monkeypatch
):
    items = [
        decoded("50046", "1", None, "no usable slice"),
        decoded("7", "3", None, "no DICOM files"),
        decoded("50046", "2", FIRST, ""),
        decoded("63706", "4", FIRST, ""),
    ]
    rows, fallbacks = predicted(monkeypatch, tmp_path, items)
    assert rows["50046"] == pytest.approx(HALF)
    assert rows["63706"] == pytest.approx(HALF)
    assert rows["7"] == pytest.approx(PRIOR)
    assert fallbacks == [
        ("50046", "1", "no usable slice"),
        ("7", "3", "no DICOM files"),
        ("7", "", "no usable series: prior"),
    ]


def test_a_model_that_answers_nonsense_leaves_the_prior_and_is_reported(tmp_path, monkeypatch):
    broken = FIRST.copy()
    broken[4] = np.nan
    items = [
        decoded(patient, series, broken if patient == "7" else FIRST, "")
        for patient, series in (("50046", "1"), ("7", "3"), ("50046", "2"), ("63706", "4"))
    ]
    rows, fallbacks = predicted(monkeypatch, tmp_path, items)
    assert rows["7"] == pytest.approx(PRIOR)
    assert fallbacks == [
        ("7", "3", "the model failed: not finite"),
        ("7", "", "no usable series: prior"),
    ]


def test_the_budget_ends_between_two_series_of_a_patient(tmp_path, monkeypatch):
    rows, fallbacks = predicted(
        monkeypatch, tmp_path, [decoded("50046", "1", FIRST, ""), None], budget=1
    )
    assert rows["50046"][:2] == pytest.approx([0.5, 0.5])
    assert rows["7"] == pytest.approx(PRIOR)
    assert fallbacks == [
        ("50046", "", "time budget spent: some series only"),
        ("7", "", "time budget spent: prior"),
        ("63706", "", "time budget spent: prior"),
    ]


def test_the_budget_ends_after_a_series_that_cannot_be_read(tmp_path, monkeypatch):
    """A patient with a problem of some series, and the rest not reached, keeps the prior and is
    reported for it.
    """
    _, fallbacks = predicted(
        monkeypatch, tmp_path, [decoded("50046", "1", None, "no usable slice"), None], budget=1
    )
    assert fallbacks == [
        ("50046", "1", "no usable slice"),
        ("50046", "", "time budget spent: prior"),
        ("7", "", "time budget spent: prior"),
        ("63706", "", "time budget spent: prior"),
    ]


@pytest.mark.parametrize(
    ("volume", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError"),
        (FIRST * np.nan, "not finite"),
        (FIRST * np.inf, "not finite"),
    ],
)
def test_what_fails_in_the_model_is_that_series_alone(tmp_path, monkeypatch, volume, reason):
    items = [
        decoded("50046", "1", volume, ""),
        decoded("50046", "2", FIRST, ""),
        decoded("7", "3", volume, ""),
        decoded("63706", "4", FIRST, ""),
    ]
    rows, fallbacks = predicted(monkeypatch, tmp_path, items)
    assert rows["50046"] == pytest.approx(HALF)
    assert rows["63706"] == pytest.approx(HALF)
    failed = f"the model failed: {reason}"
    assert fallbacks == [
        ("50046", "1", failed),
        ("7", "3", failed),
        ("7", "", "no usable series: prior"),
    ]


def test_a_series_that_fails_in_one_of_the_runs_fails_and_that_run_is_named():
    """Probabilities of the others alone are none that the calibration knows."""
    fails, third = RuntimeError("no kernel"), np.concatenate([[0.2, 0.8], HALF[2:]])
    weights = np.tile([[0.25, 0.75]], (5, 1))
    calibration = Calibration(("x", "y"), "mean", weights, np.ones(5), np.zeros(13), PRIOR)
    blend = Blend({name: Known((), None, name, None, None) for name in "ab"}, calibration)
    assert blend.ways == ["a", "b"]
    found, problem = blend.series({"a": HALF, "b": third}, (), 1)
    assert problem == ""
    assert np.array_equal(found, [HALF, third])
    patient = blend.patient("7", {"3": found, "4": found[::-1]})
    assert patient[:2] == pytest.approx([0.35, 0.65]), "mean of 0.275 and 0.425"
    for volumes, line in (
        ({"a": HALF, "b": fails}, "the model of b failed: RuntimeError"),
        ({"a": HALF * np.nan, "b": HALF}, "the model of a failed: not finite"),
    ):
        assert blend.series(volumes, (), 1)[1] == line


def test_a_model_that_fails_on_everything_is_said_so(tmp_path, monkeypatch, capfd):
    predicted(
        monkeypatch, tmp_path, [decoded(*ids, RuntimeError("no kernel"), "") for ids in LISTED]
    )
    assert (
        "warning: the model failed on every one of the 4 series it was given"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt(), SystemExit(143), InputError("what", "where", "what to do")]
)
def test_whatever_ends_the_run_what_there_is_is_written(tmp_path, monkeypatch, fault):
    items = [
        decoded("63706", "4", FIRST, ""),
        decoded("50046", "1", FIRST, ""),
        decoded("7", "3", fault, ""),
    ]
    with pytest.raises(type(fault)):
        predicted(monkeypatch, tmp_path, items)
    rows, fallbacks = written(tmp_path)
    assert rows["63706"] == pytest.approx(HALF)
    assert fallbacks == [
        ("50046", "", "stopped early: some series only"),
        ("7", "", "stopped early: prior"),
    ]


def test_patients_that_the_sample_does_not_list_are_not_predicted_and_reported(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        inference,
        "Ahead",
        lambda tasks, *given: (
            asked.extend(tasks) or SimpleNamespace(until=lambda deadline: iter(()))
        ),
    )
    tasks = [SeriesTask("9", "5", "test", "nowhere"), *TASKS]
    writer, path = SubmissionWriter(sample(), PRIOR), tmp_path / "submission.csv"
    counts = fill_submission(
        tasks,
        tmp_path,
        writer,
        known(),
        load_config("smoke"),
        path,
        1,
        0.0,
    )
    assert asked == TASKS
    assert counts["series"] == 4
    assert written(tmp_path)[1][0] == ("9", "", "not in sample_submission.csv: not predicted")


def test_no_volume_outlives_its_series(tmp_path, monkeypatch):
    """However many series there are, the last and the one under way are in memory."""
    patients = [str(1000 + k) for k in range(20)]
    tasks = [SeriesTask(one, series, "test", "nowhere") for one in patients for series in "ab"]
    volumes, most = [], []

    def until(deadline):
        for task in tasks:
            volume = FIRST.copy()
            volumes.append(weakref.ref(volume))
            most.append(sum(one() is not None for one in volumes))
            yield decoded(task.patient_id, task.series_id, volume, "")

    monkeypatch.setattr(inference, "Ahead", lambda *given: SimpleNamespace(until=until))
    writer = SubmissionWriter(sample(patients=patients), PRIOR)
    filled = (writer, known(("a", "b"), TWO), load_config("smoke"), tmp_path / "s.csv", 1, 0.0)
    counts = fill_submission(tasks, tmp_path, *filled)
    assert (counts["predicted"], counts["fallbacks"]) == (20, 0)
    assert max(most) <= 2


@pytest.mark.slow
def test_decoding_is_no_further_ahead_than_memory_is_planned_for(tmp_path, monkeypatch):
    """Many series and a slow model: what is decoded and not taken is bounded."""

    def decode(task, **options):
        (tmp_path / task.series_id).touch()
        return decode_ahead.Decoded(task.patient_id, task.series_id, {}, "")

    monkeypatch.setattr(decode_ahead, "decode_series", decode)
    tasks = [SeriesTask("7", str(k), "test", "nowhere") for k in range(32)]
    taken = 0
    for _ in decode_ahead.Ahead(tasks, tmp_path, None, [], 2).until(math.inf):
        taken += 1
        if taken == 2:
            time.sleep(1)
            # those that wait, and a part of as many under way
            assert len(list(tmp_path.iterdir())) - taken <= 2 * 2 * decode_ahead.AHEAD + 1
    assert taken == 32


@pytest.mark.slow
def test_the_end_does_not_wait_for_series_under_way(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(decode_ahead, "decode_series", lambda task, **options: time.sleep(300))
    begun = time.monotonic()
    assert not list(decode_ahead.Ahead(TASKS, tmp_path, None, [], 2).until(begun + 4))
    assert time.monotonic() - begun < 200
    assert "done again" not in capfd.readouterr().err


def test_patients_without_a_series_row_have_the_prior(tmp_path, monkeypatch):
    monkeypatch.setattr(
        inference, "Ahead", lambda *given: SimpleNamespace(until=lambda deadline: iter(()))
    )
    writer = SubmissionWriter(sample(), PRIOR)
    counts = fill_submission(
        [],
        tmp_path,
        writer,
        known(),
        load_config("smoke"),
        tmp_path / "s.csv",
        1,
        0.0,
    )
    assert (counts["predicted"], counts["prior"], counts["fallbacks"]) == (0, 3, 3)
    assert check_submission(tmp_path / "s.csv", sample()).height == 3


def test_a_submission_that_is_the_prior_alone_says_so(tmp_path, monkeypatch, capfd):
    line = "warning: none of the 4 test series could be predicted: the submission is the prior alon"
    predicted(monkeypatch, tmp_path, [decoded("7", "3", None, "no DICOM files"), None])
    assert capfd.readouterr().err.count(line) == 1
    predicted(monkeypatch, tmp_path, [decoded("7", "3", FIRST, ""), None])
    assert line not in capfd.readouterr().err


@pytest.mark.slow
def test_test_images_that_are_gone_leave_a_finished_submission(smoke, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(smoke / "data" / "phantom", data, ignore=lambda *_: ["train_images"])
    flags = ("--config", "smoke", "--data", str(data), "--out", str(out), "--models", str(smoke))
    assert stage_here("08", *flags).returncode == 0
    files = {path: path.read_bytes() for path in (out / layout.SUBMISSION).iterdir()}
    (data / "test_images").rename(data / "away")
    (data / "test_images").mkdir()
    done = stage_here("08", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: images of 0 test patients are there, the last run predicted 4, ")
    assert {path: path.read_bytes() for path in (out / layout.SUBMISSION).iterdir()} == files
    done = stage_here("08", *flags, "--force")
    assert done.returncode == 0
    assert "the submission is the prior alone" in done.stderr


def test_any_fault_of_a_series_is_that_series_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_ahead, "decode_series_files", lambda *given: 1 / 0)
    config = load_config("smoke")
    found = decode_ahead.decode_series(
        SeriesTask("7", "3", "test", str(tmp_path)), tmp_path, config.convert, [config.volume]
    )
    assert found == decoded("7", "3", None, "ZeroDivisionError: division by zero")


def mean_in_logits(tables):
    """(13,) of several (13,): in each target's group the geometric mean of every class, divided by
    their sum, in plain floats.
    """
    found = []
    for target, where in group_slices().items():
        rows = [table[where].tolist() for table in tables]
        means = [math.prod(column) ** (1 / len(rows)) for column in zip(*rows, strict=True)]
        assert target in TARGET_NAMES
        found += [value / sum(means) for value in means]
    return found


class Says(torch.nn.Module):
    """A model that answers with given logits, whatever it sees."""

    def __init__(self, **logits):
        super().__init__()
        self.logits = {name: torch.tensor([values]) for name, values in logits.items()}

    def forward(self, x):
        return self.logits, None


def ensemble_of(*models):
    options = TrainConfig(slices=2, image_size=16, targets=tuple(models[0].logits))
    return Ensemble(models, options, None, torch.device("cpu"), ThreadPoolExecutor(1))


def test_fold_models_are_averaged_in_logits():
    """A binary target and one of three grades: values by hand."""
    models = Says(bowel=[2.0], liver=[0.0, 1.0, 5.0]), Says(bowel=[-1.0], liver=[3.0, 0.0, 0.0])
    ensemble = ensemble_of(*models)
    found = ensemble.series(np.zeros((2, 16, 16), np.uint8), ())
    where = group_slices()
    assert found[where["bowel"]][1] == pytest.approx(1 / (1 + math.exp(-0.5)))
    grades = [math.exp(value) for value in (1.5, 0.5, 2.5)]
    assert found[where["liver"]] == pytest.approx([value / sum(grades) for value in grades])
    assert found[where["kidney"]] == pytest.approx([1 / 3] * 3), "not trained"
    alone = [
        predict(model, torch.zeros(1, 2, 16, 16, dtype=torch.uint8))[0].numpy() for model in models
    ]
    assert found == pytest.approx(mean_in_logits(alone))


def test_the_spread_of_the_fold_models_is_counted():
    models = Says(bowel=[2.0], liver=[0.0, 1.0, 5.0]), Says(bowel=[-1.0], liver=[3.0, 0.0, 0.0])
    ensemble = ensemble_of(*models)
    for _ in range(2):
        ensemble.series(np.zeros((2, 16, 16), np.uint8), ())
    liver = math.log(math.e + math.exp(5)), math.log(2) - 3  # of an injury, whatever its grade
    assert ensemble.fold_spread() == {
        "bowel": pytest.approx(3 / math.sqrt(2), abs=1e-3),
        "liver": pytest.approx((liver[0] - liver[1]) / math.sqrt(2), abs=1e-3),
    }
    single = ensemble_of(models[0])
    single.series(np.zeros((2, 16, 16), np.uint8), ())
    assert single.fold_spread() == {}


def test_a_calibration_of_single_models_fits_the_mean_of_logits_better_than_that_of_probabilities():
    """Simulated: five models with noise of their own, calibrated on one of them as on out-of-fold
    predictions; what the calibration costs above the best that either mean could have.
    """
    rng = np.random.default_rng(0)
    truth = rng.normal(-3, 1.6, 20_000)
    injured = rng.random(20_000) < 1 / (1 + np.exp(-truth))
    weights = np.where(injured, 6, 1)
    logits = torch.from_numpy(2 * (truth + math.log(6) + rng.normal(size=(5, 20_000))))

    def loss(line, x):
        z = line[0] * x + line[1]
        return (weights * np.logaddexp(0, np.where(injured, -z, z))).sum() / weights.sum()

    def best(x):
        return minimize(loss, [1, 0], args=(x,)).x

    line, cost = best(logits[0].numpy()), {}
    means = {
        "logits": mean_logits([{"bowel": row[:, None]} for row in logits])["bowel"][:, 0],
        "probabilities": logits.sigmoid().mean(0).logit(),
    }
    for name, x in means.items():
        cost[name] = loss(line, x.numpy()) - loss(best(x.numpy()), x.numpy())
    assert 0 < cost["logits"] < 0.5 * cost["probabilities"]
    assert loss(line, means["logits"].numpy()) < loss(line, means["probabilities"].numpy())


def test_flips_are_averaged():
    class Corner(torch.nn.Module):
        region_planes = [2]

        """Answers with the first pixel of the first slice, so that every flip shows another one."""

        def forward(self, x):
            return {"bowel": x[:, 0, 0, :1]}, None

    slices = torch.arange(8, dtype=torch.uint8).reshape(1, 2, 2, 2) * 30
    one = lambda *where: predict(Corner(), slices[(slice(None), *where)][:, None, None, None])[0]  # noqa: E731
    expected = {
        "x": one(0, 0, 1),
        "y": one(0, 1, 0),
        "z": one(1, 0, 0),
        "zy": one(1, 1, 0),
        "zyx": one(1, 1, 1),
    }
    for name, flipped in expected.items():
        found = predict(Corner(), slices, flips=[name])[0]
        assert found.tolist() == pytest.approx(mean_in_logits([one(0, 0, 0), flipped]))
    every = mean_in_logits([one(0, 0, 0), *expected.values()])
    assert predict(Corner(), slices, flips=list(expected))[0].tolist() == pytest.approx(every)


def test_what_overflows_in_mixed_precision_is_computed_in_float32(monkeypatch):
    """A model trained in bfloat16 on a GPU that knows float16 only, as Kaggle's are."""
    monkeypatch.setattr("pipeline.learning.optimise.amp_dtype", lambda device: torch.float16)

    class Large(torch.nn.Module):
        def forward(self, x):
            wide = torch.nn.functional.linear(x.abs().flatten(1) + 1, torch.full((1, 8), 30_000.0))
            return {"bowel": (wide / wide.detach()).float()}, None

    slices = torch.arange(8, dtype=torch.uint8).reshape(1, 2, 2, 2) * 30
    with torch.autocast("cpu", dtype=torch.float16):
        assert Large()(torch.ones(1, 8))[0]["bowel"].isnan().all()
    exact = predict(Large(), slices)
    assert exact.isfinite().all()
    assert torch.equal(predict(Large(), slices, amp=True), exact)


def flags(smoke: Path) -> tuple[str, ...]:
    """Of stage 08 on the smoke run's data and models, into another folder."""
    data = smoke / "data" / "phantom"
    return "--models", str(smoke), "--data", str(data), "predict.flush_every=1"


def start_anew(smoke: Path, out: Path) -> subprocess.Popen:
    """By a new interpreter, which is seconds at its imports."""
    script = ROOT / "stages" / "08_predict_test.py"
    command = [sys.executable, str(script), "--config", "smoke", "--jobs", "2", "--out", str(out)]
    return subprocess.Popen(
        [*command, *flags(smoke)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_as_if_nothing_had_happened(smoke: Path, out: Path) -> None:
    given = read_sample_submission(smoke / "data" / "phantom")
    pair = [
        check_submission(folder / layout.SUBMISSION / "submission.csv", given)
        .select(COLUMNS)
        .to_numpy()
        for folder in (smoke, out)
    ]
    assert np.allclose(*pair, atol=1e-5)
    assert (out / layout.SUBMISSION / "fallbacks.csv").read_text() == (
        smoke / layout.SUBMISSION / "fallbacks.csv"
    ).read_text()


def test_killed_at_any_moment_the_file_is_valid_and_the_next_run_completes_it(smoke, tmp_path):
    path, given = (
        tmp_path / layout.SUBMISSION / "submission.csv",
        read_sample_submission(smoke / "data" / "phantom"),
    )
    for pause_s in (0.0, 3.0):  # once with the prior only, once somewhere in loading or predicting
        run = start_anew(smoke, tmp_path)
        while not path.exists() and run.poll() is None:
            time.sleep(0.01)
        end = time.monotonic() + pause_s
        while time.monotonic() < end and run.poll() is None:
            time.sleep(0.01)
        children = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        run.kill()
        run.communicate(timeout=60)  # until nothing holds its output any more
        psutil.wait_procs(children, timeout=60)
        left = check_submission(path, given).select(COLUMNS)
        assert pause_s or left.n_unique() == 1, (
            "everyone has the prior before the models are loaded"
        )
        path.unlink()
    last = start_anew(smoke, tmp_path)
    assert last.wait(timeout=300) == 0, last.stderr.read()
    assert_as_if_nothing_had_happened(smoke, tmp_path)
    assert not [name for name in tmp_path.rglob("*") if ".tmp-" in name.name]


def test_decoding_processes_that_are_killed_change_nothing(smoke, tmp_path):
    run, killed = start("08", tmp_path, *flags(smoke)), 0
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
    for name in (layout.CLASSIFIERS, layout.SCORES):
        shutil.copytree(smoke / name, folder / name)
    return folder


def test_a_calibration_of_a_blend_is_refused_before_anything_is_predicted(smoke, tmp_path):
    models, oof = (
        copy_models(smoke, tmp_path / "models"),
        smoke / layout.SCORES / "oof_predictions.csv",
    )
    data = str(smoke / "data" / "phantom")
    shutil.copy(oof, tmp_path / "other.csv")
    blended = stage_here(
        "07",
        "--config",
        "smoke",
        "--data",
        data,
        "--out",
        str(models),
        "--oof",
        str(oof),
        str(tmp_path / "other.csv"),
    )
    assert blended.returncode == 0, blended.stderr
    done = stage_here(
        "08",
        "--config",
        "smoke",
        "--data",
        data,
        "--out",
        str(tmp_path / "out"),
        "--models",
        str(models),
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the calibration is of other predictions \(oof_predictions, other\) than those of"
        r" the models that 06_folds holds now, .*calibration.json, run .*07_score_oof.py, without"
        r" --oof\n",
        done.stderr,
    )
    foreign = stage_here(
        "07",
        "--config",
        "smoke",
        "--data",
        data,
        "--out",
        str(models),
        "--oof",
        str(tmp_path / "other.csv"),
    )
    assert foreign.returncode == 0, foreign.stderr
    done = stage_here(
        "08",
        "--config",
        "smoke",
        "--data",
        data,
        "--out",
        str(tmp_path / "out"),
        "--models",
        str(models),
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the calibration is of other predictions .*calibration.json, run .* without"
        r" --oof\n",
        done.stderr,
    )
    assert not (tmp_path / "out" / layout.SUBMISSION / "submission.csv").exists()


def test_a_calibration_from_before_the_models_were_trained_again_is_refused(smoke):
    trained = read_manifest(smoke / layout.SCORES)["inputs"][layout.CLASSIFIERS]
    scores, line = smoke / layout.SCORES, r"other predictions \(folds\) than those of the models"
    assert Calibration.of_runs(scores, [trained], "07").models == ("folds",)
    for others in ([trained[::-1]], [trained, trained[::-1]], []):
        with pytest.raises(InputError, match=line):
            Calibration.of_runs(scores, others, "07")


def test_the_submission_is_the_mean_of_all_models_aggregated_and_calibrated(smoke):
    """Step by step from DICOM; without one of the models, or not calibrated, it would be another
    one.
    """
    config, data = load_config("smoke"), smoke / "data" / "phantom"
    given = check_submission(
        smoke / layout.SUBMISSION / "submission.csv", read_sample_submission(data)
    )
    calibration = Calibration.from_json(
        json.loads((smoke / layout.SCORES / "calibration.json").read_text())
    )
    models = [
        load_classifier(path, torch.device("cpu"))
        for path in sorted((smoke / layout.CLASSIFIERS).glob("fold*/model.safetensors"))
    ]
    tasks, ways = tasks_of(data, read_series(data, "test")), [config.volume]
    volumes = [
        decode_ahead.decode_series(task, data, config.convert, ways).volumes[ways[0]]
        for task in tasks
    ]

    def submitted(models, calibrate):
        answers = []
        for volume in volumes:
            options = models[0][1].train
            slices = take_slices(volume, slice_positions(len(volume), options.slices), options)
            answers.append(
                mean_in_logits(
                    [
                        predict(model, torch.from_numpy(slices)[None], options.amp)[0].numpy()
                        for model, _ in models
                    ]
                )
            )
        ids = pl.DataFrame(
            {
                "patient_id": [task.patient_id for task in tasks],
                "series_id": [task.series_id for task in tasks],
            }
        )
        table = aggregate(ids.hstack(value_frame(np.stack(answers))), config.score.aggregate)
        values = table.select(COLUMNS).to_numpy()
        table = table.with_columns(value_frame(calibration.apply(values) if calibrate else values))
        return (
            given.select("patient_id")
            .join(table, on="patient_id", how="left", maintain_order="left")
            .select(COLUMNS)
            .to_numpy()
        )

    expected = given.select(COLUMNS).to_numpy()
    assert len(models) == 2
    np.testing.assert_allclose(submitted(models, True), expected, atol=1e-5)
    for wrong in (
        submitted(models[:1], True),
        submitted(models[1:], True),
        submitted(models, False),
    ):
        assert np.abs(wrong - expected).max() > 1e-3


def stage_08(smoke: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """Stage 08 in this process, on the smoke run's data and models."""
    script = ROOT / "stages" / "08_predict_test.py"
    monkeypatch.setattr(
        "sys.argv",
        [
            str(script),
            "--config",
            "smoke",
            "--models",
            str(smoke),
            "--jobs",
            "1",
            "--data",
            str(smoke / "data" / "phantom"),
            "--out",
            str(out),
            *overrides,
        ],
    )
    return main(str(script), predict_test, "", add_models)


def test_the_prior_is_there_before_any_test_file_is_looked_at(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.slices.sources.look_at", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage_08(smoke, tmp_path, monkeypatch)
    path = tmp_path / layout.SUBMISSION / "submission.csv"
    given = read_sample_submission(smoke / "data" / "phantom")
    assert check_submission(path, given).select(COLUMNS).n_unique() == 1
    path.write_text("of an earlier run")
    with pytest.raises(ZeroDivisionError):
        stage_08(smoke, tmp_path, monkeypatch)
    assert path.read_text() == "of an earlier run", "better than the prior"


def test_a_model_that_failed_is_tried_again_and_a_spent_budget_is_told(tmp_path, capfd):
    assert is_settled(tmp_path)
    for counts, settled in (
        ({"model_failures": 0, "late": 0}, True),
        ({"model_failures": 1, "late": 0}, False),
        ({"model_failures": 0, "late": 3}, True),
    ):
        manifest = {"schema": 1, "fingerprint": "", "outputs": {}, "counts": counts}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert is_settled(tmp_path) == settled
    assert "the time budget left 3 patients" in capfd.readouterr().err


def test_models_of_slices_turned_otherwise_are_refused(smoke, tmp_path, monkeypatch, capfd):
    """A feet-first series would be predicted as the mirror image of what the models know. The
    submission that is there stays, as finished as it was.
    """
    shutil.copytree(smoke / layout.SUBMISSION, folder := tmp_path / layout.SUBMISSION)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert stage_08(smoke, tmp_path, monkeypatch, "convert.flip_hfs=true") == 2
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    line = capfd.readouterr().err
    assert "trained on slices turned otherwise" in line
    assert "give convert.flip_hfs=false" in line


def test_volumes_are_those_that_the_models_know(smoke, tmp_path, monkeypatch):
    """Whatever the config says of volumes that this run may have."""
    assert stage_08(smoke, tmp_path, monkeypatch, "volume.depth=20") == 0
    assert_as_if_nothing_had_happened(smoke, tmp_path)


def test_broken_calibration_is_one_line(tmp_path):
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(InputError, match="not a calibration .*stages/07_score_oof.py"):
        Calibration.of_runs(tmp_path, [], "")


def test_other_views_than_those_of_the_calibration_are_told(smoke, tmp_path, monkeypatch, capfd):
    assert stage_08(smoke, tmp_path / "plain", monkeypatch) == 0
    assert "warning: the calibration" not in capfd.readouterr().err
    counts = read_manifest(tmp_path / "plain" / layout.SUBMISSION)["counts"]
    assert set(counts["fold_spread"]) == set(TARGET_NAMES)
    assert all(value > 0 for value in counts["fold_spread"].values())
    assert stage_08(smoke, tmp_path / "flipped", monkeypatch, "predict.flips=[zy]") == 0
    assert (
        f"warning: the calibration was fitted to predictions of run {smoke.name} with the views"
        " [], not ['zy']" in capfd.readouterr().err
    )


class Pixels(torch.nn.Module):
    """Answers with the first pixels that it sees, in its own measure."""

    logits, region_planes = ("bowel", "kidney", "liver"), [2]

    def __init__(self, measure):
        super().__init__()
        self.measure = measure

    def forward(self, x):
        part = self.measure * x[:, 0, :1].flatten(1)
        return {"bowel": part[:, :1], "kidney": part[:, 1:4], "liver": part[:, 4:7]}, None


def test_a_series_waits_for_its_device_once(monkeypatch):
    """Three models and four views: one transfer, and the numbers of plain loops."""
    ensemble = ensemble_of(Pixels(0.5), Pixels(-1.0), Pixels(2.0))
    volume = np.random.default_rng(0).integers(0, 256, (2, 16, 16), np.uint8)
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda one: transfers.append(one.shape) or cpu(one))
    found = ensemble.series(volume, ("x", "y", "zyx"))
    assert transfers == [(3, 1, 7)]
    grey, logits = (volume / 255 - GREY_MEAN) / GREY_STD, np.zeros(7)
    for measure in (0.5, -1.0, 2.0):
        for view in (grey, grey[:, :, ::-1], grey[:, ::-1], grey[::-1, ::-1, ::-1]):
            logits += measure * view[0, 0, :7] / 12
    where = group_slices()
    assert found[where["bowel"]][1] == pytest.approx(1 / (1 + math.exp(-logits[0])), rel=1e-5)
    for name, part in (("kidney", logits[1:4]), ("liver", logits[4:])):
        grades = np.exp(part) / np.exp(part).sum()
        assert found[where[name]] == pytest.approx(grades.tolist(), rel=1e-5)


def test_phases_are_averaged_in_logits_as_flips_are():
    """Two of two slices in four planes, each phase plain and turned in z."""
    ensemble = ensemble_of(Pixels(0.5), Pixels(-1.0))
    volume = np.random.default_rng(0).integers(0, 256, (4, 16, 16), np.uint8)
    found = ensemble.series(volume, ("z",), 2)
    grey, logits = (volume / 255 - GREY_MEAN) / GREY_STD, np.zeros(7)
    for measure in (0.5, -1.0):
        for first in (0, 2, 1, 3):  # plane that a view begins with: phases (0, 2) and (1, 3)
            logits += measure * grey[first, 0, :7] / 8
    where = group_slices()
    assert found[where["bowel"]][1] == pytest.approx(1 / (1 + math.exp(-logits[0])), rel=1e-5)
    for name, part in (("kidney", logits[1:4]), ("liver", logits[4:])):
        grades = np.exp(part) / np.exp(part).sum()
        assert found[where[name]] == pytest.approx(grades.tolist(), rel=1e-5)
