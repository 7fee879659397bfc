"""Baselines: what grey alone, and what a blurred picture, tell of the injuries.

Logistic regressions on two plain descriptions of a volume, trained on the run's own folds: a model
that is no better than these need not have learnt any anatomy. They are weighted as the metric
weighs, and their L2 penalty is chosen within the training folds, patients kept whole. Half a case
of every class stands at the mean of all features, so that a class which no training patient has
still gets a probability.
"""

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from ..competition.metric import value_frame
from ..competition.strict_table import KEY
from ..competition.targets import COLUMNS, TARGETS
from ..run import layout
from ..system.console import progress
from ..system.contained import Failure
from ..system.errors import InputError
from ..system.frames import read_frame
from ..system.pool import spread
from ..volumes.sampling import resize_planes
from .calibration import GROUP_SLICES, logarithm

GREYS = 64
DEPTH, SIDE = 8, 16  # of a thumbnail
# prior variances of the log-odds of independent features; a coefficient's is scikit-learn's C
VARIANCES = 10.0 ** np.arange(4)
STEPS = 300
INNER_FOLDS = 3
# with fewer, the start of a process takes longer than its work, and threads wait for Python's lock
VOLUMES_A_PROCESS, ROWS_A_THREAD = 100, 500


def histogram_features(volume: np.ndarray) -> np.ndarray:
    """Shares (64,) of a volume's (D, H, W) uint8 voxels in 64 equal ranges of grey."""
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in volume)
    shares = np.reshape(counts, (GREYS, -1)).sum(axis=1) / volume.size
    return shares.astype(np.float32)


def thumbnail_features(volume: np.ndarray) -> np.ndarray:
    """Greys (2048,) of a volume (D, H, W) uint8 shrunk by area to 8 x 16 x 16."""
    planes = resize_planes(volume.astype(np.float32), SIDE)  # (D, 16, 16)
    columns = planes.reshape(len(planes), SIDE * SIDE)
    return cv2.resize(columns, (SIDE * SIDE, DEPTH), interpolation=cv2.INTER_AREA).ravel()


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "histogram": histogram_features,
    "thumbnail": thumbnail_features,
}


def volume_features(path: Path) -> dict[str, np.ndarray]:
    """Both descriptions of one stored volume."""
    cv2.setNumThreads(1)
    volume = np.load(path, mmap_mode="r")
    return {kind: describe(volume) for kind, describe in KINDS.items()}


