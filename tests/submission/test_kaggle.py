"""Two runs on Kaggle, one of whole volumes and one of organ regions: no network, inputs that cannot
be written, of each run the files that docs/real-data.md names and no others; and what goes wrong
there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers_scores import patient_by_hand
from helpers_stages import ROOT, environment

from pipeline.classifier.predict import load_classifier, predict_volume
from pipeline.competition.tables import read_sample_submission, read_series
from pipeline.competition.targets import COLUMNS, group_slices
from pipeline.evaluation.stage import score_oof
from pipeline.organs import find
from pipeline.run import layout
from pipeline.run.manifest import read_manifest, trained_files
from pipeline.run.presets import load_config
from pipeline.slices.sources import test_tasks as tasks_of
from pipeline.submission.decode_ahead import decode_series
from pipeline.submission.inference import NO_ORGAN
from pipeline.submission.stage import predict_test
from pipeline.submission.writer import check_submission
from pipeline.system.errors import InputError

CONFIG, CPU = load_config("smoke"), torch.device("cpu")
HOW = {"config": CONFIG, "jobs": 1, "device": "cpu"}
# a session without a network, in which the folder $0 cannot be written
SESSION = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
UNSHARE = ["unshare", *(["-r"] if os.geteuid() else []), "-m", "-n", "bash", "-c", SESSION]


def may_unshare() -> bool:
    command = [*UNSHARE, "/tmp", "true"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, check=False).returncode


def attach(run: Path, folder: Path, organs: bool) -> None:
    """Those files of a run that its data set on Kaggle needs."""
    own = run / layout.CLASSIFIERS
    for path in (own / layout.MANIFEST, *own.glob("fold*/model.safetensors"), *own.glob("*/oof.*")):
        target = folder / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    if organs:
        left = shutil.ignore_patterns(layout.MASKS, "*.ckpt")
        shutil.copytree(run / layout.ORGANS, folder / layout.ORGANS, ignore=left)


@pytest.fixture(scope="module")
def attached(smoke, organ_run, tmp_path_factory) -> Path:
    """What is attached: the code, the competition's data, both runs, and `07_oof` of the two."""
    folder = tmp_path_factory.mktemp("kaggle") / "input"
    kept = shutil.ignore_patterns("train_images", "unlabelled", "segmentations", "train*.csv")
    shutil.copytree(smoke / "data" / "phantom", folder / "rsna", ignore=kept)
    for name in ("pipeline", "stages"):
        code = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "voco2d" / name, ignore=code)
    attach(smoke, folder / "whole", organs=False)
    attach(organ_run, folder / "organs", organs=True)
    data = smoke / "data" / "phantom"
    score_oof(out=folder / "blend", models=[smoke, organ_run], data=data, **HOW)
    return folder


@pytest.fixture
def working(attached, tmp_path) -> Path:
    """The folder that can be written, with the blend's scores in it."""
    folder = tmp_path / "working"
    shutil.copytree(attached / "blend" / layout.SCORES, folder / layout.SCORES)
    return folder


def answers(run: Path, data: Path) -> dict[tuple[str, str], np.ndarray]:
    """(13,) of each test series by one run: of every class the geometric mean over the fold models,
    divided by its target's sum; organs by all of the run's segmenters, where it has them.
    """
    found = {}
    models = [load_classifier(one) for one in trained_files(run / layout.CLASSIFIERS, layout.MODEL)]
    segmenters = trained_files(run / layout.ORGANS, layout.MODEL)
    finder = find.OrganFinder(segmenters, CPU) if segmenters else lambda volume: ()
    for task in tasks_of(data, read_series(data, "test")):
        volume = decode_series(task, data, CONFIG.convert, [CONFIG.volume]).volumes[CONFIG.volume]
        each = [
            list(predict_volume(model, volume, one.train, organs=finder(volume)).values())
            for model, one in models
        ]
        mean = np.exp(np.log(each).mean(0))
        for where in group_slices().values():
            mean[where] /= mean[where].sum()
        found[task.patient_id, task.series_id] = mean
    return found


