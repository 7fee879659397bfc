"""Baselines: features against plain loops, regressions that never saw whom they predict, the choice
of the penalty, the way into the scores.
"""

import numpy as np
import polars as pl
import pytest
from helpers_scores import label_frame, one_hot, predicted, series_frame

from pipeline.competition.metric import score_arrays
from pipeline.competition.targets import COLUMNS, TARGETS, group_slices
from pipeline.evaluation import baselines, scoring
from pipeline.run import layout
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError

CONFIG = load_config("smoke", ["score.bootstrap=20"])
LIVER = group_slices()["liver"]


def test_histogram_counts_every_voxel_once():
    volume = np.random.default_rng(0).integers(0, 256, (5, 17, 19), dtype=np.uint8)
    counts = [0] * 64
    for value in volume.ravel().tolist():
        counts[value // 4] += 1
    found = baselines.histogram_features(volume)
    assert found.shape == (64,)
    np.testing.assert_allclose(found, np.array(counts) / volume.size, rtol=1e-6)


@pytest.mark.parametrize("shape", [(16, 32, 48), (20, 40, 56), (11, 33, 50)])
def test_thumbnail_is_the_mean_over_each_cell(shape):
    """Against the integral over each cell, whose edges cut voxels."""
    volume = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    small = volume.astype(np.float64)
    for axis, count in enumerate((8, 16, 16)):
        size = small.shape[axis]
        shares = np.zeros((count, size))
        for cell in range(count):
            for voxel in range(size):
                low, high = cell * size / count, (cell + 1) * size / count
                shares[cell, voxel] = max(0.0, min(voxel + 1, high) - max(voxel, low))
        shares /= shares.sum(axis=1, keepdims=True)
        small = np.moveaxis(np.tensordot(shares, small, (1, axis)), 0, axis)
    found = baselines.thumbnail_features(volume)
    assert found.shape == (2048,)
    np.testing.assert_allclose(found.reshape(8, 16, 16), small, atol=1e-3)


def features_of(labels: np.ndarray, signal: float, seed: int = 0) -> np.ndarray:
    """(N, 20): the first tells the liver's grade, the others nothing."""
    found = np.random.default_rng(seed).normal(size=(len(labels), 20))
    found[:, 0] += signal * labels[:, LIVER].argmax(axis=1)
    return found


def run(labels: np.ndarray, features: np.ndarray, folds: np.ndarray) -> np.ndarray:
    classes = np.stack([labels[:, where].argmax(axis=1) for where in group_slices().values()])
    given = {"histogram": features}
    return baselines.out_of_fold(given, classes, np.arange(len(labels)), folds, 2)["histogram"]


def test_a_telling_feature_is_found_out_of_fold_and_noise_is_not():
    labels, folds = one_hot(240, seed=5), np.arange(240) % 2
    found = run(labels, features_of(labels, 3.0), folds)
    for where in group_slices().values():
        np.testing.assert_allclose(found[:, where].sum(axis=1), 1)
    frame = label_frame(labels)
    own = frame.select("patient_id", fold=pl.Series(folds))
    nested = scoring.nested({"a": series_frame(frame, found)}, frame, own, CONFIG.score)["nested"]
    table = score_arrays(labels, nested.select(COLUMNS).to_numpy())
    constant = np.repeat(
        labels.mean(0)[None] * np.concatenate([t.weights for t in TARGETS]), 240, 0
    )
    best = score_arrays(labels, constant)
    assert table["liver"] < 0.6 * best["liver"]
    for name in ("bowel", "kidney", "spleen"):
        assert best[name] < table[name] < 1.1 * best[name]


@pytest.mark.slow
def test_no_patient_is_predicted_by_a_regression_that_saw_the_patient():
    """Other labels in fold 1 leave the predictions of fold 1 as they are, and change all others."""
    labels, folds = one_hot(60, seed=5), np.arange(60) % 3
    features, other = features_of(labels, 1.0), labels.copy()
    other[folds == 1] = one_hot(60, seed=77)[folds == 1]
    before, after = run(labels, features, folds), run(other, features, folds)
    np.testing.assert_array_equal(before[folds == 1], after[folds == 1])
    assert (before[folds != 1] != after[folds != 1]).any(axis=1).all()


def test_a_class_that_no_training_patient_has_keeps_a_probability():
    labels, folds = one_hot(40, seed=5), np.arange(40) % 2
    labels[:, LIVER] = [1, 0, 0]
    labels[0, LIVER] = [0, 0, 1]
    found = run(labels, features_of(labels, 1.0), folds)[:, LIVER]
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert found[0] == pytest.approx(np.array([20.5, 1, 2]) / 23.5, abs=0.01)


@pytest.mark.slow
def test_regression_equals_a_slow_descent():
    """Weighted log loss with an L2 penalty and half a case of each class at the origin, minimised
    by plain gradient descent.
    """
    labels = one_hot(50, seed=3)
    x, y = features_of(labels, 1.0)[:, :3], labels[:, LIVER].argmax(axis=1)
    weights, variance = np.array([1.0, 2.0, 4.0]), 0.1
    rows, truth = np.vstack([x, np.zeros((3, 3))]), np.append(y, [0, 1, 2])
    share = np.append(weights[y], 0.5 * weights)
    slopes, bias = np.zeros((3, 3)), np.zeros(3)
    for _ in range(20_000):
        raised = np.exp(rows @ slopes + bias)
        gap = share[:, None] * (raised / raised.sum(1, keepdims=True) - np.eye(3)[truth])
        slopes -= 0.005 * (rows.T @ gap + slopes / variance)
        bias -= 0.005 * gap.sum(axis=0)
    raised = np.exp(x @ slopes + bias)
    found = baselines._regression(x, y, weights, variance, x)
    np.testing.assert_allclose(found, raised / raised.sum(1, keepdims=True), atol=2e-3)


@pytest.mark.parametrize(
    ("right", "chosen"),
    [
        ((0.5, 0.9, 0.9, 0.9), 1),  # the strongest of equals
        ((0.5, 0.6, 0.9, 0.8), 2),
        ((0.5, 0.6, 0.7, 0.99), 3),
    ],
)
def test_penalty_is_chosen_in_the_training_folds(monkeypatch, right, chosen):
    """By regressions that give the true class the probability `right`, strongest penalty first."""
    labels, calls = one_hot(90, seed=3), []
    x, y = features_of(labels, 2.0), labels[:, LIVER].argmax(axis=1)
    class_of = dict(zip(((x - x.mean(0)) / x.std(0))[:, 1].round(9), y, strict=True))

    def regression(x, y, weights, variance, held_out):
        calls.append((len(x), variance, len(held_out)))
        p = right[round(np.log10(variance * x.shape[1]))]
        true = np.eye(3)[[class_of.get(value, 0) for value in held_out[:, 1].round(9)]]
        return p * true + (1 - p) / 2 * (1 - true)

    monkeypatch.setattr(baselines, "_regression", regression)
    baselines.regress(x, y, np.arange(90), x[:7] + 100, np.array([1.0, 2.0, 4.0]))
    assert calls[-1] == (90, baselines.VARIANCES[chosen] / 20, 7)
    assert len(calls) == 1 + baselines.INNER_FOLDS * len(right)
    assert all(kept + held == 90 for kept, _, held in calls[:-1])


def test_a_penalty_that_is_better_by_chance_is_not_taken(monkeypatch):
    """A mean loss less by 0.01, of losses that differ by 0.7 from series to series."""
    x, y = np.random.default_rng(0).normal(size=(400, 20)), np.arange(400) % 2
    taken = []

    def regression(x, y, weights, variance, held_out):
        taken.append(variance)
        loss = np.full(len(held_out), 0.8)
        if variance > 0.1:
            loss = loss - 0.01 + np.where(np.arange(len(held_out)) // 2 % 2, 1, -1) * 0.7
        return np.repeat(np.exp(-loss)[:, None], 2, axis=1)

    monkeypatch.setattr(baselines, "_regression", regression)
    baselines.regress(x, y, np.arange(400), x[:7], np.ones(2))
    assert taken[-1] == baselines.VARIANCES[0] / 20


def test_inner_folds_keep_patients_whole_and_classes_even():
    patients, classes = np.repeat(np.arange(30), 2), np.repeat(np.arange(30) % 3, 2)
    found = baselines.inner_folds(patients, classes)
    assert (found[::2] == found[1::2]).all()
    counts = np.zeros((3, 3), int)
    for fold, name in zip(found[::2], classes[::2], strict=True):
        counts[fold, name] += 1
    assert set(counts.ravel()) <= {3, 4}


def write_volumes(folder, series: pl.DataFrame) -> None:
    """A small volume for every series, whose grey is its patient's number, and their index."""
    folder.mkdir(parents=True)
    paths = []
    for number, (patient, name) in enumerate(series.select("patient_id", "series_id").iter_rows()):
        paths.append(f"{patient}_{name}.npy")
        np.save(folder / paths[-1], np.full((8, 16, 16), number, np.uint8))
    index = series.select("patient_id", "series_id", path=pl.Series(paths), source=pl.lit("train"))
    index.sample(fraction=1, shuffle=True, seed=1).write_parquet(folder / layout.INDEX)


def test_every_series_is_predicted_from_its_own_volume(tmp_path, monkeypatch):
    labels = label_frame(one_hot(12))
    series = series_frame(labels, predicted(one_hot(12), 1.0), 2).sample(
        fraction=1, shuffle=True, seed=0
    )
    write_volumes(tmp_path / "v", series)
    folds = labels.select("patient_id").with_columns(fold=pl.int_range(pl.len()) % 2)

    def spy(features, classes, patients, found_folds, jobs):
        assert features["thumbnail"].shape == (24, 2048)
        np.testing.assert_array_equal(features["thumbnail"][:, 0], np.arange(24))
        ids = series["patient_id"].to_list()
        for number, values in enumerate(classes.T):
            own = labels.filter(patient_id=ids[number]).select(COLUMNS).row(0)
            for value, where in zip(values, group_slices().values(), strict=True):
                assert own[where][value] == 1
        assert found_folds.tolist() == [dict(folds.iter_rows())[one] for one in ids]
        same = np.array([[a == b for a in ids] for b in ids])
        np.testing.assert_array_equal(patients[:, None] == patients, same)
        return {kind: np.full((24, 13), 0.5) for kind in features}

    monkeypatch.setattr(baselines, "out_of_fold", spy)
    found = baselines.predict(tmp_path / "v", series, labels, folds, 1)
    assert set(found) == {"histogram", "thumbnail"}
    assert found["histogram"].columns == ["patient_id", "series_id", *COLUMNS]
    assert found["histogram"]["series_id"].equals(series["series_id"])


def test_a_volume_that_kills_its_reader_is_named(tmp_path, monkeypatch):
    failure = baselines.Failure("the worker process was killed (out of memory?)")
    monkeypatch.setattr(baselines, "spread", lambda *_: iter([(0, failure)]))
    with pytest.raises(InputError, match=r"the worker process was killed .*1_2\.npy"):
        baselines.read_features([tmp_path / "1_2.npy"], 2)


def test_baselines_are_scored_as_the_model_is():
    """A baseline that predicts what the model does has the model's nested score and intervals."""
    truth = one_hot(60, seed=5)
    labels = label_frame(truth)
    table = series_frame(labels, predicted(truth, 1.2, sharpness=3.0), 2)
    folds = labels.select("patient_id").with_columns(fold=pl.int_range(pl.len()) % 2)
    scores = scoring.score_predictions(
        {"folds": table}, labels, folds, CONFIG, {"thumbnail": table}
    ).scores
    assert scores["floors"]["thumbnail"] == scores["nested"]
    assert scores["intervals"]["thumbnail"] == scores["intervals"]["nested"]
    assert list(scores["floors"]) == ["uniform", "class_means", "weighted_means", "thumbnail"]
    assert "0.0 % below the thumbnail" in scoring.summary(scores)
    without = scoring.score_predictions({"folds": table}, labels, folds, CONFIG).scores
    assert "thumbnail" not in scoring.summary(without)
