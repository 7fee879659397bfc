"""From a config or a weights file to a classifier, and from slices to probabilities: what training
and inference share.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..competition.targets import COLUMNS
from ..learning.backbone import create_backbone, feature_shape, placed, standardise
from ..learning.checkpoint import described, load_weights
from ..learning.optimise import autocast
from ..organs.find import Organ
from ..run import layout
from ..run.config import (
    Config,
    ConvertConfig,
    ModelConfig,
    Section,
    TrainConfig,
    VolumeConfig,
)
from ..volumes.sampling import even_slices
from .model import CnnLstm, probabilities
from .regions import region_windows


class Trained(Section):
    """The sections of a config that are kept with a classifier's weights: they rebuild the model
    and say what volumes it knows.
    """

    model: ModelConfig
    train: TrainConfig
    volume: VolumeConfig
    convert: ConvertConfig


def build_model(config: Config | Trained, init: str = "scratch") -> CnnLstm:
    """The classifier of a config, its backbone from `scratch` or `imagenet`."""
    model, options = config.model, config.train
    size, planes = options.image_size, options.channels
    backbone = create_backbone(model.backbone, init, model.weights, size, planes)
    channels = feature_shape(backbone, size, planes)[0]
    return CnnLstm(backbone, channels, options)


def load_classifier(path: Path, device: torch.device | str = "cpu") -> tuple[CnnLstm, Trained]:
    """Rebuild the model of a `model.safetensors` of stage 06 from its own metadata, ready to
    predict, with its config.

    Raises:
        InputError: not a classifier of this project, or tensors that do not fit.
    """
    maker = layout.script(layout.CLASSIFIERS)
    config = described(path, Trained, "classifier of stage 06", maker)
    model = build_model(config)
    load_weights(model, path)
    return placed(model, device).eval(), config


def mean_logits(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of the logits (B, 1 or 3) of several models or views, float64. For classes it is the
    mean of log-probabilities: what one says with certainty does not drown in the others' doubt, as
    it does in a mean of probabilities.
    """
    return {
        name: torch.stack([answer[name].double() for answer in answers]).mean(0)
        for name in answers[0]
    }


@torch.inference_mode()
def logits_of(
    models: Sequence[CnnLstm],
    slices: Tensor,
    amp: bool = False,
    flips: Sequence[str] = (),
    each: Callable[..., Iterable[Any]] = map,
) -> list[dict[str, Tensor]]:
    """For each model the logits per target (B, 1 or 3) float64 on the CPU for slices (B, S, H, W)
    uint8, or (B, phases, S, H, W), those of regions one after another, averaged over phases and, in
    each, over the identity and each flip of `flips`, a name of axes such as `zy`. `each` maps over
    the models; the device is waited for once, with the answers of all.

    What overflows in mixed precision, as a model trained in bfloat16 may on a GPU that has float16
    only, is computed again in float32.
    """
    answers = on_host(list(each(lambda model: _mean_of_views(model, slices, amp, flips), models)))
    for k, answer in enumerate(answers):
        if amp and not all(value.isfinite().all() for value in answer.values()):
            answers[k] = logits_of([models[k]], slices, False, flips)[0]
    return answers


@torch.inference_mode()  # of this thread
def _mean_of_views(
    model: CnnLstm, slices: Tensor, amp: bool, flips: Sequence[str]
) -> dict[str, Tensor]:
    axes = {"x": 3, "y": 2, "z": 1}
    phases = slices.unbind(1) if slices.ndim == 5 else [slices]
    turns: list[list[int]] = [[], *([axes[axis] for axis in flip] for flip in flips)]
    views = (
        torch.cat([part.flip(turn) for part in one.split(model.region_planes, 1)], 1)
        if turn
        else one
        for one in phases
        for turn in turns
    )
    with autocast(slices.device, amp):
        return mean_logits([model(standardise(view))[0] for view in views])


def on_host(answers: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Logits (B, 1 or 3) by target, of several models, on the CPU: one transfer for all."""
    widths = {name: logits.shape[1] for name, logits in answers[0].items()}
    table = torch.stack([torch.cat([answer[name] for name in widths], 1) for answer in answers])
    return [
        dict(zip(widths, rows.split(list(widths.values()), 1), strict=True)) for rows in table.cpu()
    ]


def predict(model: CnnLstm, slices: Tensor, amp: bool = False, flips: Sequence[str] = ()) -> Tensor:
    """Probabilities (B, 13) float64 on the CPU of `logits_of`."""
    return probabilities(logits_of([model], slices, amp, flips)[0])


def as_batch(
    volume: np.ndarray,
    options: TrainConfig,
    device: torch.device,
    phases: int = 1,
    organs: Sequence[Organ] = (),
) -> Tensor:
    """`even_slices` that a classifier trained with `options` looks at in a volume (D, H, W) uint8
    with these `organs`, as a batch of one.
    """
    windows = region_windows(organs, (len(volume), *volume.shape[1:]), options)
    batch = torch.from_numpy(even_slices(volume, options, phases, windows))[None]
    # from pinned memory the copy waits for nothing
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def predict_volume(
    model: CnnLstm,
    volume: np.ndarray,
    options: TrainConfig,
    flips: Sequence[str] = (),
    phases: int = 1,
    organs: Sequence[Organ] = (),
) -> dict[str, float]:
    """Uncalibrated probabilities of one volume (D, H, W) uint8, as stage 02 stores it, by the 13
    columns of a submission. A model of `train.regions=organs` looks at the whole volume in place of
    every region whose organ is not among `organs`, which `pipeline.organs.find.OrganFinder` gives.
    """
    batch = as_batch(volume, options, next(model.parameters()).device, phases, organs)
    return dict(zip(COLUMNS, predict(model, batch, options.amp, flips)[0].tolist(), strict=True))
