"""The 2D-VoCo training loop: every step is a pure function of (state, step), so that a resumed run
repeats an unbroken one.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..learning import optimise
from ..learning.backbone import adapted, create_backbone, placed, save_backbone, settle
from ..learning.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from ..learning.distributed import World, peers
from ..learning.interrupt import StopSignal
from ..learning.loaders import loading
from ..learning.log import Record, open_log, read_log
from ..run import layout
from ..run.config import Config
from ..run.room import checkpoint_bytes, require
from ..system.console import log, progress
from ..system.frames import read_frame
from ..system.machine import seed_everything
from .data import Batch, VocoSamples, batches, choose_volumes
from .step import State, Taken, start, train_step

EARLIER = "earlier"  # folder of checkpoints that a run with other settings left


def resume(run: State, folder: Path) -> None:
    """Go on from the newest whole checkpoint of this run; another run's is named and not used."""
    state = newest_checkpoint(folder / layout.LAST, run.config.pretrain.keep)
    if state is None:
        return
    known = state["identity"]
    changed = [
        name
        for name in (*run.identity, *known)  # a key at its default may be in one alone
        if known.get(name) != run.identity.get(name)
    ]
    if changed or state["step"] > run.config.pretrain.steps:
        why = (
            f"of another run ({changed[0]} differs)"
            if changed
            else f"at step {state['step']}, past pretrain.steps"
        )
        log(
            f"last.ckpt is {why}: training starts afresh, and the checkpoints are kept in"
            f" {folder / EARLIER}"
        )
        return
    run.restore(state)
    if not usable_best(run, folder):
        run.best = -1.0  # the next evaluation makes another one
    log(f"resumed at step {run.step}")


def _set_aside(folder: Path, keep: bool) -> None:
    """Move the checkpoints of another run out of the way: a stop before the first one of this run
    must not bring them back.
    """
    found = list(folder.glob("*.ckpt"))
    if found and keep:
        shutil.rmtree(folder / EARLIER, ignore_errors=True)
        (folder / EARLIER).mkdir()
    for path in found:
        path.replace(folder / EARLIER / path.name) if keep else path.unlink()


def usable_best(run: State, folder: Path) -> dict[str, Any] | None:
    """The best checkpoint of this very run, None where there is none, a damaged one or another
    run's.
    """
    state = load_checkpoint(folder / layout.BEST)
    return state if state and state["identity"] == run.identity else None


