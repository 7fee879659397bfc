"""Stage 06 over ranks, runs and configs: every fold trained once, whoever ends last writes the
manifest, and it lists what is there.
"""

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
import torch
from helpers_faults import (
    copy,
    end,
    plain_lines,
    products,
    refused,
    run_here,
    start,
    stop_two_folds,
    torchrun,
    wait_for,
    without_patient,
)
from helpers_stages import ROOT, environment

from pipeline.classifier.fold import gather_fold
from pipeline.classifier.predict import Trained, load_classifier
from pipeline.classifier.stage import train_folds
from pipeline.competition.tables import read_labels
from pipeline.folds import read_folds
from pipeline.learning.checkpoint import describe, save_weights
from pipeline.learning.side_by_side import folds_at_once
from pipeline.run import layout
from pipeline.run.command import add_fold, main
from pipeline.run.layout import LOG, MODEL, OOF
from pipeline.run.manifest import digest, read_manifest
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage
from pipeline.submission.inference import load_blend
from pipeline.system.errors import InputError

SCRIPT, CPU = ROOT / "stages" / "06_train_folds.py", torch.device("cpu")


@pytest.fixture
def out(smoke, tmp_path) -> Path:
    """What stage 06 reads of the smoke run."""
    return copy(
        smoke,
        tmp_path / "run",
        layout.SLICES,
        layout.CLASSIFIERS,
        layout.SCORES,
        layout.SUBMISSION,
        layout.REPORT,
    )


@pytest.fixture
def stage_06(out, monkeypatch):
    """Calls stage 06 as one rank, in this process and with a training that only writes files, other
    ones each time.

    `stage_06.trained` lists the folds that were trained, `stage_06.meanwhile` is called within
    every training.
    """

    def call(*arguments: str, rank: int = 0, world: int = 1) -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr(
            "sys.argv",
            [str(SCRIPT), "--config", "smoke", "--out", str(out), "--jobs", "1", *arguments],
        )
        return main(str(SCRIPT), train_folds, "", add_fold)

    def train(part: Stage, fold: int) -> dict[str, int]:
        call.trained.append(fold)
        call.meanwhile()
        part.folder.mkdir(parents=True, exist_ok=True)
        for name in (MODEL, OOF, LOG):
            (part.folder / name).write_text(f"{name} of training {len(call.trained)}")
        return {"fold": fold}

    call.trained, call.meanwhile = [], lambda: None
    monkeypatch.setattr("pipeline.classifier.train.run_fold", train)
    return call


def assert_whole(out: Path, folds: int = 2) -> None:
    """The manifest of all is there and lists each fold's files as they are now."""
    listed = read_manifest(out / layout.CLASSIFIERS)["outputs"]
    assert list(listed) == [f"fold{fold}/{name}" for fold in range(folds) for name in (OOF, MODEL)]
    for name, entry in listed.items():
        assert entry["digest"] == digest(out / layout.CLASSIFIERS / name), name


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_the_rank_that_ends_last_writes_the_manifest(out, stage_06, ranks):
    for rank in ranks:
        assert read_manifest(out / layout.CLASSIFIERS) is None
        assert stage_06(rank=rank, world=2) == 0
    assert stage_06.trained == list(ranks)
    assert_whole(out)
    again = [stage_06("--force", rank=rank, world=2) for rank in ranks]
    assert again == [0, 0]
    assert stage_06.trained == [*ranks, *ranks]
    assert_whole(out)


def test_no_manifest_vouches_for_a_fold_that_another_rank_is_changing(out, stage_06):
    assert stage_06() == 0

    def other_rank() -> None:
        stage_06.meanwhile = lambda: None
        assert stage_06("--force", rank=1 - stage_06.trained[-1], world=2) == 0
        assert read_manifest(out / layout.CLASSIFIERS) is None

    for rank in (0, 1):
        stage_06.meanwhile = other_rank
        assert stage_06("--force", rank=rank, world=2) == 0
        assert_whole(out)


