"""`data.limit`: the first patients, in every stage."""

import numpy as np
import polars as pl
import pytest
from helpers_dataset import make_data
from helpers_faults import run_here
from helpers_scores import label_frame, one_hot

from pipeline.competition.subset import first_patients
from pipeline.folds import make_folds
from pipeline.run import layout
from pipeline.run.config import decisive
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import load_config
from pipeline.slices.stage import convert_dicom
from pipeline.volumes.stage import build_volumes


def test_the_first_patients_are_like_all_and_fewer_are_part_of_more():
    labels = label_frame(one_hot(200, injured=0.4))
    series = labels.select("patient_id").with_columns(series_id=pl.lit("1")).tail(180)
    few, more = (first_patients(labels, series, limit) for limit in (20, 60))
    assert (len(few), len(more)) == (20, 60)
    assert few < more <= set(series["patient_id"]), "none without a series"
    every = labels.join(series, on="patient_id", how="semi").drop("patient_id").to_numpy()
    chosen = labels.filter(pl.col("patient_id").is_in(list(more))).drop("patient_id").to_numpy()
    assert np.abs(chosen.mean(0) - every.mean(0)).max() < 0.03
    assert first_patients(labels.reverse(), series, 20) == few
    assert len(first_patients(labels, series, 1000)) == 180


def test_no_limit_leaves_fingerprints_as_they_were():
    assert decisive(load_config("smoke").data) == {}


def series_of(folder) -> set[str]:
    return set(pl.read_parquet(folder / layout.INDEX)["series_id"])


@pytest.mark.slow
def test_a_trial_uses_few_and_leaves_what_is_there_of_the_others(tmp_path):
    data, out = make_data(tmp_path / "data", patients=12, unlabelled=5), tmp_path / "out"
    whole, few = load_config("smoke"), load_config("smoke", ["data.limit=4"])
    where = {"data": data, "out": out, "jobs": 1}
    slices, volumes = convert_dicom(whole, **where), build_volumes(whole, **where)
    made = {path: path.stat().st_mtime_ns for path in [*slices.glob("*/*"), *volumes.glob("*.npy")]}
    convert_dicom(few, **where)
    build_volumes(few, **where)
    folds = pl.read_csv(make_folds(few, **where) / layout.FOLD_TABLE, infer_schema=False)
    index = pl.read_parquet(volumes / layout.INDEX)
    assert len(index) == 8, "four labelled and four unlabelled patients"
    assert set(index.filter(source="train")["patient_id"]) == set(folds["patient_id"])
    assert index.filter(source="unlabelled")["patient_id"].to_list() == [
        f"unlabelled-{k}" for k in (1, 2, 3, 4)
    ]
    assert read_manifest(slices)["counts"]["converted_now"] == 0
    convert_dicom(whole, **where)
    build_volumes(whole, **where)
    assert read_manifest(slices)["counts"]["converted_now"] == 0
    assert len(series_of(volumes)) == 13  # 12, and the name that all unlabelled ones share
    assert {path: path.stat().st_mtime_ns for path in made} == made, "nothing is made twice"


@pytest.mark.slow
def test_the_whole_way_with_ten_patients(smoke, tmp_path):
    data, out = smoke / "data" / "phantom", tmp_path / "run"
    for stage in ("01", "02", "03", "04", "05", "06", "07", "08", "09"):
        code, text = run_here(stage, out, "--data", str(data), "data.limit=10", "score.bootstrap=0")
        assert code == 0, text
        if stage == "08":
            assert "data.limit: 4 test patients are predicted" in text
    scored = pl.read_csv(out / layout.SCORES / layout.OOF_TABLE, infer_schema=False)
    assert scored["patient_id"].n_unique() == 10
    code, text = run_here("08", out, "--data", str(data), "data.limit=2")
    assert code == 0, text
    kept = (out / layout.SUBMISSION / layout.FALLBACKS).read_text()
    assert kept.count("no series in test_series_meta.csv within data.limit=2: prior") == 2
