"""The one door to albumentations, whose last release is 2.0.8: no other module imports it."""

import os
from types import ModuleType


def albumentations() -> ModuleType:
    """The library, imported at the first call."""
    # its import looks for a newer release on the network
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations
