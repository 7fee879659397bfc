"""What the sections of `gpu.py` share: sizes, drawn data, settings of the card, table rows."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from common import draw_volumes

from pipeline.classifier.data import Series
from pipeline.classifier.fold import FoldData
from pipeline.competition.targets import TARGETS
from pipeline.learning.log import LOGGERS, Record
from pipeline.run.config import Config
from pipeline.run.presets import load_config

T = TypeVar("T")
CPU = torch.device("cpu")
SCRATCH = ("pretrain.init=scratch", "train.init=scratch")
ALONE = ("pretrain.workers=0", "train.workers=0")
FAST = "model.backbone=efficientnet_b0"  # of the rows of speed; `paper` itself has a larger one
# crops as large as the paper's, so that every layer meets its sizes; few of them, for the CPU
CHECKED = (
    FAST,
    *("volume.depth=24", "volume.height=192", "volume.width=192"),
    *("pretrain.batch=2", "pretrain.slices=4", "pretrain.image_size=192", "pretrain.grid=3"),
    *("pretrain.width=256", "pretrain.warmup=2", "pretrain.holdout=2", "pretrain.settle=2"),
    *("train.slices=8", "train.image_size=96", "train.batch=2", "train.hidden=64"),
    # what is drawn on a device is not what is drawn on another
    *("train.epochs=2", "train.backbone_dropout=0", "train.accumulate=1"),
)
TINY = (
    *("pretrain.width=16", "pretrain.settle=1", "train.slices=2", "train.image_size=32"),
    *("train.batch=4", "train.slice_loss=0"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. `value` None: not measured, and `note` says why. A row with `passed`
    is a check: whether `value` keeps to `tolerance`.
    """

    name: str
    value: float | None
    unit: str = ""
    tolerance: str = ""
    passed: bool | None = None
    note: str = ""


def missing(name: str, why: str, passed: bool | None = None) -> Row:
    """A row that is left out; `passed` False where that is a failure."""
    return Row(name, None, passed=passed, note=f"not measured: {why}")


def check(name: str, value: float, most: float, note: str = "") -> Row:
    """Passes where `value` is at most `most`; NaN fails."""
    return Row(name, value, "", f"at most {most:g}", bool(value <= most), note)


def least(name: str, value: float, bound: float, note: str = "") -> Row:
    """Passes where `value` is at least `bound`; NaN fails."""
    return Row(name, value, "", f"at least {bound:g}", bool(value >= bound), note)


def spread(times: Sequence[float], scale: float = 1e3, unit: str = "ms") -> str:
    """The median and, in brackets, the smallest and largest of repeats."""
    middle, low, high = (scale * one for one in (median(times), min(times), max(times)))
    return f"{middle:.4g} {unit} ({low:.4g} to {high:.4g}, n={len(times)})"


def ratio(name: str, found: dict[str, list[float]], ours: str, other: str) -> Row:
    """How many times as long `other` takes, medians of alternating repeats."""
    note = f"{ours} {spread(found[ours])}; {other} {spread(found[other])}"
    return Row(name, median(found[other]) / median(found[ours]), "x", note=note)


@dataclass
class Plan:
    """Device, sizes and data of a run; `until` (`time.monotonic()`) ends a section's repeats."""

    device: torch.device
    size: str
    folder: Path
    until: float = math.inf
    cached: dict[Any, Any] = field(default_factory=dict)

    def pick(self, tiny: T, quick: T, whole: T) -> T:
        """What belongs to this run's size."""
        return {"tiny": tiny, "quick": quick, "whole": whole}[self.size]

    @property
    def cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """Repeats of what is timed."""
        return self.pick(1, 5, 11)

    @property
    def resnet(self) -> str:
        """A backbone whose half-precision gradients are near those of float32 untrained."""
        return self.pick("test_resnet", "resnet18", "resnet18")

    def checked(self, *overrides: str) -> Config:
        """The config of checks, small enough for a CPU."""
        if self.size == "tiny":
            return load_config("smoke", (*SCRATCH, *ALONE, *TINY, *overrides))
        return load_config("paper", (*SCRATCH, *ALONE, *CHECKED, *overrides))

    def paper(self, *overrides: str) -> Config:
        """The config of measurements; its processes that load data are the preset's."""
        if self.size == "tiny":
            chosen = [one for one in overrides if not one.startswith("model.backbone")]
            return load_config("smoke", (*SCRATCH, *ALONE, *TINY, *chosen))
        return load_config("paper", (*SCRATCH, FAST, *overrides))

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once a run."""
        if key not in self.cached:
            self.cached[key] = make()
        return self.cached[key]

    def volumes(self, config: Config) -> Path:
        """A folder of 16 drawn volumes as large as the config's."""
        shape = (config.volume.depth, config.volume.height, config.volume.width)
        folder = self.folder / "x".join(map(str, shape))
        return self.once(folder, lambda: draw_volumes(folder, 16, shape))

    def fold_data(self, config: Config) -> FoldData:
        """Twelve training and four held-out series of these volumes, every class there."""
        depth = config.volume.depth
        series = [
            Series(
                f"p{k}",
                str(k),
                self.volumes(config) / f"p{k}_0.npy",
                np.concatenate(
                    [np.eye(len(t.classes), dtype=np.float32)[k % len(t.classes)] for t in TARGETS]
                ),
                np.zeros((depth, 2), np.float32),
                np.ones(2, np.float32),
            )
            for k in range(16)
        ]
        return FoldData(0, series[:12], series[12:])


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """float32 as it is written, without TF32, by deterministic algorithms where there are any."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with cudnn(benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)


def cudnn(**flags: bool) -> contextlib.AbstractContextManager[None]:
    """cuDNN with these flags, TF32 as torch has it unless told."""
    return torch.backends.cudnn.flags(enabled=True, **flags)


def other_road(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Other kernels than the reference's: the GPU's. Where the CPU stands in for a GPU, torch's own
    instead of oneDNN's, so that a comparison compares something.
    """
    if device.type == "cuda":
        return contextlib.nullcontext()
    return torch.backends.mkldnn.flags(enabled=False)


@contextlib.contextmanager
def stopping(asks: Callable[[Record], bool]) -> Iterator[None]:
    """SIGTERM to this very process, as a batch system sends it, at the first record for which
    `asks`; the training that it ends does not end the program.
    """

    class Stopper:
        def __init__(self, folder: Path, kept: Sequence[Record], axis: str) -> None:
            self.sent = False

        def write(self, record: Record) -> None:
            if not self.sent and asks(record):
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self) -> None:
            pass

    LOGGERS.append(Stopper)
    try:
        with contextlib.suppress(SystemExit):
            yield
    finally:
        LOGGERS.remove(Stopper)


class Overtime(BaseException):
    """A section has used up its time. No Exception: none of the code between may swallow it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Overtime in the block after `seconds`."""

    def ring(number: int, frame: Any) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def after(seconds: float) -> Callable[[Record], bool]:
    """A question for `stopping`: have `seconds` passed since now?"""
    end = time.monotonic() + seconds
    return lambda record: time.monotonic() > end