def pretrain(
    config: Config,
    volumes: Path,
    folder: Path,
    world: World,
    fresh: bool = False,
    excluded: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Train to `config.pretrain.steps` and leave backbone.safetensors, last.ckpt, best.ckpt and
    log.jsonl in `folder`. Images of the labelled patients `excluded` are not read.

    A stopped run goes on from its last checkpoint unless `fresh`. Returns the counts for the
    manifest.

    Raises:
        InputError: too few volumes, a batch that the ranks cannot share, weights that do not fit.
        NonFiniteLoss, Collapse: training went wrong; the last good checkpoint stays.
    """
    options = config.pretrain
    world.check_divides(options.batch, "pretrain.batch")
    index = read_frame(volumes / layout.INDEX)
    training, held = choose_volumes(index, options, config.seed, excluded)
    run = start(config, world, volumes, excluded)
    if not fresh:
        resume(run, folder)
    pairs, ranks = run.method.pairs, (world.rank, world.size)
    samples = VocoSamples(volumes, training, options, config.seed, *ranks, pairs)
    evaluation = VocoSamples(volumes, held, options, config.seed, pairs=pairs)
    folder.mkdir(parents=True, exist_ok=True)
    world.agree(run.step, "the step of last.ckpt", f"{folder} must be one folder for all")
    if world.main:
        parameters = sum(one.numel() for one in run.method.student.parameters())
        known = sum(path.stat().st_size for path in folder.glob("*.ckpt"))
        need = max(0, checkpoint_bytes(parameters, options) - known)
        require(folder, folder.name, need, way_out="lower pretrain.keep")
    if world.main and run.step == 0:
        _set_aside(folder, keep=not fresh)
    if world.main and not run.baselines:
        _measure_baselines(run, samples, evaluation)
    with (
        StopSignal(world.size > 1) as stop,
        loading(),
        peers(),
        contextlib.ExitStack() as closing,
        _log(folder, run) as write,
    ):
        began_at = run.step

        def finish(record: dict[str, Any], stopping: bool) -> None:
            _finish_step(run, record, samples, evaluation, folder, write, stopping)

        def waiting() -> None:
            """Leave where a stop came while a batch is waited for: one process alone may."""
            if stop.signum and world.size == 1:
                pace.catch_up()
                if run.step > began_at and not run.flat:
                    save_checkpoint(folder / layout.LAST, run.state(), options.keep)
                _leave(run, stop)

        pinned = world.device.type == "cuda"
        stream = batches(samples, run.step, options.steps, pinned, waiting)
        closing.callback(stream.close)  # ends its processes
        steps, pace = range(run.step, options.steps), _Pace(run, finish)
        for _ in progress(steps, len(steps), "2D-VoCo", "steps") if world.main else steps:
            batch = pace.next_of(stream)
            taken = train_step(run, batch, stop.signum > 0)
            # several ranks agree one step later
            stopping = pace.take(taken, _due(run), world.size == 1 and stop.signum > 0)
            if stopping:
                # torchrun ends the others as soon as one has ended: not while the checkpoint is
                # being written
                world.barrier()
                _leave(run, stop)
    if world.main:
        _choose(run, samples, evaluation, folder)
    return {
        "volumes": len(training),
        "held_out": len(held),
        "steps": options.steps,
        "merit": run.method.merit,
        run.method.merit: round(run.best, 4),
        "baselines": run.baselines,
    }


class _Pace:
    """Steps and their figures, which are read one step late where the device works ahead, and at
    once where something hangs on them: nothing is logged or kept that was not looked at.
    """

    def __init__(self, run: State, finish: Callable[[dict[str, Any], bool], None]) -> None:
        self.run, self.finish = run, finish
        self.late = optimise.reads_late(run.world.device)
        self.unread: Taken | None = None
        self.waited, self.since = 0.0, time.perf_counter()

    def next_of(self, stream: Iterator[Batch]) -> Batch:
        """The next batch; only a device that is done with the step before waits for it."""
        began = time.perf_counter()
        batch = next(stream)
        if self.unread is None or self.unread.figures.here():
            self.waited += time.perf_counter() - began
        return batch

    def take(self, taken: Taken, due: bool, stopping: bool) -> bool:
        """Finish the step before `taken`, and this one where it is `due` or the loop ends with it;
        returns whether it does.
        """
        stopping = self.catch_up() or stopping
        self.unread = taken
        if due or stopping or not self.late:
            stopping = self.catch_up(stopping) or stopping
        return stopping

    def catch_up(self, stopping: bool = False) -> bool:
        """Finish the step that was not read yet; returns whether a rank wants to stop."""
        if self.unread is None:
            return False
        record, asked = self.unread.read()
        now, options = time.perf_counter(), self.run.config.pretrain
        seconds = now - self.since
        record |= {
            "samples_per_s": round(options.batch / seconds, 3),
            "waiting": round(self.waited / seconds, 4),
        }
        self.unread, self.waited, self.since = None, 0.0, now
        self.finish(record, stopping or asked)
        if record["step"] == self.run.step:  # else the device has been at the next step meanwhile
            self.since = time.perf_counter()
        return asked


def _measure_baselines(run: State, samples: VocoSamples, evaluation: VocoSamples) -> None:
    began = time.perf_counter()
    found = run.method.baselines(samples, evaluation)
    run.baselines = {name: round(value, 4) for name, value in found.items()}
    if found:
        figures = ", ".join(f"{name} {value}" for name, value in run.baselines.items())
        log(f"without a network: {figures} ({time.perf_counter() - began:.1f} s)")


def _choose(run: State, samples: VocoSamples, evaluation: VocoSamples, folder: Path) -> None:
    """Export the best of the checkpoints that are better than every baseline, the last state where
    none is.
    """
    merit, best = run.method.merit, usable_best(run, folder) if run.best > run.floor else None
    if best:
        run.restore(best)
    else:
        run.best = round(run.method.evaluate(evaluation)[merit], 4)
        log(
            f"warning: no checkpoint's {merit} is above {run.floor:g}, which needs no network:"
            f" {layout.BACKBONE} is the last state's ({run.best:g})"
        )
        save_checkpoint(folder / layout.BEST, run.state())
    export(run, samples, folder / layout.BACKBONE)


def _leave(run: State, stop: StopSignal) -> None:
    if run.world.main:
        log(f"stopped at step {run.step}, checkpoint written: run the same command again to go on")
    stop.leave()


def _finish_step(
    run: State,
    record: dict[str, Any],
    samples: VocoSamples,
    evaluation: VocoSamples,
    folder: Path,
    write: Callable[[Record], None],
    stopping: bool,
) -> None:
    options, merit, step = run.config.pretrain, run.method.merit, record["step"]
    last, latest = step == options.steps, step == run.step
    if "std" in record:
        _watch_collapse(run, step, record["std"], last)
    if not run.world.main:
        return
    if step % options.eval_every == 0 or last:
        found = run.method.evaluate(evaluation)
        record |= {name: round(value, 4) for name, value in found.items()} | run.baselines
        if record[merit] > max(run.best, run.floor) and not run.flat:
            run.best = record[merit]
            save_checkpoint(folder / layout.BEST, run.state())
            export(run, samples, folder / layout.BACKBONE)
    if step % options.log_every == 0 or merit in record or (stopping and latest):
        write(record)
    if latest and ((_checkpoint_due(run) and not run.flat) or stopping):
        save_checkpoint(folder / layout.LAST, run.state(), options.keep)
        run.saved = time.monotonic()


def _checkpoint_due(run: State) -> bool:
    options, minutes = run.config.pretrain, (time.monotonic() - run.saved) / 60
    by_time = 0 < options.checkpoint_minutes <= minutes
    return by_time or run.step % options.checkpoint_every == 0 or run.step == options.steps


def _due(run: State) -> bool:
    """Whether an evaluation or a checkpoint follows this very step."""
    return run.step % run.config.pretrain.eval_every == 0 or _checkpoint_due(run)


def _watch_collapse(run: State, step: int, std: float, last: bool) -> None:
    options = run.config.pretrain
    run.flat = run.flat + 1 if std < options.collapse_std else 0
    if run.flat == 1:
        log(
            f"warning: embeddings have collapsed at step {step} (standard deviation {std:.3g});"
            " no checkpoint is written meanwhile"
        )
    if run.flat >= (1 if last else options.collapse_patience):
        raise optimise.Collapse(
            f"embeddings collapsed for {run.flat} steps until step {step} (standard deviation"
            f" {std:.3g}); the last good checkpoint is kept; lower pretrain.lr or raise"
            " pretrain.regularisation"
        )


@torch.no_grad()
def export(run: State, samples: VocoSamples, path: Path) -> None:
    """Write the method's backbone, its batch-norm statistics taken anew from whole slices: a
    crop's border is most of a small map.

    A plain copy is written: the run's own layers may wait for other ranks, and its statistics stay
    as they are.
    """
    config, device = run.config, run.world.device
    seed_everything(config.seed)
    whole = create_backbone(config.model.backbone, size=config.pretrain.image_size)
    backbone = placed(whole, device)
    backbone.load_state_dict(adapted(backbone, run.method.backbone.state_dict()))
    if config.pretrain.settle:
        with optimise.autocast(device, config.pretrain.amp):
            settle(backbone, samples.whole_slices(config.pretrain.settle), device)
    metadata = {
        "kind": config.pretrain.method,
        "backbone": config.model.backbone,
        "step": str(run.step),
        run.method.merit: f"{run.best:.4f}",
        "statistics": "whole slices" if config.pretrain.settle else "crops",
    }
    save_backbone(backbone, path, metadata)


def _log(folder: Path, run: State) -> contextlib.AbstractContextManager[Callable[[Record], None]]:
    """Where records go: nowhere but on the main rank; what came after the checkpoint that this
    sitting starts from is dropped.
    """
    if not run.world.main:
        return contextlib.nullcontext(lambda record: None)
    kept = [record for record in read_log(folder / layout.LOG) if record["step"] <= run.step]
    return open_log(folder, kept, "step")
