"""Can the phantom be fooled? `python tests/benchmarks/phantom.py [--config demo]`.

Draws so many training patients of a preset in memory, resamples them to the preset's volumes and
lets four readers answer, each a logistic regression on the folds of others, calibrated as the
models are: 64 grey counts, the volume shrunk to 8 x 16 x 16, all metadata, and features of form
inside the true organ masks about each finding. Prints Markdown tables with bootstrap intervals over
patients and says which of the bounds are missed (exit code 1).
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from helpers_instrument import (  # noqa: E402
    READER,
    READERS,
    best_constant,
    draw_features,
    judged,
    random_folds,
)

from pipeline.competition.targets import COLUMNS, SCORE_KEYS, TARGET_NAMES  # noqa: E402
from pipeline.evaluation.metrics import score_intervals  # noqa: E402
from pipeline.run.presets import load_config  # noqa: E402

# Least share of the best constant that a blind reader's score may be: overall and of each target.
BOUNDS = {"demo": (0.88, 0.80), "ablation_quick": (0.93, 0.85), "ablation_full": (0.93, 0.85)}
# Least area under the ROC curve of the reader with masks.
AREAS = {
    name: 0.9 if name.endswith("high") or name.startswith("extravasation") else 0.75
    for name in COLUMNS
    if not name.endswith("healthy")
}


def scores_table(labels, found, best, resamples):
    """Rows of the scores with their intervals; and the scores, by reader and key."""
    scores = {name: score_intervals(labels, found[name][1], resamples, 0) for name in READERS}
    print("| | best constant |", " | ".join(READERS), "|")
    print("|---" * (2 + len(READERS)) + "|")
    for key in SCORE_KEYS:
        cells = [
            f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            for one in (scores[name][key] for name in READERS)
        ]
        print(f"| {key} | {best[key]:.3f} |", " | ".join(cells), "|")
    return scores


def areas_table(labels, found, resamples):
    """Areas under the ROC curve of the reader with masks, with intervals."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(labels), (resamples, len(labels)))
    print("\n| class |", " | ".join(f"AUC, {name}" for name in READERS), "|")
    print("|---" * (1 + len(READERS)) + "|")
    areas = {}
    for name in AREAS:
        k, cells = COLUMNS.index(name), []
        for reader in READERS:
            p, y = found[reader][0][:, k], labels[:, k]
            low, high = np.percentile([roc_auc_score(y[i], p[i]) for i in drawn], (2.5, 97.5))
            areas[reader, name] = roc_auc_score(y, p)
            cells.append(f"{areas[reader, name]:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} |", " | ".join(cells), "|")
    return areas


def missed(preset, scores, best, areas):
    """Sentences on the bounds that do not hold."""
    overall, each = BOUNDS.get(preset, BOUNDS["demo"])
    blind = [name for name in READERS if name != READER]
    shares = {(n, k): scores[n][k]["value"] / best[k] for n in blind for k in SCORE_KEYS}
    found = [
        f"{name} has {shares[name, key]:.2f} of the best constant's {key}"
        for name in blind
        for key in (*TARGET_NAMES, "score")
        if shares[name, key] < (overall if key == "score" else each)
    ]
    return found + [
        f"{READER}: {name} {areas[READER, name]:.2f} is below {least}"
        for name, least in AREAS.items()
        if areas[READER, name] < least
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--resamples", type=int, default=500)
    options = parser.parse_args()
    config, start = load_config(options.config, []), time.perf_counter()
    phantom = config.phantom.model_copy(
        update={
            "train_patients": options.patients,
            "unlabelled_patients": 0,
            "second_series": 0.0,
        }
    )
    labels, features = draw_features(phantom, config.volume, options.seed, options.jobs)
    print(f"{options.patients} patients of {config.name}, {time.perf_counter() - start:.0f} s\n")
    found = judged(labels, features, random_folds(len(labels), options.folds, options.seed))
    best = best_constant(labels)
    scores = scores_table(labels, found, best, options.resamples)
    areas = areas_table(labels, found, options.resamples)
    faults = missed(options.config, scores, best, areas)
    print("\n" + ("\n".join(faults) or "All bounds hold."))
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
