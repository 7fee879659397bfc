"""Stage 01: DICOM (and unlabelled NIfTI) series to 8-bit PNG slices, fixed window -150..250 HU.

Reads   <data>/train_series_meta.csv, <data>/train_images/<patient>/<series>/*.dcm,
        <data>/unlabelled/<patient>/<series>/*.dcm and <data>/unlabelled/**/*.nii[.gz]
Writes  <out>/01_slices/<patient>/<series>/<instance>.png, index.parquet, quarantine.csv,
        manifest.json

Series that are done and unchanged are skipped, and so is the stage with convert.keep_png=false:
stage 02 reads the images itself then. --scheduler tcp://HOST:PORT converts on a Dask
cluster; data and output folders must be on a file system that all its machines share under the
same path.
"""

from pipeline.run.command import add_scheduler, main
from pipeline.slices.stage import convert_dicom

if __name__ == "__main__":
    raise SystemExit(main(__file__, convert_dicom, __doc__, add_scheduler))
