"""What the networks of a preset take, counted from shapes alone: no arithmetic and no memory, so
that a batch for a card of 24 GB is counted on any machine.

Layers are the library's own, in half precision, as a GPU runs them. Multiply-adds are those of
convolutions and matrix products; recurrent cells, under a hundredth of them, are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pipeline.classifier.predict import build_model
from pipeline.learning.backbone import create_backbone
from pipeline.organs.loss import organ_terms
from pipeline.organs.model import build_segmenter
from pipeline.run.config import Config
from pipeline.voco.model import VocoNet

# a backward pass is two forward passes: the gradients of what goes in and of the weights
TRAINING = 3


@dataclass(frozen=True)
class Counted:
    """Of one training step: `parameters` of the network, `macs` (multiply-adds) of its forward
    pass, `kept` bytes that stay for the backward pass, and how many `pictures` it sees.
    """

    parameters: int
    macs: int
    kept: int
    pictures: int

    @property
    def picture_macs(self) -> float:
        """Multiply-adds of a picture's forward pass."""
        return self.macs / self.pictures


def count(
    make: Callable[[], nn.Module], forward: Callable[[nn.Module], Tensor], pictures: int
) -> Counted:
    """Count one forward pass for training of a network: `make` builds it, `forward` calls it and
    gives its loss.
    """
    kept: dict[int, int] = {}
    alive = []  # so that no storage takes the number of another

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    library = mock.patch("pipeline.learning.fast_layers.speed_up", lambda module: module)
    with library, FakeTensorMode():
        network = make().train()
        half = torch.autocast("cpu", dtype=torch.bfloat16)
        hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks, half:
            loss = forward(network)
        assert loss.requires_grad
        parameters = sum(one.numel() for one in network.parameters())
    return Counted(parameters, counter.get_total_flops() // 2, sum(kept.values()), pictures)


def count_pretraining(config: Config) -> Counted:
    """Of the student in a step of stage 04."""
    options, name = config.pretrain, config.model.backbone
    side, crops = options.image_size // options.grid, options.random_crops + options.grid**2

    def make() -> nn.Module:
        backbone = create_backbone(name, size=side)
        return VocoNet(backbone, side, options.width, options.pool, options.z_bins)

    shape = options.batch, crops, options.slices, side, side
    pictures = options.batch * crops * options.slices
    return count(make, lambda net: net(torch.zeros(shape, dtype=torch.uint8)).sum(), pictures)


def count_segmenter(config: Config) -> Counted:
    """Of a step of stage 05."""
    options = config.organs
    batch, size = options.batch, options.image_size

    def forward(net: nn.Module) -> Tensor:
        labels = torch.zeros(batch, size, size, dtype=torch.uint8)
        terms = organ_terms(net(torch.zeros(batch, 3, size, size)), labels)
        return terms["dice"] + terms["entropy"]

    return count(lambda: build_segmenter(config), forward, batch)


def count_classifier(config: Config) -> Counted:
    """Of a forward and backward pass of stage 06; `train.accumulate` of them are a step."""
    options = config.train
    pictures = options.batch * options.sample_slices
    shape = options.batch, options.sample_slices * options.channels, *[options.image_size] * 2

    def forward(net: nn.Module) -> Tensor:
        logits, slices = net(torch.zeros(shape))
        parts = [*logits.values(), *slices]
        return torch.cat([part.flatten() for part in parts]).sum()

    return count(lambda: build_model(config), forward, pictures)
