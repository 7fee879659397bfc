"""The state of a pretraining and its step, whatever the method."""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..learning import optimise
from ..learning.distributed import World
from ..run import layout
from ..run.config import RESUMABLE, Config, decisive
from ..run.manifest import digest
from ..system.machine import seed_everything
from .data import Batch
from .height import Height
from .masked import Masked
from .method import Method
from .simclr import SimClr
from .voco2d import Voco2D

METHODS: dict[str, type[Method]] = {
    "voco2d": Voco2D,
    "height": Height,
    "simclr": SimClr,
    "masked": Masked,
}


@dataclass
class State:
    """What a step changes, and the settings that it obeys."""

    config: Config
    identity: dict[str, Any]
    world: World
    method: Method
    update: optimise.Update
    step: int = 0
    best: float = -1.0
    flat: int = 0  # steps for which the embeddings have been collapsed
    # when the last checkpoint was written
    saved: float = field(default_factory=lambda: time.monotonic())
    baselines: dict[str, float] = field(default_factory=dict)  # figures that need no network

    @property
    def floor(self) -> float:
        """What the best baseline has of the method's merit, -1 without one."""
        merit = self.method.merit
        return max(
            (value for name, value in self.baselines.items() if name.endswith(f"_{merit}")),
            default=-1.0,
        )

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds; random numbers and data order follow from `step` and
        the seed.
        """
        return {
            "identity": self.identity,
            "step": self.step,
            "best": self.best,
            "flat": self.flat,
            "baselines": self.baselines,
            **{name: network.state_dict() for name, network in self.method.networks.items()},
            **self.update.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        for name, network in self.method.networks.items():
            network.load_state_dict(state[name])
        self.update.restore(state)
        self.step, self.best, self.flat = state["step"], state["best"], state["flat"]
        self.baselines = state.get("baselines", {})


def identity(
    config: Config, volumes: Path | None, excluded: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """What two sittings must share to be one run: settings, volumes, and patients left out."""
    weights = (
        digest(Path(config.model.weights))
        if config.model.weights and config.pretrain.init == "imagenet"
        else None
    )
    return {
        "seed": config.seed,
        **decisive(config.model),
        "start": weights,
        **decisive(config.pretrain, RESUMABLE),
        "volumes": volumes and digest(volumes / layout.INDEX),
        **({"excluded": digest(sorted(excluded))} if excluded else {}),
    }


def start(
    config: Config,
    world: World,
    volumes: Path | None = None,
    excluded: frozenset[str] = frozenset(),
) -> State:
    """Networks and optimiser at step 0, the same on every rank."""
    options = config.pretrain
    seed_everything(config.seed)
    method = METHODS[options.method](config, world)
    optimiser = optimise.adamw(method.student, options.lr, options.weight_decay, options.amsgrad)
    update = optimise.Update(
        method.student.parameters(),
        optimiser,
        optimise.grad_scaler(world.device, options.amp),
        options.clip,
    )
    return State(config, identity(config, volumes, excluded), world, method, update)


@dataclass(frozen=True)
class Taken:
    """A step that was handed to the device: its `figures`, and what was `known` before."""

    figures: optimise.Figures
    known: dict[str, float]

    def read(self) -> tuple[dict[str, float], bool]:
        """The figures over all ranks, and whether any rank wants to stop; waits for the step.

        Raises:
            NonFiniteLoss: see `Figures.read`.
        """
        values = self.figures.read()
        return {"step": self.figures.step, **values, **self.known}, self.figures.more[0] > 0


def train_step(run: State, batch: Batch, stopping: bool = False) -> Taken:
    """One optimiser step and what the method does after it; nothing waits for the device before
    `read` of what is returned.
    """
    options, method, world = run.config.pretrain, run.method, run.world
    seed_everything(run.config.seed, run.step, world.rank)
    rate = options.lr * optimise.warmup_cosine(run.step, options.warmup, options.steps)
    run.update.set_rate(rate)
    loss, stats = method.loss(batch, run.step)
    # a backward pass that recomputes activations would move the statistics a second time
    recomputing = options.activation_checkpointing
    with optimise.fixed_statistics(method.student) if recomputing else contextlib.nullcontext():
        run.update.backward(loss)
    asked = torch.full((1,), float(stopping), device=stats.device)
    shared = world.mean(torch.cat([stats, asked]))
    figures = run.update.apply(run.step + 1, method.stats, shared, batch["ids"])
    more = method.after_step(run.step)
    run.step += 1
    return Taken(figures, {"lr": rate, **more})
