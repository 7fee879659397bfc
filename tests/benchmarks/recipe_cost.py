"""What each stage of a preset costs, in parts: `python tests/benchmarks/recipe_cost.py
[--config kaggle kaggle_t4 paper] [--counted] [key=value ...]`.

Prints one Markdown table, a column for each preset; its last column says where a figure is from:

counted    from shapes (tests/benchmarks/recipe_count.py), the same for every card
measured   seconds of one core of this CPU, so that other work on the machine counts little: a
           series of 300 slices of 512 x 512 that the phantom's code draws and writes; untrained
           networks, which take the same time; files in the system's cache. `--counted` leaves
           these out
on paper   counted or measured figures times the numbers of the competition
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from common import GIB
from predict import COMPETITION, HOURS, draw, write_data
from recipe_count import (
    TRAINING,
    Counted,
    count_classifier,
    count_pretraining,
    count_segmenter,
)

from pipeline.classifier.data import Series, SeriesDataset
from pipeline.classifier.predict import as_batch, build_model, logits_of
from pipeline.competition.targets import COLUMNS
from pipeline.organs.data import Masked, PlaneDataset
from pipeline.organs.find import label_volume, organ_boxes, without_islands
from pipeline.organs.masks import ORGANS
from pipeline.organs.model import build_segmenter
from pipeline.phantom.anatomy import Scan
from pipeline.run import room
from pipeline.run.config import AugmentConfig, Config
from pipeline.run.presets import load_config
from pipeline.slices.sources import SeriesTask
from pipeline.submission.decode_ahead import decode_series
from pipeline.voco.data import VocoSamples

SERIES, SERIES_A_PATIENT = 4711, 4711 / 3147
CPU, MOST, ENOUGH = torch.device("cpu"), 9, 3.0
# boxes in shares of a volume, about those of an abdomen: the cost depends on nothing else
BOXES = {
    "liver": (0.10, 0.55, 0.15, 0.75, 0.05, 0.60),
    "spleen": (0.10, 0.40, 0.40, 0.85, 0.65, 0.95),
    "kidney": (0.30, 0.65, 0.45, 0.85, 0.20, 0.80),
    "bowel": (0.35, 0.95, 0.10, 0.75, 0.10, 0.90),
}
COUNTED, PAPER, MEASURED = "counted", "on paper", "measured"
Rows = dict[tuple[str, str], str]  # (what, where from): how much


def of_step(one: Counted, copies: int) -> str:
    """What a training step holds: kept maps and so many float32 copies of the parameters."""
    return f"{one.kept / GIB:.1f} + {4 * copies * one.parameters / GIB:.1f}"


def operations(macs: float) -> str:
    """Multiply-adds as 10^15 operations, two each."""
    return f"{2 * macs / 1e15:.3g}"


def gigabytes(count: float) -> str:
    """Bytes in GB."""
    return f"{count / 1e9:.1f}"


@dataclass(frozen=True)
class Networks:
    """The networks of a preset, counted."""

    config: Config

    @cached_property
    def pretraining(self) -> Counted:
        """Stage 04's student."""
        return count_pretraining(self.config)

    @cached_property
    def segmenter(self) -> Counted:
        """Stage 05's."""
        return count_segmenter(self.config)

    @cached_property
    def classifier(self) -> Counted:
        """Stage 06's."""
        return count_classifier(self.config)

    @property
    def finds_organs(self) -> bool:
        """Whether stage 08 runs the segmenters."""
        return self.config.train.regions == "organs"

    @property
    def passes(self) -> int:
        """Forward passes of one classifier for a test series."""
        return self.config.predict.phases * (1 + len(self.config.predict.flips))

    @property
    def series_macs(self) -> float:
        """Multiply-adds of a classifier for all slices of a series."""
        return self.config.train.sample_slices * self.classifier.picture_macs

    @property
    def test_macs(self) -> float:
        """Multiply-adds of a test series in stage 08: segmenters and classifiers of all folds."""
        found = self.passes * self.series_macs
        if self.finds_organs:
            found += self.config.volume.depth * self.segmenter.picture_macs
        return self.config.folds.count * found


def on_disk(nets: Networks) -> Rows:
    """Bytes of the folders that matter, and of a batch in shared memory."""
    config, folds = nets.config, nets.config.folds.count
    averaged = config.train.ema > 0
    # a fold's model and its last state: weights, two moments, the average
    classifiers = 4 * folds * (4 + averaged) * nets.classifier.parameters
    checkpoints = room.checkpoint_bytes(nets.pretraining.parameters, config.pretrain)
    found = {
        ("02: volumes, GB", PAPER): gigabytes(room.volume_bytes(config.volume, SERIES)),
        ("04: checkpoints, GB", PAPER): gigabytes(checkpoints),
    }
    if config.organs.enabled:
        segmenters = 4 * folds * 4 * nets.segmenter.parameters
        found["05: models and checkpoints, GB", PAPER] = gigabytes(segmenters)
    shared = room.train_batch_bytes(config.train, config.predict.phases)
    return found | {
        ("06: models and checkpoints, GB", PAPER): gigabytes(classifiers),
        ("06: a batch in /dev/shm, MB", PAPER): f"{shared / 1e6:.0f}",
    }


