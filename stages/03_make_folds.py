"""Stage 03: divide the labelled patients into folds, once.

Reads   train.csv and train_series_meta.csv of the data folder.
Writes  03_folds/folds.csv (patient_id,fold); prints how many patients of each class every fold
        has.
"""

from pipeline.folds import make_folds
from pipeline.run.command import main

if __name__ == "__main__":
    raise SystemExit(main(__file__, make_folds, __doc__))
