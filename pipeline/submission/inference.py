"""Stage 08: test series from DICOM to the probabilities of one or several runs in memory, decoded
ahead in processes, under a time budget.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ..classifier.model import CnnLstm, chosen_targets, injury_log_odds, probabilities
from ..classifier.predict import as_batch, load_classifier, logits_of, mean_logits
from ..classifier.second_level import SecondLevel, load_second_level, logits_of_volume
from ..classifier.views import SECOND_LEVEL
from ..competition.metric import value_frame
from ..competition.targets import COLUMNS
from ..evaluation.calibration import Calibration
from ..organs.find import OrganFinder
from ..run import layout
from ..run.config import Config, PredictConfig, TrainConfig, VolumeConfig, decisive
from ..run.manifest import finished, trained_files
from ..run.runs import names_of
from ..run.stage import Stage
from ..slices.sources import SeriesTask
from ..system.console import log
from ..system.errors import InputError
from ..system.files import write_text
from ..system.machine import pick_device
from .decode_ahead import Ahead, Decoded
from .writer import SubmissionWriter

# a series that is predicted all the same
NO_ORGAN = "no organ found: looked at whole"


@dataclass(frozen=True)
class Ensemble:
    """The fold models of one run, the options and volumes they were trained with, threads to run
    them, what finds the organs that they look at, where they do, and their second levels, where
    they have one.
    """

    models: Sequence[CnnLstm]
    options: TrainConfig
    volume: VolumeConfig
    device: torch.device
    threads: Executor
    finder: OrganFinder | None = None
    second: Sequence[SecondLevel] = ()
    # of each series, the standard deviation over models of the log-odds of an injury (targets,)
    spreads: list[np.ndarray] = field(default_factory=list)
    # of each series, whether the finder found none of its organs
    organless: list[bool] = field(default_factory=list)

    def series(self, volume: np.ndarray, flips: Sequence[str], phases: int = 1) -> np.ndarray:
        """Probabilities (13,) of one volume, of the mean logits over the fold models, phases and
        flips; with a second level, which sees all planes as they are, over the fold models.
        """
        organs = self.finder(volume) if self.finder else ()
        self.organless.append(bool(self.finder) and not any(one.voxels for one in organs))
        if self.second:
            pairs = list(zip(self.models, self.second, strict=True))
            answers = logits_of_volume(pairs, volume, self.options, organs, self.threads.map)
        else:
            batch = as_batch(volume, self.options, self.device, phases, organs)
            answers = logits_of(self.models, batch, self.options.amp, flips, self.threads.map)
        if len(answers) > 1:
            odds = torch.cat([injury_log_odds(answer) for answer in answers])
            self.spreads.append(odds.std(0).numpy())
        return probabilities(mean_logits(answers))[0].numpy()

    def fold_spread(self) -> dict[str, float]:
        """How far the fold models differ, by target: the mean of `spreads`; nothing of one model
        or no series.
        """
        if not self.spreads:
            return {}
        names = [target.name for target in chosen_targets(self.options)]
        return dict(zip(names, np.mean(self.spreads, axis=0).round(3).tolist(), strict=True))


@dataclass(frozen=True)
class Blend:
    """The ensembles of one or several runs by name, and the calibration of their out-of-fold
    predictions, which knows the runs in this order.
    """

    runs: Mapping[str, Ensemble]
    calibration: Calibration

    @property
    def ways(self) -> list[VolumeConfig]:
        """The distinct ways in which the runs' volumes are made."""
        return list(dict.fromkeys(run.volume for run in self.runs.values()))

    def series(
        self, volumes: Mapping[VolumeConfig, np.ndarray], flips: Sequence[str], phases: int
    ) -> tuple[np.ndarray, str]:
        """Probabilities (runs, 13) of a series, and what went wrong in the first run that gives
        none.
        """
        found = np.full((len(self.runs), len(COLUMNS)), np.nan)
        for k, (name, run) in enumerate(self.runs.items()):
            problem = "not finite"
            try:
                found[k] = run.series(volumes[run.volume], flips, phases)
            except InputError:
                raise
            except Exception as fault:  # a full GPU too: other series count, the report names it
                problem = type(fault).__name__
            if not np.isfinite(found[k]).all():
                whose = "the model" if len(self.runs) == 1 else f"the model of {name}"
                return found, f"{whose} failed: {problem}"
        return found, ""

    def found_no_organ(self) -> bool:
        """Whether a run found no organ in the last series, so that all its regions were the whole
        volume.
        """
        return any(run.organless[-1] for run in self.runs.values() if run.organless)

    def patient(self, patient_id: str, series: Mapping[str, np.ndarray]) -> np.ndarray:
        """Calibrated probabilities (13,) of a patient from those (runs, 13) of each series id,
        summed in the order of ids whatever came first.
        """
        names = sorted(series)
        ids = pl.DataFrame({"patient_id": [patient_id] * len(names), "series_id": names})
        values = np.stack([series[name] for name in names], axis=1)
        tables = [ids.hstack(value_frame(run)) for run in values]
        return self.calibration.predict(tables).select(COLUMNS).to_numpy()[0]

    def fold_spread(self) -> dict[str, float]:
        """How far the fold models of a run differ, by target, in the mean over the runs."""
        found = defaultdict(list)
        for run in self.runs.values():
            for name, value in run.fold_spread().items():
                found[name].append(value)
        return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def load_blend(runs: Sequence[Stage], calibration: Calibration) -> Blend:
    """The models of all runs, which `calibration` knows in this order.

    On a CPU models run side by side in threads of their own: threads within a model would wait for
    each other wherever the decoding processes hold one of them up.

    Raises:
        InputError: models of a run that were trained otherwise than its others, on slices turned
        otherwise than this config turns them, or on organs of other segmenters than there are.
    """
    device, jobs = pick_device(runs[0].device_name), runs[0].jobs
    paths = [trained_files(run.upstream(layout.CLASSIFIERS), layout.MODEL) for run in runs]
    threads = min(jobs, max(map(len, paths))) if device.type == "cpu" else 1
    if device.type == "cpu":
        torch.set_num_threads(max(1, jobs // threads))
    pool, turned = ThreadPoolExecutor(threads), runs[0].config.convert.flip_hfs
    ensembles = [
        load_ensemble(*both, turned, device, pool) for both in zip(runs, paths, strict=True)
    ]
    return Blend(dict(zip(names_of(runs), ensembles, strict=True)), calibration)


def segmenters_of(run: Stage) -> list[Path]:
    """Stage 05's models of all folds of a run whose classifiers or second levels look at organs.

    Raises:
        InputError: there are none, or others than those whose organs they know.
    """
    known = finished(run.upstream(layout.CLASSIFIERS))["inputs"]
    folder = run.upstream(layout.ORGANS)
    if known[layout.ORGANS] != run.inputs(layout.ORGANS)[layout.ORGANS]:
        raise InputError(
            "the models were trained on organs of other segmenters",
            str(folder),
            f"run {layout.script(layout.CLASSIFIERS)} again, or bring back the folder",
        )
    return trained_files(folder, layout.MODEL)


def load_ensemble(
    run: Stage, paths: Sequence[Path], turned: bool, device: torch.device, pool: Executor
) -> Ensemble:
    """The fold models `paths` of a run, trained alike, on slices of `convert.flip_hfs` as `turned`,
    their second levels, where they have one, and the segmenters, where one of both looks at organs.
    """
    models, configs = zip(*(load_classifier(path, device) for path in paths), strict=True)
    first = configs[0]
    for path, config in zip(paths, configs, strict=True):
        alike = decisive(config.train) == decisive(first.train) and config.volume == first.volume
        if not alike:
            raise InputError(
                "the fold models were trained with different options",
                f"{paths[0]} and {path}",
                "train all folds alike",
            )
        if config.convert.flip_hfs != turned:
            flip = str(config.convert.flip_hfs).lower()
            raise InputError(
                "the models were trained on slices turned otherwise",
                f"convert.flip_hfs of the config and of {path}",
                f"give convert.flip_hfs={flip}, and runs that all have it",
            )
    folder = run.upstream(layout.CLASSIFIERS)
    files = trained_files(folder, layout.SECOND_MODEL)
    second = list(map(load_second_level, files, models))
    inputs = finished(folder)["inputs"]
    gated = SECOND_LEVEL in inputs and layout.ORGANS in inputs
    seen = gated or first.train.regions == "organs"
    finder = OrganFinder(segmenters_of(run), device) if seen else None
    return Ensemble(models, first.train, first.volume, device, pool, finder, second)


class Filling:
    """A submission being filled in series by series, and the (patient, series, reason) of whatever
    fell back, no patient left out.
    """

    def __init__(
        self,
        tasks: Sequence[SeriesTask],
        writer: SubmissionWriter,
        blend: Blend,
        views: PredictConfig,
    ) -> None:
        self.writer, self.blend, self.views = writer, blend, views
        self.missing = Counter(task.patient_id for task in tasks)
        self.found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        self.problems: list[tuple[str, str, str]] = []
        # series that the model did and did not give probabilities for
        self.answered = self.failed = 0
        self.late = 0  # patients with series that were not reached

    def note_tables(self, tasks: Sequence[SeriesTask], limit: int = 0) -> None:
        """Report patients that only one of the two test tables names, or that are past the
        `limit`.
        """
        within = f" within data.limit={limit}" if limit else ""
        strangers = sorted({task.patient_id for task in tasks} - self.writer.rows.keys())
        self.problems += [
            (patient, "", "not in sample_submission.csv: not predicted") for patient in strangers
        ]
        absent = [patient for patient in self.writer.rows if patient not in self.missing]
        self.problems += [
            (patient, "", f"no series in test_series_meta.csv{within}: prior") for patient in absent
        ]

    def take(self, item: Decoded) -> bool:
        """Predict a series; at its patient's last one fill the patient in, and return True."""
        values, problem = self._answer(item)
        if values is None:
            self.problems.append((item.patient_id, item.series_id, problem))
        else:
            self.found[item.patient_id][item.series_id] = values
        self.missing[item.patient_id] -= 1
        if self.missing[item.patient_id]:
            return False
        if not self._fill_in(item.patient_id):
            self.problems.append((item.patient_id, "", "no usable series: prior"))
        return True

    def _answer(self, item: Decoded) -> tuple[np.ndarray | None, str]:
        """Probabilities (runs, 13) of a series, or None and the reason; what fails in a model is
        this series' alone.
        """
        if not item.volumes:
            return None, item.problem
        values, problem = self.blend.series(item.volumes, self.views.flips, self.views.phases)
        if problem:
            self.failed += 1
            return None, problem
        self.answered += 1
        if self.blend.found_no_organ():
            self.problems.append((item.patient_id, item.series_id, NO_ORGAN))
        return values, ""

    def _fill_in(self, patient: str) -> bool:
        series = self.found.pop(patient, {})
        return bool(series) and self.writer.update(patient, self.blend.patient(patient, series))

    def close(self, over: str) -> None:
        """Fill in patients of whom some series were reached, and report them and those who keep the
        prior; `over` says what ended it.
        """
        late = [patient for patient in self.writer.rows if self.missing[patient]]
        self.late = len(late)
        for patient in late:
            filled = self._fill_in(patient)
            self.problems.append(
                (patient, "", f"{over}: {'some series only' if filled else 'prior'}")
            )


def fill_submission(
    tasks: Sequence[SeriesTask],
    data: Path,
    writer: SubmissionWriter,
    blend: Blend,
    config: Config,
    path: Path,
    jobs: int,
    started: float,
) -> dict[str, Any]:
    """Fill in the submission at `path`, valid at every moment, and write `fallbacks.csv` beside it;
    returns the manifest's counts.

    `started` is the `time.monotonic()` from which `predict.time_budget_h` counts. Both files are
    written whatever ends the run.
    """
    options, ready = config.predict, time.monotonic()
    listed = [task for task in tasks if task.patient_id in writer.rows]
    filling, over = Filling(listed, writer, blend, options), "stopped early"
    filling.note_tables(tasks, config.data.limit)
    try:
        _predict_until(
            filling,
            Ahead(listed, data, config.convert, blend.ways, jobs),
            _deadline(options, started),
            path,
            options.flush_every,
        )
        over = "time budget spent"
    finally:
        filling.close(over)
        writer.write(path)
        table = pl.DataFrame(
            filling.problems, schema=["patient_id", "series_id", "reason"], orient="row"
        )
        write_text(path.with_name(layout.FALLBACKS), table.write_csv())
    _log_problems(filling, len(listed))
    if spread := blend.fold_spread():
        values = ", ".join(f"{name} {value:.2f}" for name, value in spread.items())
        log(f"fold models differ in the log-odds of an injury by (standard deviation): {values}")
    seconds = max(1e-3, time.monotonic() - ready)
    predicted = int(writer.predicted.sum())
    return {
        "patients": len(writer.rows),
        "series": len(listed),
        "predicted": predicted,
        "prior": len(writer.rows) - predicted,
        "fallbacks": len(filling.problems),
        "model_failures": filling.failed,
        "fold_spread": spread,
        "late": filling.late,
        "start_s": round(ready - started, 1),
        "patients_per_hour": round(3600 * predicted / seconds, 1),
    }


def _log_problems(filling: Filling, asked: int) -> None:
    for patient, series, reason in filling.problems[:20]:
        log(f"fallback: patient {patient} {'series ' + series + ' ' if series else ''}({reason})")
    if not filling.answered:
        why = (
            f"the model failed on every one of the {filling.failed} series it was given"
            if filling.failed
            else f"none of the {asked} test series could be predicted"
        )
        log(f"warning: {why}: the submission is the prior alone")


def _deadline(options: PredictConfig, started: float) -> float:
    """The budget's end, with 2 percent (a minute at most) kept for the last write."""
    if options.time_budget_h is None:
        return float("inf")
    seconds = options.time_budget_h * 3600
    return started + seconds - min(60.0, 0.02 * seconds)


def _predict_until(
    filling: Filling, ahead: Ahead, deadline: float, path: Path, flush_every: int
) -> None:
    """Predict what comes decoded until all is done or the deadline passes; the file is written
    every `flush_every` patients.
    """
    start, shown, done, patients = time.monotonic(), time.monotonic(), 0, len(filling.missing)
    for item in ahead.until(deadline):
        if not filling.take(item):
            continue
        done += 1
        if done % flush_every == 0:
            filling.writer.write(path)
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            rate = done / (shown - start)
            log(
                f"predict: {done}/{patients} patients, {3600 * rate:.0f} patients/h, ETA"
                f" {(patients - done) / rate:.0f} s"
            )
