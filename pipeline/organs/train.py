"""Stage 05's loop: one segmenter a fold, every step a pure function of (state, step), so that a
resumed run repeats an unbroken one.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..learning.backbone import placed, standardise
from ..learning.checkpoint import describe, load_checkpoint, save_checkpoint, save_weights
from ..learning.interrupt import StopSignal
from ..learning.loaders import loading
from ..learning.log import open_log
from ..learning.optimise import (
    Figures,
    Update,
    adamw,
    autocast,
    grad_scaler,
    parameter_groups,
    reads_late,
    warmup_cosine,
)
from ..run import layout
from ..run.config import Config, decisive
from ..system.console import log, progress
from ..system.machine import seed_everything
from ..system.processes import parent_stage
from .data import Masked, PlaneDataset, plane_batches
from .loss import organ_terms
from .model import OrganNet, Segmented, build_segmenter


@dataclass(frozen=True)
class OrganFold:
    """Masked series that one fold's segmenter is trained on, and the fingerprint of everything
    that its training depends on.
    """

    fold: int
    train: Sequence[Masked]
    fingerprint: str = ""


class OrganTrainer:
    """Model, optimiser and history of one fold; `run` trains to the last step."""

    def __init__(
        self,
        config: Config,
        data: OrganFold,
        folder: Path,
        device: torch.device,
        pretrained: Path | None = None,
    ) -> None:
        self.config, self.options, self.data = config, config.organs, data
        self.folder, self.device = folder, device
        seed_everything(config.seed, data.fold)
        init = "imagenet" if self.options.init == "imagenet" else "scratch"
        self.model = placed(build_segmenter(config, init, pretrained), device)
        options = self.options
        groups = parameter_groups(self.model, options.backbone_lr, options.weight_decay)
        self.update = Update(
            self.model.parameters(),
            adamw(groups, options.lr, options.weight_decay),
            grad_scaler(device, options.amp),
            options.clip,
        )
        self.dataset = PlaneDataset(data.train, options, config.seed + data.fold)
        self.done = 0
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}  # of the terms since the last row
        self.unread: Figures | None = None  # of the last step, where they are read late
        self.since = time.perf_counter()
        self.stop = StopSignal()

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the last step. SIGTERM and Ctrl-C
        stop it after a step, with a checkpoint from which it goes on as if it had not stopped.
        """
        self.resume()
        steps, name = range(self.done, self.options.steps), f"organs fold {self.data.fold}"
        if not len(steps):
            return
        with (
            self.stop,
            loading(),
            contextlib.ExitStack() as closing,
            open_log(self.folder, self.history, "step") as write,
        ):
            sharing = self.config.folds.count if parent_stage() else 1
            stream = plane_batches(self.dataset, steps, self.device, self._leave_if_asked, sharing)
            closing.callback(stream.close)  # ends its processes
            self.model.train()
            self.since = time.perf_counter()
            for step in progress(steps, len(steps), name, "steps"):
                figures = self.step(step, next(stream))
                self._read()
                self.unread, self.done = figures, step + 1
                if not reads_late(self.device):
                    self._read()
                if self.done % self.options.log_every == 0 or self.done == self.options.steps:
                    write(self._row())
                self._leave_if_asked()  # with the step's row: the next one begins after it
                due = self.done % self.options.checkpoint_every == 0
                if due and self.done < self.options.steps:
                    self.save()
            self.save()

    def step(self, step: int, batch: dict[str, torch.Tensor]) -> Figures:
        """One optimiser step; returns the loss terms, for which nothing has waited."""
        seed_everything(self.config.seed, self.data.fold, step)
        self.update.set_rate(self.learning_rate(step))
        images, labels = (
            batch[name].to(self.device, non_blocking=True) for name in ("image", "label")
        )
        with autocast(self.device, self.options.amp):
            logits = self.model(standardise(images))
        terms = organ_terms(logits, labels)
        self.update.backward(sum(terms.values(), logits.new_zeros(())))
        ids = [self.data.train[item].series_id for item in batch["item"].tolist()]
        values = torch.stack([value.detach() for value in terms.values()])
        return self.update.apply(step, list(terms), values, ids)

    def learning_rate(self, step: int) -> float:
        """Warm-up and cosine, a pure function of the step."""
        total = self.options.steps
        return self.options.lr * warmup_cosine(step, int(self.options.warmup * total), total)

    def _read(self) -> None:
        """Add the figures of the last step to the row's, unless that is done; waits for it."""
        if self.unread is not None:
            for name, value in self.unread.read().items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.unread = None

    def _row(self) -> dict[str, Any]:
        """The log row of the steps since the last one."""
        self._read()
        before = self.history[-1]["step"] if self.history else 0
        count, now = self.done - before, time.perf_counter()
        terms = {name: value / count for name, value in self.sums.items()}
        row = {
            "step": self.done,
            "lr": self.learning_rate(self.done - 1),
            "loss": sum(terms.values()),
            "terms": terms,
            "planes_per_s": round(count * self.options.batch / (now - self.since), 1),
        }
        self.sums, self.since = {}, now
        self.history.append(row)
        return row

    def _leave_if_asked(self) -> None:
        if self.stop.signum:
            self.save()
            log(f"organs fold {self.data.fold}: stopped after step {self.done}, checkpoint written")
            self.stop.leave()

    def save(self) -> None:
        """Everything that a resumed run needs."""
        self._read()
        state = {
            "model": self.model.state_dict(),
            **self.update.state(),
            "step": self.done,
            "history": self.history,
            "sums": self.sums,
            "identity": self._identity(),
        }
        save_checkpoint(self.folder / layout.LAST, state)

    def resume(self) -> None:
        """Take up the last checkpoint where it belongs to this very config, fold and data."""
        state = load_checkpoint(self.folder / layout.LAST)
        if state is None:
            return
        if state["identity"] != self._identity():
            log(
                f"organs fold {self.data.fold}: the checkpoint is of another config or data,"
                " training starts anew"
            )
            return
        self.model.load_state_dict(state["model"])
        self.update.restore(state)
        self.done, self.history, self.sums = state["step"], state["history"], state["sums"]
        log(f"organs fold {self.data.fold}: resumed after step {self.done}")

    def _identity(self) -> str:
        return json.dumps(
            {
                "organs": decisive(self.options),
                "model": decisive(self.config.model),
                "seed": self.config.seed,
                "series": [one.series_id for one in self.data.train],
                "fingerprint": self.data.fingerprint,
            }
        )


def train_organs(
    config: Config,
    data: OrganFold,
    folder: Path,
    device: torch.device,
    pretrained: Path | None = None,
) -> OrganNet:
    """Train one fold's segmenter and write `model.safetensors`, `last.ckpt` and `log.jsonl`;
    returns it, ready to predict.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = OrganTrainer(config, data, folder, device, pretrained)
    trainer.run()
    save_weights(folder / layout.MODEL, trainer.model, describe("organs", config, Segmented))
    return trainer.model.eval()
