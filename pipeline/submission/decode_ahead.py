"""Test series from DICOM to volumes in memory, decoded by worker processes ahead of the models.

No DataLoader, because a submission must not end with what it waits for: a killed worker ends a
DataLoader, here its series are done again or named; its timeout is one for all waits, here a wait
ends at the deadline, and what is under way is killed then instead of joined for seconds each. And
no torch, which would be half a gigabyte more in each worker.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import polars as pl

# here, not when two threads may import it at once
from joblib.externals.loky import get_reusable_executor

from ..run.config import ConvertConfig, VolumeConfig
from ..slices.convert import SliceImage, decode_series_files
from ..slices.sources import SeriesTask, list_files
from ..system.contained import Failure
from ..system.pool import spread
from ..volumes.store import usable, volume_of

AHEAD = 4  # series a process that are under way or waiting for the model: what bounds memory


class Decoded(NamedTuple):
    """A test series as a volume (D, H, W) uint8 for each way of making them, or none and the
    reason.
    """

    patient_id: str
    series_id: str
    volumes: dict[VolumeConfig, np.ndarray]
    problem: str


def slice_table(slices: Sequence[SliceImage]) -> pl.DataFrame:
    """Rows of the slice index for slices in memory; `row` is the position in `slices`."""
    fields = (
        "instance_number",
        "order",
        "z_mm",
        "rows",
        "cols",
        "spacing_y_mm",
        "spacing_x_mm",
        "flags",
    )
    table = pl.DataFrame(
        {name: [getattr(item, name) for item in slices] for name in fields}, strict=False
    )
    return table.with_row_index("row")


def decode_series(
    task: SeriesTask, data: Path, convert: ConvertConfig, ways: Sequence[VolumeConfig]
) -> Decoded:
    """Read one series from DICOM and build its volumes, one for each of `ways`: the very functions
    of stages 01 and 02. What fails is this series' alone.
    """
    try:
        cv2.setNumThreads(1)
        slices, quarantined = decode_series_files(list_files(task.path, data), convert)
        table = usable(slice_table(slices)) if slices else None
        if table is None or table.is_empty():
            reason = quarantined[0][1] if quarantined else "no usable slice"
            return Decoded(task.patient_id, task.series_id, {}, reason)
        volumes = {
            way: volume_of((slices[row].image for row in table["row"]), table, way).array
            for way in ways
        }
        return Decoded(task.patient_id, task.series_id, volumes, "")
    except Exception as fault:  # the submission must not end with it, and the report names it
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())
        return Decoded(task.patient_id, task.series_id, {}, reason)


class Ahead:
    """Decoded series as they are ready.

    A thread feeds worker processes part by part, because waiting for them cannot be ended; the
    queue that it fills can be waited for until a deadline. Both hold `AHEAD` series a process.
    """

    def __init__(
        self,
        tasks: Sequence[SeriesTask],
        data: Path,
        convert: ConvertConfig,
        ways: Sequence[VolumeConfig],
        jobs: int,
    ) -> None:
        self._work = partial(decode_series, data=data, convert=convert, ways=ways)
        # two, so that a child never forks from this process with its model threads
        self._tasks, self._jobs = tasks, max(2, jobs)
        self._size = AHEAD * self._jobs
        self._ready: queue.Queue[Decoded | BaseException | None] = queue.Queue(self._size)
        self._stop = threading.Event()
        threading.Thread(target=self._produce, daemon=True).start()

    def _produce(self) -> None:
        try:
            for start in range(0, len(self._tasks), self._size):
                part = self._tasks[start : start + self._size]
                for k, answer in spread(self._work, part, self._jobs):
                    if isinstance(answer, Failure):
                        ids = part[k].patient_id, part[k].series_id
                        answer = Decoded(*ids, {}, answer.reason)
                    self._put(answer)
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
        """Yield series as they are ready; ends when all are done or `time.monotonic()` passes
        `deadline`.
        """
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
            self._stop.set()
            # the one that works, whatever joblib gave it: to make another would wait for the
            # series under way
            with contextlib.suppress(OSError):  # there is none, where none can be made
                get_reusable_executor(reuse=True).shutdown(wait=False, kill_workers=True)
