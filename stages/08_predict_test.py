"""Stage 08: predict the test patients straight from DICOM and write the submission; skipped where
there are no test tables.

Reads   test_series_meta.csv, sample_submission.csv and test_images/ of the data folder,
        06_folds/fold<K>/model.safetensors and 07_oof/calibration.json below `--models` (default:
        <out>)
Writes  <out>/08_submission/submission.csv, fallbacks.csv (who got the prior, and why),
        manifest.json
"""

import argparse

from pipeline.run.command import main
from pipeline.submission.stage import predict_test


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only this stage has."""
    flags.add_argument(
        "--models",
        help="folder that holds 06_folds and 07_oof, may be read-only (default: the output folder)",
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__, predict_test, __doc__, add_flags))