def pretraining(nets: Networks) -> Rows:
    """Stage 04."""
    one, options = nets.pretraining, nets.config.pretrain
    # and the teacher's forward pass, where its base crops are compared with
    step = (TRAINING + (options.base_encoder == "teacher")) * one.macs
    # student, teacher, gradients, two moments and with amsgrad the largest second one
    copies = 5 + options.amsgrad
    return {
        ("04: parameters with projector, millions", COUNTED): f"{one.parameters / 1e6:.1f}",
        (
            "04: crops a step, side",
            COUNTED,
        ): f"{one.pictures}, {options.image_size // options.grid}",
        ("04: memory of a step, GiB", COUNTED): of_step(one, copies),
        ("04: steps", PAPER): f"{options.steps}",
        ("04: all steps, 10^15 operations", PAPER): operations(options.steps * step),
    }


def segmenting(nets: Networks) -> Rows:
    """Stage 05."""
    config = nets.config
    if not config.organs.enabled:
        return {}
    one, options = nets.segmenter, config.organs
    train = config.folds.count * options.steps * TRAINING * one.macs
    find = SERIES * config.volume.depth * one.picture_macs
    return {
        ("05: parameters, millions", COUNTED): f"{one.parameters / 1e6:.1f}",
        ("05: planes a step, side", COUNTED): f"{one.pictures}, {options.image_size}",
        ("05: multiply-adds a plane, 10^9", COUNTED): f"{one.picture_macs / 1e9:.2f}",
        ("05: memory of a step, GiB", COUNTED): of_step(one, 4),
        ("05: all folds, 10^15 operations", PAPER): operations(train + find),
    }


def classifying(nets: Networks) -> Rows:
    """Stage 06."""
    config, one, folds = nets.config, nets.classifier, nets.config.folds.count
    options = config.train
    checks = len([e for e in range(1, options.epochs) if e % options.eval_every == 0]) + 1
    trained = folds * options.epochs * TRAINING * SERIES * (folds - 1) / folds
    predicted = SERIES * (checks + nets.passes)
    copies = 4 + (options.ema > 0)  # weights, gradients, two moments, the average
    return {
        ("06: parameters, millions", COUNTED): f"{one.parameters / 1e6:.1f}",
        ("06: slices of a series, side", COUNTED): f"{options.sample_slices}, {options.image_size}",
        ("06: multiply-adds a series, 10^9", COUNTED): f"{nets.series_macs / 1e9:.0f}",
        ("06: slices at once", COUNTED): f"{one.pictures}",
        ("06: memory of a step, GiB", COUNTED): of_step(one, copies),
        ("06: all folds, 10^15 operations", PAPER): operations(
            (trained + predicted) * nets.series_macs
        ),
    }


def predicting(nets: Networks) -> Rows:
    """Stage 08, for one run."""
    tests = COMPETITION * SERIES_A_PATIENT
    rate = 2 * tests * nets.test_macs / 1e12 / (3600 * HOURS)
    return {
        ("08: forward passes of a classifier a series, all folds", COUNTED): (
            f"{nets.config.folds.count * nets.passes}"
        ),
        ("08: multiply-adds a series, 10^9", COUNTED): f"{nets.test_macs / 1e9:.0f}",
        (f"08: {COMPETITION} patients, 10^15 operations", PAPER): operations(
            tests * nets.test_macs
        ),
        (f"08: 10^12 operations/s that end within {HOURS} h", PAPER): f"{rate:.2f}",
    }


def used() -> float:
    """Seconds of a core that this process and its children have used."""
    children = (child.cpu_times() for child in psutil.Process().children(recursive=True))
    return time.process_time() + sum(one.user + one.system for one in children)


def seconds(work: Callable[[int], object]) -> float:
    """Median of `MOST` calls, each with a number of its own, or of fewer that take `ENOUGH`
    together, after one that does not count.
    """
    found: list[float] = []
    work(0)
    while len(found) < MOST and sum(found) < ENOUGH:
        start = used()
        work(len(found) + 1)
        found.append(used() - start)
    return statistics.median(found)


def long_scan(planes: int, times: int) -> Scan:
    """A body whose drawn planes stand several times each: to draw them all takes 12 GB."""
    scan = draw(512, planes)
    z, y, x = scan.spacing
    return replace(scan, hu=scan.hu.repeat(times, 0), spacing=(z / times, y, x))


