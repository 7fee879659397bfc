"""Runs of versions whose stages after 04 had a number less: taken over, and read where they may not
be changed.
"""

from pathlib import Path

import pytest
from helpers_faults import copy, run_here
from helpers_former import OLD, make_old
from helpers_stages import stage_here

from pipeline.run import layout
from pipeline.run.config import decisive
from pipeline.run.manifest import SCHEMA, digest, read_manifest
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage
from pipeline.run.verify import differences


def test_the_names_of_before_are_known():
    assert layout.FORMER == OLD
    assert layout.former("06_folds/fold0") == "05_folds/fold0"
    assert layout.current("05_folds/fold0") == "06_folds/fold0"
    for name in ("05_organs", "05_organs/fold0", "04_voco2d", "data/phantom", "masks"):
        assert layout.former(name) == layout.current(name) == name


def test_fingerprints_are_those_of_before(tmp_path):
    config = load_config("smoke")
    stage = Stage("06_folds/fold0", config, Options(out=tmp_path))
    found = stage.fingerprint_of({"02_volumes": "x", "06_folds": "y"}, ["seed", "train"])
    expected = {
        "schema": SCHEMA,
        "stage": "05_folds/fold0",
        "config": {"seed": config.seed, "train": decisive(config.train)},
        "inputs": {"02_volumes": "x", "05_folds": "y"},
    }
    assert found == digest(expected)


@pytest.fixture
def old(smoke, tmp_path) -> Path:
    """A finished run of an older version."""
    return make_old(copy(smoke, tmp_path / "old", layout.ORGANS, layout.REPORT))


@pytest.mark.slow
def test_an_older_run_is_taken_over_and_nothing_is_made_again(old, smoke):
    before = (old / "05_folds" / "fold0" / layout.MODEL).read_bytes()
    code, text = run_here("06", old)
    assert code == 0, text
    line = f"{old} is of an older version: 05_folds is now 06_folds, 06_oof is now 07_oof"
    assert text.count(line) == 1
    assert "06_folds: up to date" in text
    assert (old / "06_folds" / "fold0" / layout.MODEL).read_bytes() == before
    assert not [name for name in OLD.values() if (old / name).exists()]
    for number, name in (("07", "07_oof"), ("08", "08_submission")):
        code, text = run_here(number, old)
        assert code == 0, text
        assert f"{name}: up to date" in text
        assert "older version" not in text
    assert not list(differences(old))


@pytest.mark.slow
def test_a_stopped_older_training_goes_on(old):
    fold = old / "05_folds" / "fold1"
    (old / "05_folds" / layout.MANIFEST).unlink()
    (fold / layout.MANIFEST).unlink()
    weights = (fold / layout.MODEL).read_bytes()
    (fold / layout.MODEL).unlink()
    code, text = run_here("06", old)
    assert code == 0, text
    assert "fold 1: resumed after epoch 2" in text
    assert "fold 0: resumed" not in text
    assert (old / "06_folds" / "fold1" / layout.MODEL).read_bytes() == weights
    assert read_manifest(old / "06_folds")["counts"].keys() == {"fold0", "fold1"}


@pytest.mark.slow
def test_models_of_an_older_run_predict_and_are_left_as_they_are(old, smoke, tmp_path):
    names = sorted(path.name for path in old.iterdir() if not path.name.startswith(".lock"))
    done = stage_here(
        "08",
        *("--config", "smoke", "--models", str(old), "--out", str(tmp_path / "new")),
        *("--data", str(smoke / "data" / "phantom"), "--jobs", "2"),
    )
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "new" / layout.SUBMISSION / layout.SUBMISSION_TABLE).read_bytes()
    assert made == (smoke / layout.SUBMISSION / layout.SUBMISSION_TABLE).read_bytes()
    assert names == sorted(path.name for path in old.iterdir() if path.name[:5] != ".lock")


@pytest.mark.slow
def test_an_older_run_is_verified_under_its_names(old):
    assert not list(differences(old))
    table = old / "06_oof" / layout.SCORE_TABLE
    table.write_text(table.read_text().replace("0", "1", 1))
    assert [line for line in differences(old) if str(table) in line]
    assert (old / "06_oof").is_dir()
