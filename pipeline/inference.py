"""Stage 07: test series from DICOM to probabilities in memory, decoded ahead in processes, under a time budget."""

import contextlib
import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from .artifacts import Stage
from .calibration import Calibration
from .classifier import CnnLstm
from .config import Config, ConvertConfig, PredictConfig, TrainConfig, VolumeConfig
from .convert import SliceImage, read_series
from .datasets import slice_positions, take_slices
from .parallel import Failure, spread
from .prediction import load_classifier, predict
from .runtime import log, pick_device, write_text
from .sources import SeriesTask, list_files
from .submission import SubmissionWriter
from .targets import COLUMNS
from .volume_store import usable, volume_of

WINDOW = 4  # series a process that are under way or waiting for the model: what bounds memory


class Decoded(NamedTuple):
    """A test series as a volume (D, H, W) uint8, or None and the reason."""

    patient_id: str
    series_id: str
    volume: np.ndarray | None
    problem: str


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

    def patient(self, patient_id: str, series: Sequence[np.ndarray]) -> np.ndarray:
        """Calibrated probabilities (13,) of a patient from those of the series."""
        ids = pl.DataFrame({"patient_id": [patient_id] * len(series), "series_id": [str(k) for k in range(len(series))]})
        table = ids.hstack(pl.DataFrame(np.stack(series), schema=list(COLUMNS)))
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


def slice_table(slices: Sequence[SliceImage]) -> pl.DataFrame:
    """Rows of the slice index for slices in memory; `row` is the position in `slices`."""
    fields = ("instance_number", "order", "z_mm", "rows", "cols", "spacing_y_mm", "spacing_x_mm", "flags")
    table = pl.DataFrame({name: [getattr(item, name) for item in slices] for name in fields}, strict=False)
    return table.with_row_index("row")


def decode_series(task: SeriesTask, data: Path, convert: ConvertConfig, volume: VolumeConfig) -> Decoded:
    """Read one series from DICOM and build its volume: the very functions of stages 01 and 02."""
    slices, quarantined = read_series(list_files(task.path, data), convert)
    table = usable(slice_table(slices)) if slices else None
    if table is None or table.is_empty():
        reason = quarantined[0][1] if quarantined else "no usable slice"
        return Decoded(task.patient_id, task.series_id, None, reason)
    images = (slices[row].image for row in table["row"])
    return Decoded(task.patient_id, task.series_id, volume_of(images, table, volume).array, "")


class Ahead:
    """Iterator over decoded series: a thread feeds worker processes window by window, so that little waits and nothing piles up."""

    def __init__(self, tasks: Sequence[SeriesTask], data: Path, config: Config, jobs: int) -> None:
        self._work = partial(decode_series, data=data, convert=config.convert, volume=config.volume)
        self._tasks, self._jobs = tasks, max(2, jobs)  # two, so that a child never forks from this process with its model threads
        self._ready: queue.Queue[Decoded | BaseException | None] = queue.Queue(maxsize=WINDOW * self._jobs)
        self._stop = threading.Event()
        threading.Thread(target=self._produce, daemon=True).start()

    def _produce(self) -> None:
        size = WINDOW * self._jobs
        try:
            for start in range(0, len(self._tasks), size):
                window = self._tasks[start : start + size]
                for k, answer in spread(self._work, window, self._jobs):
                    failed = isinstance(answer, Failure)
                    self._put(Decoded(window[k].patient_id, window[k].series_id, None, answer.reason) if failed else answer)
                    if self._stop.is_set():
                        return
            self._put(None)
        except BaseException as fault:  # handed to the consumer, which raises it
            self._put(fault)

    def _put(self, item: Decoded | BaseException | None) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.5)
                return

    def until(self, deadline: float) -> Iterator[Decoded]:
        """Yield series as they are ready; ends when all are done or `time.monotonic()` passes `deadline`."""
        try:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    item = self._ready.get(timeout=min(left, 3600))
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._close()

    def _close(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        self._stop.set()
        get_reusable_executor().shutdown(wait=False, kill_workers=True)


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
    missing, found, problems, done = defaultdict(int), defaultdict(list), [], 0
    for task in tasks:
        missing[task.patient_id] += 1
    start = shown = time.monotonic()
    for item in Ahead(tasks, data, config, jobs).until(deadline):
        if item.volume is None:
            problems.append((item.patient_id, item.series_id, item.problem))
        else:
            found[item.patient_id].append(ensemble.series(item.volume, config.predict.flips))
        missing[item.patient_id] -= 1
        if missing[item.patient_id]:
            continue
        series = found.pop(item.patient_id, [])
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
