"""Segmenters as a module, `python -m pipeline.organs`: one of several processes for folds."""

from functools import partial

from ..run.command import add_fold, main
from .stage import train_segmenter

if __name__ == "__main__":
    one_fold = partial(add_fold, required=True)
    raise SystemExit(main("05_segment_organs", train_segmenter, train_segmenter.__doc__, one_fold))
