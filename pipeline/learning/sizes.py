"""Image sizes that a config gives its backbone, and whether the backbone takes them."""

import functools

from torch import nn

from ..run.config import Config
from ..system.errors import InputError
from .backbone import WrongSize, create_backbone


def crop_backbone(config: Config, init: str = "scratch") -> nn.Module:
    """The config's backbone for crops of the pretraining.

    Raises:
        InputError: what `create_backbone` raises; where it takes no crops of this size, with values
            of `pretrain.image_size` that it does.
    """
    model = config.model
    try:
        return create_backbone(model.backbone, init, model.weights, config.pretrain.crop)
    except WrongSize as fault:
        raise _refused_crops(config, fault) from fault


def check_pretraining(config: Config) -> None:
    """Raises InputError where timm lacks the backbone, or it does not take the crops that it is
    pretrained on or the planes that it is then exported for.
    """
    if fault := _misfit(config.model.backbone, config.pretrain.crop):
        raise _refused_crops(config, fault) from fault
    _check(config, "pretrain.image_size", config.pretrain.image_size)


def check_training(config: Config) -> None:
    """Raises InputError where timm lacks the backbone, or it does not take the organ finder's or
    the classifier's planes.
    """
    if config.organs.enabled:
        _check(config, "organs.image_size", config.organs.image_size)
    _check(config, "train.image_size", config.train.image_size, config.train.channels)


def _check(config: Config, key: str, size: int, channels: int = 1) -> None:
    if fault := _misfit(config.model.backbone, size, channels):
        fits = [str(one) for one in fault.sizes]
        raise _refused(config, f"images of {size} x {size}", f"{key}={size}", "it", fits) from fault


@functools.cache  # the cells of a grid ask for the same few
def _misfit(name: str, size: int, channels: int = 1) -> WrongSize | None:
    try:
        create_backbone(name, size=size, channels=channels)
    except WrongSize as fault:
        return fault
    return None


def _refused_crops(config: Config, fault: WrongSize) -> InputError:
    options, crop = config.pretrain, config.pretrain.crop
    where = f"pretrain.image_size={options.image_size} and pretrain.grid={options.grid}"
    fits = [f"{size * options.grid} (crops of {size})" for size in fault.sizes]
    return _refused(config, f"crops of {crop} x {crop}", where, "pretrain.image_size", fits)


def _refused(config: Config, what: str, where: str, it: str, fits: list[str]) -> InputError:
    other = "another model.backbone"
    return InputError(
        f"{config.model.backbone} takes no {what} pixels, or has no spatial map",
        where,
        f"set {it} to {' or '.join(fits)}, or choose {other}" if fits else f"choose {other}",
    )