def test_forced_training_that_is_stopped_leaves_no_old_fold(out, stage_06):
    """Else the same command without --force, which the line says to run, would vouch for new folds
    and old ones together.
    """
    stage_06()

    def stop() -> None:
        raise KeyboardInterrupt

    (out / layout.CLASSIFIERS / "fold1" / "last.ckpt").touch()
    stage_06.meanwhile = stop
    assert stage_06("--force") == 130
    assert not list((out / layout.CLASSIFIERS).rglob("manifest.json"))
    assert not list((out / layout.CLASSIFIERS).rglob("last.ckpt"))
    stage_06.meanwhile, stage_06.trained[:] = lambda: None, []
    assert stage_06() == 0
    assert stage_06.trained == [0, 1]
    assert_whole(out)


def test_with_patience_the_aggregation_that_chooses_the_epoch_counts(out, stage_06):
    stage_06()
    stage_06("score.aggregate=max")
    assert stage_06.trained == [0, 1], "it changes no model"
    stage_06("train.patience=2")
    stage_06("train.patience=2", "score.aggregate=max")
    assert stage_06.trained == 3 * [0, 1]


def test_no_manifest_lists_a_fold_that_is_gone_meanwhile(out, stage_06, monkeypatch):
    monkeypatch.setattr("pipeline.classifier.fold.read_manifest", lambda folder: None)
    assert stage_06() == 0
    assert not (out / layout.CLASSIFIERS / "manifest.json").exists()


def test_torchrun_spreads_the_folds(out):
    flags = ("--config", "smoke", "--out", str(out), "--device", "cpu", "--jobs", "1")
    short = ("train.init=scratch", "train.epochs=1")
    code, text = torchrun(str(SCRIPT), *flags, *short, variables=environment())
    assert code == 0, text
    assert_whole(out)
    assert set(
        pl.concat(pl.read_parquet(out / layout.CLASSIFIERS / f"fold{k}" / OOF) for k in (0, 1))[
            "fold"
        ]
    ) == {0, 1}


@pytest.mark.parametrize(
    ("folds", "jobs", "at_once"),
    [(3, 2, 3), (2, 2, 2), (5, 2, 3), (5, 16, 5), (5, 4, 5), (4, 3, 4), (6, 3, 3), (3, 1, 1)],
)
def test_no_core_is_left_idle_by_the_last_round_of_folds(folds, jobs, at_once):
    assert folds_at_once(folds, jobs) == at_once


def test_folds_side_by_side_are_what_they_are_alone(smoke, out):
    """The smoke run trained them side by side; one thread for each is what `--jobs 1` gives."""
    for fold in "10":
        code, text = run_here("06", out, "--fold", fold)
        assert code == 0, text
    assert products(out / layout.CLASSIFIERS) == products(smoke / layout.CLASSIFIERS)


