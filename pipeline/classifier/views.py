"""What predictions depend on beside the training: the views of a volume that they average, and the
second level. With others a finished training is kept.
"""

from typing import TYPE_CHECKING, Any

from ..run import layout
from ..run.manifest import read_manifest, stage_folder
from ..run.stage import Stage

if TYPE_CHECKING:  # late: stage scripts answer a Ctrl-C in one line from the first moment on
    from ..run.config import Config

VIEWS, SECOND_LEVEL = "flips", "second_level"  # names of the inputs in the manifest
MASKS = f"{layout.ORGANS}/{layout.MASKS}"  # what `train.dice_loss` learns from


def views(config: "Config") -> dict[str, Any]:
    """The test set's flips and phases as an input of the out-of-fold predictions, to which the
    calibration is fitted. With others a finished training is kept and its series are predicted
    anew.
    """
    options = config.predict
    found = [*options.flips, *([f"phases={options.phases}"] if options.phases > 1 else [])]
    return {VIEWS: found} if found else {}


def uses_organs(stage: Stage) -> bool:
    """Whether stage 06 reads what stage 05 found: where training needs it, and for the gates of a
    second level where it is there.
    """
    train = stage.config.train
    there = read_manifest(stage_folder(stage.out, layout.ORGANS)) is not None
    return train.needs_organs or (train.second_level.enabled and there)


def second_level(config: "Config") -> dict[str, Any]:
    """The second level's options as an input of the out-of-fold predictions; nothing where it is
    off.
    """
    from ..run.config import decisive

    options = config.train.second_level
    return {SECOND_LEVEL: decisive(options)} if options.enabled else {}


def beside_training(config: "Config") -> tuple[str, ...]:
    """Names of the inputs that the classifier's training does not depend on."""
    return (VIEWS, SECOND_LEVEL, *(() if config.train.needs_organs else (layout.ORGANS,)))
