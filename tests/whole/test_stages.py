"""The stage scripts as a user calls them: the whole path, skipping, single stages, wrong input."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from helpers_faults import run
from helpers_stages import STAGES, run_all, run_stage, stage_here

from pipeline.competition.tables import read_labels, read_sample_submission
from pipeline.competition.targets import COLUMNS, SCORE_KEYS
from pipeline.run import layout
from pipeline.run.layout import MAKERS
from pipeline.run.manifest import read_manifest
from pipeline.submission.writer import check_submission

SMOKE = ("--config", "smoke", "--out")


def test_run_leaves_a_manifest_in_every_stage_folder(smoke):
    for folder in sorted(MAKERS.keys() - {layout.ABLATION}):  # which run_all.sh does not run
        manifest = read_manifest(smoke / folder)
        assert manifest is not None, folder
        assert {
            "schema",
            "config",
            "inputs",
            "fingerprint",
            "outputs",
            "counts",
            "seconds",
            "versions",
            "git",
        } <= set(manifest)


def test_no_temporary_file_is_left(smoke):
    assert not [path for path in smoke.rglob("*") if ".tmp-" in path.name]


def test_second_run_skips_everything_touches_nothing_and_imports_nothing_heavy(smoke, monkeypatch):
    """Python lists what it imports: a limit in seconds would depend on the machine."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    before = {
        path: path.stat().st_mtime_ns
        for path in smoke.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }
    again = run_all(smoke)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("up to date") == 10 + 2, "ten stages and two folds"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    imported = {
        line.rpartition("|")[2].strip()
        for line in again.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "pipeline.run.stage" in imported
    assert not imported & {
        "torch",
        "timm",
        "albumentations",
        "cv2",
        "scipy",
        "sklearn",
        "matplotlib",
    }


def test_submission_is_the_samples_in_columns_order_and_patients(smoke):
    sample = read_sample_submission(smoke / "data" / "phantom")
    table = check_submission(smoke / layout.SUBMISSION / "submission.csv", sample)
    assert table.height == 4
    assert table.select(COLUMNS).to_numpy().std(0).max() > 0, "patients differ"


def test_out_of_fold_predictions_cover_every_series_once(smoke):
    labels = read_labels(smoke / "data" / "phantom")
    oof = pl.concat(
        [
            pl.read_parquet(path)
            for path in sorted((smoke / layout.CLASSIFIERS).glob("fold*/oof.parquet"))
        ]
    )
    volumes = pl.read_parquet(smoke / layout.VOLUMES / "index.parquet").filter(
        pl.col("source") == "train"
    )
    assert sorted(zip(oof["patient_id"], oof["series_id"], strict=True)) == sorted(
        zip(volumes["patient_id"], volumes["series_id"], strict=True)
    )
    assert set(oof["patient_id"]) == set(labels["patient_id"])
    folds = dict(
        pl.read_csv(
            smoke / layout.FOLDS / "folds.csv", schema_overrides={"patient_id": pl.String}
        ).iter_rows()
    )
    assert all(
        folds[patient] == fold for patient, fold in oof.select("patient_id", "fold").iter_rows()
    )
    assert np.isfinite(oof.select(COLUMNS).to_numpy()).all()


def test_scores_hold_every_table(smoke):
    scores = json.loads((smoke / layout.SCORES / "scores.json").read_text())
    for table in (scores["raw"], scores["nested"], scores["in_sample"], *scores["floors"].values()):
        assert set(SCORE_KEYS) <= set(table)
    constants = {"uniform", "class_means", "weighted_means"}
    assert set(scores["floors"]) == constants | {"histogram", "thumbnail"}
    assert "weighted means" in (smoke.parent / "stdout.txt").read_text()


def test_pretraining_never_reads_labels(smoke):
    inputs = read_manifest(smoke / layout.VOCO)["inputs"]
    assert not any("train.csv" in key or "folds" in key for key in inputs)


def test_test_predictions_are_those_of_the_stages_on_disk(smoke, tmp_path):
    """The in-memory path of stage 08 and stages 01 and 02 give the same volume."""
    from pipeline.run.presets import load_config
    from pipeline.slices.sources import SeriesTask
    from pipeline.submission.decode_ahead import decode_series

    config = load_config("smoke")
    row = (
        pl.read_parquet(smoke / layout.VOLUMES / "index.parquet")
        .filter(pl.col("source") == "train")
        .row(0, named=True)
    )
    data = smoke / "data" / "phantom"
    task = SeriesTask(
        row["patient_id"],
        row["series_id"],
        "test",
        str(data / "train_images" / row["patient_id"] / row["series_id"]),
    )
    decoded = decode_series(task, data, config.convert, [config.volume])
    assert np.array_equal(
        decoded.volumes[config.volume], np.load(smoke / layout.VOLUMES / row["path"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES, ids=lambda path: path.stem)
def test_help_says_what_is_read_and_written(script):
    done = run_stage(script.stem, "--help")
    assert done.returncode == 0
    assert "Reads" in done.stdout
    assert "Writes" in done.stdout
    assert len(script.read_text().splitlines()) <= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "maker"),
    [
        ("01", "00_make_phantom"),
        ("02", "01_convert"),
        ("03", "00_make"),
        ("04", "02_build"),
        ("06", "00_make"),
        ("07", "00_make"),
        ("08", "00_make"),
    ],
)
def test_missing_input_is_one_line_that_names_the_stage(stage, maker, tmp_path):
    done = run_stage(stage, *SMOKE, str(tmp_path / "empty"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert maker in lines[0]


@pytest.mark.slow
def test_wrong_key_names_the_nearest_one(tmp_path):
    done = run_stage("03", *SMOKE, str(tmp_path), "pretrain.stepz=3")
    assert done.returncode == 2
    assert "did you mean 'pretrain.steps'" in done.stderr


@pytest.mark.slow
def test_paper_preset_asks_for_data(tmp_path):
    done = run_stage("01", "--config", "paper", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--data" in done.stderr


def test_changed_key_redoes_what_depends_on_it_and_nothing_else(smoke, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(smoke, out)
    same = stage_here("07", *SMOKE, str(out))
    assert "up to date" in same.stderr, "a moved output folder is as good as new"
    redone = stage_here("07", *SMOKE, str(out), "score.bootstrap=20")
    assert redone.returncode == 0, redone.stderr
    assert "up to date" not in redone.stderr
    assert "up to date" in stage_here("03", *SMOKE, str(out), "score.bootstrap=20").stderr


def test_truncated_artifact_is_made_again(smoke, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(smoke, out)
    target = out / layout.SCORES / "calibration.json"
    whole = target.read_bytes()
    target.write_bytes(whole[:20])
    done = stage_here("07", *SMOKE, str(out))
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == whole


def test_real_data_skips_the_phantom_and_missing_test_tables_skip_the_submission(smoke, tmp_path):
    data = tmp_path / "rsna"
    data.mkdir()
    shutil.copy(smoke / "data" / "phantom" / "train.csv", data)
    skipped = run_stage("00", *SMOKE, str(tmp_path / "out"), "--data", str(data))
    assert skipped.returncode == 0
    assert not (tmp_path / "out" / "data").exists()
    none = run_stage("08", *SMOKE, str(tmp_path / "out"), "--data", str(data))
    assert none.returncode == 0
    assert "skipped" in none.stderr


def test_time_budget_gives_a_valid_file_with_the_prior(smoke, tmp_path):
    out = tmp_path / "late"
    done = run_stage(
        "08",
        "--config",
        "smoke",
        "--models",
        str(smoke),
        "--data",
        str(smoke / "data" / "phantom"),
        "--out",
        str(out),
        "predict.time_budget_h=0.0003",
    )
    assert done.returncode == 0, done.stderr
    sample = read_sample_submission(smoke / "data" / "phantom")
    table = check_submission(out / layout.SUBMISSION / "submission.csv", sample)
    late = pl.read_csv(out / layout.SUBMISSION / "fallbacks.csv")
    assert late.height >= 1
    assert late["reason"].str.contains("budget").all()
    assert table.height == sample.height


def test_damaged_test_series_fall_back_and_are_reported(smoke, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(
        smoke / "data" / "phantom",
        data,
        ignore=shutil.ignore_patterns("train_images", "unlabelled"),
    )
    series = pl.read_csv(
        data / "test_series_meta.csv",
        schema_overrides={"patient_id": pl.String, "series_id": pl.String},
    )
    broken, gone, empty = series["patient_id"].unique(maintain_order=True)[:3]
    for patient, sid in series.select("patient_id", "series_id").iter_rows():
        folder = data / "test_images" / patient / sid
        if patient == broken:
            for path in folder.iterdir():
                path.write_bytes(path.read_bytes()[:200])
        elif patient in (gone, empty):
            shutil.rmtree(folder)
            if patient == empty:
                folder.mkdir()
    code, text = run("08", tmp_path / "out", "--models", str(smoke), "--data", str(data))
    assert code == 0, text
    table = check_submission(
        tmp_path / "out" / layout.SUBMISSION / "submission.csv", read_sample_submission(data)
    )
    rows = (
        table.filter(pl.col("patient_id").is_in([broken, gone, empty])).select(COLUMNS).to_numpy()
    )
    assert np.allclose(rows, rows[0]), "all three have the prior"
    ids = {"patient_id": pl.String, "series_id": pl.String}
    reported = (
        pl.read_csv(tmp_path / "out" / layout.SUBMISSION / "fallbacks.csv", schema_overrides=ids)
        .fill_null("")
        .rows()
    )
    reasons = {patient: reason for patient, sid, reason in reported if sid}
    assert reasons.keys() == {broken, gone, empty}
    assert reasons[empty] == "no DICOM files"
    assert reasons[gone].startswith("no such folder")
    alone = [(patient, reason) for patient, sid, reason in reported if not sid]
    assert sorted(alone) == sorted(
        (patient, "no usable series: prior") for patient in (broken, gone, empty)
    )
    untouched = check_submission(
        smoke / layout.SUBMISSION / "submission.csv", read_sample_submission(data)
    )
    rest = ~pl.col("patient_id").is_in([broken, gone, empty])
    pair = [frame.filter(rest).select(COLUMNS).to_numpy() for frame in (table, untouched)]
    assert np.allclose(*pair, atol=1e-5), (
        "the others are as they were (to float32 sums by another number of threads)"
    )
