"""Stage 07: test series from DICOM to probabilities in memory, decoded ahead in processes, under a time budget."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from .artifacts import Stage
from .calibration import Calibration
from .classifier import CnnLstm
from .config import Config, PredictConfig, TrainConfig
from .datasets import slice_positions, take_slices
from .decode_ahead import Ahead
from .metric import value_frame
from .prediction import load_classifier, predict
from .runtime import log, pick_device, write_text
from .sources import SeriesTask
from .submission import SubmissionWriter
from .targets import COLUMNS


@dataclass(frozen=True)
class Ensemble:
    """The fold models with the options they were trained with, and the calibration of their out-of-fold predictions."""

    models: Sequence[CnnLstm]
    options: TrainConfig
    calibration: Calibration
    device: torch.device

    def series(self, volume: np.ndarray, flips: Sequence[str]) -> np.ndarray:
        """Probabilities (13,) of one volume: mean over the fold models and flips."""
        slices = take_slices(volume, slice_positions(len(volume), self.options.slices), self.options)
        batch = torch.from_numpy(slices)[None].to(self.device)
        return torch.stack([predict(model, batch, self.options.amp, flips)[0] for model in self.models]).mean(0).numpy()

    def patient(self, patient_id: str, series: dict[str, np.ndarray]) -> np.ndarray:
        """Calibrated probabilities (13,) of a patient from those of each series id, summed in the order of ids whatever came first."""
        names = sorted(series)
        ids = pl.DataFrame({"patient_id": [patient_id] * len(names), "series_id": names})
        table = ids.hstack(value_frame(np.stack([series[name] for name in names])))
        return self.calibration.predict([table]).select(COLUMNS).to_numpy()[0]


def load_ensemble(stage: Stage) -> Ensemble:
    """All fold models of stage 05 and the calibration of stage 06."""
    if stage.options.jobs:
        torch.set_num_threads(stage.jobs)
    device = pick_device(stage.device_name)
    folds = sorted(stage.upstream("05_folds").glob("fold*/model.safetensors"))
    loaded = [load_classifier(path, device) for path in folds]
    path = stage.upstream("06_oof") / "calibration.json"
    calibration = Calibration.from_json(json.loads(path.read_text(encoding="utf-8")), path)
    return Ensemble([model for model, _ in loaded], loaded[0][1], calibration, device)


def predict_test(tasks: Sequence[SeriesTask], data: Path, sample: pl.DataFrame, ensemble: Ensemble, config: Config, path: Path, jobs: int,
                 started: float) -> dict[str, Any]:  # fmt: skip
    """Write `submission.csv` at `path`, valid from the first second on, and `fallbacks.csv` beside it; returns the manifest's counts.

    `started` is the `time.monotonic()` from which `predict.time_budget_h` counts.
    """
    options = config.predict
    writer = SubmissionWriter(sample, ensemble.calibration.prior)
    writer.write(path)
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
    seconds = time.monotonic() - started
    predicted = int(writer.predicted.sum())
    return {"patients": len(writer.rows), "series": len(tasks), "predicted": predicted, "prior": len(writer.rows) - predicted,
            "fallbacks": len(problems), "patients_per_hour": round(3600 * predicted / seconds, 1)}  # fmt: skip


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
