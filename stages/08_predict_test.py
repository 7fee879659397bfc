"""Stage 08: predict the test patients straight from DICOM and write the submission; skipped where
there are no test tables.

Reads   test_series_meta.csv, sample_submission.csv and test_images/ of the data folder,
        06_folds/fold<K>/model.safetensors, where they were trained with them second_level/ and
        05_organs/, and 07_oof/calibration.json below `--models` (default: <out>); of several runs
        the models of each, and <out>/07_oof/ that stage 07 made of the same `--models`
Writes  <out>/08_submission/submission.csv, fallbacks.csv (who got the prior, and why),
        manifest.json
"""

from pipeline.run.command import add_models, main
from pipeline.submission.stage import predict_test

if __name__ == "__main__":
    raise SystemExit(main(__file__, predict_test, __doc__, add_models))