class Measured:
    """One series in a folder, timed on one thread."""

    def __init__(self, nets: Networks, task: SeriesTask, data: Path, folder: Path) -> None:
        self.nets, self.config, self.task, self.data = nets, nets.config, task, data
        self.volume = self.decode(0)
        labels = np.zeros(self.volume.shape, np.uint8)
        for number, name in enumerate(ORGANS, start=1):
            ends = np.reshape(BOXES[name], (3, 2)) * np.array(labels.shape)[:, None]
            labels[tuple(slice(int(a), int(b)) for a, b in ends)] = number
        self.labels, self.organs = labels, tuple(organ_boxes(labels))
        self.path, self.mask = folder / "volume.npy", folder / "mask.npy"
        np.save(self.path, self.volume), np.save(self.mask, labels)

    def decode(self, _: int) -> np.ndarray:
        """From DICOM to the volume."""
        way = self.config.volume
        return decode_series(self.task, self.data, self.config.convert, [way]).volumes[way]

    def loading(self) -> Rows:
        """A sample of each stage that trains, by the processes that load."""
        config = self.config
        crops = VocoSamples(self.path.parent, [self.path.name], config.pretrain, 0)
        labels, planes = np.zeros(len(COLUMNS), np.float32), np.zeros((len(self.volume), 2))
        planes[len(planes) // 2] = 1
        series = Series(
            "1", "1", self.path, labels, np.float32(planes), np.ones(2, np.float32), self.organs
        )
        quiet = config.train.model_copy(update={"augment": AugmentConfig(probability=0)})
        whole = SeriesDataset([series], config.train, augment=True)
        plain = SeriesDataset([series], quiet, augment=True)
        found = {
            ("04: a volume's crops, ms", MEASURED): lambda k: crops.sample(0, [k]),
            ("06: a series, ms", MEASURED): lambda k: whole[k, 0],
            ("06: of it before augmentation, ms", MEASURED): lambda k: plain[k, 0],
        }
        if config.organs.enabled:
            masked = Masked("1", "1", self.path, self.mask)
            dataset = PlaneDataset([masked], config.organs, 0)
            found["05: a plane, ms", MEASURED] = lambda k: dataset[k, 0]
        return {name: f"{1000 * seconds(work):.0f}" for name, work in sorted(found.items())}

    def predicting(self) -> Rows:
        """A test series in its parts, and how they add up for all folds and views."""
        config, nets, folds = self.config, self.nets, self.config.folds.count
        model = build_model(config).eval()
        batch = as_batch(self.volume, config.train, CPU, 1, self.organs)
        one = seconds(lambda _: logits_of([model], batch, config.train.amp))
        parts = {
            "decode to a volume": (seconds(self.decode), 1),
            "one classifier, one view": (one, folds * nets.passes),
        }
        if nets.finds_organs:
            parts["one segmenter, all planes"] = (self.segment(), folds)
            find = seconds(lambda _: organ_boxes(without_islands(self.labels)))
            parts["boxes out of a label map"] = (find, 1)
        total = sum(value * times for value, times in parts.values())
        found = {
            (f"08: {name}, s (share of the series)", MEASURED): (
                f"{value:.2f} x {times} ({value * times / total:.0%})"
            )
            for name, (value, times) in parts.items()
        }
        return found | {("08: a series, s", PAPER): f"{total:.1f}"}

    def segment(self) -> float:
        """Seconds of one fold's segmenter for a volume."""
        model = build_segmenter(self.config).eval()
        return seconds(lambda _: label_volume([model], self.volume, self.config.organs, CPU))


def measured(nets: Networks, data: Path) -> Rows:
    """All that is measured of a preset, on the first series of `data`."""
    (folder,) = next(iter(sorted((data / "test_images").iterdir()))).iterdir()
    task = SeriesTask(folder.parent.name, folder.name, "test", str(folder))
    with tempfile.TemporaryDirectory() as name:
        one = Measured(nets, task, data, Path(name))
        return one.loading() | one.predicting()


def rows_of(nets: Networks, data: Path | None) -> Rows:
    """All rows of a preset, in the order of the stages."""
    found = on_disk(nets)
    for part in (pretraining, segmenting, classifying, predicting):
        found |= part(nets)
    if data is not None:
        found |= measured(nets, data)
    return dict(sorted(found.items(), key=lambda row: row[0][0][:2]))  # each stage's stay in order


def main() -> None:
    """Print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", nargs="+", default=["kaggle", "kaggle_t4", "paper"])
    flags.add_argument("--counted", action="store_true", help="leave out what is measured")
    flags.add_argument("overrides", nargs="*")
    options = flags.parse_intermixed_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    scratch = ["pretrain.init=scratch", *options.overrides]
    presets = {name: Networks(load_config(name, scratch)) for name in options.config}
    with tempfile.TemporaryDirectory() as name:
        data = None if options.counted else Path(name)
        if data is not None:
            write_data(data, long_scan(50, 6), 1)
        found = {}
        for preset, nets in presets.items():
            found[preset] = rows_of(nets, data)
            print(f"{preset}: done", file=sys.stderr, flush=True)
    every = sorted(
        {row: None for rows in found.values() for row in rows}, key=lambda row: row[0][:2]
    )
    print(f"| | {' | '.join(found)} | |\n|---|{'---|' * len(found)}---|")
    for row in every:
        values = " | ".join(rows.get(row, "-") for rows in found.values())
        print(f"| {row[0]} | {values} | {row[1]} |", flush=True)


if __name__ == "__main__":
    main()
