"""2D-VoCo: a student and its averaged teacher, contrasted by where their crops lie."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from ..learning import optimise
from ..learning.distributed import World, sync_batch_norm
from ..run.config import Config
from . import baselines
from .crops import hits
from .data import Batch, VocoSamples, evaluation_batches
from .losses import similarity
from .method import Method
from .model import (
    Embeddings,
    RoundedCopy,
    VocoNet,
    correlation,
    dropout_mask,
    make_teacher,
    spread_of,
    voco_terms,
)


def rounds_together(device: torch.device) -> bool:
    """Whether rounding the teacher's weights one by one costs time: a GPU's launches do."""
    return device.type == "cuda"


class Voco2D(Method):
    """Position contrast between random and base crops (docs/method.md)."""

    stats = ("loss", "intra", "inter", "reg", "std", "correlation")
    student: VocoNet

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        options = self.options
        self.merit = "place_accuracy" if options.z_bins > 1 else "position_accuracy"
        student = VocoNet(
            self.first_backbone(), options.crop, options.width, options.pool, options.z_bins
        )
        student = self.prepared(student)
        self.teacher: VocoNet = sync_batch_norm(make_teacher(student), world)
        self.student = sync_batch_norm(student, world).train()
        self.average = optimise.Average(self.teacher, self.student)
        self.recompute_activations(self.student.backbone)
        for network in (self.student, self.teacher):
            self.compile(network.backbone)
        self.teaching = self._teaching()

    def _teaching(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The teacher's forward pass in a step."""
        options, device = self.options, self.world.device
        dtype = optimise.amp_dtype(device) if options.amp and rounds_together(device) else None
        # the compiler makes the roundings part of other kernels
        return (
            self.teacher if dtype is None or options.compile else RoundedCopy(self.teacher, dtype)
        )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Student and teacher."""
        return {"student": self.student, "teacher": self.teacher}

    @property
    def backbone(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.backbone

    @property
    def one_sided(self) -> bool:
        """Whether all terms that count compare the student's random with the teacher's base crops:
        then neither looks at any other.
        """
        options = self.options
        return options.base_encoder == "teacher" and not (
            options.symmetric or options.inter or options.regularisation
        )

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of intra, inter and regularisation."""
        options, world = self.options, self.world
        crops = batch["crops"].to(world.device, non_blocking=True)  # (B, P, S, h, w)
        overlap = batch["overlap"].to(world.device, non_blocking=True)  # (B, R, K)
        R, Z = options.random_crops, options.z_bins
        one_sided = self.one_sided
        asked, answering = (crops[:, :R], crops[:, R:]) if one_sided else (crops, crops)
        keep = self._dropout(asked, step)
        with optimise.autocast(world.device, options.amp):
            student = Embeddings.split(self.distributed_student(asked, keep), R, Z)
            if options.base_encoder == "student":
                teacher = student  # one pass for both sides, and gradients through both
            else:
                with torch.no_grad():
                    teacher = Embeddings.split(self.teaching(answering), 0 if one_sided else R, Z)
        everyone = world.gather(student.random if one_sided else student.base)
        others: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if options.inter:  # a batch of one has no next volume
            first = world.rank * len(crops) + 1
            following = following_volumes(first, len(crops), options.batch, world.device)
            others = (everyone[following], world.gather(teacher.base)[following])
        softmax = options.temperature if options.intra_loss == "softmax" else None
        terms = voco_terms(student, teacher, overlap, *others, options.symmetric, softmax)
        loss = (
            options.intra * terms["intra"]
            + options.inter * terms["inter"]
            + options.regularisation * terms["reg"]
        )
        correlated = correlation(world.gather(terms["similarity"]), world.gather(overlap))
        three = [terms[name] for name in ("intra", "inter", "reg")]
        figures = [loss, *three, spread_of(everyone), correlated]
        return loss, torch.stack([value.detach() for value in figures])

    def _dropout(self, crops: torch.Tensor, step: int) -> torch.Tensor | None:
        """This rank's part (B, groups, P, features) of the batch's dropout mask."""
        options, world = self.options, self.world
        B, P, S = crops.shape[:3]
        if not options.dropout:
            return None
        before = options.pool == "slice" or options.dropout_at == "slices"
        groups = S if before else options.z_bins
        shape = (options.batch, groups, P, self.student.features)
        mask = dropout_mask(shape, options.dropout, self.config.seed, step, world.device)
        return mask[world.rank * B : (world.rank + 1) * B]

    def after_step(self, step: int) -> dict[str, float]:
        """The teacher follows the student."""
        options = self.options
        momentum = optimise.momentum_at(
            step, options.steps, options.ema_momentum, options.ema_final
        )
        self.average.update(momentum)
        return {"momentum": momentum}

    def evaluate(self, samples: VocoSamples) -> dict[str, float]:
        """The teacher's position accuracies."""
        # as in training on a GPU; on a CPU the maps of more outgrow its caches
        volumes = self.options.batch if self.world.device.type == "cuda" else 1
        return position_accuracies(
            self.teacher, samples, self.world.device, self.options.amp, volumes
        )

    def baselines(self, training: VocoSamples, held: VocoSamples) -> dict[str, float]:
        """The position accuracies of pictures of 8 x 8 cells and regression trees."""
        return baselines.position_accuracies(training, held)


@lru_cache(maxsize=8)
def following_volumes(first: int, B: int, batch: int, device: torch.device) -> torch.Tensor:
    """(B,): the numbers `first`, `first` + 1, ... modulo `batch` of the volumes after those of a
    rank; made once.
    """
    with torch.inference_mode(False):
        return torch.arange(first, first + B, device=device) % batch


@torch.no_grad()
def position_accuracies(
    net: VocoNet, samples: VocoSamples, device: torch.device, amp: bool, volumes: int = 1
) -> dict[str, float]:
    """Share of held-out random crops whose most similar base crop is the right one (`hits`): in the
    plane, and with more than one slab along z and over both. `volumes` go through the network
    together, and the device is waited for once.
    """
    chosen, overlap, Z = [], [], samples.config.z_bins
    net.eval()
    for batch in evaluation_batches(samples, baselines.CROPS, volumes):
        crops = batch["crops"].to(device, non_blocking=True)
        with optimise.autocast(device, amp):
            found = Embeddings.split(net(crops), baselines.CROPS, Z)
        chosen.append(similarity(found.random, found.base).mean(1).argmax(-1).flatten())
        overlap.append(batch["overlap"].flatten(0, 1))
    net.train()
    right = hits(torch.cat(chosen).cpu().numpy(), torch.cat(overlap).numpy(), Z)
    return {name: float(found.mean()) for name, found in right.items()}
