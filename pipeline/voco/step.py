"""One step of 2D-VoCo: what it changes, its losses, its accuracy on held-out volumes."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..learning import optimise
from ..learning.backbone import create_backbone
from ..learning.distributed import World, sync_batch_norm
from ..run import layout
from ..run.config import Config, resolved
from ..run.manifest import digest
from ..system.errors import InputError
from ..system.machine import seed_everything
from .data import Batch, VocoSamples, evaluation_batches
from .losses import similarity
from .model import (
    Embeddings,
    VocoNet,
    correlation,
    dropout_mask,
    make_teacher,
    spread_of,
    voco_terms,
)

FREE = {
    "steps",
    "eval_every",
    "checkpoint_every",
    "keep",
    "log_every",
    "collapse_std",
    "collapse_patience",
    "settle",
    "workers",
    "compile",
    "activation_checkpointing",
}  # keys that may change between two sittings of one run


STATS = ("loss", "intra", "inter", "reg", "std", "correlation")


EVALUATION_CROPS = 8  # random crops of each held-out volume


@dataclass
class State:
    """What a step changes, and the settings that it obeys."""

    config: Config
    identity: dict[str, Any]
    world: World
    student: VocoNet
    teacher: VocoNet
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: float = -1.0
    flat: int = 0  # steps for which the embeddings have been collapsed

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds; random numbers and data order follow from `step` and
        the seed.
        """
        return {
            "identity": self.identity,
            "step": self.step,
            "best": self.best,
            "flat": self.flat,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        for name in ("student", "teacher", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        optimise.load_scaler(self.scaler, state["scaler"])
        self.step, self.best, self.flat = state["step"], state["best"], state["flat"]


def identity(config: Config, volumes: Path | None) -> dict[str, Any]:
    """What two sittings must share to be one run: settings and volumes."""
    section = {name: value for name, value in resolved(config.pretrain).items() if name not in FREE}
    weights = (
        digest(Path(config.model.weights))
        if config.model.weights and config.pretrain.init == "imagenet"
        else None
    )
    return {
        "seed": config.seed,
        **resolved(config.model),
        "start": weights,
        **section,
        "volumes": volumes and digest(volumes / layout.INDEX),
    }


def start(config: Config, world: World, volumes: Path | None = None) -> State:
    """Student, teacher and optimiser at step 0, the same on every rank."""
    options = config.pretrain
    seed_everything(config.seed)
    backbone = create_backbone(config.model.backbone, options.init, config.model.weights)
    student = VocoNet(backbone, options.image_size // options.grid, options.width, options.pool)
    student = student.to(world.device, memory_format=torch.channels_last)
    world.broadcast(student)
    teacher = sync_batch_norm(make_teacher(student), world)
    student = sync_batch_norm(student, world).train()
    if options.activation_checkpointing:
        _checkpoint_activations(student.backbone, config.model.backbone)
    if options.compile:
        student.backbone.compile()
        teacher.backbone.compile()
    optimiser = optimise.adamw(student, options.lr, options.weight_decay, options.amsgrad)
    return State(
        config,
        identity(config, volumes),
        world,
        student,
        teacher,
        optimiser,
        optimise.grad_scaler(world.device, options.amp),
    )


def _checkpoint_activations(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as fault:
        what, remedy = (
            f"{name} cannot recompute its activations",
            "set it to false or choose another model.backbone",
        )
        raise InputError(what, "pretrain.activation_checkpointing=true", remedy) from fault


def forward(run: State, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss (to differentiate) and the six `STATS` of its part of the batch."""
    options, world = run.config.pretrain, run.world
    crops = batch["crops"].to(world.device, non_blocking=True)  # (B, P, S, h, w)
    overlap = batch["overlap"].to(world.device, non_blocking=True)  # (B, R, K)
    B, P, S = crops.shape[:3]
    keep = None
    if options.dropout:
        groups = 1 if options.pool == "clip" else S
        keep = dropout_mask(
            (options.batch, groups, P, run.student.features),
            options.dropout,
            run.config.seed,
            run.step,
            world.device,
        )
        keep = keep[world.rank * B : (world.rank + 1) * B]
    with optimise.autocast(world.device, options.amp):
        student = Embeddings.split(run.student(crops, keep), options.random_crops)
        with torch.no_grad():
            teacher = Embeddings.split(run.teacher(crops), options.random_crops)
    following = (
        torch.arange(world.rank * B + 1, (world.rank + 1) * B + 1, device=world.device)
        % options.batch
    )
    everyone = world.gather(student.base)
    terms = voco_terms(
        student, teacher, overlap, everyone[following], world.gather(teacher.base)[following]
    )
    loss = (
        options.intra * terms["intra"]
        + options.inter * terms["inter"]
        + options.regularisation * terms["reg"]
    )
    correlated = correlation(world.gather(terms["similarity"]), world.gather(overlap))
    stats = [loss, terms["intra"], terms["inter"], terms["reg"], spread_of(everyone), correlated]
    return loss, torch.stack([value.detach() for value in stats])


def train_step(run: State, batch: Batch, stopping: bool = False) -> tuple[dict[str, float], bool]:
    """One optimiser step and one teacher update; returns the stats over all ranks, and whether any
    rank wants to stop.
    """
    options = run.config.pretrain
    seed_everything(run.config.seed, run.step, run.world.rank)
    rate = options.lr * optimise.warmup_cosine(run.step, options.warmup, options.steps)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    run.optimiser.zero_grad(set_to_none=True)
    loss, stats = forward(run, batch)
    with (
        optimise.fixed_statistics(run.student)
        if options.activation_checkpointing
        else contextlib.nullcontext()
    ):
        run.scaler.scale(loss).backward()
    run.world.average_gradients(run.student.parameters())
    run.scaler.unscale_(run.optimiser)
    norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), options.clip)
    shared = run.world.mean(torch.cat([stats, stats.new_tensor([float(stopping)])])).tolist()
    values = dict(zip(STATS, shared, strict=False))
    optimise.check_finite(
        run.step + 1,
        values if run.scaler.is_enabled() else {**values, "gradient": float(norm)},
        batch["ids"],
    )
    run.scaler.step(run.optimiser)
    run.scaler.update()
    optimise.check_scale(run.scaler, run.step + 1, batch["ids"])
    momentum = optimise.momentum_at(
        run.step, options.steps, options.ema_momentum, options.ema_final
    )
    optimise.ema_update(run.teacher, run.student, momentum)
    run.step += 1
    return {"step": run.step, **values, "lr": rate, "momentum": momentum}, shared[-1] > 0


@torch.no_grad()
def position_accuracy(net: VocoNet, samples: VocoSamples, device: torch.device, amp: bool) -> float:
    """Share of held-out random crops whose most similar base crop overlaps them within 0.1 of the
    largest overlap.
    """
    right = []
    net.eval()
    for batch in evaluation_batches(samples, EVALUATION_CROPS):
        with optimise.autocast(device, amp):
            found = Embeddings.split(net(batch["crops"].to(device)), EVALUATION_CROPS)
        chosen = similarity(found.random, found.base).mean(1).argmax(-1).cpu()  # (1, R)
        overlap = batch["overlap"]
        right.append(overlap.gather(2, chosen[..., None])[..., 0] >= overlap.amax(2) - 0.1 - 1e-6)
    net.train()
    return torch.cat(right).float().mean().item()
