"""From a config or a weights file to a classifier, and from slices to probabilities: what training and inference share."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .backbone import create_backbone, feature_shape, normalise
from .checkpoint import load_weights
from .classifier import CnnLstm, probabilities
from .config import Config
from .engine import autocast


def build_model(config: Config, init: str = "scratch") -> CnnLstm:
    """The classifier of a config, its backbone from `scratch` or `imagenet`."""
    backbone = create_backbone(config.model.backbone, init, config.model.weights)
    channels = feature_shape(backbone, config.train.image_size)[0]
    return CnnLstm(backbone, channels, config.train)


def load_classifier(path: Path, config: Config, device: torch.device) -> CnnLstm:
    """The model of a `model.safetensors` written by `train_fold`, ready to predict."""
    model = build_model(config)
    load_weights(path, model)
    return model.to(device, memory_format=torch.channels_last).eval()


@torch.inference_mode()
def predict(model: CnnLstm, slices: Tensor, amp: bool = False, flips: Sequence[str] = ()) -> Tensor:
    """Probabilities (B, 13) float64 on the CPU for slices (B, S, H, W) uint8, averaged over the identity and each flip of `flips`."""
    axes = {"x": 3, "y": 2, "z": 1}
    views = [slices, *(slices.flip(axes[name]) for name in flips)]
    with autocast(slices.device, amp):
        outputs = [probabilities(model(normalise(view))[0]) for view in views]
    return torch.stack(outputs).mean(0)
