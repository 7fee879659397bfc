"""Folds: balanced, seeded, persisted once, no patient twice; stage 03 as a user runs it."""

import os
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers_dataset import make_data
from helpers_scores import label_frame, one_hot
from helpers_stages import stage_here

from pipeline import folds
from pipeline.competition import tables
from pipeline.competition.targets import COLUMNS
from pipeline.folds import make_folds
from pipeline.run import layout
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError


def series_of(labels: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """One or two series for every patient."""
    number = np.random.default_rng(seed).integers(1, 3, labels.height)
    patients = [
        patient
        for patient, count in zip(labels["patient_id"], number, strict=True)
        for _ in range(count)
    ]
    return pl.DataFrame(
        {"patient_id": patients, "series_id": [str(i) for i in range(len(patients))]}
    )


def assert_balanced(
    found: pl.DataFrame, labels: pl.DataFrame, series: pl.DataFrame, count: int
) -> None:
    """Every class within 15 percent or one patient of its share of each fold, by plain counting."""
    counts = dict(series.group_by("patient_id").len().iter_rows())
    fold_of = dict(found.iter_rows())
    for column in COLUMNS:
        positive = [row["patient_id"] for row in labels.iter_rows(named=True) if row[column]]
        for fold in range(count):
            inside = sum(fold_of[patient] == fold for patient in positive)
            share = len(positive) / count
            assert abs(inside - share) <= max(1, 0.15 * share), (
                f"{column} in fold {fold}: {inside} of {share:.1f}"
            )
    for number in set(counts.values()):
        inside = [
            sum(counts[p] == number for p in fold_of if fold_of[p] == fold) for fold in range(count)
        ]
        assert max(inside) - min(inside) <= max(2, 0.3 * sum(inside) / count)


@pytest.mark.parametrize(("patients", "count"), [(24, 2), (240, 3), (600, 5)])
def test_every_class_has_its_share(patients, count):
    labels = label_frame(one_hot(patients, seed=1))
    series = series_of(labels)
    found = folds.stratified_folds(labels, series, count, seed=7)
    assert found["patient_id"].sort().to_list() == labels["patient_id"].to_list()
    assert set(found["fold"]) == set(range(count))
    assert_balanced(found, labels, series, count)


def test_seed_decides_and_row_order_does_not():
    labels = label_frame(one_hot(80))
    series = series_of(labels)
    found = folds.stratified_folds(labels, series, 4, seed=1)
    assert found.equals(
        folds.stratified_folds(
            labels.sample(fraction=1, shuffle=True, seed=3), series[::-1], 4, seed=1
        )
    )
    assert not found.equals(folds.stratified_folds(labels, series, 4, seed=2))


def test_derived_seeds_are_tried_until_the_balance_is_right(monkeypatch):
    labels = label_frame(one_hot(40))
    for excesses, chosen in (([3.0, 0.9, 0.1], 1), ([3.0, 1.5, 2.0], 1), ([0.0], 0)):
        draws = [np.roll(np.arange(40) // 20, shift) for shift in range(len(excesses))]
        monkeypatch.setattr(folds, "_splits", lambda *_, draws=draws: iter(draws))
        excess = {draw.tobytes(): value for draw, value in zip(draws, excesses, strict=True)}
        monkeypatch.setattr(
            folds, "imbalance", lambda found, *_, excess=excess: excess[found.tobytes()]
        )
        assert (
            folds.stratified_folds(labels, series_of(labels), 2, 0)["fold"].to_list()
            == draws[chosen].tolist()
        )


def test_imbalance_by_hand():
    matrix = np.array([[1, 0]] * 40 + [[0, 1]] * 4)
    perfect = np.array([0, 1] * 22)
    assert folds.imbalance(perfect, matrix, 2) == 0
    skewed = np.array([0] * 26 + [1] * 14 + [0, 1] * 2)
    assert folds.imbalance(skewed, matrix, 2) == pytest.approx(6 / (0.15 * 20))


def test_errors(tmp_path):
    labels = label_frame(one_hot(9))
    with pytest.raises(InputError, match="9 patients are too few for 5 folds"):
        folds.stratified_folds(labels, series_of(labels), 5, 0)
    path = tmp_path / "folds.csv"
    path.write_text("patient_id,fold\n10000,0\n10001,1\n10000,1\n")
    with pytest.raises(
        InputError, match=r"patient '10000' is in two folds, .*folds.csv row 4 column patient_id"
    ):
        folds.read_folds(path)
    path.write_text("patient_id,fold\n10000,0\n10001,1\n10000,0\n")
    with pytest.raises(InputError, match="patient '10000' is there twice"):
        folds.read_folds(path)
    path.write_text("patient_id,fold\n10000,0\n")
    with pytest.raises(InputError, match="patient '10001' is in no fold"):
        folds.read_folds(path, labels)


def write_hospitals(folder: Path, rows: list[tuple[str, str, str]], column="hospital") -> None:
    """train_series_meta.csv of patients, series and hospitals."""
    lines = [",".join(row) for row in [("patient_id", "series_id", column), *rows]]
    (folder / "train_series_meta.csv").write_text("\n".join(lines) + "\n")


def test_one_fold_a_hospital(tmp_path):
    labels = label_frame(one_hot(9))
    name = dict(zip(labels["patient_id"], "CABBACCBA", strict=True))
    ids = [*name, "10000", "10003", "99999"]  # two have two series, one has no label
    write_hospitals(
        tmp_path, [(patient, str(k), name.get(patient, "D")) for k, patient in enumerate(ids)]
    )
    found = folds.hospital_folds(folds.read_hospitals(tmp_path, labels), 3)
    assert dict(found.iter_rows()) == {p: "ABC".index(hospital) for p, hospital in name.items()}
    assert found["fold"].dtype == pl.Int64
    with pytest.raises(InputError, match="5 folds for 3 hospitals, folds.count, set folds.count=3"):
        folds.hospital_folds(folds.read_hospitals(tmp_path, labels), 5)
    write_hospitals(tmp_path, [(patient, patient, "A") for patient in name])
    with pytest.raises(InputError, match="5 folds for 1 hospitals, .*, set folds.by=patient"):
        folds.hospital_folds(folds.read_hospitals(tmp_path, labels), 5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("10000", "1", "A"), ("10001", "2", " ")], "the cell is empty, .*csv row 3 column hosp"),
        (
            [("10000", "1", "A"), ("10001", "2", "B"), ("10000", "3", "B")],
            "'B' is not the hospital of the patient's series above, .*csv row 4 column hospital,"
            " give each patient one, or set folds.by=patient",
        ),
        ([("10000", "1", "A")], "patient '10001' has no series and so no hospital, .*csv, list"),
    ],
)
def test_wrong_hospitals_are_refused(tmp_path, rows, message):
    write_hospitals(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        folds.read_hospitals(tmp_path, label_frame(one_hot(3)[:2]))


def run_stage(tmp_path: Path, *more: str) -> subprocess.CompletedProcess:
    where = ("--data", str(tmp_path), "--out", str(tmp_path / "out"))
    return stage_here("03", "--config", "smoke", *where, *more)


@pytest.mark.slow
def test_stage_03_writes_once_and_then_only_reads(tmp_path):
    labels = label_frame(one_hot(40))
    labels.write_csv(tmp_path / "train.csv")
    series_of(labels).write_csv(tmp_path / "train_series_meta.csv")
    first = run_stage(tmp_path, "folds.count=4")
    assert first.returncode == 0, first.stderr
    assert "fold 3" in first.stdout
    assert "bowel_injury" in first.stdout
    path = tmp_path / "out" / layout.FOLDS / "folds.csv"
    found, stamp = folds.read_folds(path, labels), path.stat().st_mtime_ns
    assert_balanced(found, labels, series_of(labels), 4)
    again = run_stage(tmp_path, "folds.count=4")
    assert "up to date" in again.stderr
    assert path.stat().st_mtime_ns == stamp
    assert run_stage(tmp_path, "folds.count=2").returncode == 0
    assert set(folds.read_folds(path)["fold"]) == {0, 1}
    real = run_stage(tmp_path, "folds.by=hospital")
    assert real.returncode == 2
    assert (
        f"column 'hospital' is missing, which folds.by=hospital needs, {tmp_path}/"
        "train_series_meta.csv row 1, add it, or set folds.by=patient" in real.stderr
    )
    ids = labels["patient_id"]
    write_hospitals(tmp_path, [(p, str(k), "AB"[k >= 30]) for k, p in enumerate(ids)])
    done = run_stage(tmp_path, "folds.by=hospital", "folds.count=2")
    assert "fold 0: hospital A, fold 1: hospital B" in done.stderr
    assert dict(folds.read_folds(path).iter_rows()) == {p: int(k >= 30) for k, p in enumerate(ids)}


@pytest.mark.slow
def test_stage_03_refuses_wrong_tables(tmp_path):
    labels = label_frame(one_hot(40))
    pl.concat([labels, labels[:1]]).write_csv(tmp_path / "train.csv")
    series_of(labels).write_csv(tmp_path / "train_series_meta.csv")
    done = run_stage(tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .split("\n")[-1]
        .startswith(
            f"error: patient '10000' is there twice, {tmp_path}/train.csv row 42 column patient_id"
        )
    )
    assert not (tmp_path / "out" / layout.FOLDS / "folds.csv").exists()


@pytest.mark.skipif(
    "VOCO2D_RSNA_META" not in os.environ,
    reason="VOCO2D_RSNA_META names no folder with the real tables",
)
def test_the_real_table_in_five_folds():
    """Runs only where VOCO2D_RSNA_META names a folder with the competition's own tables, which are
    not ours to hand out.
    """
    data = Path(os.environ["VOCO2D_RSNA_META"])
    labels, series = tables.read_labels(data), tables.read_series(data, "train")
    assert_balanced(folds.stratified_folds(labels, series, 5, 42), labels, series, 5)


def test_a_refused_command_leaves_finished_folds_as_they_are(tmp_path):
    data = make_data(tmp_path / "data", patients=6)
    config = ("phantom=null", "train.slice_loss=0")
    made = make_folds(load_config("smoke", config), data=data, out=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    wrong = load_config("smoke", (*config, "folds.count=4"))
    with pytest.raises(InputError, match="6 patients are too few for 4 folds"):
        make_folds(wrong, data=data, out=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert read_manifest(made) is not None
