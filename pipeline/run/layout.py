"""Names of the folders and files of a run, and of the scripts that make them: the one place.

Paths are relative to the run's folder, `outputs/<config name>/` or `--out`.
"""

PHANTOM = "data/phantom"
SLICES = "01_slices"
VOLUMES = "02_volumes"
FOLDS = "03_folds"
VOCO = "04_voco2d"
ORGANS = "05_organs"
CLASSIFIERS = "06_folds"
SCORES = "07_oof"
SUBMISSION = "08_submission"
REPORT = "09_report"
ABLATION = "10_ablation"

# folder of a stage: its script, in the order of the stages
MAKERS = {
    PHANTOM: "00_make_phantom",
    SLICES: "01_convert_dicom",
    VOLUMES: "02_build_volumes",
    FOLDS: "03_make_folds",
    VOCO: "04_pretrain_voco2d",
    ORGANS: "05_segment_organs",
    CLASSIFIERS: "06_train_folds",
    SCORES: "07_score_oof",
    SUBMISSION: "08_predict_test",
    REPORT: "09_report",
    ABLATION: "10_ablate",
}

# the names that these had before stage 05 was that of the organs, a number lower: runs of that time
# bear them, and fingerprints keep them, so that what was finished then stays up to date
FORMER = {
    name: f"{int(name[:2]) - 1:02d}{name[2:]}"
    for name in (CLASSIFIERS, SCORES, SUBMISSION, REPORT, ABLATION)
}
CURRENT = {before: name for name, before in FORMER.items()}

MANIFEST = "manifest.json"  # of every stage folder, written last
INDEX = "index.parquet"  # of slices, and of volumes
QUARANTINE = "quarantine.csv"  # files that became no slice
SIDECAR = "series.json"  # of one series' slices
SLICE_TABLE = "slices.parquet"  # the slice index where no slices are kept, beside the volumes
FOLD_TABLE = "folds.csv"
BACKBONE = "backbone.safetensors"
MODEL = "model.safetensors"  # of one fold
LAST, BEST = "last.ckpt", "best.ckpt"
LOG = "log.jsonl"
MASKS = "masks"  # below `ORGANS`: expert masks on the grids of their volumes
ORGAN_TABLE = "organs.parquet"  # boxes and visible shares, one row a series and organ
DICE = "dice.csv"  # out of fold, one row a masked series and organ
OUTLINES = "outlines.png"
FOUND = "found"  # below a fold of `ORGANS`: what its segmenter found in the series held out
OOF = "oof.parquet"  # out-of-fold predictions of one fold, one row a series
# of one fold with train.second_level: its model, features of all planes by series, and beside `OOF`
# what the classifier alone predicts
SECOND_LEVEL = "second_level"
SECOND_MODEL = f"{SECOND_LEVEL}/{MODEL}"
FEATURES = "features"
FIRST_OOF = f"{SECOND_LEVEL}/first_level.parquet"
FIRST_TABLE = "first_level.parquet"  # the same of all folds
OOF_TABLE = "oof_predictions.csv"  # blended, uncalibrated, one row a series
SCORE_TABLE = "scores.json"
CALIBRATION = "calibration.json"
SUBMISSION_TABLE = "submission.csv"
FALLBACKS = (
    "fallbacks.csv"  # patients of the test set who got less than a prediction from all series
)
PAGE = "index.html"
GRIDS = "grids"  # within it the tables of every grid that was run, by its name
CELLS, TABLE, TABLE_JSON, TABLE_MD, PROBES = (
    "cells.csv",
    "table.csv",
    "table.json",
    "table.md",
    "probes.csv",
)


def volume_file(patient_id: str, series_id: str) -> str:
    """Name of one series' volume within `VOLUMES`."""
    return f"{patient_id}_{series_id}.npy"


def fold_folder(fold: int) -> str:
    """Name of one fold's folder within `CLASSIFIERS`."""
    return f"fold{fold}"


def former(folder: str) -> str:
    """The name that a stage folder, or a path in it, had before, else its own."""
    return _renamed(folder, FORMER)


def current(folder: str) -> str:
    """The name of a stage folder, or of a path in it, that may be a former one."""
    return _renamed(folder, CURRENT)


def _renamed(folder: str, names: dict[str, str]) -> str:
    stage, slash, rest = folder.partition("/")
    return names.get(stage, stage) + slash + rest


def script(folder: str) -> str:
    """The script that makes a stage folder, or a folder in it: `06_folds/fold0` -> its path."""
    stage = folder if folder in MAKERS else folder.split("/")[0]
    return f"stages/{MAKERS[stage]}.py"
