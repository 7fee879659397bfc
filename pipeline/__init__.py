"""VoCo2D: raw abdominal-trauma CT to a scored Kaggle submission, with 2D-VoCo pretraining.

The method is that of arXiv 2601.14593. What a notebook needs can be imported from here; it loads
when it is asked for: `from pipeline import pretrain_voco2d, load_config` (docs/notebook.md).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# name: the module that defines it
_HOME = {
    "make_phantom": "phantom.stage",
    "convert_dicom": "slices.stage",
    "build_volumes": "volumes.stage",
    "make_folds": "folds",
    "pretrain_voco2d": "voco.stage",
    "segment_organs": "organs.stage",
    "train_folds": "classifier.stage",
    "score_oof": "evaluation.stage",
    "predict_test": "submission.stage",
    "write_report": "report.stage",
    "ablate": "ablation.stage",
    "load_config": "run.presets",
    "load_classifier": "classifier.predict",
    "predict_volume": "classifier.predict",
    "pretrain": "voco.pretrain",
    "train_fold": "classifier.train",
    "score": "competition.metric",
}
__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
