"""The 2D-VoCo training loop: every step is a pure function of (state, step), so that a resumed run repeats an unbroken one."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from ..learning import optimise as engine
from ..learning.backbone import create_backbone, normalise, save_backbone
from ..learning.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from ..learning.distributed import World, peers, sync_batch_norm
from ..run.config import Config, resolved
from ..run.stage import digest
from ..system.machine import InputError, log, progress, seed_everything
from .data import Batch, VocoSamples, batches, choose_volumes, evaluation_batches
from .losses import similarity
from .model import Embeddings, VocoNet, correlation, dropout_mask, make_teacher, spread_of, voco_terms

FREE = {"steps", "eval_every", "checkpoint_every", "keep", "log_every", "collapse_std", "collapse_patience", "settle", "workers", "compile",
        "activation_checkpointing"}  # keys that may change between two sittings of one run  # fmt: skip
EARLIER = "earlier"  # folder of checkpoints that a run with other settings left
STATS = ("loss", "intra", "inter", "reg", "std", "correlation")
EVALUATION_CROPS = 8  # random crops of each held-out volume


@dataclass
class Run:
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
        """Everything that a checkpoint holds; random numbers and data order follow from `step` and the seed."""
        return {"identity": self.identity, "step": self.step, "best": self.best, "flat": self.flat,
                "student": self.student.state_dict(), "teacher": self.teacher.state_dict(),
                "optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint."""
        for name in ("student", "teacher", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        engine.load_scaler(self.scaler, state["scaler"])
        self.step, self.best, self.flat = state["step"], state["best"], state["flat"]


def identity(config: Config, volumes: Path | None) -> dict[str, Any]:
    """What two sittings must share to be one run: settings and volumes."""
    section = {name: value for name, value in resolved(config.pretrain).items() if name not in FREE}
    weights = digest(Path(config.model.weights)) if config.model.weights and config.pretrain.init == "imagenet" else None
    return {"seed": config.seed, **resolved(config.model), "start": weights, **section,
            "volumes": volumes and digest(volumes / "index.parquet")}  # fmt: skip


def start(config: Config, world: World, volumes: Path | None = None) -> Run:
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
    optimiser = engine.adamw(student, options.lr, options.weight_decay, options.amsgrad)
    return Run(config, identity(config, volumes), world, student, teacher, optimiser, engine.grad_scaler(world.device, options.amp))


def _checkpoint_activations(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as fault:
        what, remedy = f"{name} cannot recompute its activations", "set it to false or choose another model.backbone"
        raise InputError(what, "pretrain.activation_checkpointing=true", remedy) from fault


def resume(run: Run, folder: Path) -> None:
    """Go on from the newest whole checkpoint of this run; another run's is named and not used."""
    state = newest_checkpoint(folder / "last.ckpt", run.config.pretrain.keep)
    if state is None:
        return
    changed = [name for name, value in run.identity.items() if state["identity"].get(name) != value]
    if changed or state["step"] > run.config.pretrain.steps:
        why = f"of another run ({changed[0]} differs)" if changed else f"at step {state['step']}, past pretrain.steps"
        log(f"last.ckpt is {why}: training starts afresh, and the checkpoints are kept in {folder / EARLIER}")
        return
    run.restore(state)
    if not usable_best(run, folder):
        run.best = -1.0  # the next evaluation makes another one
    log(f"resumed at step {run.step}")


def _set_aside(folder: Path, keep: bool) -> None:
    """Move the checkpoints of another run out of the way: a stop before the first one of this run must not bring them back."""
    found = list(folder.glob("*.ckpt"))
    if found and keep:
        shutil.rmtree(folder / EARLIER, ignore_errors=True)
        (folder / EARLIER).mkdir()
    for path in found:
        path.replace(folder / EARLIER / path.name) if keep else path.unlink()


def usable_best(run: Run, folder: Path) -> dict[str, Any] | None:
    """The best checkpoint of this very run, None where there is none, a damaged one or another run's."""
    state = load_checkpoint(folder / "best.ckpt")
    return state if state and state["identity"] == run.identity else None


def forward(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss (to differentiate) and the six `STATS` of its part of the batch."""
    options, world = run.config.pretrain, run.world
    crops = batch["crops"].to(world.device, non_blocking=True)  # (B, P, S, h, w)
    overlap = batch["overlap"].to(world.device, non_blocking=True)  # (B, R, K)
    B, P, S = crops.shape[:3]
    keep = None
    if options.dropout:
        groups = 1 if options.pool == "clip" else S
        keep = dropout_mask((options.batch, groups, P, run.student.features), options.dropout, run.config.seed, run.step, world.device)
        keep = keep[world.rank * B : (world.rank + 1) * B]
    with engine.autocast(world.device, options.amp):
        student = Embeddings.split(run.student(crops, keep), options.random_crops)
        with torch.no_grad():
            teacher = Embeddings.split(run.teacher(crops), options.random_crops)
    following = torch.arange(world.rank * B + 1, (world.rank + 1) * B + 1, device=world.device) % options.batch
    everyone = world.gather(student.base)
    terms = voco_terms(student, teacher, overlap, everyone[following], world.gather(teacher.base)[following])
    loss = options.intra * terms["intra"] + options.inter * terms["inter"] + options.regularisation * terms["reg"]
    correlated = correlation(world.gather(terms["similarity"]), world.gather(overlap))
    stats = [loss, terms["intra"], terms["inter"], terms["reg"], spread_of(everyone), correlated]
    return loss, torch.stack([value.detach() for value in stats])


def train_step(run: Run, batch: Batch, stopping: bool = False) -> tuple[dict[str, float], bool]:
    """One optimiser step and one teacher update; returns the stats over all ranks, and whether any rank wants to stop."""
    options = run.config.pretrain
    seed_everything(run.config.seed, run.step, run.world.rank)
    rate = options.lr * engine.warmup_cosine(run.step, options.warmup, options.steps)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    run.optimiser.zero_grad(set_to_none=True)
    loss, stats = forward(run, batch)
    with engine.fixed_statistics(run.student) if options.activation_checkpointing else contextlib.nullcontext():
        run.scaler.scale(loss).backward()
    run.world.average_gradients(run.student.parameters())
    run.scaler.unscale_(run.optimiser)
    norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), options.clip)
    shared = run.world.mean(torch.cat([stats, stats.new_tensor([float(stopping)])])).tolist()
    values = dict(zip(STATS, shared, strict=False))
    engine.check_finite(run.step + 1, values if run.scaler.is_enabled() else {**values, "gradient": float(norm)}, batch["ids"])
    run.scaler.step(run.optimiser)
    run.scaler.update()
    engine.check_scale(run.scaler, run.step + 1, batch["ids"])
    momentum = engine.momentum_at(run.step, options.steps, options.ema_momentum, options.ema_final)
    engine.ema_update(run.teacher, run.student, momentum)
    run.step += 1
    return {"step": run.step, **values, "lr": rate, "momentum": momentum}, shared[-1] > 0


@torch.no_grad()
def position_accuracy(net: VocoNet, samples: VocoSamples, device: torch.device, amp: bool) -> float:
    """Share of held-out random crops whose most similar base crop overlaps them within 0.1 of the largest overlap."""
    right = []
    net.eval()
    for batch in evaluation_batches(samples, EVALUATION_CROPS):
        with engine.autocast(device, amp):
            found = Embeddings.split(net(batch["crops"].to(device)), EVALUATION_CROPS)
        chosen = similarity(found.random, found.base).mean(1).argmax(-1).cpu()  # (1, R)
        overlap = batch["overlap"]
        right.append(overlap.gather(2, chosen[..., None])[..., 0] >= overlap.amax(2) - 0.1 - 1e-6)
    net.train()
    return torch.cat(right).float().mean().item()


def pretrain(config: Config, volumes: Path, folder: Path, world: World, fresh: bool = False) -> dict[str, Any]:
    """Train to `config.pretrain.steps` and leave backbone.safetensors, last.ckpt, best.ckpt and log.jsonl in `folder`.

    A stopped run goes on from its last checkpoint unless `fresh`. Returns the counts for the manifest.

    Raises:
        InputError: too few volumes, a batch that the ranks cannot share, weights that do not fit.
        NonFiniteLoss, Collapse: training went wrong; the last good checkpoint stays.
    """
    options = config.pretrain
    world.check_divides(options.batch, "pretrain.batch")
    training, held = choose_volumes(pl.read_parquet(volumes / "index.parquet"), options, config.seed)
    run = start(config, world, volumes)
    if not fresh:
        resume(run, folder)
    samples = VocoSamples(volumes, training, options, config.seed, world.rank, world.size)
    evaluation = VocoSamples(volumes, held, options, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    world.agree(run.step, "the step of last.ckpt", f"{folder} must be one folder for all")
    if world.main and run.step == 0:
        _set_aside(folder, keep=not fresh)
    with engine.StopSignal(world.size > 1) as stop, engine.loading(), peers(), _logs(folder, run) as write:
        stream = batches(samples, run.step, options.steps, pinned=world.device.type == "cuda")
        steps = range(run.step, options.steps)
        for _ in progress(steps, len(steps), "2D-VoCo", "steps") if world.main else steps:
            began = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - began
            record, stopping = train_step(run, batch, stop.signum > 0)
            stopping = stopping or (world.size == 1 and stop.signum > 0)  # several ranks agree one step later
            seconds = time.perf_counter() - began
            record |= {"samples_per_s": round(options.batch / seconds, 3), "waiting": round(waited / seconds, 4)}
            _finish_step(run, record, samples, evaluation, folder, write, stopping)
            if stopping:
                world.barrier()  # torchrun ends the others as soon as one has ended: not while the checkpoint is being written
                if world.main:
                    log(f"stopped at step {run.step}, checkpoint written: run the same command again to go on")
                stop.leave()
    if world.main:
        run.restore(usable_best(run, folder) or run.state())
        export(run, samples, folder / "backbone.safetensors")
    return {"volumes": len(training), "held_out": len(held), "steps": options.steps, "position_accuracy": round(run.best, 4)}


def _finish_step(run: Run, record: dict[str, Any], samples: VocoSamples, evaluation: VocoSamples, folder: Path,
                 write: Callable[[dict[str, Any]], None], stopping: bool) -> None:  # fmt: skip
    options, last = run.config.pretrain, run.step == run.config.pretrain.steps
    _watch_collapse(run, record["std"], last)
    if not run.world.main:
        return
    if run.step % options.eval_every == 0 or last:
        record["position_accuracy"] = round(position_accuracy(run.teacher, evaluation, run.world.device, options.amp), 4)
        if record["position_accuracy"] > run.best and not run.flat:
            run.best = record["position_accuracy"]
            save_checkpoint(folder / "best.ckpt", run.state())
            export(run, samples, folder / "backbone.safetensors")
    if run.step % options.log_every == 0 or "position_accuracy" in record or stopping:
        write(record)
    if ((run.step % options.checkpoint_every == 0 or last) and not run.flat) or stopping:
        save_checkpoint(folder / "last.ckpt", run.state(), options.keep)


def _watch_collapse(run: Run, std: float, last: bool) -> None:
    options = run.config.pretrain
    run.flat = run.flat + 1 if std < options.collapse_std else 0
    if run.flat == 1:
        log(f"warning: embeddings have collapsed at step {run.step} (standard deviation {std:.3g}); no checkpoint is written meanwhile")
    if run.flat >= (1 if last else options.collapse_patience):
        raise engine.Collapse(f"embeddings collapsed for {run.flat} steps until step {run.step} (standard deviation {std:.3g}); "
                       "the last good checkpoint is kept; lower pretrain.lr or raise pretrain.regularisation")  # fmt: skip


@torch.no_grad()
def export(run: Run, samples: VocoSamples, path: Path) -> None:
    """Write the teacher's backbone, its batch-norm statistics taken anew from whole slices: a crop's border is most of a small map.

    A plain copy is written: the run's own layers may wait for other ranks, and its statistics stay as they are.
    """
    config, device = run.config, run.world.device
    seed_everything(config.seed)
    backbone = create_backbone(config.model.backbone).to(device, memory_format=torch.channels_last)
    backbone.load_state_dict(run.teacher.backbone.state_dict())
    slices = (normalise(planes.to(device)) for planes in samples.whole_slices(config.pretrain.settle))
    if config.pretrain.settle:
        with engine.autocast(device, config.pretrain.amp):
            torch.optim.swa_utils.update_bn(slices, backbone)
    metadata = {"kind": "voco2d", "backbone": config.model.backbone, "step": str(run.step), "position_accuracy": f"{run.best:.4f}",
                "statistics": "whole slices" if config.pretrain.settle else "crops"}  # fmt: skip
    save_backbone(backbone, path, metadata)


@contextlib.contextmanager
def _logs(folder: Path, run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """One writer for log.jsonl and TensorBoard; both keep what came before the step that this sitting starts from."""
    if not run.world.main:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    start = run.step
    with engine.json_log(folder / "log.jsonl", lambda record: record["step"] <= start) as write, \
            SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1) as board:  # fmt: skip

        def both(record: dict[str, Any]) -> None:
            write(record)
            for name, value in record.items():
                board.add_scalar(name, value, record["step"])

        yield both
