"""Stage 05 as a user runs it: boxes and shares of every series by a model that has not seen the
patient, one line where there is nothing to do, masks that do not fit.
"""

import gzip
import runpy
import shutil
import signal
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from helpers_faults import (
    copy,
    products,
    refused,
    rewrite_folds,
    run_here,
    start,
    stop_two_folds,
    without_patient,
)

from pipeline.organs import work
from pipeline.organs.find import label_volume, organ_boxes, without_islands
from pipeline.organs.loss import dice_scores
from pipeline.organs.masks import ORGANS
from pipeline.organs.model import load_segmenter
from pipeline.organs.stage import known_masks, segment_organs, train_segmenter
from pipeline.organs.work import mean_dice
from pipeline.run import layout
from pipeline.run.command import add_fold, main
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage

pytestmark = pytest.mark.slow


@pytest.fixture
def out(smoke, tmp_path):
    """What stage 05 reads of the smoke run."""
    later = (layout.ORGANS, *layout.FORMER)
    return copy(smoke, tmp_path / "run", *later)


def tables(folder):
    index = pl.read_parquet(folder / layout.VOLUMES / layout.INDEX).filter(source="train")
    organs = pl.read_parquet(folder / layout.ORGANS / layout.ORGAN_TABLE)
    dice = pl.read_csv(folder / layout.ORGANS / layout.DICE, infer_schema=False)
    return index, organs, dice


def test_every_series_has_its_organs_by_the_model_that_has_not_seen_the_patient(smoke):
    index, organs, dice = tables(smoke)
    assert set(organs["series_id"]) == set(index["series_id"])
    assert organs.height == len(ORGANS) * index.height
    folds = dict(
        pl.read_csv(
            smoke / layout.FOLDS / layout.FOLD_TABLE, schema_overrides={"patient_id": pl.String}
        )
        .select("patient_id", "fold")
        .iter_rows()
    )
    assert all(folds[patient] == fold for patient, fold in organs["patient_id", "fold"].iter_rows())
    for row in organs.iter_rows(named=True):
        there = row["voxels"] > 0
        assert sum(row["visible"]) == pytest.approx(float(there))
        assert (row["z1"] > row["z0"]) == there
        assert row["ml"] is None or (row["ml"] > 0) == there
    masks = {path.name.split(".")[0] for path in (smoke / "data/phantom/segmentations").iterdir()}
    assert set(dice["series_id"]) == masks & set(index["series_id"])
    counts = read_manifest(smoke / layout.ORGANS)["counts"]
    assert counts["masked"] == dice["series_id"].n_unique() > 4
    means = mean_dice(dice.with_columns(pl.col("dice").cast(pl.Float64)))
    assert counts["dice"] == means


def test_rows_are_those_of_the_folds_own_model(smoke):
    index, organs, dice = tables(smoke)
    row = index.filter(pl.col("series_id") == dice["series_id"][0]).row(0, named=True)
    mine = organs.filter(series_id=row["series_id"])
    folder = smoke / layout.ORGANS
    model, config = load_segmenter(folder / f"fold{mine['fold'][0]}" / layout.MODEL)
    volume = np.load(smoke / layout.VOLUMES / row["path"])
    device = torch.device("cpu")
    labels = without_islands(label_volume([model], volume, config.organs, device))
    for organ, found in zip(organ_boxes(labels), mine.iter_rows(named=True), strict=True):
        assert (organ.name, organ.voxels) == (found["organ"], found["voxels"])
        np.testing.assert_allclose(found["visible"], organ.visible)
    truth = np.load(folder / layout.MASKS / row["path"])
    assert truth.shape == volume.shape
    expected = ["" if s is None else s for s in dice_scores(labels, truth, len(ORGANS))]
    found = dice.filter(series_id=row["series_id"])["dice"].fill_null("").to_list()
    assert [float(f) if f else "" for f in found] == pytest.approx(expected)


def test_nothing_is_done_twice_and_other_masks_are_other_inputs(out):
    assert run_here("05", out)[0] == 0
    folder = out / layout.ORGANS
    first = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert len(first) == 2
    assert "05_organs: up to date" in run_here("05", out)[1]
    (folder / layout.MANIFEST).unlink()
    text = run_here("05", out)[1]
    for name in ("masks", "fold0", "fold1"):
        assert f"05_organs/{name}: up to date" in text
    name = next((out / "data/phantom/segmentations").iterdir())
    shutil.copy(name, name.with_suffix(".copy"))
    name.with_suffix(".copy").replace(name)  # another time
    text = run_here("05", out)[1]
    assert "05_organs/masks: up to date" not in text
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == first


