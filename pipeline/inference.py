"""Stage 07: test series from DICOM to probabilities in memory, decoded ahead in processes, under a time budget."""

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from .artifacts import Stage
from .calibration import Calibration
from .classifier import CnnLstm
from .config import Config, PredictConfig, TrainConfig, resolved
from .datasets import slice_positions, take_slices
from .decode_ahead import Ahead
from .metric import value_frame
from .prediction import load_classifier, predict
from .runtime import InputError, log, pick_device, write_text
from .sources import SeriesTask
from .submission import SubmissionWriter
from .targets import COLUMNS


@dataclass(frozen=True)
class Ensemble:
    """The fold models with the options they were trained with, the calibration of their out-of-fold predictions, threads to run them."""

    models: Sequence[CnnLstm]
    options: TrainConfig
    calibration: Calibration
    device: torch.device
    threads: Executor

    def series(self, volume: np.ndarray, flips: Sequence[str]) -> np.ndarray:
        """Probabilities (13,) of one volume: mean over the fold models and flips."""
        slices = take_slices(volume, slice_positions(len(volume), self.options.slices), self.options)
        batch = torch.from_numpy(slices)[None].to(self.device)
        answers = self.threads.map(lambda model: predict(model, batch, self.options.amp, flips)[0], self.models)
        return torch.stack(list(answers)).mean(0).numpy()

    def patient(self, patient_id: str, series: dict[str, np.ndarray]) -> np.ndarray:
        """Calibrated probabilities (13,) of a patient from those of each series id, summed in the order of ids whatever came first."""
        names = sorted(series)
        ids = pl.DataFrame({"patient_id": [patient_id] * len(names), "series_id": names})
        table = ids.hstack(value_frame(np.stack([series[name] for name in names])))
        return self.calibration.predict([table]).select(COLUMNS).to_numpy()[0]


def load_ensemble(stage: Stage, calibration: Calibration) -> Ensemble:
    """All fold models of stage 05, trained alike and on volumes like those of this config.

    On a CPU models run side by side in threads of their own: threads within a model would wait for each other wherever the decoding
    processes hold one of them up.
    """
    device = pick_device(stage.device_name)
    paths = sorted(stage.upstream("05_folds").glob("fold*/model.safetensors"))
    models, configs = zip(*(load_classifier(path, device) for path in paths), strict=True)
    for path, config in zip(paths, configs, strict=True):
        if config.train != configs[0].train:
            raise InputError("the fold models were trained with different options", f"{paths[0]} and {path}", "train all folds alike")
        if config.volume != stage.config.volume:
            raise InputError("the models were trained on volumes made otherwise", f"volume.* of the config and of {path}",
                             f"give {' '.join(f'volume.{key}={value}' for key, value in resolved(config.volume).items())}")  # fmt: skip
    threads = min(stage.jobs, len(models)) if device.type == "cpu" else 1
    if device.type == "cpu":
        torch.set_num_threads(max(1, stage.jobs // threads))
    return Ensemble(models, configs[0].train, calibration, device, ThreadPoolExecutor(threads))


def predict_test(tasks: Sequence[SeriesTask], data: Path, writer: SubmissionWriter, ensemble: Ensemble, config: Config, path: Path,
                 jobs: int, started: float) -> dict[str, Any]:  # fmt: skip
    """Fill in the submission at `path`, valid at every moment, and write `fallbacks.csv` beside it; returns the manifest's counts.

    `started` is the `time.monotonic()` from which `predict.time_budget_h` counts.
    """
    options, ready = config.predict, time.monotonic()
    problems = _listed_without_series(writer, tasks)
    problems += _run(tasks, data, writer, ensemble, config, path, jobs, _deadline(options, started))
    late = [patient for patient in writer.waiting if patient not in {patient for patient, _, _ in problems}]
    problems += [(patient, "", "time budget spent: prior") for patient in late]
    writer.write(path)
    write_text(
        path.with_name("fallbacks.csv"), pl.DataFrame(problems, schema=["patient_id", "series_id", "reason"], orient="row").write_csv()
    )
    for patient, series, reason in problems[:20]:
        log(f"fallback: patient {patient} {'series ' + series + ' ' if series else ''}({reason})")
    seconds = max(1e-3, time.monotonic() - ready)
    predicted = int(writer.predicted.sum())
    return {"patients": len(writer.rows), "series": len(tasks), "predicted": predicted, "prior": len(writer.rows) - predicted,
            "fallbacks": len(problems), "start_s": round(ready - started, 1),
            "patients_per_hour": round(3600 * predicted / seconds, 1)}  # fmt: skip


def _deadline(options: PredictConfig, started: float) -> float:
    """The budget's end, with 2 percent (a minute at most) kept for the last write."""
    if options.time_budget_h is None:
        return float("inf")
    seconds = options.time_budget_h * 3600
    return started + seconds - min(60.0, 0.02 * seconds)


def _listed_without_series(writer: SubmissionWriter, tasks: Sequence[SeriesTask]) -> list[tuple[str, str, str]]:
    known = {task.patient_id for task in tasks}
    return [(patient, "", "no series in test_series_meta.csv: prior") for patient in writer.rows if patient not in known]


def _run(tasks: Sequence[SeriesTask], data: Path, writer: SubmissionWriter, ensemble: Ensemble, config: Config, path: Path, jobs: int,
         deadline: float) -> list[tuple[str, str, str]]:  # fmt: skip
    """Predict until all is done or the deadline passes; returns (patient, series, reason) of what fell back."""
    missing, found, problems, done = defaultdict(int), defaultdict(dict), [], 0
    for task in tasks:
        missing[task.patient_id] += 1
    start = shown = time.monotonic()
    for item in Ahead(tasks, data, config, jobs).until(deadline):
        if item.volume is None:
            problems.append((item.patient_id, item.series_id, item.problem))
        else:
            found[item.patient_id][item.series_id] = ensemble.series(item.volume, config.predict.flips)
        missing[item.patient_id] -= 1
        if missing[item.patient_id]:
            continue
        series = found.pop(item.patient_id, {})
        if not series or not writer.update(item.patient_id, ensemble.patient(item.patient_id, series)):
            problems.append((item.patient_id, "", "no readable series: prior"))
        done += 1
        if done % config.predict.flush_every == 0:
            writer.write(path)
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            rate = done / (shown - start)
            log(f"predict: {done}/{len(missing)} patients, {3600 * rate:.0f} patients/h, ETA {(len(missing) - done) / rate:.0f} s")
    for patient, series in found.items():  # the deadline fell between two series of a patient: what there is counts
        if writer.update(patient, ensemble.patient(patient, series)):
            problems.append((patient, "", "time budget spent: some series only"))
    return problems