def assert_blend(working: Path, attached: Path) -> None:
    """The submission is that of both runs' answers, weighted and calibrated by hand."""
    data = attached / "rsna"
    fitted = json.loads((working / layout.SCORES / layout.CALIBRATION).read_text())
    runs = [name if name == "organs" else "whole" for name in fitted["models"]]
    assert sorted(runs) == ["organs", "whole"]
    series = [answers(attached / name, data) for name in runs]
    sample = read_sample_submission(data)
    rows = [
        patient_by_hand(
            [[one[key] for one in series] for key in series[0] if key[0] == who], fitted
        )
        for who in sample["patient_id"]
    ]
    found = check_submission(working / layout.SUBMISSION / layout.SUBMISSION_TABLE, sample)
    np.testing.assert_allclose(found.select(COLUMNS).to_numpy(), rows, atol=1e-5)


def prior(working: Path, data: Path) -> bool:
    """Whether the submission is valid and everyone in it has the prior."""
    fitted = json.loads((working / layout.SCORES / layout.CALIBRATION).read_text())
    path = working / layout.SUBMISSION / layout.SUBMISSION_TABLE
    rows = check_submission(path, read_sample_submission(data)).select(COLUMNS).to_numpy()
    return np.allclose(rows, [fitted["prior"][column] for column in COLUMNS])


@pytest.mark.skipif(not may_unshare(), reason="no right to a network and mounts of its own")
def test_the_cell_of_two_runs_needs_no_network_and_writes_no_input(attached, working):
    before = {path: path.stat().st_mtime_ns for path in attached.rglob("*")}
    command = [
        *(sys.executable, str(attached / "voco2d" / "stages" / "08_predict_test.py")),
        *("--config", "smoke", "--data", str(attached / "rsna")),
        *("--models", str(attached / "whole"), str(attached / "organs")),
        *("--out", str(working), "--jobs", "2", "predict.time_budget_h=8.5"),
    ]
    # nothing that an earlier download left either
    nowhere = {"HF_HOME": str(working / "hub"), "TORCH_HOME": str(working / "hub")}
    given = environment(**nowhere) | {"PYTHONPATH": str(attached / "voco2d")}
    done = subprocess.run(
        [*UNSHARE, str(attached), *command], env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in attached.rglob("*")} == before
    counts = read_manifest(working / layout.SUBMISSION)["counts"]
    assert (counts["predicted"], counts["late"], counts["model_failures"]) == (4, 0, 0)
    assert_blend(working, attached)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "a file of 05_organs is missing or has another size"),
        (spoil, "weights not readable"),
        (Path.unlink, "a file of 05_organs is missing or has another size"),
        (lambda path: shutil.rmtree(path.parents[1]), "05_organs is missing or unfinished"),
    ],
)
def test_a_damaged_segmenter_of_one_of_two_runs_is_named_and_the_prior_stays(
    attached, working, tmp_path, damage, words
):
    organs = shutil.copytree(attached / "organs", tmp_path / "organs")
    damage(organs / layout.ORGANS / "fold1" / layout.MODEL)
    models = [attached / "whole", organs]
    with pytest.raises(InputError, match=words) as fault:
        predict_test(out=working, models=models, data=attached / "rsna", **HOW)
    assert str(organs / layout.ORGANS) in str(fault.value)
    assert prior(working, attached / "rsna")


def test_a_series_in_which_no_organ_is_found_is_looked_at_whole_and_named(
    attached, working, monkeypatch, capfd
):
    monkeypatch.setattr(find, "label_volume", lambda models, volume, *more: np.zeros_like(volume))
    data = attached / "rsna"
    models = [attached / "whole", attached / "organs"]
    predict_test(out=working, models=models, data=data, **HOW)
    assert_blend(working, attached)
    table = pl.read_csv(working / layout.SUBMISSION / layout.FALLBACKS, infer_schema=False)
    expected = {
        (one.patient_id, one.series_id) for one in tasks_of(data, read_series(data, "test"))
    }
    assert set(table["reason"]) == {NO_ORGAN}
    assert set(table.select("patient_id", "series_id").iter_rows()) == expected
    assert f"({NO_ORGAN})" in capfd.readouterr().err
    counts = read_manifest(working / layout.SUBMISSION)["counts"]
    assert (counts["predicted"], counts["model_failures"]) == (4, 0)
