"""The second level of one fold: features of its series, training, out-of-fold predictions. What a
stopped run has done is not done again.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..learning.checkpoint import describe, load_checkpoint, save_checkpoint, save_weights
from ..learning.interrupt import StopSignal
from ..learning.log import open_log
from ..learning.optimise import Figures, Update, adamw, grad_scaler, warmup_cosine
from ..run import layout
from ..run.config import Config, decisive
from ..system.console import log, progress
from ..system.files import atomic_path, remove_temporaries
from ..system.machine import seed_everything, world_size
from ..system.processes import parent_stage
from .data import Series
from .features import read_features, save_features, weights_digest
from .fold import FoldData, fold_rows, held_out_score
from .loss import InjuryLoss
from .model import CnnLstm, probabilities, start_at_prior
from .predict import Trained, on_host
from .second_level import (
    CLASSIFIER,
    KIND,
    SecondLevel,
    as_gated_batch,
    gated_sequences,
    second_logits,
)

LEVEL = 2  # tells its draws from the classifier's


def feature_statistics(folder: Path, series: Sequence[Series]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the features of all planes of `series`, one series in
    memory at a time.
    """
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64)
    for one in series:
        features = read_features(folder, one).double()
        count, total = count + len(features), total + features.sum(0)
        squares = squares + features.square().sum(0)
    mean = total / count
    spread = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), spread.clamp_min(1e-3).float()  # a dead feature stays small


