"""Work in processes that may die: contained children for risky code, and joblib (one machine or a
Dask cluster) for many tasks.

`contained` runs a function over items in a forked child. When the child dies, the next one answers
item by item, so the culprit is the first item without an answer: nothing else is lost, and the
items behind it go on in a new child. `spread` runs tasks in joblib's worker processes; each of them
may use `contained`, here as on a cluster, so results do not depend on where they were made.
"""

import contextlib
import errno
import functools
import multiprocessing.resource_tracker
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .console import log, log_is_shown, show_log
from .contained import Failure
from .errors import InputError
from .processes import end_with, interrupts_blocked

ROUNDS, CONNECT_S = 3, 30
KILLED = "the worker process was killed (out of memory?)"  # reason of a task that `spread` gave up


def spread(
    work: Callable[[Any], Any], tasks: Sequence[Any], jobs: int, scheduler: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (k, work(tasks[k])) as they finish, from `jobs` processes or the Dask cluster at
    `scheduler` (`tcp://host:port`).

    Tasks that were being worked on when a process was killed are done again behind all others;
    those to which it happens for the third time are done alone, and one whose process is killed
    even then is answered with a `Failure`. `work` and tasks must be picklable.

    Raises:
        InputError: no cluster answers, or `work` raised it.
    """
    if jobs == 1 and not scheduler:
        yield from ((k, work(task)) for k, task in enumerate(tasks))
        return
    open_tasks, kills = dict(enumerate(tasks)), Counter[int]()
    while open_tasks:
        begun: set[int] = set()
        for k, answer in _round(work, open_tasks, jobs, scheduler, begun):
            del open_tasks[k]
            yield k, answer
        struck = {
            k: open_tasks.pop(k) for k in sorted(begun & open_tasks.keys() or open_tasks.keys())
        }
        if struck:
            log(f"warning: a worker process was killed; {len(struck)} tasks are done again")
        for k, task in struck.items():
            kills[k] += 1
            if kills[k] < ROUNDS:
                open_tasks[k] = task  # behind those that were not begun
            else:
                answers = list(_round(work, {k: task}, 2, scheduler, set()))
                yield answers[0] if answers else (k, Failure(KILLED))


def _start_trackers() -> None:
    """Start the processes that tidy up after dead ones: silent ones, and now, because their start
    ends the blocking of signals.
    """
    from joblib.externals.loky.backend import resource_tracker

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        for tracker in (resource_tracker, multiprocessing.resource_tracker):
            tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _call(work: Callable[[Any], Any], k: int, task: Any, shown: bool) -> tuple[int | None, Any]:
    if shown:
        show_log()
    try:
        return k, work(task)
    except InputError as fault:  # does not survive pickling
        return None, str(fault)


def _round(
    work: Callable[[Any], Any],
    tasks: dict[int, Any],
    jobs: int,
    scheduler: str | None,
    begun: set[int],
) -> Iterator[tuple[int, Any]]:
    """One pass over `tasks`, ending early when a worker process is killed; `begun` takes the keys
    of those that were handed out.
    """
    import joblib
    from joblib.externals.loky.process_executor import BrokenProcessPool

    _silence_pool()

    def calls() -> Iterator[Any]:
        for k, task in list(tasks.items()):
            begun.add(k)
            yield joblib.delayed(_call)(work, k, task, log_is_shown())

    # by whoever stops early, on purpose
    warnings.filterwarnings("ignore", message=".*tasks which were still being processed")
    with contextlib.ExitStack() as stack:
        lost: tuple[type[Exception], ...] = (BrokenProcessPool,)
        # a process watches its parent from its start on, with or without a task
        options: dict[str, Any] = {"initializer": end_with, "initargs": (os.getpid(),)}
        if scheduler:
            from distributed import KilledWorker

            lost, options = (KilledWorker,), {}  # a cluster's workers outlive their clients
            stack.enter_context(_cluster(scheduler))
            stack.enter_context(joblib.parallel_config("dask"))
        pool = joblib.Parallel(
            n_jobs=jobs,
            return_as="generator_unordered",
            batch_size=1,
            pre_dispatch="3*n_jobs",
            max_nbytes=None,
            **options,
        )
        try:
            answers = _started(pool, calls())
            if answers is None:
                answers = (call(*arguments) for call, arguments, _ in calls())
            for k, answer in answers:
                if k is None:
                    raise InputError(*answer.split(", ", 2))
                yield k, answer
        except lost:
            return


def _started(pool: Any, calls: Iterator[Any]) -> Iterator[Any] | None:
    """The answers of the pool's processes; None, and a warning, where none can be started: their
    locks are files in /dev/shm.
    """
    try:
        _start_trackers()
        with interrupts_blocked():
            return pool(calls)
    except OSError as fault:  # a task's own comes with its answer
        full = fault.errno == errno.ENOSPC
        why = "/dev/shm is full: a container takes --shm-size" if full else fault.strerror
        log(f"warning: no worker processes ({why}); one task after another")
        return None


@functools.cache
def _silence_pool() -> None:
    """Print nothing where joblib's own thread stumbles over tasks that are gone: whoever stops a
    pool early, on purpose, causes that.
    """
    before = threading.excepthook

    def hook(fault: Any) -> None:
        if (
            fault.exc_type is not KeyError
            or getattr(fault.thread, "name", "") != "ExecutorManagerThread"
        ):
            before(fault)

    threading.excepthook = hook


def _cluster(scheduler: str) -> Any:
    """A client of the Dask cluster, to be closed; InputError where none answers or dask is not
    installed.
    """
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "dask is not installed", f"--scheduler {scheduler}", "pip install 'dask[distributed]'"
        ) from None
    try:
        return Client(scheduler, timeout=CONNECT_S)
    except (OSError, ValueError) as fault:
        raise InputError(
            "no Dask scheduler answers",
            f"--scheduler {scheduler}",
            "give the address it printed, tcp://host:port",
        ) from fault
