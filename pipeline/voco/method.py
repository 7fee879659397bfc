"""What a method of pretraining brings to the loop: networks, a loss, a figure of merit.

The loop (`pretrain.py`), the step (`step.py`), data and checkpoints know nothing else of it.
A new method is a subclass in a file of its own and a line in `METHODS` (docs/extending.md).
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import nn

from ..learning import optimise
from ..learning.backbone import placed
from ..learning.compilation import compile_passes
from ..learning.distributed import World, sync_batch_norm
from ..learning.sizes import crop_backbone
from ..run.config import Config
from ..system.errors import InputError
from .data import Batch, VocoSamples

N = TypeVar("N", bound=nn.Module)


class Method(ABC):
    """A method of pretraining at work; `student` is what the optimiser trains."""

    stats: ClassVar[tuple[str, ...]]  # names of the figures of `loss`, the loss itself first
    merit: str  # which figure of `evaluate` the best backbone is chosen by
    pairs: ClassVar[bool] = False  # whether each place is shown twice, instead of base crops
    student: nn.Module

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.options, self.world = config, config.pretrain, world

    def first_backbone(self) -> nn.Module:
        """The backbone that training starts from, for images of the crops' size."""
        return crop_backbone(self.config, self.options.init)

    @cached_property
    def distributed_student(self) -> nn.Module:
        """`student` as `loss` is to call it: its gradients become their means over ranks."""
        return self.world.parallel(self.student)

    def prepared(self, network: N) -> N:
        """A network to train, on the run's device, the same on every rank."""
        network = placed(network, self.world.device)
        self.world.broadcast(network)
        return network

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by name."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """What is exported."""

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's loss, to differentiate, and the figures `stats` of its part of the batch; the
        student is called as `distributed_student`.
        """

    @abstractmethod
    def evaluate(self, samples: VocoSamples) -> dict[str, float]:
        """Figures of held-out volumes by name, among them `merit`; larger is better."""

    def baselines(self, training: VocoSamples, held: VocoSamples) -> dict[str, float]:
        """What is reached without a network, by name: `<baseline>_<figure of evaluate>`."""
        return {}

    def after_step(self, step: int) -> dict[str, float]:
        """What follows the optimiser's step, e.g. an averaged teacher; returns figures to log."""
        return {}

    def recompute_activations(self, backbone: nn.Module) -> None:
        """Recompute activations in the backward pass where `pretrain.activation_checkpointing` is
        on.
        """
        if not self.options.activation_checkpointing:
            return
        try:
            backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError) as fault:
            what = f"{self.config.model.backbone} cannot recompute its activations"
            remedy = "set it to false or choose another model.backbone"
            raise InputError(what, "pretrain.activation_checkpointing=true", remedy) from fault

    def compile(self, backbone: nn.Module) -> None:
        """Have the passes of a backbone compiled where `pretrain.compile` is on."""
        if wanted := self.options.compile:
            mode = None if wanted is True else wanted
            compile_passes(backbone, self.world.device, "pretrain.compile", mode)


class OneNetwork(Method):
    """A method that trains one network, whose `backbone` is exported."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        self.student = sync_batch_norm(self.prepared(self.network()), world).train()
        self.recompute_activations(self.backbone)
        self.compile(self.backbone)

    @abstractmethod
    def network(self) -> nn.Module:
        """The network that training starts from, around `first_backbone`."""

    def output(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """What `network`, the student by one name or the other, says of this rank's crops."""
        with optimise.autocast(self.world.device, self.options.amp):
            return network(batch["crops"].to(self.world.device, non_blocking=True))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The one."""
        return {"student": self.student}

    @property
    def backbone(self) -> nn.Module:
        """Its own."""
        return self.student.get_submodule("backbone")
