"""Stage 06 as a module, `python -m pipeline.classifier`: one of several processes for folds."""

from ..run.command import add_fold, main
from .stage import train_folds

if __name__ == "__main__":
    raise SystemExit(main("06_train_folds", train_folds, train_folds.__doc__, add_fold))
