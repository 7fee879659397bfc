"""The views of a volume that predictions average: what they depend on beside the training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # late: stage scripts answer a Ctrl-C in one line from the first moment on
    from ..run.config import Config

VIEWS = "flips"  # name of the input in the manifest


def views(config: "Config") -> dict[str, Any]:
    """The test set's flips and phases as an input of the out-of-fold predictions, to which the
    calibration is fitted. With others a finished training is kept and its series are predicted
    anew.
    """
    options = config.predict
    found = [*options.flips, *([f"phases={options.phases}"] if options.phases > 1 else [])]
    return {VIEWS: found} if found else {}
