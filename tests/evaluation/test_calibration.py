"""Calibration and blending: exact gradients, honest nesting, the order of the steps; stage 07 as a
user runs it.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers_scores import label_frame, one_hot, predicted, series_frame
from helpers_stages import stage_here
from scipy.optimize import approx_fprime

from pipeline.competition.metric import WEIGHTS, aggregate, constants, normalise, score_arrays
from pipeline.competition.targets import COLUMNS, SCORE_KEYS, TARGETS, group_slices
from pipeline.evaluation import calibration, figures, scoring
from pipeline.evaluation.calibration import Calibration, fit, fit_prior, objective
from pipeline.run import layout
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError

CONFIG = load_config("smoke", ["score.bootstrap=20"])
LABELS = one_hot(120, seed=5)


def folds_of(labels: pl.DataFrame, count: int = 3) -> pl.DataFrame:
    return labels.select("patient_id").with_columns(fold=pl.int_range(pl.len()) % count)


def stack(models: int, patients: int = 120) -> np.ndarray:
    return np.stack(
        [predicted(LABELS[:patients], 0.5 + model, seed=model) for model in range(models)]
    )


def free_parameters(models: int) -> int:
    """Weights of each model and a temperature for every target, a bias for every class but
    healthy.
    """
    return len(TARGETS) * (models + 1) + len(COLUMNS) - len(TARGETS)


def slow_objective(
    vector: np.ndarray, outputs: np.ndarray, labels: np.ndarray, joint: bool
) -> float:
    """The penalised score in numpy, target by target, by the official score of the calibrated
    outputs.
    """
    models, values = len(outputs), np.empty(labels.shape)
    shares = np.exp(vector[: len(TARGETS) * models].reshape(len(TARGETS), models))
    sharpness, biases = np.split(vector[shares.size :], [len(TARGETS)])
    for number, where in enumerate(group_slices().values()):
        mixed = np.average(outputs[:, :, where], axis=0, weights=shares[number])
        bias, biases = np.split(np.append(0.0, biases), [mixed.shape[1]])
        values[:, where] = mixed ** np.exp(sharpness[number]) * np.exp(bias)
    table = score_arrays(labels, values)
    parts = [value for key, value in table.items() if key in SCORE_KEYS[: -1 if joint else -2]]
    return sum(parts) / len(SCORE_KEYS[:-1]) + calibration.STRENGTH / len(labels) * (
        vector @ vector
    )


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("joint", [False, True])
def test_gradient_equals_finite_differences(models, joint):
    outputs = stack(models)
    vector = np.random.default_rng(0).normal(size=free_parameters(models)) * 0.3
    value, gradient = objective(vector, outputs, LABELS, joint)
    slow = lambda x: slow_objective(x, outputs, LABELS, joint)  # noqa: E731
    assert value == pytest.approx(slow(vector), rel=1e-12)
    np.testing.assert_allclose(gradient, approx_fprime(vector, slow, 1e-7), atol=2e-7)


def test_objective_is_the_official_score(monkeypatch):
    monkeypatch.setattr(calibration, "STRENGTH", 0.0)
    outputs = stack(1)
    assert objective(np.zeros(free_parameters(1)), outputs, LABELS)[0] == pytest.approx(
        score_arrays(LABELS, outputs[0])["score"], rel=1e-12
    )
    only_targets = objective(np.zeros(free_parameters(1)), outputs, LABELS, joint=False)[0]
    assert only_targets == pytest.approx(
        sum(score_arrays(LABELS, outputs[0])[target.name] for target in TARGETS) / 6
    )


def test_the_joint_fit_serves_any_injury():
    """The maximum over targets of calibrated risks is too bold: the joint fit trades a little of
    each target for it.
    """
    outputs = predicted(LABELS, 0.5)
    table = series_frame(label_frame(LABELS), outputs)
    both = fit({"a": table}, label_frame(LABELS), "mean").apply(outputs)
    free = torch.from_numpy(minimum(outputs[None], joint=False))
    alone = [part.numpy() for part in calibration._unpack(free, 1)]
    separate = Calibration(
        ("a",), "mean", alone[0], 1 / alone[1], alone[2], LABELS.mean(axis=0)
    ).apply(outputs)
    joint, apart = score_arrays(LABELS, both), score_arrays(LABELS, separate)
    assert joint["score"] < apart["score"]
    assert joint["any_injury"] < apart["any_injury"]
    assert sum(joint[t.name] for t in TARGETS) > sum(apart[t.name] for t in TARGETS)


def minimum(outputs: np.ndarray, joint: bool) -> np.ndarray:
    from scipy.optimize import minimize

    start = np.zeros(free_parameters(len(outputs)))
    return minimize(objective, start, args=(outputs, LABELS, joint), jac=True, method="L-BFGS-B").x


def test_prior_is_the_best_constant():
    prior = fit_prior(LABELS)
    everyone = lambda row: score_arrays(LABELS, np.repeat(row[None], len(LABELS), axis=0))["score"]  # noqa: E731
    assert everyone(prior) < constants(LABELS)["weighted_means"]["score"]
    random = np.random.default_rng(0)
    for _ in range(200):
        assert everyone(prior * np.exp(0.05 * random.normal(size=13))) > everyone(prior) - 1e-4
    for where in group_slices().values():
        assert prior[where].sum() == pytest.approx(1)


@pytest.mark.skipif(
    "VOCO2D_RSNA_META" not in os.environ,
    reason="VOCO2D_RSNA_META names no folder with the real tables",
)
def test_prior_of_the_real_table():
    """Runs only where VOCO2D_RSNA_META names a folder with the competition's own train.csv, which
    is not ours to hand out.
    """
    from pipeline.competition.tables import read_labels

    labels = (
        read_labels(Path(os.environ["VOCO2D_RSNA_META"])).select(COLUMNS).to_numpy().astype(float)
    )
    assert (
        round(
            score_arrays(labels, np.repeat(fit_prior(labels)[None], len(labels), axis=0))["score"],
            4,
        )
        == 0.5794
    )


def test_few_cases_and_certain_outputs_leave_the_parameters_finite():
    labels = one_hot(12)
    labels[:, group_slices()["spleen"]] = [1, 0, 0]
    certain = normalise(np.where(one_hot(12, seed=9) > 0, 1.0, 0.0))
    found = fit({"a": series_frame(label_frame(labels), certain)}, label_frame(labels), "mean")
    values = found.apply(certain)
    assert np.isfinite(values).all()
    assert (values > 0).all()
    assert score_arrays(labels, values)["score"] < score_arrays(labels, certain)["score"]
    assert (found.prior > 0).all()


def test_calibrated_outputs_are_left_nearly_alone():
    """The ridge: exact posteriors of the weighted classes can only lose by a change, and from few
    cases they lose little.
    """
    labels = one_hot(4000, seed=0)
    exact = normalise(predicted(labels, 1.0) * WEIGHTS)
    few, rest = slice(0, 24), slice(24, None)
    found = fit(
        {"a": series_frame(label_frame(labels[few]), exact[few])}, label_frame(labels[few]), "mean"
    )
    after = score_arrays(labels[rest], found.apply(exact[rest]))["score"]
    assert after < score_arrays(labels[rest], exact[rest])["score"] + 0.15


@pytest.mark.parametrize("how", ["mean", "max"])
def test_blend_then_aggregate_then_calibrate(how):
    """`predict` against plain loops over series, models and classes."""
    labels = label_frame(LABELS[:12])
    tables = {}
    for model in range(3):
        values = np.random.default_rng(model).random((24, 13)) + 0.01
        tables[f"m{model}"] = pl.concat(
            [
                series_frame(labels, values[:12]),
                series_frame(labels, values[12:]).with_columns(series_id=pl.col("series_id") + "b"),
            ]
        )
    found = fit(tables, labels, how)
    result = {row[0]: row[1:] for row in found.predict(list(tables.values())).iter_rows()}
    for patient in labels["patient_id"]:
        for number, (target, where) in enumerate(
            zip(TARGETS, group_slices().values(), strict=True)
        ):
            blended = []
            for series_id in tables["m0"].filter(patient_id=patient)["series_id"]:
                mixed = [0.0] * len(target.classes)
                for model, table in enumerate(tables.values()):
                    row = table.filter(series_id=series_id).select(target.columns).row(0)
                    mixed = [
                        m + found.weights[number, model] * p / sum(row)
                        for m, p in zip(mixed, row, strict=True)
                    ]
                blended.append(mixed)
            joined = [
                max(c) if how == "max" else sum(c) / len(c) for c in zip(*blended, strict=True)
            ]
            raised = [
                (p / sum(joined)) ** (1 / found.temperature[number]) * np.exp(b)
                for p, b in zip(joined, found.bias[where], strict=True)
            ]
            assert result[patient][where] == pytest.approx([p / sum(raised) for p in raised])
    assert found.weights.sum(axis=1) == pytest.approx(np.ones(5))
    assert (found.weights >= 0).all()


def test_blend_weights_find_who_is_good_at_what():
    labels = label_frame(LABELS)
    good, noise = (
        predicted(LABELS, 2.0, seed=1),
        predicted(LABELS, 0.0, seed=2) * np.exp(np.random.default_rng(0).normal(size=LABELS.shape)),
    )
    liver = group_slices()["liver"]
    one, two = good.copy(), normalise(noise)
    one[:, liver], two[:, liver] = two[:, liver], good[:, liver].copy()
    weights = fit(
        {"one": series_frame(labels, one), "two": series_frame(labels, two)}, labels, "mean"
    ).weights
    for target, row in zip(TARGETS, weights, strict=True):
        assert row[1 if target.name == "liver" else 0] > 0.7


def test_parameters_survive_json():
    found = fit(
        {"a": series_frame(label_frame(LABELS), predicted(LABELS, 1.0))}, label_frame(LABELS), "max"
    )
    again = Calibration.from_json(json.loads(json.dumps(found.to_json())))
    values = predicted(LABELS, 0.7, seed=8)
    assert np.array_equal(found.apply(values), again.apply(values))
    assert (again.models, again.aggregate) == (("a",), "max")
    broken = found.to_json()
    del broken["temperature"]["liver"]
    with pytest.raises(InputError, match="not a calibration"):
        Calibration.from_json(broken)
    with pytest.raises(InputError, match="the calibration is of 1 models, predictions are of 2"):
        found.predict([series_frame(label_frame(LABELS), values)] * 2)


def test_without_calibration_nothing_changes():
    table = series_frame(label_frame(LABELS), values := predicted(LABELS, 1.0))
    found = fit({"a": table, "b": table}, label_frame(LABELS), "mean", calibrate=False)
    np.testing.assert_allclose(
        found.predict([table, table]).select(COLUMNS).to_numpy(), values, rtol=1e-12
    )


def miscalibrated(
    models: int = 1, patients: int = 120
) -> tuple[dict[str, pl.DataFrame], pl.DataFrame]:
    labels = label_frame(LABELS[:patients])
    tables = {
        f"m{m}": series_frame(labels, predicted(LABELS[:patients], 1.2, seed=m, sharpness=3.0), 2)
        for m in range(models)
    }
    return tables, labels


def test_nested_calibration_improves_the_held_out_score():
    tables, labels = miscalibrated()
    outcome = scoring.score_predictions(tables, labels, folds_of(labels), CONFIG)
    assert outcome.scores["nested"]["score"] < 0.8 * outcome.scores["raw"]["score"]
    assert outcome.scores["in_sample"]["score"] < outcome.scores["nested"]["score"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mean", "max"])
def test_what_scores_a_patient_never_saw_the_patient(how):
    """Other labels for the patients of a fold change every prediction but those of that very
    fold.
    """
    tables, labels = miscalibrated(models=3)
    folds = folds_of(labels)
    options = CONFIG.score.model_copy(update={"aggregate": how})
    before = scoring.nested(tables, labels, folds, options)
    inside = (folds["fold"] == 1).to_numpy()
    other = LABELS.copy()
    other[inside] = one_hot(120, seed=77)[inside]
    after = scoring.nested(tables, label_frame(other), folds, options)
    for name in ("nested", "raw"):
        same = np.array(
            [a == b for a, b in zip(before[name].iter_rows(), after[name].iter_rows(), strict=True)]
        )
        assert same[inside].all(), name
        assert not same[~inside].any(), name
    ids = labels.filter(pl.Series(inside))["patient_id"].implode()
    of_fold = pl.col("patient_id").is_in(ids)
    assert before["series"].filter(of_fold).equals(after["series"].filter(of_fold))


def test_fits_see_the_other_folds_only(monkeypatch):
    tables, labels = miscalibrated(models=2)
    folds, seen = folds_of(labels), []
    original = calibration.fit

    def spy(series, known, how, calibrate=True):
        assert all(
            set(table["patient_id"]) == set(known["patient_id"]) for table in series.values()
        )
        seen.append(set(known["patient_id"]))
        return original(series, known, how, calibrate)

    monkeypatch.setattr(calibration, "fit", spy)
    scoring.nested(tables, labels, folds, CONFIG.score)
    for fold, known in enumerate(seen):
        assert known == set(folds.filter(pl.col("fold") != fold)["patient_id"])


def test_noise_gains_in_sample_and_not_nested():
    """Six models of pure noise around the best constant: fitting them to their own labels looks
    like progress.
    """
    labels = label_frame(LABELS)
    prior, random = fit_prior(LABELS), np.random.default_rng(1)
    tables = {
        f"m{m}": series_frame(
            labels, normalise(prior * np.exp(0.5 * random.normal(size=LABELS.shape)))
        )
        for m in range(6)
    }
    scores = scoring.score_predictions(tables, labels, folds_of(labels), CONFIG).scores
    constant = score_arrays(LABELS, np.repeat(prior[None], 120, axis=0))["score"]
    assert scores["in_sample"]["score"] < constant < scores["nested"]["score"]


def test_patients_without_series_get_the_prior_of_the_others():
    tables, labels = miscalibrated()
    absent = labels["patient_id"][4]
    tables = {name: table.filter(pl.col("patient_id") != absent) for name, table in tables.items()}
    found = scoring.nested(tables, labels, folds_of(labels), CONFIG.score)
    row = found["nested"].filter(patient_id=absent).select(COLUMNS).to_numpy()[0]
    np.testing.assert_allclose(row, fit_prior(LABELS[np.arange(120) % 3 != 4 % 3]))
    outcome = scoring.score_predictions(tables, labels, folds_of(labels), CONFIG)
    assert outcome.scores["counts"]["without_series"] == 1
    assert outcome.patients.height == 120


def write_oof(
    folder: Path, models: int = 2, change=lambda frame: frame
) -> tuple[list[Path], pl.DataFrame]:
    tables, labels = miscalibrated(models, patients=40)
    labels.write_csv(folder / "train.csv")
    paths = []
    for number, (name, table) in enumerate(tables.items()):
        table = table.sample(fraction=1, shuffle=True, seed=number)
        (change(table) if number == models - 1 else table).write_csv(folder / f"{name}.csv")
        paths.append(folder / f"{name}.csv")
    return paths, labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.filter(pl.col("patient_id") != "10003"),
            "patient '10003' is missing, .*m1.csv",
        ),
        (
            lambda f: pl.concat([f, f[:1].with_columns(patient_id=pl.lit("7"))]),
            "patient '7' is not expected, .*m1.csv row 82",
        ),
        (
            lambda f: f.filter(pl.col("series_id") != "100031"),
            "series '100031' of patient '10003' is missing, .*m1.csv",
        ),
        (
            lambda f: pl.concat([f, f[:1].with_columns(series_id=pl.lit("9"))]),
            "series '9' is not in .*m0.csv, .*m1.csv row 82",
        ),
        (lambda f: pl.concat([f, f[:1]]), "is there twice, .*m1.csv row 82"),
    ],
)
def test_oof_tables_must_cover_the_same_series(tmp_path, change, message):
    paths, labels = write_oof(tmp_path, change=change)
    with pytest.raises(InputError, match=message):
        scoring.read_oof(paths, labels)


def test_own_folds_of_the_oof_are_used_where_they_agree():
    tables, labels = miscalibrated(2)
    folds = folds_of(labels, 4)
    own = {name: table.join(folds, on="patient_id") for name, table in tables.items()}
    assert (
        scoring.nested_folds(own, labels, CONFIG)
        .sort("patient_id")
        .equals(folds.sort("patient_id"))
    )
    own["m1"] = own["m1"].with_columns(fold=3 - pl.col("fold"))
    drawn = scoring.nested_folds(own, labels, CONFIG)
    assert sorted(drawn["patient_id"]) == sorted(labels["patient_id"])
    assert drawn["fold"].n_unique() == CONFIG.score.nested_folds
    few = load_config("smoke", ["score.nested_folds=61"])
    with pytest.raises(
        InputError, match="120 patients are too few for 61 folds, score.nested_folds, "
    ):
        scoring.nested_folds(own, labels, few)


def run_stage(folder: Path, *more: str) -> subprocess.CompletedProcess:
    where = ("--data", str(folder), "--out", str(folder / "out"))
    return stage_here("07", "--config", "smoke", *where, *more)


@pytest.mark.slow
def test_tables_that_are_refused_leave_the_last_scores_finished(tmp_path):
    paths, _ = write_oof(tmp_path)
    assert run_stage(tmp_path, "score.nested_folds=3", "--oof", str(paths[0])).returncode == 0
    folder = tmp_path / "out" / layout.SCORES
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "bad.csv").write_text("patient_id,series_id\n1,2\n")
    done = run_stage(tmp_path, "score.nested_folds=3", "--oof", str(tmp_path / "bad.csv"))
    assert done.returncode == 2
    assert "bad.csv" in done.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_stage_06_blends_files_of_others(tmp_path):
    paths, labels = write_oof(tmp_path)
    done = run_stage(tmp_path, "score.nested_folds=3", "--oof", *map(str, paths))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / layout.SCORES
    scores = json.loads((folder / "scores.json").read_text())
    for name in ("raw", "nested", "in_sample"):
        assert tuple(scores[name]) == SCORE_KEYS
        assert f"{scores[name]['score']:.4f}" in done.stdout
    assert set(scores["floors"]) == {"uniform", "class_means", "weighted_means"}
    assert "baselines are left out" in done.stderr
    table = pl.read_csv(
        folder / "oof_predictions.csv",
        schema_overrides={"patient_id": pl.String, "series_id": pl.String},
    )
    assert table.columns == ["patient_id", "series_id", *COLUMNS]
    patients = labels.select("patient_id").join(
        aggregate(table, "mean"), on="patient_id", how="left", maintain_order="left"
    )
    truth = labels.select(COLUMNS).to_numpy().astype(float)
    assert score_arrays(truth, patients.select(COLUMNS).to_numpy()) == pytest.approx(scores["raw"])
    kept = pl.read_parquet(folder / "patients.parquet")
    assert score_arrays(
        truth, kept.select(f"nested_{c}" for c in COLUMNS).to_numpy()
    ) == pytest.approx(scores["nested"])
    assert (
        scores["intervals"]["nested"]["score"]["low"]
        < scores["nested"]["score"]
        < scores["intervals"]["nested"]["score"]["high"]
    )
    parameters = json.loads((folder / "calibration.json").read_text())
    final = Calibration.from_json(parameters)
    series = list(scoring.read_oof(paths, labels).values())
    in_sample = labels.select("patient_id").join(
        final.predict(series), on="patient_id", how="left", maintain_order="left"
    )
    assert score_arrays(truth, in_sample.select(COLUMNS).to_numpy()) == pytest.approx(
        scores["in_sample"]
    )
    assert set(parameters["nested"]) == {"0", "1", "2"}
    for picture in ("precision_recall.png", "reliability.png", "confusion.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    again = run_stage(tmp_path, "score.nested_folds=3", "--oof", *map(str, paths))
    assert "up to date" in again.stderr
    assert again.stdout == done.stdout
    last = run_stage(tmp_path, "--oof", *map(str, paths), "score.nested_folds=3")
    assert last.returncode == 0
    assert "up to date" in last.stderr
    missing = run_stage(tmp_path, "--oof", str(tmp_path / "a=3"))
    assert missing.returncode == 2
    assert f"no such OOF table: '{tmp_path}/a=3'" in missing.stderr
    both = run_stage(tmp_path, "--oof", str(paths[0]), "--models", str(tmp_path))
    assert both.returncode == 2
    assert "error: tables or runs, not both, --oof and --models, leave one" in both.stderr


@pytest.mark.slow
def test_scoring_twice_gives_the_same_bytes(tmp_path):
    tables, labels = miscalibrated(2, patients=40)
    first, second = (
        scoring.score_predictions(tables, labels, folds_of(labels), CONFIG) for _ in range(2)
    )
    assert json.dumps([first.scores, first.parameters]) == json.dumps(
        [second.scores, second.parameters]
    )
    assert first.series.equals(second.series)
    for name in "ab":
        figures.confusion_tables(LABELS[:40], predicted(LABELS[:40], 1.0), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def finished(folder: Path, *outputs: str) -> None:
    """A stage folder that claims to be finished, with files that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {name: {"bytes": (folder / name).stat().st_size} for name in outputs}
    (folder / "manifest.json").write_text(
        json.dumps({"schema": 1, "outputs": listed, "fingerprint": ""})
    )


