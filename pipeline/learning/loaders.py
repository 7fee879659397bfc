"""Processes that load batches: as many as the machine has room for, and none is waited for without
limit.
"""

import contextlib
import mmap
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch.utils import data

from ..run.room import AHEAD, LOADER_KEYS, loaders
from ..system.errors import TrainingStopped

LOOK_S = 0.5  # a stop that comes while a batch is waited for is answered this soon
LIMIT_S = 900.0  # for one batch; a shared file system may stall for minutes
JOIN_S = 0.2  # for processes that are left behind
# shared with the processes that load: set by one whose batch found no room
NO_ROOM = mmap.mmap(-1, 1)


def _end_loader(fault: Exception, batch: Any) -> None:
    """In place of multiprocessing's hook, which prints a traceback, drops the batch and lets the
    loop wait for it for ever.
    """
    NO_ROOM[0] = 1
    os._exit(1)


def start_loader(worker: int) -> None:
    """One thread, and no death by the signal that stops the whole process group: the loop needs its
    data to end its step.

    A second SIGTERM takes its ordinary course: the parent's way to end a worker that does not end
    by itself. A batch that cannot be handed over ends the process.
    """
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    hook, queue = staticmethod(_end_loader), multiprocessing.queues.Queue
    queue._on_queue_feeder_error = hook  # type: ignore[attr-defined]


def make_loader(dataset: data.Dataset, workers: int, pinned: bool, **plan: Any) -> data.DataLoader:
    """A loader whose `workers` processes (0: none) work `AHEAD` batches each ahead; `plan` is its
    sampler.
    """
    return data.DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pinned,
        # other work on a process's core is not at once waited for
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=start_loader,
        timeout=LOOK_S if workers else 0,
        **plan,
    )


def batches_of(
    loader: data.DataLoader, waiting: Callable[[], object]
) -> Generator[Any, None, None]:
    """The batches of `loader`; while one is waited for, `waiting` is called every `LOOK_S`, and may
    raise.

    Raises:
        TrainingStopped: none has come for `LIMIT_S`.
        RuntimeError: torch's, where a process has died, or the same where it died while it handed a
            batch over; `loading` tells them.
    """
    NO_ROOM[0] = 0
    stream, asked = iter(loader), time.monotonic()
    try:
        while True:
            try:
                batch = next(stream)
            except StopIteration:
                return
            except RuntimeError as fault:
                if "timed out" not in str(fault):
                    raise
                waiting()
                if time.monotonic() - asked > LIMIT_S:
                    raise TrainingStopped(
                        f"no batch has come for {LIMIT_S:.0f} s; the last checkpoint is kept: see"
                        f" to the disk of the volumes, or set {LOADER_KEYS} to 0"
                    ) from fault
                continue
            except (OSError, EOFError) as fault:
                if (pid := _dead(stream)) is None:
                    raise
                raise RuntimeError(f"DataLoader worker (pid {pid}) died") from fault
            yield batch
            asked = time.monotonic()
    except BaseException:
        _abandon(stream)
        raise


def loaded(
    dataset: data.Dataset,
    count: int,
    asked: int | None,
    batch_bytes: int,
    key: str,
    *,
    pinned: bool,
    waiting: Callable[[], object],
    sharing: int = 1,
    **plan: Any,
) -> Generator[Any, None, None]:
    """`batches_of` the `count` batches of a `plan`, by as many processes as there is room for: see
    `room.loaders`.
    """
    workers = min(loaders(asked, batch_bytes, key, pinned, sharing), count)
    return batches_of(make_loader(dataset, workers, pinned, **plan), waiting)


def _dead(stream: Any) -> int | None:
    """The process of a loader that has ended with an error, or does within a while: what it held
    open is closed before it can be waited for.
    """
    ends = {process.sentinel: process for process in getattr(stream, "_workers", ())}
    ending = [ends[end] for end in multiprocessing.connection.wait(list(ends), timeout=1)]
    for process in ending:
        process.join(timeout=1)
    return next((process.pid for process in ending if process.exitcode), None)


def _abandon(stream: Any) -> None:
    """End the processes of a loader at once; a fault's traceback would keep them alive, and Python
    wait for them at its end. One that was killed by a bus error found no room either.
    """
    processes = getattr(stream, "_workers", ())
    if any(process.exitcode == -signal.SIGBUS for process in processes):
        NO_ROOM[0] = 1
    data._utils.MP_STATUS_CHECK_INTERVAL = JOIN_S
    getattr(stream, "_shutdown_workers", lambda: None)()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Turn the death of a process that loads data into TrainingStopped."""
    try:
        yield
    except RuntimeError as fault:
        text = str(fault)
        no_room = NO_ROOM[0] or "shared memory" in text  # torch's word for a bus error too
        if "DataLoader worker" not in text or ("(pid" not in text and not no_room):
            raise
        if no_room:
            raise TrainingStopped(
                "a process that loads data found no room in /dev/shm; the last checkpoint is kept:"
                " give the container more (docker run --shm-size=2g) or set fewer"
                f" {LOADER_KEYS}, and run the same command again"
            ) from fault
        raise TrainingStopped(
            "a process that loads data was killed (out of memory?); the last checkpoint is kept:"
            f" run the same command again, with fewer {LOADER_KEYS} if memory is short"
        ) from fault