class SecondTrainer:
    """Model, optimiser and history of one fold's second level; `run` trains, `predict_held_out`
    gives the OOF rows.
    """

    def __init__(
        self, config: Config, data: FoldData, features: Path, width: int, device: torch.device
    ) -> None:
        self.config, self.options = config, config.train.second_level
        self.data, self.features, self.folder, self.device = data, features, features.parent, device
        seed_everything(config.seed, data.fold, LEVEL)
        self.model = SecondLevel(width, config.train)
        labels = np.stack([series.labels for series in data.train])
        start_at_prior(self.model.heads, labels)
        mean, std = feature_statistics(features, data.train)
        self.model.mean.copy_(mean)
        self.model.std.copy_(std)
        self.model.to(device)
        self.loss = InjuryLoss(config.train, labels).to(device)
        self.update = Update(
            self.model.parameters(),
            adamw(self.model, self.options.lr, config.train.weight_decay),
            grad_scaler(device, False),
            config.train.clip,
        )
        self.history: list[dict[str, Any]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last one may be smaller."""
        return -(-len(self.data.train) // self.options.batch)

    def run(self, identity: str, waiting: Callable[[], object]) -> None:
        """Train from the last checkpoint of the same `identity`, or from the start, to the last
        epoch. `waiting` is called after each step, and may raise: a resumed run does that epoch
        again.
        """
        self._resume(identity)
        epochs = range(len(self.history), self.options.epochs)
        name = f"fold {self.data.fold} second level"
        with open_log(self.folder, self.history, "epoch") as write:
            for epoch in progress(epochs, len(epochs), name, "epochs"):
                row = self._train_epoch(epoch, waiting)
                self.history.append(row)
                save_checkpoint(
                    self.folder / layout.LAST,
                    {
                        "model": self.model.state_dict(),
                        **self.update.state(),
                        "history": self.history,
                        "identity": identity,
                    },
                )
                write(row)

    def _train_epoch(self, epoch: int, waiting: Callable[[], object]) -> dict[str, Any]:
        """One pass over the training series; returns the log row."""
        self.model.train()
        started, steps, size = time.perf_counter(), self.steps_per_epoch, self.options.batch
        rng = np.random.default_rng((self.config.seed, self.data.fold, LEVEL, epoch))
        order = rng.permutation(len(self.data.train)).tolist()
        terms: dict[str, float] = {}
        for k in range(steps):
            chosen = order[k * size : (k + 1) * size]
            for name, value in self._step(epoch, epoch * steps + k, chosen).read().items():
                terms[name] = terms.get(name, 0.0) + value / steps
            waiting()
        return {
            "epoch": epoch + 1,
            "lr": self.learning_rate((epoch + 1) * steps - 1),
            "loss": sum(terms.values()),
            "terms": terms,
            "seconds": round(time.perf_counter() - started, 2),
        }

    def learning_rate(self, step: int) -> float:
        """Warm-up and cosine to 0, a pure function of the step."""
        total = self.options.epochs * self.steps_per_epoch
        return self.options.lr * warmup_cosine(step, int(self.config.train.warmup * total), total)

    def _step(self, epoch: int, step: int, chosen: Sequence[int]) -> Figures:
        """One optimiser step on the training series numbered `chosen`; returns the loss terms."""
        seeds = (self.config.seed, self.data.fold, LEVEL)
        seed_everything(*seeds, step)
        self.update.set_rate(self.learning_rate(step))
        series = [self.data.train[k] for k in chosen]
        samples = [
            gated_sequences(
                read_features(self.features, one),
                one.organs,
                len(one.planes),
                self.config.train,
                np.random.default_rng((*seeds, epoch, k)),
            )
            for k, one in zip(chosen, series, strict=True)
        ]
        outputs = self.model(*as_gated_batch(samples, self.device)), ()
        labels = torch.from_numpy(np.stack([one.labels for one in series])).to(self.device)
        nothing = labels.new_zeros(0)  # of slices
        terms = self.loss(outputs, labels, nothing, nothing, len(series))
        self.update.backward(cast(Tensor, sum(terms.values())))
        values = torch.stack([value.detach() for value in terms.values()])
        return self.update.apply(step, list(terms), values, [one.series_id for one in series])

    def predict_held_out(self) -> pl.DataFrame:
        """OOF rows: `patient_id, series_id, fold` and the 13 columns."""
        model, values = self.model.eval(), []
        for one in self.data.held_out:
            features = read_features(self.features, one)
            logits = second_logits(model, features, one.organs, len(one.planes), self.config.train)
            values.append(probabilities(on_host([logits])[0]))
        return fold_rows(self.data, torch.cat(values).numpy())

    def _resume(self, identity: str) -> None:
        state = load_checkpoint(self.folder / layout.LAST)
        if state is None or state["identity"] != identity:
            return
        self.model.load_state_dict(state["model"])
        self.update.restore(state)
        self.history = state["history"]
        log(f"fold {self.data.fold}: second level resumed after epoch {len(self.history)}")


def train_second_level(
    config: Config, data: FoldData, classifier: CnnLstm, folder: Path
) -> dict[str, Any]:
    """Train the second level of one fold in `folder` on the features of its `classifier`, and write
    `second_level/` and, in place of the classifier's, `oof.parquet`; returns the manifest's counts.
    """
    started, own = time.perf_counter(), folder / layout.SECOND_LEVEL
    features, device = own / layout.FEATURES, next(classifier.parameters()).device
    weights = weights_digest(classifier)
    remove_temporaries(own)
    with StopSignal(world_size() > 1) as stop:

        def leave_if_asked() -> None:
            if stop.signum:
                log(f"fold {data.fold}: second level stopped; what is done is kept")
                stop.leave()

        save_features(
            classifier.eval(),
            [*data.train, *data.held_out],
            config.train,
            features,
            json.dumps([weights, data.fingerprint]),
            leave_if_asked,
            config.folds.count if parent_stage() else world_size(),
        )
        extracted = time.perf_counter()
        width = classifier.norm.normalized_shape[0]
        trainer = SecondTrainer(config, data, features, width, device)
        options = decisive(config.train.second_level)
        trainer.run(json.dumps([weights, options, data.second_fingerprint]), leave_if_asked)
        rows = trainer.predict_held_out()
    metadata = describe(KIND, config, Trained) | {CLASSIFIER: weights}
    save_weights(folder / layout.SECOND_MODEL, trainer.model, metadata)
    with atomic_path(folder / layout.OOF) as path:
        rows.write_parquet(path)
    score = held_out_score(data, rows, config.score.aggregate)["score"]
    seconds = time.perf_counter() - extracted
    log(
        f"fold {data.fold}: second level: held-out score {score:.4f}, features in"
        f" {extracted - started:.0f} s, training in {seconds:.0f} s"
    )
    return {
        "loss": trainer.history[-1]["loss"],
        "held_out_score": score,
        "features_s": round(extracted - started, 1),
        "training_s": round(seconds, 1),
    }
