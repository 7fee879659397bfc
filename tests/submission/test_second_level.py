"""Stages 06 to 08 with train.second_level as a user calls them: its predictions are scored and
submitted, the classifier's stay beside them, and off everything is as before.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from helpers_faults import copy, refused, run_here
from helpers_scores import volume_of
from helpers_shared import made_once
from polars.testing import assert_frame_equal

from pipeline.classifier.predict import load_classifier
from pipeline.classifier.second_level import load_second_level
from pipeline.competition.metric import value_frame
from pipeline.competition.tables import read_sample_submission, read_series
from pipeline.competition.targets import COLUMNS
from pipeline.evaluation.calibration import Calibration
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.weights import read_weights
from pipeline.organs.find import OrganFinder
from pipeline.run import layout
from pipeline.run.manifest import read_manifest, trained_files
from pipeline.run.verify import differences
from pipeline.slices.sources import SeriesTask
from pipeline.slices.sources import test_tasks as tasks_of
from pipeline.submission.inference import Ensemble
from pipeline.submission.writer import check_submission

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
KEYS = ("train.second_level.enabled=true", "train.second_level.epochs=3")
LATER = (layout.SCORES, layout.SUBMISSION)


@pytest.fixture(scope="module")
def out(smoke, tmp_path_factory, worker_id):
    """The smoke run with a second level: its classifiers are there already."""

    def make(folder):
        copy(smoke, folder, *LATER, layout.REPORT)
        for stage in ("06", "07", "08", "09"):
            code, text = run_here(stage, folder, *KEYS)
            assert code == 0, text

    return made_once(tmp_path_factory, worker_id, "second_level", make)


@pytest.fixture(scope="module")
def without_masks(smoke, tmp_path_factory, worker_id):
    """The same without stage 05."""

    def make(folder):
        copy(smoke, folder, *LATER, layout.ORGANS)
        code, text = run_here("06", folder, *KEYS)
        assert code == 0, text
        assert text.count("all planes count alike (gates of 1)") == 1

    return made_once(tmp_path_factory, worker_id, "gates_of_1", make)


def ensemble_of(out, fold, finder):
    """Stage 08's models of one fold alone."""
    paths = (trained_files(out / layout.CLASSIFIERS, name) for name in FILES)
    first, second = (found[fold] for found in paths)
    model, trained = load_classifier(first, CPU)
    level = load_second_level(second, model)
    threads = ThreadPoolExecutor(1)
    return Ensemble([model], trained.train, trained.volume, CPU, threads, finder, [level])


FILES = (layout.MODEL, layout.SECOND_MODEL)


@pytest.mark.parametrize("masks", [True, False], ids=["gated", "gates_of_1"])
def test_the_test_sets_path_gives_the_out_of_fold_predictions(out, without_masks, masks):
    """Of the held-out series of each fold, read from DICOM."""
    folder, differ = out if masks else without_masks, 0
    for fold in (0, 1):
        finder = None
        if masks:
            finder = OrganFinder([trained_files(folder / layout.ORGANS, layout.MODEL)[fold]], CPU)
        ensemble = ensemble_of(folder, fold, finder)
        part = folder / layout.CLASSIFIERS / f"fold{fold}"
        rows, first = (pl.read_parquet(part / name) for name in (layout.OOF, layout.FIRST_OOF))
        assert rows.select("patient_id", "series_id", "fold").equals(
            first.select("patient_id", "series_id", "fold")
        )
        for row in rows.head(4).iter_rows(named=True):
            ids = row["patient_id"], row["series_id"]
            images = folder / "data" / "phantom" / "train_images" / "/".join(ids)
            volume = volume_of(folder, SeriesTask(*ids, "train", str(images)))
            found = ensemble.series(volume, (), 1)
            assert found == pytest.approx([row[name] for name in COLUMNS], abs=1e-5)
            differ += not np.allclose(found, first.filter(series_id=ids[1]).select(COLUMNS).row(0))
    assert differ == 8


def test_what_is_submitted_is_the_second_levels_calibrated_mean_of_logits(out):
    data = out / "data" / "phantom"
    sample = read_sample_submission(data)
    given = check_submission(out / layout.SUBMISSION / layout.SUBMISSION_TABLE, sample)
    text = (out / layout.SCORES / layout.CALIBRATION).read_text()
    finder = OrganFinder(trained_files(out / layout.ORGANS, layout.MODEL), CPU)
    each = [ensemble_of(out, fold, finder) for fold in (0, 1)]
    tasks, values = tasks_of(data, read_series(data, "test")), []
    for task in tasks:
        volume = volume_of(out, task)
        shares = np.exp(np.mean([np.log(one.series(volume, ())) for one in each], axis=0))
        for first, width in ((0, 2), (2, 2), (4, 3), (7, 3), (10, 3)):
            shares[first : first + width] /= shares[first : first + width].sum()
        values.append(shares)
    ids = {name: [getattr(task, name) for task in tasks] for name in ("patient_id", "series_id")}
    calibration = Calibration.from_json(json.loads(text))
    table = calibration.predict([pl.DataFrame(ids).hstack(value_frame(np.stack(values)))])
    expected = given.select("patient_id").join(table, on="patient_id", maintain_order="left")
    np.testing.assert_allclose(
        given.select(COLUMNS).to_numpy(), expected.select(COLUMNS).to_numpy(), atol=1e-5
    )