@pytest.mark.parametrize("why", ["switched off", "no masks", "too few"])
def test_where_there_is_nothing_to_learn_from_one_line_says_so(smoke, tmp_path, why, capfd):
    data = tmp_path / "data"
    shutil.copytree(
        smoke / "data" / "phantom", data, ignore=lambda folder, names: {"train_images"} & {*names}
    )
    masks = sorted((data / "segmentations").iterdir())
    for path in {"switched off": [], "no masks": masks, "too few": masks[1:]}[why]:
        path.unlink()
    run_folder = copy(smoke, tmp_path / "run", layout.ORGANS, *layout.FORMER)
    config = load_config("smoke", ["organs.enabled=false"] if why == "switched off" else [])
    folder = segment_organs(config, out=run_folder, data=data)
    line = {
        "switched off": "05_organs: skipped, organs.enabled is false",
        "no masks": f"05_organs: skipped, {data} has no masks of its series in segmentations/",
        "too few": "would have no mask to be trained on",
    }[why]
    assert capfd.readouterr().err.count(line) == 1
    assert not (folder / layout.MANIFEST).exists()


def test_a_mask_that_does_not_fit_is_one_line(out):
    import nibabel

    path = sorted((out / "data/phantom/segmentations").iterdir())[0]
    image = nibabel.load(path)
    half = np.asarray(image.dataobj)[::2]
    nibabel.save(nibabel.Nifti1Image(half, image.affine), path)
    refused(
        *run_here("05", out, "--jobs", "1"), str(path), "the mask's planes have", "remove the file"
    )
    path.write_bytes(gzip.compress(b"nothing"))
    refused(*run_here("05", out), str(path), "mask not usable", "remove the file")


def test_the_held_out_patients_masks_are_not_trained_on(out, monkeypatch):
    stage, seen = Stage(layout.ORGANS, load_config("smoke"), Options(out=out)), {}

    def train(config, data, folder, device, pretrained):
        seen[data.fold] = {one.patient_id for one in data.train}
        folder.mkdir(parents=True)
        for name in (layout.MODEL, layout.LOG):
            (folder / name).touch()

    monkeypatch.setattr(work, "train_organs", train)
    index = work._labelled(stage)
    masked = work.lay_masks(stage, known_masks(stage), index)
    for fold in (0, 1):
        work.train_fold(stage, fold, masked, index, {}, torch.device("cpu"))
    held = {fold: set(index.filter(fold=fold)["patient_id"]) for fold in (0, 1)}
    every = {one.patient_id for one in masked.values()}
    assert seen == {fold: every - held[fold] for fold in (0, 1)}
    assert seen[0]
    assert seen[1]


def test_segmenters_side_by_side_are_what_they_are_alone(smoke, out):
    """The smoke run trained them side by side; one thread for each is what `--jobs 1` gives."""
    code, text = run_here("05", out, "--jobs", "1")
    assert code == 0, text
    names = [f"fold{fold}/{layout.MODEL}" for fold in (0, 1)]
    for name in [*names, layout.ORGAN_TABLE, layout.DICE]:
        assert (out / layout.ORGANS / name).read_bytes() == (
            smoke / layout.ORGANS / name
        ).read_bytes()


def test_segmenters_end_with_their_stage_and_go_on(smoke, out):
    run = start("05", out, "organs.steps=3000", "organs.log_every=5")
    stop_two_folds(run, out / layout.ORGANS, signal.SIGTERM)
    assert not (out / layout.ORGANS / layout.MANIFEST).exists()
    assert run_here("05", out)[0] == 0
    assert products(out / layout.ORGANS) == products(smoke / layout.ORGANS)


def test_a_stopped_search_goes_on_with_the_folds_that_are_not_done(smoke, tmp_path):
    folder = copy(smoke, tmp_path / "run", *layout.FORMER)
    stage = folder / layout.ORGANS
    tables = {name: (stage / name).read_bytes() for name in (layout.ORGAN_TABLE, layout.DICE)}
    for name in (layout.MANIFEST, *tables, f"fold1/{layout.FOUND}/{layout.DICE}"):
        (stage / name).unlink()
    made = (stage / (other := f"fold1/{layout.MODEL}")).stat().st_mtime_ns
    # one that is trained alone has one thread, as it had beside the other
    shutil.rmtree(stage / "fold0")
    code, text = run_here("05", folder, "--jobs", "2")
    assert code == 0, text
    assert (stage / other).stat().st_mtime_ns == made
    assert "05_organs/fold1/found: done in" in text
    assert {name: (stage / name).read_bytes() for name in tables} == tables
    assert products(stage) == products(smoke / layout.ORGANS)


