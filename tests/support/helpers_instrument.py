"""What can be told from phantom patients without looking at form: baselines on grey counts, on
thumbnails and on metadata, and a reader who is given the true organ masks.

Volumes are drawn and resampled in memory, with no files between.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial

import cv2
import numpy as np
import polars as pl
from scipy.ndimage import (
    find_objects,
    gaussian_filter,
    label,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from pipeline.competition.metric import constants
from pipeline.competition.strict_table import KEY
from pipeline.competition.targets import COLUMNS, TARGETS
from pipeline.evaluation.baselines import histogram_features, thumbnail_features
from pipeline.evaluation.scoring import nested
from pipeline.phantom.anatomy import make_scan
from pipeline.phantom.dataset import one_hot
from pipeline.phantom.hospitals import HOSPITALS
from pipeline.phantom.plan import TRAIN, make_plan
from pipeline.phantom.tissues import PHASES
from pipeline.run.config import ScoreConfig
from pipeline.slices.window import window
from pipeline.volumes.build import build_volume

READER = "reader with masks"
READERS = ("histogram", "thumbnail", "metadata", READER)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the regressions


def stored_volume(hu, spacing, config):
    """The stored (D, H, W) uint8 volume of HU planes."""
    grey = window(hu)
    z = -np.arange(len(grey)) * spacing[0]
    sizes = [plane.shape for plane in grey]
    return build_volume(iter(grey), sizes, z, spacing[1:], config).array


def metadata(plan, scan):
    """What tables and headers say of a patient, hospital included."""
    series = plan.series[0]
    one_hot_of = [series.phase == phase for phase in PHASES]
    one_hot_of += [plan.hospital == hospital for hospital in HOSPITALS]
    air = scan.hu[:, 2:6, 2:6].std()
    extent = scan.spacing[0] * len(scan.hu)
    identity = [int(plan.patient_id), int(series.series_id), plan.index]
    header = [len(scan.hu), *scan.spacing, extent, scan.aortic_hu, air, float(series.masks)]
    return np.array([*identity, *header, *one_hot_of], dtype=float)


def patient_features(config, volume, seed, plan):
    key = (seed, plan.split, plan.index)
    scan = make_scan(config, plan.labels, key, 0, plan.series[0].phase, plan.hospital)
    stored = stored_volume(scan.hu, scan.spacing, volume)
    return {
        "histogram": histogram_features(stored),
        "thumbnail": thumbnail_features(stored),
        "metadata": metadata(plan, scan),
        **reader_features(scan),
    }


def shape_features(dark, spacing, organ):
    """Volume and form of a dark part of an organ: how far its voxels lie from its edge, how long
    its parts are, how much of it lies near the surface.
    """
    parts, _ = label(dark)
    sizes = np.bincount(parts.ravel())[1:]
    if not len(sizes) or sizes.max() < 4:
        return np.zeros(9)
    large = parts == 1 + sizes.argmax()
    inside, depth = edge_distance(dark, 1.0), edge_distance(organ, 1.0)
    at = np.argwhere(large) * spacing
    axes = np.sqrt(np.linalg.eigvalsh(np.cov(at.T) + np.eye(3)))
    extent = np.ptp(at, axis=0)
    values = inside[dark]
    return np.array(
        [
            dark.sum() / organ.sum(),
            large.sum() / organ.sum(),
            np.mean(values),
            np.max(values),
            axes[2] / np.linalg.norm(extent + 1),
            axes[2],
            extent[0],
            large.sum() * np.prod(spacing) / np.prod(axes),
            np.mean(depth[dark] <= 2),
        ]
    )


def organ_features(hu, masks, spacing, number):
    organ = masks == number
    if organ.sum() < 30:
        return np.zeros(27)
    box = find_objects(organ.astype(int))[0]
    box = tuple(slice(max(0, s.start - 2), s.stop + 2) for s in box)
    organ, hu = organ[box], hu[box].astype(float)
    middle = np.quantile(hu[organ], 0.5 if number < 3 else 0.75)
    weight = gaussian_filter(organ.astype(float), (0, 0.7, 0.7)) + 1e-6
    smooth = gaussian_filter(np.where(organ, hu - middle, 0), (0, 0.7, 0.7)) / weight
    drops = (25, 35, 48) if number < 3 else (45, 65, 85)
    found = [shape_features(organ & (smooth < -drop), spacing, organ) for drop in drops]
    return np.concatenate(found)


def edge_distance(mask, mm):
    """Distance in the plane (mm) of each voxel to the edge of its part."""
    planes = [cv2.distanceTransform(p, cv2.DIST_L2, 5) for p in mask.astype(np.uint8)]
    return np.stack(planes).astype(np.float64) * mm


def around(scan, name, reach):
    """HU, masks and distance (mm) from the site of a finding, within `reach` mm of it."""
    site, spacing = np.array(scan.sites[name]), np.array(scan.spacing)
    steps = np.ceil(reach / spacing).astype(int)
    low = np.maximum(site - steps, 0)
    box = tuple(slice(a, b + 1) for a, b in zip(low, site + steps, strict=True))
    hu = scan.hu[box].astype(np.float32)
    grid = np.indices(hu.shape).transpose(1, 2, 3, 0) + low - site
    return hu, scan.masks[box], np.linalg.norm(grid * spacing, axis=-1)


def bowel_features(scan):
    """Thickness of the wall of the loop, and thin grey lines in the fat about it."""
    hu, masks, far = around(scan, "bowel", 70)
    mm = scan.spacing[1]
    smooth = gaussian_filter(hu, (0, 0.5, 0.5))
    loop = (masks == 5) & (far < 24)
    wall = loop & (smooth > 55)
    fat = (masks == 0) & (smooth < 75) & (far < 65)
    grey = fat & (smooth > -55)
    deep = edge_distance(grey, mm)
    rings = [grey & (far > a) & (far < a + 15) for a in (20, 35, 50)]
    return np.array(
        [
            wall.sum() / max(loop.sum(), 1),
            np.mean(smooth[(masks == 5) & (far < 12)]) if ((masks == 5) & (far < 12)).any() else 0,
            edge_distance(wall, mm).max(),
            grey.sum() / max(fat.sum(), 1),
            deep[grey].mean() if grey.any() else 0,
            *np.quantile(deep[grey] if grey.any() else [0.0], (0.75, 0.9, 0.98)),
            *(r.sum() * np.prod(scan.spacing) / 1e4 for r in rings),
        ]
    )


def bright_features(scan):
    """Form of the bright volume and what lies about it."""
    hu, masks, far = around(scan, "extravasation", 60)
    mm = scan.spacing[1]
    bright = (hu > 200) & (masks != 3) & (masks != 4) & (far < 45)
    parts, count = label(bright)
    if not count:
        return np.zeros(8)
    sizes = np.bincount(parts.ravel())[1:]
    middle = [far[parts == k + 1].min() / 20 - np.log(sizes[k]) for k in range(count)]
    own = parts == 1 + int(np.argmin(middle))
    away = edge_distance(~own, mm)
    ring = hu[(away > 1.5 * mm) & (away < 4.5 * mm) & own.any(axis=(1, 2))[:, None, None]]
    flat = np.argwhere(own.any(axis=0)) * mm
    extent = (
        np.sqrt(np.linalg.eigvalsh(np.cov(flat.T) + mm**2 / 6 * np.eye(2)))
        if len(flat) > 2
        else np.ones(2)
    )
    return np.array(
        [
            np.log(own.sum()),
            extent[1],
            extent[1] / extent[0],
            far[own].min(),
            edge_distance(own, mm).max(),
            np.mean((ring > -20) & (ring < 100)) if len(ring) else 0,
            np.mean(ring < -50) if len(ring) else 0,
            np.mean((hu > 15) & (hu < 80) & (masks == 0) & (far < 25)),
        ]
    )


def reader_features(scan):
    """Features by target of a reader who is given the organ masks."""
    one = (scan.hu, scan.masks, np.array(scan.spacing))
    side = np.bincount(around(scan, "kidney", 40)[1].ravel(), minlength=6)
    return {
        "bowel": bowel_features(scan),
        "extravasation": bright_features(scan),
        "kidney": organ_features(*one, 3 if side[3] > side[4] else 4),
        "liver": organ_features(*one, 1),
        "spleen": organ_features(*one, 2),
    }


def draw_features(config, volume, seed, jobs=2):
    plans = [plan for plan in make_plan(config, seed) if plan.split == TRAIN]
    work = partial(patient_features, config, volume, seed)
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(pool.map(work, plans, chunksize=8))
    labels = np.array([one_hot(plan.labels) for plan in plans])
    return labels, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def regression(train, classes, test):
    """Class probabilities of `test` by a standardised logistic regression, C by inner folds."""
    scale = StandardScaler().fit(train)
    train, test = scale.transform(train), scale.transform(test)
    if train.shape[1] > len(train):  # a rotation: the penalty and the answer stay the same
        axes = np.linalg.svd(train, full_matrices=False)[2]
        train, test = train @ axes.T, test @ axes.T
    folds = StratifiedKFold(min(3, np.bincount(classes).min()), shuffle=True, random_state=0)
    search = GridSearchCV(
        LogisticRegression(max_iter=2000), {"C": STRENGTHS}, scoring="neg_log_loss", cv=folds
    )
    return search.fit(train, classes).predict_proba(test)


def predictions(features, labels, folds):
    """(N, 13) out-of-fold probabilities by a regression on the features of each target."""
    answer, at = np.zeros(labels.shape), 0
    for target in TARGETS:
        where = slice(at, at + len(target.classes))
        at = where.stop
        classes, own = labels[:, where].argmax(axis=1), features[target.name]
        for fold in np.unique(folds):
            held = folds == fold
            answer[held, where] = regression(own[~held], classes[~held], own[held])
    return answer


def random_folds(count, folds, seed):
    return np.random.default_rng(seed).permutation(np.arange(count) % folds)


def nested_predictions(probabilities, labels, folds):
    """(N, 13) predictions calibrated as the models' are, each fold by the others."""
    ids = [f"{k:05d}" for k in range(len(labels))]
    frame = pl.DataFrame({KEY: ids, "series_id": ids}).hstack(
        pl.DataFrame(probabilities, schema=COLUMNS, orient="row")
    )
    truth = pl.DataFrame({KEY: ids}).hstack(pl.DataFrame(labels, schema=COLUMNS, orient="row"))
    split = pl.DataFrame({KEY: ids, "fold": folds})
    found = nested({"one": frame}, truth, split, ScoreConfig(bootstrap=0))["nested"]
    return found.select(COLUMNS).to_numpy()


def judged(labels, features, folds):
    """Of every reader, (N, 13) out-of-fold probabilities and the same calibrated, nested."""
    found = {}
    for name in READERS:
        own = {t.name: features[t.name if name == READER else name] for t in TARGETS}
        with threadpool_limits(1):  # threads cost these small products five times what they take
            raw = predictions(own, labels, folds)
        found[name] = (raw, nested_predictions(raw, labels, folds))
    return found


def best_constant(labels):
    return constants(labels)["weighted_means"]