def test_the_classifiers_are_kept_and_their_own_predictions_too(out, smoke):
    """Nothing is trained anew; features are there for every series, and nothing else is."""
    tables = []
    for fold in ("fold0", "fold1"):
        now, before = (one / layout.CLASSIFIERS / fold for one in (out, smoke))
        weights, known = (read_weights(one / layout.MODEL)[0] for one in (now, before))
        assert all(torch.equal(weights[name], value) for name, value in known.items())
        assert (
            load_checkpoint(now / layout.LAST)["tally"]["seconds"]
            == (load_checkpoint(before / layout.LAST)["tally"]["seconds"])
        ), "the very training"
        first = pl.read_parquet(now / layout.FIRST_OOF)
        assert_frame_equal(first, pl.read_parquet(before / layout.OOF), check_exact=True)
        tables.append(first)
        files = {path.name for path in (now / layout.SECOND_LEVEL / layout.FEATURES).glob("*")}
        index = pl.read_parquet(out / layout.VOLUMES / layout.INDEX).filter(source="train")
        assert files == {*index["path"], "identity.txt"}
    joined = pl.read_parquet(out / layout.CLASSIFIERS / layout.FIRST_TABLE)
    assert_frame_equal(joined, pl.concat(tables))
    manifest = read_manifest(out / layout.CLASSIFIERS)
    assert {"second_level", layout.ORGANS} <= manifest["inputs"].keys()
    assert not list(differences(out))


def test_what_the_classifiers_alone_score_can_be_asked(out, smoke, tmp_path):
    table = out / layout.CLASSIFIERS / layout.FIRST_TABLE
    data = ("--data", str(out / "data" / "phantom"))
    code, text = run_here("07", tmp_path / "first", *data, "--oof", str(table))
    assert code == 0, text
    found, before, second = (
        json.loads((one / layout.SCORES / layout.SCORE_TABLE).read_text())["nested"]["score"]
        for one in (tmp_path / "first", smoke, out)
    )
    assert found == pytest.approx(before, abs=1e-9)
    assert found != pytest.approx(second, abs=1e-6)


def test_off_again_everything_is_as_before(out, smoke, tmp_path):
    folder = copy(out, tmp_path / "run", *LATER)
    code, text = run_here("06", folder)
    assert code == 0, text
    assert "resumed after epoch 2" in text
    for fold in ("fold0", "fold1"):
        now, before = (one / layout.CLASSIFIERS / fold / layout.OOF for one in (folder, smoke))
        assert now.read_bytes() == before.read_bytes()
    assert not (folder / layout.CLASSIFIERS / layout.FIRST_TABLE).exists()
    listed = read_manifest(folder / layout.CLASSIFIERS)
    known = read_manifest(smoke / layout.CLASSIFIERS)
    assert listed["fingerprint"] == known["fingerprint"]


def test_other_options_take_over_classifiers_and_features(out, tmp_path):
    folder = copy(out, tmp_path / "run", *LATER)
    files = sorted((folder / layout.CLASSIFIERS).glob("*/second_level/features/*.npy"))
    times = [path.stat().st_mtime_ns for path in files]
    code, text = run_here("06", folder, KEYS[0], "train.second_level.epochs=2")
    assert code == 0, text
    assert [path.stat().st_mtime_ns for path in files] == times
    for fold in ("fold0", "fold1"):
        now, before = (one / layout.CLASSIFIERS / fold for one in (folder, out))
        lines = (now / layout.SECOND_LEVEL / layout.LOG).read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
        assert (now / layout.FIRST_OOF).read_bytes() == (before / layout.FIRST_OOF).read_bytes()
        assert (now / layout.OOF).read_bytes() != (before / layout.OOF).read_bytes()


def test_an_interrupted_second_level_ends_the_same(out, tmp_path):
    """As if it was killed after its features and the second epoch."""
    folder = copy(out, tmp_path / "run", *LATER)
    for fold in ("fold0", "fold1"):
        own = folder / layout.CLASSIFIERS / fold
        (own / layout.MANIFEST).unlink()
        (own / layout.SECOND_MODEL).unlink()
        (own / layout.OOF).unlink()
    (folder / layout.CLASSIFIERS / layout.MANIFEST).unlink()
    half = folder / layout.CLASSIFIERS / "fold0" / layout.SECOND_LEVEL
    (half / layout.LAST).unlink()
    lost = sorted((half / layout.FEATURES).glob("*.npy"))[3]
    known = lost.read_bytes()
    lost.unlink()
    code, text = run_here("06", folder, *KEYS)
    assert code == 0, text
    assert lost.read_bytes() == known
    for fold in ("fold0", "fold1"):
        now, before = (one / layout.CLASSIFIERS / fold for one in (folder, out))
        for name in (layout.OOF, layout.SECOND_MODEL):
            assert (now / name).read_bytes() == (before / name).read_bytes(), name


def test_stage_08_wants_the_organs_that_gate_and_the_very_classifier(out, tmp_path):
    folder = copy(out, tmp_path / "run", layout.ORGANS)
    refused(
        *run_here("08", folder, "--force", *KEYS), "05_organs is missing", "05_segment_organs.py"
    )
    mixed = copy(out, tmp_path / "mixed") / layout.CLASSIFIERS
    first, second = ((mixed / fold / layout.SECOND_MODEL) for fold in ("fold0", "fold1"))
    second.write_bytes(first.read_bytes())
    refused(*run_here("08", mixed.parent, "--force", *KEYS), "another classifier", str(second))