def processes_of(run, folds: str) -> list[psutil.Process]:
    """The processes of a running stage's folds, in their order, once all have become the stage's
    script.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        found = {}
        for child in psutil.Process(run.pid).children():
            with contextlib.suppress(psutil.Error):  # it may be gone by now
                command = child.cmdline()
                # a process that has only been forked still has its parent's command
                if "--fold" in command:
                    found[command[command.index("--fold") + 1]] = child
        if sorted(found) == sorted(folds):
            return [found[fold] for fold in folds]
        time.sleep(0.02)
    raise AssertionError(f"never the folds {folds}: {end(run)}")


def test_a_fold_that_is_killed_ends_the_stage_with_one_line_and_a_rerun_goes_on(smoke, out):
    run = start("06", out, "--device", "cpu", "train.epochs=200")
    killed, other = processes_of(run, "01")
    wait_for(out / layout.CLASSIFIERS / "fold1" / "log.jsonl", run)
    killed.kill()
    code, text = end(run)
    assert code == 1, text
    assert plain_lines(text) == [
        "error: fold 0 was brought down by SIGKILL (out of memory?), run the same command again"
    ]
    assert not other.is_running()
    assert (out / layout.CLASSIFIERS / "fold1" / "last.ckpt").exists()
    assert not (out / layout.CLASSIFIERS / "manifest.json").exists()
    assert run_here("06", out)[0] == 0
    assert products(out / layout.CLASSIFIERS) == products(smoke / layout.CLASSIFIERS)


# SIGTERM: the test of stage 05
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_folds_end_with_their_stage(out, number):
    run = start("06", out, "--device", "cpu", "train.epochs=2000", "train.workers=1")
    processes_of(run, "01")
    stop_two_folds(run, out / layout.CLASSIFIERS, number)


def test_fewer_folds_leave_none_of_the_others_behind(out, stage_06):
    for count in (3, 2):
        assert run_here("03", out, f"folds.count={count}")[0] == 0
        assert stage_06(f"folds.count={count}") == 0
        assert_whole(out, count)
    assert not (out / layout.CLASSIFIERS / "fold2").exists()


def test_what_changes_no_result_trains_nothing_again(out, stage_06):
    assert stage_06() == 0
    assert stage_06("train.workers=1") == 0
    (out / layout.CLASSIFIERS / "fold1" / "manifest.json").unlink()
    assert stage_06("train.workers=1", "train.compile=true") == 0
    assert stage_06.trained == [0, 1, 1]
    assert_whole(out)


def test_a_fold_that_is_not_there_is_refused_and_changes_nothing(out, stage_06, capfd):
    assert stage_06() == 0
    assert stage_06("--fold", "2") == 2
    assert "error: there is no fold 2, --fold 2, choose one of [0, 1]" in capfd.readouterr().err
    assert_whole(out)


def test_folds_without_a_patient_are_refused_and_change_nothing(out, stage_06, capfd):
    """One who joined train.csv after stage 03, say."""
    assert stage_06() == 0
    without_patient(out, read_labels(out / "data" / "phantom")["patient_id"][3])
    capfd.readouterr()
    assert stage_06() == 2
    refused(2, capfd.readouterr().err, "is in no fold", "folds.csv", "run stage 03 again")
    assert stage_06.trained == [0, 1]
    assert_whole(out)


def test_a_fold_that_lost_a_file_is_not_vouched_for(out, stage_06):
    assert stage_06() == 0
    (out / layout.CLASSIFIERS / "fold1" / MODEL).unlink()
    assert stage_06("--fold", "0") == 0
    assert read_manifest(out / layout.CLASSIFIERS) is None
    assert stage_06() == 0
    assert stage_06.trained == [0, 1, 1]
    assert_whole(out)


def test_a_fold_that_is_made_again_is_listed_anew(out, stage_06):
    """Its log is no file that later stages depend on, so the manifest of all still looked whole."""
    assert stage_06() == 0
    (out / layout.CLASSIFIERS / "fold1" / LOG).write_text("")
    assert stage_06() == 0
    assert stage_06.trained == [0, 1, 1]
    assert_whole(out)


def stage_of(out: Path, name: str = layout.CLASSIFIERS, **options: object) -> Stage:
    return Stage(name, load_config("smoke"), Options(out=out, **options))


def test_training_and_held_out_patients_are_apart_and_together_everyone(out):
    stage, seen = stage_of(out), []
    index = pl.read_parquet(out / layout.VOLUMES / "index.parquet").filter(
        pl.col("source") == "train"
    )
    drawn = dict(read_folds(out / layout.FOLDS / "folds.csv").iter_rows())
    with stage.reading:
        for fold in (0, 1):
            found = gather_fold(stage.part(f"fold{fold}"), fold)
            train, held_out = (
                {one.patient_id for one in side} for side in (found.train, found.held_out)
            )
            assert not train & held_out
            assert {drawn[patient] for patient in held_out} == {fold}
            both = [(one.patient_id, one.series_id) for one in (*found.train, *found.held_out)]
            assert sorted(both) == sorted(index.select("patient_id", "series_id").iter_rows())
            seen += held_out
    assert sorted(seen) == sorted(set(index["patient_id"]))


@pytest.mark.parametrize(
    ("override", "there"),
    [("train.positive_slices=0.5", True), ("train.positive_slices=0", False)],
)
def test_slice_labels_are_read_where_positive_slices_are_to_be_shown(out, override, there):
    config = load_config("smoke", ["train.slice_loss=0", override])
    stage = Stage(layout.CLASSIFIERS, config, Options(out=out))
    with stage.reading:
        found = gather_fold(stage.part("fold0"), 0)
    assert any(one.planes.any() for one in found.train) == there


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "patient '[0-9]+' is in no fold, .*folds.csv, .* run stage 03 again"),
        ("{patient},0\n{patient},1\n", "patient '[0-9]+' is in two folds"),
    ],
)
def test_a_patient_in_no_fold_or_in_two_is_refused(out, line, message):
    """One who joined train.csv after stage 03, say."""
    stage, patient = stage_of(out), read_labels(out / "data" / "phantom")["patient_id"][3]
    without_patient(out, patient, line.format(patient=patient))
    with stage.reading, pytest.raises(InputError, match=message):
        gather_fold(stage.part("fold0"), 0)


def test_the_ensemble_is_what_the_manifest_lists(smoke, tmp_path):
    """Not a fold of an earlier run that lies beside it; models that differ only in who fed them are
    alike.
    """
    shutil.copytree(smoke / layout.CLASSIFIERS, tmp_path / layout.CLASSIFIERS)
    shutil.copytree(
        tmp_path / layout.CLASSIFIERS / "fold1", tmp_path / layout.CLASSIFIERS / "fold2"
    )
    model, config = load_classifier(path := tmp_path / layout.CLASSIFIERS / "fold1" / MODEL, CPU)
    fed = config.model_copy(update={"train": config.train.model_copy(update={"workers": 7})})
    save_weights(path, model, describe("classifier", fed, Trained))
    stage = stage_of(tmp_path, layout.SUBMISSION, device="cpu").reading_run(tmp_path)
    with stage.reading:
        assert len(load_blend([stage], None).runs[tmp_path.name].models) == 2
    for section, key, value in (("train", "crop", 0.1), ("volume", "depth", 99)):
        part = getattr(config, section).model_copy(update={key: value})
        save_weights(
            path, model, describe("classifier", config.model_copy(update={section: part}), Trained)
        )
        with stage.reading, pytest.raises(InputError, match="trained with different options"):
            load_blend([stage], None)


@pytest.mark.parametrize(
    ("override", "views"), [("predict.flips=[zy]", ["zy"]), ("predict.phases=3", ["phases=3"])]
)
def test_other_views_predict_the_held_out_series_anew_and_train_nothing(
    smoke, tmp_path, override, views
):
    """The calibration is fitted to what the test set gets."""
    run = copy(smoke, tmp_path / "run", layout.SLICES, layout.SUBMISSION, layout.REPORT)
    folder = run / layout.CLASSIFIERS
    before = {name: (folder / f"fold0/{name}").read_bytes() for name in (MODEL, OOF)}
    config = load_config("smoke", [override])
    train_folds(config, out=run, jobs=1, device="cpu")
    assert (folder / f"fold0/{MODEL}").read_bytes() == before[MODEL]
    assert read_manifest(folder)["inputs"]["flips"] == views
    epochs = [json.loads(line) for line in (folder / f"fold0/{LOG}").read_text().splitlines()]
    assert len(epochs) == config.train.epochs
    flipped, plain = pl.read_parquet(folder / f"fold0/{OOF}"), pl.read_parquet(before[OOF])
    assert flipped["series_id"].equals(plain["series_id"])
    assert not flipped.equals(plain)
    train_folds(load_config("smoke"), out=run, jobs=1, device="cpu")
    assert pl.read_parquet(folder / f"fold0/{OOF}").equals(plain)
