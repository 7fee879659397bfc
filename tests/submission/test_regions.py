"""Stages 05 to 08 with train.regions=organs as a user calls them: the test set's path looks at what
the out-of-fold path looks at.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from helpers_faults import copy, refused, run_here
from helpers_scores import volume_of
from helpers_stages import ORGAN_KEYS as KEYS

from pipeline.classifier.predict import load_classifier, predict_volume
from pipeline.classifier.regions import region_windows
from pipeline.competition.metric import value_frame
from pipeline.competition.tables import read_sample_submission, read_series
from pipeline.competition.targets import COLUMNS
from pipeline.evaluation.calibration import Calibration
from pipeline.organs.find import OrganFinder, read_organs
from pipeline.run import layout
from pipeline.run.manifest import read_manifest, trained_files
from pipeline.run.presets import load_config
from pipeline.slices.sources import SeriesTask
from pipeline.slices.sources import test_tasks as tasks_of
from pipeline.submission.inference import Ensemble
from pipeline.submission.writer import check_submission

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture
def out(organ_run):
    return organ_run


def models_of(out, stage):
    return trained_files(out / stage, layout.MODEL)


def test_the_test_sets_path_gives_the_out_of_fold_predictions(out):
    """The classifier and the segmenter of one fold, on its held-out series read from DICOM."""
    config, seen, differ = load_config("smoke", list(KEYS)).train, set(), 0
    stored = read_organs(out / layout.ORGANS / layout.ORGAN_TABLE)
    for fold in (0, 1):
        path, segmenter = (models_of(out, one)[fold] for one in (layout.CLASSIFIERS, layout.ORGANS))
        model, trained = load_classifier(path, CPU)
        assert trained.train.regions == "organs"
        finder = OrganFinder([segmenter], CPU)
        ensemble = Ensemble(
            [model], trained.train, trained.volume, CPU, ThreadPoolExecutor(1), finder
        )
        rows = pl.read_parquet(out / layout.CLASSIFIERS / f"fold{fold}" / layout.OOF)
        for row in rows.head(4).iter_rows(named=True):
            ids = row["patient_id"], row["series_id"]
            images = out / "data" / "phantom" / "train_images" / "/".join(ids)
            volume = volume_of(out, SeriesTask(*ids, "train", str(images)))
            found = ensemble.series(volume, (), 1)
            assert found == pytest.approx([row[name] for name in COLUMNS], abs=1e-5)
            windows = region_windows(stored[ids[1]], volume.shape, config)
            assert windows == region_windows(finder(volume), volume.shape, config)
            seen |= {str(window) for window in windows}
            whole = predict_volume(model, volume, trained.train)
            differ += not np.allclose(found, list(whole.values()), atol=1e-6)
    assert len(seen) > 4, "regions of each series' own"
    assert differ > 1


def test_the_submission_looks_at_the_organs_that_all_segmenters_find(out):
    data = out / "data" / "phantom"
    given = check_submission(
        out / layout.SUBMISSION / "submission.csv", read_sample_submission(data)
    )
    text = (out / layout.SCORES / layout.CALIBRATION).read_text()
    calibration = Calibration.from_json(json.loads(text))
    finder = OrganFinder(models_of(out, layout.ORGANS), CPU)
    assert len(finder.models) == 2
    models = [load_classifier(path, CPU) for path in models_of(out, layout.CLASSIFIERS)]
    tasks, values = tasks_of(data, read_series(data, "test")), []
    for task in tasks:
        volume = volume_of(out, task)
        organs = finder(volume)
        each = [
            np.array([*predict_volume(model, volume, one.train, organs=organs).values()])
            for model, one in models
        ]
        logs = np.mean([np.log(one) for one in each], axis=0)
        shares, first = np.exp(logs), 0
        for width in (2, 2, 3, 3, 3):  # mean of logits, then a softmax of each target
            shares[first : first + width] /= shares[first : first + width].sum()
            first += width
        values.append(shares)
    ids = {
        "patient_id": [task.patient_id for task in tasks],
        "series_id": [task.series_id for task in tasks],
    }
    table = calibration.predict([pl.DataFrame(ids).hstack(value_frame(np.stack(values)))])
    expected = given.select("patient_id").join(table, on="patient_id", maintain_order="left")
    np.testing.assert_allclose(
        given.select(COLUMNS).to_numpy(), expected.select(COLUMNS).to_numpy(), atol=1e-5
    )


def test_the_log_has_the_loss_of_slices_by_visible_share(out):
    rows = (out / layout.CLASSIFIERS / "fold0" / layout.LOG).read_text().splitlines()
    assert all(json.loads(row)["terms"]["visible"] > 0 for row in rows)
    inputs = read_manifest(out / layout.CLASSIFIERS)["inputs"]
    assert layout.ORGANS in inputs
    assert "06_folds: up to date" in run_here("06", out, *KEYS)[1]


def test_without_its_segmenters_stage_08_is_one_line(out, tmp_path):
    folder = copy(out, tmp_path / "run", layout.ORGANS)
    script = "stages/05_segment_organs.py"
    refused(*run_here("08", folder, "--force", *KEYS), "05_organs is missing", script)
    refused(*run_here("06", folder, *KEYS), "05_organs is missing", script)


@pytest.mark.parametrize("stage", ["06", "08"])
def test_organs_of_another_run_are_refused(out, tmp_path, stage):
    folder = copy(out, tmp_path / "run")
    path = folder / layout.ORGANS / layout.MANIFEST
    manifest = json.loads(path.read_text())
    if stage == "06":
        manifest["inputs"][layout.FOLDS] = "others"
    else:
        manifest["outputs"][layout.DICE]["digest"] = "other"
    path.write_text(json.dumps(manifest))
    words = {"06": "other volumes or folds", "08": "other segmenters"}[stage]
    refused(*run_here(stage, folder, "--force", *KEYS), words, str(folder / layout.ORGANS))