def test_forced_segmenters_that_are_stopped_leave_no_old_fold(smoke, tmp_path, monkeypatch):
    """Else the same command without --force, which the line says to run, would vouch for new folds
    and old ones together.
    """
    folder = copy(smoke, tmp_path / "run", *layout.FORMER) / layout.ORGANS
    (folder / "fold1" / layout.LAST).touch()
    assert (folder / "fold1" / layout.FOUND / layout.MANIFEST).is_file()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "train_organs", stop)
    assert run_here("05", folder.parent, "--force", "--jobs", "1")[0] == 130
    for fold in (0, 1):
        assert not (folder / f"fold{fold}" / layout.MANIFEST).exists()
        assert not (folder / f"fold{fold}" / layout.LAST).exists()
        assert not (folder / f"fold{fold}" / layout.FOUND / layout.MANIFEST).exists()


def test_a_fold_that_is_made_anew_by_itself_is_not_vouched_for(smoke, tmp_path, monkeypatch):
    out = copy(smoke, tmp_path / "run", *layout.FORMER)
    call, manifest = partial(one_fold, out, monkeypatch=monkeypatch), out / layout.ORGANS
    assert call("--fold", "0") == 0
    assert (manifest / layout.MANIFEST).is_file(), "nothing was done"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "train_organs", stop)
    assert call("--fold", "0", "--force") == 130
    assert not (manifest / layout.MANIFEST).exists()
    assert (manifest / "fold1" / layout.MANIFEST).is_file()


def test_the_module_of_a_fold_wants_its_number(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pipeline.organs", "--config", "smoke"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("pipeline.organs", run_name="__main__")
    assert "the following arguments are required: --fold" in capsys.readouterr().err


def one_fold(out, *arguments, monkeypatch):
    """Exit code of the segmenters' module, in this process."""
    argv = ["05_segment_organs", "--config", "smoke", "--out", str(out), "--jobs", "1", *arguments]
    monkeypatch.setattr("sys.argv", argv)
    return main("05_segment_organs", train_segmenter, "", add_fold)


def test_a_fold_by_itself_wants_its_number_and_masks_that_are_laid(smoke, out, monkeypatch, capfd):
    call = partial(one_fold, out, monkeypatch=monkeypatch)
    assert call("--fold", "2") == 2
    assert "error: there is no fold 2, --fold 2, choose one of [0, 1]" in capfd.readouterr().err
    assert call("--fold", "0") == 2
    assert "error: the masks are not on the grids of the volumes" in capfd.readouterr().err
    assert call("--fold", "0", "organs.enabled=false") == 0
    assert "05_organs: skipped, organs.enabled is false" in capfd.readouterr().err
    assert not list((out / layout.ORGANS).rglob("*.safetensors"))
    shutil.copytree(smoke / layout.ORGANS / layout.MASKS, out / layout.ORGANS / layout.MASKS)
    assert call("--fold", "0") == 0
    model = f"fold0/{layout.MODEL}"
    assert (out / layout.ORGANS / model).read_bytes() == (
        smoke / layout.ORGANS / model
    ).read_bytes()


@pytest.mark.parametrize(
    ("stage", "name", "arguments", "message"),
    [
        ("05", layout.ORGANS, (), "is in no fold"),
        ("04", layout.VOCO, ("pretrain.exclude_fold=1",), "no patient is in fold 1"),
    ],
)
def test_wrong_folds_are_refused_and_leave_what_was_made(
    smoke, tmp_path, stage, name, arguments, message
):
    out = copy(smoke, tmp_path / "run")
    before = read_manifest(out / name)
    assert before is not None
    if arguments:
        rewrite_folds(out, lambda text: text.replace(",1\n", ",0\n"))
    else:
        without_patient(out, pl.read_csv(out / "data/phantom/train.csv")["patient_id"][3])
    refused(*run_here(stage, out, *arguments), message, layout.FOLD_TABLE)
    assert read_manifest(out / name) == before


def test_masks_of_unknown_series_are_named_and_ignored(out):
    folder = out / "data/phantom/segmentations"
    path = sorted(folder.iterdir())[0]
    path.rename(folder / "999999.nii.gz")
    code, text = run_here("05", out)
    assert code == 0, text
    assert "warning: 1 masks are of no series" in text
    assert "999999.nii.gz" in text
    dice = pl.read_csv(out / layout.ORGANS / layout.DICE, infer_schema=False)
    assert path.name.split(".")[0] not in set(dice["series_id"])
