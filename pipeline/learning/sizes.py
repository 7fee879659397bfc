"""Image sizes that a config gives its backbone, and whether the backbone takes them."""

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
    model, options = config.model, config.pretrain
    crop = options.image_size // options.grid
    try:
        return create_backbone(model.backbone, init, model.weights, crop)
    except WrongSize as fault:
        fits = [f"{size * options.grid} (crops of {size})" for size in fault.sizes]
        raise InputError(
            f"{model.backbone} takes no crops of {crop} x {crop} pixels, or has no spatial map",
            f"pretrain.image_size={options.image_size} and pretrain.grid={options.grid}",
            f"set pretrain.image_size to {' or '.join(fits)}, or choose another model.backbone"
            if fits
            else "choose another model.backbone",
        ) from fault


def check_pretraining(config: Config) -> None:
    """Raises InputError where timm lacks the backbone, or it does not take the crops that it is
    pretrained on or the planes that it is then exported for.
    """
    crop_backbone(config)
    _check(config, "pretrain.image_size", config.pretrain.image_size)


def check_training(config: Config) -> None:
    """Raises InputError where timm lacks the backbone, or it does not take the organ finder's or
    the classifier's planes.
    """
    if config.organs.enabled:
        _check(config, "organs.image_size", config.organs.image_size)
    _check(config, "train.image_size", config.train.image_size, config.train.channels)


def _check(config: Config, key: str, size: int, channels: int = 1) -> None:
    name = config.model.backbone
    try:
        create_backbone(name, size=size, channels=channels)
    except WrongSize as fault:
        raise InputError(
            f"{name} takes no images of {size} x {size} pixels, or has no spatial map",
            f"{key}={size}",
            f"set it to {' or '.join(map(str, fault.sizes))}, or choose another model.backbone"
            if fault.sizes
            else "choose another model.backbone",
        ) from fault
