"""Stage 06's loop: one CNN-LSTM a fold, resumable, with out-of-fold predictions at series level."""

import contextlib
import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ..learning.backbone import load_backbone, placed, standardise
from ..learning.checkpoint import describe, load_checkpoint, save_checkpoint, save_weights
from ..learning.compilation import compile_passes
from ..learning.interrupt import StopSignal
from ..learning.loaders import loading
from ..learning.log import open_log
from ..learning.optimise import (
    Average,
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
from ..run.config import Config, PredictConfig, TrainConfig, decisive
from ..run.stage import Stage
from ..system.console import log, progress
from ..system.errors import InputError
from ..system.files import atomic_path, remove_folder
from ..system.machine import pick_device, seed_everything, world_size
from .batches import FoldBatches
from .data import positive_share
from .dice import OrganDecoder
from .features import require_room
from .fold import FoldData, fold_rows, gather_fold, held_out_score
from .loss import InjuryLoss
from .mix import mix_volumes, mixed_terms
from .model import CnnLstm, start_at_prior
from .predict import Trained, build_model, predict
from .second_fold import train_second_level

PLAIN = PredictConfig()  # one view


class FoldTrainer:
    """Model, optimiser and history of one fold; `run` trains, `predict_held_out` gives the OOF
    rows.
    """

    def __init__(
        self,
        config: Config,
        data: FoldData,
        folder: Path,
        device: torch.device,
        pretrained: Path | None,
    ) -> None:
        self.config, self.options, self.data, self.folder, self.device = (
            config,
            config.train,
            data,
            folder,
            device,
        )
        seed_everything(config.seed, data.fold)
        self.model = build_model(
            config, "imagenet" if self.options.init == "imagenet" else "scratch"
        )
        _refuse_single_values(self.model.backbone, self.options, len(data.train))
        if pretrained is not None:
            log(f"fold {data.fold}: {load_backbone(self.model.backbone, pretrained)}")
        self.batches = FoldBatches(config, data, device, self._leave_if_asked)
        self.dataset = self.batches.training
        # as often as they are drawn
        labels = np.stack([series.labels for series in data.train]) * np.float32(
            self.batches.weights[:, None]
        )
        start_at_prior(self.model.heads, labels)
        # before the decoder, whose hooks a copy would have too
        self.averaged = (
            placed(copy.deepcopy(self.model), device).requires_grad_(False)
            if self.options.ema
            else None
        )
        self.decoder = (
            OrganDecoder(self.model.backbone, self.options) if self.options.dice_loss else None
        )
        beside = [] if self.decoder is None else [placed(self.decoder, device)]
        placed(self.model, device)
        self.average = Average(self.averaged, self.model) if self.averaged else None
        positives = positive_share(data.train, self.options)
        self.loss = InjuryLoss(self.options, labels, positives).to(device)
        backbone_lr, decay = self.options.backbone_lr, self.options.weight_decay
        self.model.backbone.requires_grad_(not self.options.freeze_backbone)
        groups = parameter_groups(self.model, backbone_lr, decay, *beside)
        self.update = Update(
            nn.ModuleList([self.model, *beside]).parameters(),
            adamw(groups, self.options.lr, decay),
            grad_scaler(device, self.options.amp),
            self.options.clip,
        )
        if self.options.compile:  # what follows is small, and a graph ends at recurrent cells
            compile_passes(self.model.backbone, device, "train.compile")
        self.history: list[dict[str, Any]] = []
        self.epoch = 0
        # of the epoch under way, so that a stopped run goes on within it
        self.tally: dict[str, Any] = {}
        self.unread: Figures | None = None  # of the last step, where they are read late
        self.judged: pl.DataFrame | None = None  # the OOF rows of the last score
        self.stop = StopSignal(world_size() > 1)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last one may be smaller."""
        return -(-len(self.data.train) // (self.options.batch * self.options.accumulate))

    @property
    def final_model(self) -> CnnLstm:
        """The weights that predict: averaged ones where `train.ema` is on."""
        return self.averaged or self.model

    @property
    def kept(self) -> dict[str, Any]:
        """The log row of the epoch whose weights predict: the best one where early stopping is on,
        else the last.
        """
        return (
            min((row for row in self.history if "score" in row), key=lambda row: row["score"])
            if self.options.patience
            else self.history[-1]
        )

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the last epoch or until patience is
        spent.

        SIGTERM and Ctrl-C stop it after a step, with a checkpoint from which it goes on as if it
        had not stopped.
        """
        self.resume()
        with (
            self.stop,
            loading(),
            contextlib.closing(self.batches),
            open_log(self.folder, self.history, "epoch") as write,
        ):
            while self.epoch < self.options.epochs and not self._out_of_patience():
                row = self.train_epoch()
                row |= self.validate() if self.batches.validates(self.epoch) else {}
                self.epoch += 1
                self.history.append(row)
                self.save()
                write(row)
                score = f" held-out score {row['score']:.4f}," if "score" in row else ""
                log(
                    f"fold {self.data.fold} epoch {self.epoch}/{self.options.epochs}: loss"
                    f" {row['loss']:.4f},{score}"
                    f" {row['slices_per_s']:.0f} slices/s, waiting {100 * row['waiting']:.1f} %"
                )
        if self.options.patience:
            self._load_best()
            log(
                f"fold {self.data.fold}: train.patience kept epoch {self.kept['epoch']} of"
                f" {self.epoch} by its score on the held-out patients: their out-of-fold score"
                " flatters it"
            )

    def train_epoch(self) -> dict[str, Any]:
        """One pass over the training series; returns the log row."""
        self.model.train()
        if self.options.freeze_backbone:
            self.model.backbone.eval()
        if self.tally.get("epoch") != self.epoch:
            self.tally = {
                "epoch": self.epoch,
                "steps": 0,
                "seconds": 0.0,
                "waiting": 0.0,
                "slices": 0,
                "terms": {},
            }
        tally = self.tally
        batches = self.batches.of_epoch(self.epoch, tally["steps"])
        steps = range(tally["steps"], self.steps_per_epoch)
        for step in progress(
            steps, len(steps), f"fold {self.data.fold} epoch {self.epoch + 1}", "step"
        ):
            asked = time.perf_counter()
            micro = next(batches)
            if self.unread is None or self.unread.here():  # else the device does not wait for data
                tally["waiting"] += time.perf_counter() - asked
            figures = self.step(self.epoch * self.steps_per_epoch + step, micro)
            self._read()
            self.unread = figures
            if not reads_late(self.device):
                self._read()
            tally["slices"] += sum(len(b["labels"]) for b in micro) * self.options.sample_slices
            tally["seconds"] += time.perf_counter() - asked
            tally["steps"] += 1
            self._leave_if_asked()
        asked = time.perf_counter()
        self._read()
        tally["seconds"] += time.perf_counter() - asked
        terms = tally["terms"]
        rate = self.learning_rate((self.epoch + 1) * self.steps_per_epoch - 1)
        return {
            "epoch": self.epoch + 1,
            "lr": rate,
            "loss": sum(terms.values()),
            "terms": terms,
            "seconds": round(tally["seconds"], 2),
            "slices_per_s": tally["slices"] / tally["seconds"],
            "waiting": tally["waiting"] / tally["seconds"],
        }

    def _read(self) -> None:
        """Add the figures of the last step to the epoch's, unless that is done; waits for it."""
        if self.unread is None:
            return
        terms = self.tally["terms"]
        for name, value in self.unread.read().items():
            terms[name] = terms.get(name, 0.0) + value / self.steps_per_epoch
        self.unread = None

    def _leave_if_asked(self) -> None:
        if self.stop.signum:
            self._read()
            self.save_state()
            log(
                f"fold {self.data.fold}: stopped in epoch {self.epoch + 1} after step"
                f" {self.tally['steps']}, checkpoint written"
            )
            self.stop.leave()

    def learning_rate(self, step: int) -> float:
        """Warm-up and cosine to `lr_final`, a pure function of the step."""
        options = self.options
        total = options.cosine_steps or options.epochs * self.steps_per_epoch
        share = warmup_cosine(step, int(options.warmup * total), total)
        return options.lr_final + (options.lr - options.lr_final) * share

    def step(self, step: int, micro: list[dict[str, Tensor]]) -> Figures:
        """One optimiser step over the micro-batches of one large batch; returns the loss terms,
        for which nothing has waited.
        """
        seed_everything(self.config.seed, self.data.fold, step)
        self.update.set_rate(self.learning_rate(step))
        full = sum(len(batch["labels"]) for batch in micro)
        ids = [self.data.train[i].series_id for batch in micro for i in batch["item"].tolist()]
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro):
            batch = {
                name: value if name == "masked" else value.to(self.device, non_blocking=True)
                for name, value in batch.items()
                if name != "item"
            }
            draw = np.random.default_rng((self.config.seed, self.data.fold, step, number))
            volumes, share, box = mix_volumes(standardise(batch["slices"]), self.options, draw)
            with autocast(self.device, self.options.amp):
                outputs = self.model(volumes)
                organs = None if self.decoder is None else self.decoder(batch, share, box)
            terms = mixed_terms(self.loss, outputs, batch, share, full)
            if organs is not None:
                terms["dice"] = self.options.dice_loss * organs / full
            self.update.backward(cast(Tensor, sum(terms.values())))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        figures = self.update.apply(step, list(sums), torch.stack(list(sums.values())), ids)
        if self.average is not None:
            self.average.update(min(self.options.ema, (1 + step) / (10 + step)))
        return figures

    def validate(self) -> dict[str, float]:
        """Official score of the held-out patients after this epoch."""
        through = self.tally.get("epoch") == self.epoch and (
            self.tally["steps"] == self.steps_per_epoch
        )
        self.judged = self.predict_held_out(PLAIN, self.batches.held_out(self.epoch, through))
        return held_out_score(self.data, self.judged, self.config.score.aggregate)

    def predict_held_out(
        self, views: PredictConfig = PLAIN, batches: Iterator[dict[str, Tensor]] | None = None
    ) -> pl.DataFrame:
        """OOF rows: `patient_id, series_id, fold` and the 13 columns; `batches` (none: loaded anew)
        are those of all held-out series.
        """
        model, values = self.final_model.eval(), []
        for batch in batches or self.batches.held_out_alone(views.phases):
            slices = batch["slices"].to(self.device, non_blocking=True)
            values.append(predict(model, slices, self.options.amp, views.flips))
            self._leave_if_asked()
        return fold_rows(self.data, torch.cat(values).numpy())

    def out_of_fold(self) -> pl.DataFrame:
        """`predict_held_out` with the views of the test set, calibration being fitted to what that
        gets. Where the last score is of these very views and weights, so are its rows.
        """
        views = self.config.predict
        plain = (views.flips, views.phases) == (PLAIN.flips, PLAIN.phases)
        if plain and self.judged is not None and not self.options.patience:
            return self.judged
        return self.predict_held_out(views)

    def save(self) -> None:
        """Checkpoint after an epoch where one is due, and with the best weights beside it where
        early stopping is on and they are new.
        """
        last = self.history[-1]
        best = self.options.patience and "score" in last and self.kept is last
        if best:
            save_checkpoint(self.folder / layout.BEST, {"model": self.final_model.state_dict()})
        over = self.epoch == self.options.epochs or self._out_of_patience()
        if best or over or self.epoch % self.options.checkpoint_every == 0:
            self.save_state()

    def save_state(self) -> None:
        """Everything that a resumed run needs."""
        save_checkpoint(
            self.folder / layout.LAST,
            {
                "model": self.model.state_dict(),
                "averaged": self.averaged.state_dict() if self.averaged else None,
                "decoder": self.decoder.state_dict() if self.decoder else None,
                **self.update.state(),
                "epoch": self.epoch,
                "history": self.history,
                "tally": self.tally,
                "identity": self._identity(),
            },
        )

    def resume(self) -> None:
        """Take up the last checkpoint where it belongs to this very config and fold."""
        state = load_checkpoint(self.folder / layout.LAST)
        if state is None:
            return
        if state["identity"] != self._identity():
            log(
                f"fold {self.data.fold}: the checkpoint is of another config or data, training"
                " starts anew"
            )
            return
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.decoder is not None:
            self.decoder.load_state_dict(state["decoder"])
        self.update.restore(state)
        self.epoch, self.history, self.tally = state["epoch"], state["history"], state["tally"]
        inside = (
            f" and step {self.tally['steps']} of the next"
            if self.tally["epoch"] == self.epoch
            else ""
        )
        log(f"fold {self.data.fold}: resumed after epoch {self.epoch}{inside}")

    def _identity(self) -> str:
        held_out = [series.series_id for series in self.data.held_out]
        return json.dumps(
            {
                "train": decisive(self.options),
                "model": decisive(self.config.model),
                "seed": self.config.seed,
                "held_out": held_out,
                "fingerprint": self.data.fingerprint,
            }
        )

    def _out_of_patience(self) -> bool:
        patience, scored = self.options.patience, any("score" in row for row in self.history)
        return bool(patience and scored) and self.epoch - self.kept["epoch"] >= patience

    def _load_best(self) -> None:
        path = self.folder / layout.BEST
        if (state := load_checkpoint(path)) is None:
            raise InputError(
                "the weights of the best epoch are missing or damaged",
                str(path),
                f"remove {layout.LAST} beside it to train the fold anew",
            )
        self.final_model.load_state_dict(state["model"])


