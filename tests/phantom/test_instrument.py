"""The phantom as an instrument: grey counts, thumbnails and metadata do not tell its injuries, a
reader who looks at form inside the organ masks does.

Bounds are loose here; `tests/benchmarks/phantom.py` measures with more patients.
"""

import numpy as np
import pytest
from helpers_instrument import READER, best_constant, draw_features, judged, random_folds
from sklearn.metrics import roc_auc_score

from pipeline.competition.metric import score_arrays
from pipeline.competition.targets import COLUMNS, TARGET_NAMES
from pipeline.run.presets import load_config

PATIENTS = 180


@pytest.mark.slow
def test_form_tells_injuries_and_nothing_else_does():
    """One test, so that the patients are drawn once."""
    config = load_config("demo", [])
    phantom = config.phantom.model_copy(
        update={"train_patients": PATIENTS, "unlabelled_patients": 0, "second_series": 0.0}
    )
    labels, features = draw_features(phantom, config.volume, 1)
    found, best = judged(labels, features, random_folds(PATIENTS, 3, 0)), best_constant(labels)
    for blind in ("histogram", "thumbnail", "metadata"):
        scores = score_arrays(labels, found[blind][1])
        assert scores["score"] > 0.88 * best["score"], blind
        for name in TARGET_NAMES:
            assert scores[name] > 0.8 * best[name], (blind, name)
    raw = found[READER][0]
    auc = {name: roc_auc_score(labels[:, k], raw[:, k]) for k, name in enumerate(COLUMNS)}
    for name in ("kidney_high", "liver_high", "spleen_high", "extravasation_injury"):
        assert auc[name] > 0.85, auc
    assert auc["bowel_injury"] > 0.85, auc
    low = [auc[name] for name in ("kidney_low", "liver_low", "spleen_low")]
    assert min(low) > 0.55, "27 patients each: an area is known to 0.06"
    assert np.mean(low) > 0.7
    assert np.mean(list(auc.values())) > 0.85
