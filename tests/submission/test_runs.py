"""Several runs in stages 07 and 08: what was scored is what is submitted."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers_faults import copy
from helpers_former import make_old
from helpers_scores import patient_by_hand

from pipeline.classifier.predict import load_classifier, predict
from pipeline.classifier.stage import train_folds
from pipeline.competition.tables import read_sample_submission, read_series
from pipeline.competition.targets import COLUMNS, group_slices
from pipeline.evaluation.stage import score_oof
from pipeline.folds import make_folds
from pipeline.run import layout
from pipeline.run.manifest import digest, read_manifest, stage_folder
from pipeline.run.presets import load_config
from pipeline.run.runs import names_of, runs_of
from pipeline.run.stage import Options, Stage
from pipeline.run.verify import differences
from pipeline.slices.sources import test_tasks as tasks_of
from pipeline.submission.decode_ahead import decode_series
from pipeline.submission.stage import predict_test
from pipeline.submission.writer import check_submission
from pipeline.system.errors import InputError
from pipeline.volumes.sampling import slice_positions, take_slices
from pipeline.volumes.stage import build_volumes

CONFIG = load_config("smoke")


@pytest.fixture(scope="module")
def runs(smoke, tmp_path_factory) -> list[Path]:
    """Three runs: the smoke one, one of its folds and another seed, one of other volumes, folds and
    seed whose stages have the former numbers.
    """
    folder, later = tmp_path_factory.mktemp("runs"), ("data", *list(layout.MAKERS)[5:])
    how = {"data": smoke / "data" / "phantom", "jobs": 1, "device": "cpu"}
    for name in "bc":
        copy(smoke, folder / name, *later)
    train_folds(load_config("smoke", ["seed=5", "train.epochs=1"]), out=folder / "b", **how)
    size = [f"volume.{key}={value}" for key, value in (("depth", 9), ("height", 40), ("width", 32))]
    other = load_config("smoke", ["seed=6", "train.epochs=1", "train.slices=3", *size])
    for stage in (build_volumes, make_folds, train_folds):
        stage(other, out=folder / "c", **how)
    return [smoke, folder / "b", make_old(folder / "c")]


@pytest.fixture(scope="module")
def how(smoke) -> dict:
    """Arguments that stages 07 and 08 share."""
    return {"config": CONFIG, "data": smoke / "data" / "phantom", "jobs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def blended(runs, how, tmp_path_factory) -> Path:
    """The three, scored and submitted."""
    out = tmp_path_factory.mktemp("blend") / "out"
    score_oof(out=out, models=runs, **how)
    predict_test(out=out, models=runs, **how)
    return out


def submitted(out: Path, data: Path) -> pl.DataFrame:
    path = out / layout.SUBMISSION / layout.SUBMISSION_TABLE
    return check_submission(path, read_sample_submission(data))


def series_by_hand(run: Path, data: Path) -> dict[tuple[str, str], np.ndarray]:
    """(13,) of each test series by one run: in every target's group the geometric mean over the
    fold models, divided by its sum.
    """
    found, folder = {}, stage_folder(run, layout.CLASSIFIERS)
    models = [load_classifier(path) for path in sorted(folder.glob("fold*/model.safetensors"))]
    assert len(models) == 2
    for task in tasks_of(data, read_series(data, "test")):
        way, options = models[0][1].volume, models[0][1].train
        volume = decode_series(task, data, CONFIG.convert, [way]).volumes[way]
        assert volume.shape == (way.depth, way.height, way.width)
        slices = take_slices(volume, slice_positions(len(volume), options.slices), options)
        batch = torch.from_numpy(slices)[None]
        answers = [predict(model, batch, options.amp)[0].numpy() for model, _ in models]
        mean = np.sqrt(answers[0] * answers[1])
        for where in group_slices().values():
            mean[where] /= mean[where].sum()
        found[task.patient_id, task.series_id] = mean
    return found


def expected(folders: list[Path], fitted: dict, data: Path) -> np.ndarray:
    """Rows (patients, 13) in the order of the sample."""
    answers, rows = [series_by_hand(folder, data) for folder in folders], []
    for patient in read_sample_submission(data)["patient_id"]:
        own = [key for key in answers[0] if key[0] == patient]
        rows.append(patient_by_hand([[one[key] for one in answers] for key in own], fitted))
    return np.stack(rows)


def test_the_submission_is_the_blend_that_was_scored(runs, blended, how):
    fitted = json.loads((blended / layout.SCORES / layout.CALIBRATION).read_text())
    folders = {run.name: run for run in runs}
    assert set(fitted["models"]) == set(folders)
    assert len(fitted["models"]) == 3
    found = submitted(blended, how["data"]).select(COLUMNS).to_numpy()
    ordered = [folders[name] for name in fitted["models"]]
    np.testing.assert_allclose(found, expected(ordered, fitted, how["data"]), atol=1e-5)
    turned = expected(ordered[1:] + ordered[:1], fitted, how["data"])
    assert np.abs(found - turned).max() > 1e-4, "each run has weights of its own"
    counts = read_manifest(blended / layout.SUBMISSION)["counts"]
    assert (counts["predicted"], counts["fallbacks"]) == (4, 0)
    scores = json.loads((blended / layout.SCORES / layout.SCORE_TABLE).read_text())
    assert scores["counts"]["models"] == 3
    assert {"histogram", "thumbnail"} < set(scores["floors"])
    assert not list(differences(blended))


def test_the_order_of_the_runs_does_not_matter(runs, blended, how, tmp_path, capfd):
    turned = runs[::-1]
    score_oof(out=blended, models=turned, **how)
    predict_test(out=blended, models=turned, **how)
    said = capfd.readouterr().err
    assert "07_oof: up to date" in said
    assert "08_submission: up to date" in said
    shutil.copytree(blended / layout.SCORES, tmp_path / layout.SCORES)
    predict_test(out=tmp_path, models=turned, **how)
    assert submitted(tmp_path, how["data"]).equals(submitted(blended, how["data"]))


def test_folds_that_the_runs_share_are_those_of_the_score(runs, how, smoke, tmp_path, capfd):
    score_oof(out=tmp_path, models=runs[:2], **how)
    assert "do not share their folds" not in capfd.readouterr().err
    ids = {"patient_id": pl.String}
    drawn = pl.read_csv(smoke / layout.FOLDS / layout.FOLD_TABLE, schema_overrides=ids)
    used = pl.read_parquet(tmp_path / layout.SCORES / "patients.parquet")
    assert used.select("patient_id", "fold").sort("patient_id").equals(drawn.sort("patient_id"))
    score_oof(out=tmp_path, models=runs[1:], **how)
    assert "the models do not share their folds: nested ones are drawn" in capfd.readouterr().err


def test_other_runs_than_those_that_were_calibrated_are_refused(runs, blended, how, tmp_path):
    line = f"stages/07_score_oof.py --models {runs[0]} {runs[1]} --out "
    with pytest.raises(InputError) as fault:
        predict_test(out=blended, models=runs[:2], **how)
    assert "the calibration is of other predictions (" in str(fault.value)
    assert f"run {line}{blended}, without --oof" in str(fault.value)
    with pytest.raises(InputError, match="07_oof is missing or unfinished") as fault:
        predict_test(out=tmp_path, models=runs[:2], **how)
    assert f"run {line}{tmp_path} first" in str(fault.value)


@pytest.mark.parametrize("stage", [score_oof, predict_test])
def test_a_run_that_is_missing_or_named_twice_is_refused(runs, how, tmp_path, stage):
    remedy = "give a run's folder, the one that holds 06_folds"
    with pytest.raises(InputError) as fault:
        stage(out=tmp_path, models=[runs[0], tmp_path / "none"], **how)
    assert str(fault.value) == f"no such folder, --models {tmp_path}/none, {remedy}"
    with pytest.raises(InputError) as fault:
        stage(out=tmp_path, models=runs[0] / "06_folds", **how)
    assert str(fault.value) == f"no 06_folds in it, --models {runs[0]}/06_folds, {remedy}"
    (tmp_path / "none" / "06_folds").mkdir(parents=True)
    with pytest.raises(InputError, match="06_folds is missing or unfinished") as fault:
        stage(out=tmp_path, models=[runs[0], tmp_path / "none"], **how)
    assert f"{tmp_path}/none/06_folds, run stages/06_train_folds.py first" in str(fault.value)
    with pytest.raises(InputError, match="two runs have the same models, --models .* and "):
        stage(out=tmp_path, models=[runs[0], runs[1], runs[0]], **how)


def test_runs_of_other_series_are_refused(runs, how, tmp_path):
    other = copy(runs[1], tmp_path / "other")
    path = other / layout.CLASSIFIERS / "fold0" / layout.OOF
    table = pl.read_parquet(path)
    several = table.filter(pl.col("patient_id").is_duplicated())
    patient, series = several.select("patient_id", "series_id").row(0)
    table.filter(pl.col("series_id") != series).write_parquet(path)
    manifest = read_manifest(path.parents[1])
    manifest["outputs"]["fold0/oof.parquet"] = {
        "bytes": path.stat().st_size,
        "digest": digest(path),
    }
    (path.parents[1] / layout.MANIFEST).write_text(json.dumps(manifest))
    line = f"series '{series}'( of patient '{patient}' is missing| is not in ).*/06_folds/fold"
    with pytest.raises(InputError, match=line):
        score_oof(out=tmp_path / "out", models=[runs[0], other], **how)


def test_a_spent_budget_leaves_the_prior_of_the_blend(runs, blended, how, tmp_path):
    shutil.copytree(blended / layout.SCORES, tmp_path / layout.SCORES)
    late = {**how, "config": load_config("smoke", ["predict.time_budget_h=0.000001"])}
    predict_test(out=tmp_path, models=runs, **late)
    prior = json.loads((tmp_path / layout.SCORES / layout.CALIBRATION).read_text())["prior"]
    rows = submitted(tmp_path, how["data"]).select(COLUMNS).to_numpy()
    np.testing.assert_allclose(rows, [[prior[column] for column in COLUMNS]] * 4, atol=1e-12)
    counts = read_manifest(tmp_path / layout.SUBMISSION)["counts"]
    assert (counts["predicted"], counts["late"]) == (0, 4)


def made_up(folder: Path, content: str) -> Path:
    """A run of which there is the manifest of its folds."""
    (folder / layout.CLASSIFIERS).mkdir(parents=True)
    (folder / layout.CLASSIFIERS / "log").write_text(content)
    outputs = {"log": {"bytes": len(content), "digest": content}}
    manifest = {"schema": 1, "fingerprint": "", "inputs": {}, "outputs": outputs}
    (folder / layout.CLASSIFIERS / layout.MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_names_of_runs_are_distinct(tmp_path):
    folders = [made_up(tmp_path / name, name) for name in ("a/run", "b/run", "c")]
    stage = Stage(layout.SCORES, CONFIG, Options(out=tmp_path, models=folders))
    found = runs_of(stage)
    assert sorted(names_of(found.values())) == sorted([*map(str, folders[:2]), "c"])
    assert list(found) == sorted(found)
    assert {run.models[0] for run in found.values()} == set(folders)
    again = Stage(layout.SCORES, CONFIG, Options(out=tmp_path, models=folders[::-1]))
    assert list(runs_of(again)) == list(found)
    twice = Stage(layout.SCORES, CONFIG, Options(out=tmp_path, models=[*folders, folders[0]]))
    with pytest.raises(InputError, match="two runs have the same models"):
        runs_of(twice)