def _refuse_single_values(backbone: nn.Module, options: TrainConfig, series: int) -> None:
    """Raise InputError where a batch would give a batch norm one value of each channel, which has
    no variance: tried on a copy where a batch is a single slice.
    """
    smallest = min(options.batch, series % options.batch or options.batch)
    if smallest * options.sample_slices > 1 or options.freeze_backbone:
        return
    shape = 1, options.channels, options.image_size, options.image_size
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copy.deepcopy(backbone).train()(torch.zeros(shape))
    except ValueError as fault:
        raise InputError(
            f"the last batch of an epoch of {series} series is a single slice, too little for the"
            f" batch norms of this model ({fault})",
            f"train.batch={options.batch} train.slices={options.slices}"
            f" train.image_size={options.image_size}",
            "set train.slices=2, or a train.batch that leaves no single series over",
        ) from fault


def train_fold(
    config: Config, data: FoldData, folder: Path, device: torch.device, pretrained: Path | None
) -> dict[str, Any]:
    """Train one fold and write `model.safetensors`, `last.ckpt`, `log.jsonl`, `oof.parquet` and,
    with a second level, `second_level/`; returns the manifest's counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = FoldTrainer(config, data, folder, device, pretrained)
    second = config.train.second_level.enabled
    if second:  # told before hours of training
        everything, features = [*data.train, *data.held_out], folder / layout.SECOND_LEVEL
        require_room(trainer.model, everything, config.train, features / layout.FEATURES)
    trainer.run()
    save_weights(
        folder / layout.MODEL, trainer.final_model, describe("classifier", config, Trained)
    )
    rows = folder / (layout.FIRST_OOF if second else layout.OOF)
    with atomic_path(rows) as temporary, loading():
        trainer.out_of_fold().write_parquet(temporary)
    kept = trainer.kept
    counts: dict[str, Any] = {
        "fold": data.fold,
        "train_series": len(data.train),
        "held_out_series": len(data.held_out),
        "epochs": trainer.epoch,
        "loss": kept["loss"],
        "held_out_score": kept["score"],
    }
    if second:
        counts["second_level"] = train_second_level(config, data, trainer.final_model, folder)
    return counts


def run_fold(part: Stage, fold: int, pretrained: Path | None = None) -> dict[str, Any]:
    """Train fold `fold` of the run in the folder of `part`, from stage 04's backbone unless
    told.
    """
    config = part.config
    if part.options.jobs:
        torch.set_num_threads(part.jobs)
    data = gather_fold(part, fold)
    if part.options.force:
        remove_folder(part.folder / layout.SECOND_LEVEL)
    if config.train.init == "voco2d" and pretrained is None:
        pretrained = part.upstream(layout.VOCO) / layout.BACKBONE
    device = pick_device(part.device_name, int(os.environ.get("LOCAL_RANK", 0)))
    return train_fold(config, data, part.folder, device, pretrained)