def read_features(paths: list[Path], jobs: int) -> dict[str, np.ndarray]:
    """Features (N, F) of each kind of N stored volumes, which up to `jobs` processes read one at a
    time.
    """
    rows: list[dict[str, np.ndarray]] = [{}] * len(paths)
    done = spread(volume_features, paths, min(jobs, 1 + len(paths) // VOLUMES_A_PROCESS))
    for k, row in progress(done, len(paths), "baselines: features", "volumes"):
        if isinstance(row, Failure):
            raise InputError(row.reason, str(paths[k]), "run stage 02 again")
        rows[k] = row
    return {kind: np.stack([row[kind] for row in rows]) for kind in KINDS}


def predict(
    volumes: Path, series: pl.DataFrame, labels: pl.DataFrame, folds: pl.DataFrame, jobs: int
) -> dict[str, pl.DataFrame]:
    """Out-of-fold table (`patient_id, series_id`, 13 columns) of each baseline for the rows of
    `series`, whose volumes stage 02 left in `volumes`.
    """
    keys = series.select(KEY, "series_id")
    index = read_frame(volumes / layout.INDEX, [*keys.columns, "path"])
    paths = keys.join(index, on=keys.columns, how="left", maintain_order="left")["path"]
    features = read_features([volumes / path for path in paths], jobs)
    rows = keys.join(labels, on=KEY, how="left", maintain_order="left")
    classes = np.stack(
        [rows.select(target.columns).to_numpy().argmax(axis=1) for target in TARGETS]
    )
    fold = keys.join(folds, on=KEY, how="left", maintain_order="left")["fold"].to_numpy()
    patients = keys[KEY].rank("dense").to_numpy() - 1
    found = out_of_fold(features, classes, patients, fold, jobs)
    return {kind: keys.hstack(value_frame(values)) for kind, values in found.items()}


def out_of_fold(
    features: dict[str, np.ndarray],
    classes: np.ndarray,
    patients: np.ndarray,
    folds: np.ndarray,
    jobs: int,
) -> dict[str, np.ndarray]:
    """Probabilities (N, 13) of every kind of `features` (N, F) by regressions that saw the other
    folds: classes (5, N) by target, numbers of patients (N,), folds (N,).
    """
    import joblib
    from sklearn.exceptions import ConvergenceWarning

    parts = list(product(features, range(len(TARGETS)), np.unique(folds).tolist()))
    found = {kind: np.zeros((len(folds), len(COLUMNS))) for kind in features}

    def fit(kind: str, target: int, fold: int) -> np.ndarray:
        kept, x, y = folds != fold, features[kind], classes[target]
        weights = np.array(TARGETS[target].weights)
        return regress(x[kept], y[kept], patients[kept], x[~kept], weights)

    # threads, which share the features: of many rows nearly all time goes to products of matrices
    threads = min(jobs, 1 + len(folds) // ROWS_A_THREAD)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # as good as `STEPS` make it
        pool = joblib.Parallel(threads, require="sharedmem", return_as="generator")
        done = pool(joblib.delayed(fit)(*part) for part in parts)
        named = progress(done, len(parts), "baselines: regressions", "fits")
        for (kind, target, fold), values in zip(parts, named, strict=True):
            found[kind][folds == fold, GROUP_SLICES[target]] = values
    return found


def regress(
    x: np.ndarray, y: np.ndarray, patients: np.ndarray, held_out: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Probabilities (n, classes) of features `held_out` (n, F) by a regression of classes y (N,) on
    x (N, F); each class of `weights` (classes,) weighs as much.

    The penalty is chosen by weighted log loss over inner folds of `patients` (N,): the strongest
    one that is no worse than the best by more than a standard error of the difference. Folds that
    choose alike have outputs of one scale, which one calibration fits.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    x, held_out = scaler.transform(x), scaler.transform(held_out)
    variances = VARIANCES / x.shape[1]
    inner, losses = inner_folds(patients, y), np.zeros((len(variances), len(y)))
    for fold, (k, variance) in product(np.unique(inner), enumerate(variances)):
        away = inner == fold
        probabilities = _regression(x[~away], y[~away], weights, variance, x[away])
        true = probabilities[np.arange(away.sum()), y[away]]
        losses[k, away] = -weights[y[away]] * logarithm(true)
    worse = losses - losses[losses.mean(axis=1).argmin()]
    near = worse.mean(axis=1) <= worse.std(axis=1) / np.sqrt(len(y))
    return _regression(x, y, weights, variances[near.argmax()], held_out)


def inner_folds(patients: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N,) inner fold of every series: the patients of each class are dealt out in turn."""
    _, first, own = np.unique(patients, return_index=True, return_inverse=True)
    dealt = np.empty(len(first), dtype=np.int64)
    dealt[np.argsort(classes[first], kind="stable")] = np.arange(len(first)) % INNER_FOLDS
    return dealt[own]


def _regression(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, variance: float, held_out: np.ndarray
) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    extra = np.arange(len(weights))
    x = np.concatenate([x, np.zeros((len(extra), x.shape[1]), x.dtype)])
    y, share = np.concatenate([y, extra]), np.concatenate([weights[y], 0.5 * weights])
    model = LogisticRegression(C=variance, max_iter=STEPS, tol=1e-3)
    return model.fit(x, y, sample_weight=share).predict_proba(held_out)
