"""Segmenters as a module, `python -m pipeline.organs`: one of several processes for folds."""

from ..run.command import add_fold, main
from .stage import train_segmenter

if __name__ == "__main__":
    raise SystemExit(main("05_segment_organs", train_segmenter, train_segmenter.__doc__, add_fold))