@pytest.mark.slow
def test_stage_06_scores_the_runs_own_folds(tmp_path):
    tables, labels = miscalibrated(patients=40)
    labels.write_csv(tmp_path / "train.csv")
    folds, table, absent = folds_of(labels, 2), tables["m0"], labels["patient_id"][6]
    early = run_stage(tmp_path)
    assert early.returncode == 2
    assert "run stages/02_build_volumes.py first" in early.stderr
    out = tmp_path / "out"
    for name in (layout.VOLUMES, layout.FOLDS):
        finished(out / name)
    table = table.filter(pl.col("patient_id") != absent)
    path = pl.format("{}.npy", "series_id")
    table.select("patient_id", "series_id", path=path, source=pl.lit("train")).write_parquet(
        out / layout.VOLUMES / "index.parquet"
    )
    for number, series_id in enumerate(table["series_id"]):
        volume = np.full((8, 16, 16), number, np.uint8)
        np.save(out / layout.VOLUMES / f"{series_id}.npy", volume)
    folds.write_csv(out / layout.FOLDS / "folds.csv")
    for fold, part in [
        *table.join(folds, on="patient_id").group_by("fold"),
        ((2,), table.with_columns(fold=2)),
    ]:
        (out / layout.CLASSIFIERS / f"fold{fold[0]}").mkdir(parents=True)
        part.write_parquet(out / layout.CLASSIFIERS / f"fold{fold[0]}" / "oof.parquet")
    # fold2 is one of an earlier run with more of them
    finished(out / layout.CLASSIFIERS, "fold0/oof.parquet", "fold1/oof.parquet")
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / layout.SCORES / "scores.json").read_text())
    assert scores["counts"]["without_series"] == 1
    assert scores["nested"]["score"] < scores["raw"]["score"]
    for name in ("histogram", "thumbnail"):  # grey tells nothing here
        assert tuple(scores["floors"][name]) == SCORE_KEYS
        assert scores["floors"][name]["score"] > scores["nested"]["score"]
        interval = scores["intervals"][name]["score"]
        assert interval["value"] == pytest.approx(scores["floors"][name]["score"], rel=1e-12)
        assert interval["low"] < interval["value"]
        assert f"\n{name}" in done.stdout
    folds.with_columns(fold=1 - pl.col("fold")).write_csv(out / layout.FOLDS / "folds.csv")
    with pytest.raises(InputError, match=r"was held out in fold \d, not \d as folds.csv says"):
        scoring.read_trained(
            out / layout.FOLDS, out / layout.CLASSIFIERS, out / layout.VOLUMES, labels
        )
