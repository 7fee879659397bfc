"""Stage 00: make the demo's phantom data set, a seeded procedural abdomen with injuries, as DICOM.

Reads   the config's `phantom` section and `seed`
Writes  <out>/data/phantom/ in the competition's layout: train_images/, test_images/, unlabelled/,
        train.csv, train_series_meta.csv, image_level_labels.csv, test_series_meta.csv,
        sample_submission.csv, segmentations/ (`phantom.masks`), and for evaluation
        only phantom_truth.csv (labels of the test patients), phantom_organs.csv (organs in view by
        slice), manifest.json
Skipped when --data names a data set or the config has `phantom: null`.
"""

from pipeline.phantom.stage import make_phantom
from pipeline.run.command import main

if __name__ == "__main__":
    raise SystemExit(main(__file__, make_phantom, __doc__))
