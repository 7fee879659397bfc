"""Work in processes that may die: contained children for risky code, and joblib (one machine or a Dask cluster) for many tasks.

`contained` runs a function over items in a forked child. When the child dies, the next one answers item by item, so the culprit is
the first item without an answer: nothing else is lost, and the items behind it go on in a new child. `spread` runs tasks in joblib's worker
processes; each of them may use `contained`, here as on a cluster, so results do not depend on where they were made.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import multiprocessing.resource_tracker
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .machine import InputError, deaf, end_with, log

GAVE_UP = 3  # exit code of a child that met an exception and so trusts its own memory no more
CAREFUL, LOST = 2, 3  # strikes after which an item is tried with `careful`, and given up
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
WAIT_S = 0.02  # a child answers no more often: waking the parent costs as much as a tenth of a slice
ROUNDS, CONNECT_S = 3, 30
KILLED = "the worker process was killed (out of memory?)"  # reason of a task that `spread` gave up


@dataclass(frozen=True)
class Failure:
    """The answer for an item, or a task, that brought down its process every time."""

    reason: str


def keep_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB: else every picture's buffers go back and are paged in anew, a third of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # other C libraries have none, and no such habit
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(option, 32 << 20)


def _die_with(parent: int) -> None:
    """Let Linux kill this process when `parent` ends: in the midst of C code, which holds the interpreter, no thread could."""
    getattr(ctypes.CDLL(None), "prctl", lambda *options: 0)(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _serve(work: Callable[[Any, bool], Any], items: Sequence[Any], careful: bool, limit_s: float, wait_s: float, pipe: Connection) -> None:
    """Body of the child: answer at least every `wait_s`; SIGALRM kills it when one item takes longer than `limit_s`, be it in C code."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)  # what C libraries print when they die helps nobody
    os.dup2(null, 1)
    os.dup2(null, 2)
    gc.freeze()
    keep_memory()
    answers, sent = [], time.monotonic()
    for item in items:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            answers.append(work(item, careful))
        except OSError as fault:  # the disk, not the item
            answers.append(fault)
        if time.monotonic() - sent >= wait_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answers)
            answers, sent = [], time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.send(answers)


def _fork(*work: Any) -> tuple[int, Connection]:
    """Start a child that runs `_serve(*work, pipe)`: its process id and the pipe that its answers come through."""
    if cv2 := sys.modules.get("cv2"):
        cv2.setNumThreads(1)  # its threads do not outlive a fork: a child that changes their number would wait for them
    reader, writer = multiprocessing.Pipe(duplex=False)
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = GAVE_UP
        try:
            _die_with(parent)
            reader.close()
            _serve(*work, writer)
            code = 0
        finally:
            os._exit(code)
    writer.close()
    return pid, reader


def _answers(pipe: Connection) -> Iterator[Any]:
    """What a child answers until its end, whole answers only; an OSError it met is raised here."""
    while True:
        try:
            answers = pipe.recv()
        except (EOFError, OSError):
            return
        for answer in answers:
            if isinstance(answer, OSError):
                raise answer
            yield answer


def contained(work: Callable[[Any, bool], Any], items: Sequence[Any], limit_s: float, deaths: list[str] | None = None,
              linked: bool = False) -> Iterator[Any]:  # fmt: skip
    """Yield work(item, careful) for each of `items` in order, from forked children that may crash, hang, be killed or raise.

    An item over which a child was lost is tried alone: once more as before when a signal killed the child (SIGALRM: the item took
    more than `limit_s`), then, or at once after an exception, with `careful` true; after that its answer is a `Failure`, and with
    `linked` that of all items behind it too, because they need the same. The causes of lost children are appended to `deaths`. An
    OSError that `work` lets pass is raised here.
    """
    at, strikes, wait_s = 0, 0, WAIT_S
    while at < len(items):
        end = at + 1 if strikes else len(items)
        pid, pipe = _fork(work, items[at:end], strikes >= CAREFUL, limit_s, wait_s)
        try:
            for answer in _answers(pipe):
                at, strikes = at + 1, 0
                yield answer
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            pipe.close()
            status = os.waitpid(pid, 0)[1]
        if at == end:
            continue
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an exception" if status else "an exit"
        if deaths is not None:
            deaths.append(name)
        if wait_s:  # answers may be lost: the culprit is only known when each is sent at once
            wait_s = 0.0
            continue
        strikes = strikes + 1 if os.WIFSIGNALED(status) else max(strikes + 1, CAREFUL)
        if strikes >= LOST:
            failure = Failure(f"took longer than {limit_s:g} s" if name == "SIGALRM" else f"brought down by {name}: the worker process")
            lost = len(items) - at if linked else 1
            at, strikes = at + lost, 0
            yield from [failure] * lost


def spread(work: Callable[[Any], Any], tasks: Sequence[Any], jobs: int, scheduler: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (k, work(tasks[k])) as they finish, from `jobs` processes or the Dask cluster at `scheduler` (`tcp://host:port`).

    Tasks that were being worked on when a process was killed are done again behind all others; those to which it happens for the
    third time are done alone, and one whose process is killed even then is answered with a `Failure`. `work` and tasks must be
    picklable.

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
        struck = {k: open_tasks.pop(k) for k in sorted(begun & open_tasks.keys() or open_tasks.keys())}
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
    """Start the processes that tidy up after dead ones: silent ones, and now, because their start ends the blocking of signals."""
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


def _call(work: Callable[[Any], Any], k: int, task: Any, parent: int | None) -> tuple[int | None, Any]:
    if parent is not None:
        end_with(parent)
    try:
        return k, work(task)
    except InputError as fault:  # does not survive pickling
        return None, str(fault)


def _round(work: Callable[[Any], Any], tasks: dict[int, Any], jobs: int, scheduler: str | None,
           begun: set[int]) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """One pass over `tasks`, ending early when a worker process is killed; `begun` takes the keys of those that were handed out."""
    import joblib
    from joblib.externals.loky.process_executor import BrokenProcessPool

    _silence_pool()
    parent = None if scheduler else os.getpid()  # a cluster's workers outlive their clients

    def calls() -> Iterator[Any]:
        for k, task in list(tasks.items()):
            begun.add(k)
            yield joblib.delayed(_call)(work, k, task, parent)

    warnings.filterwarnings("ignore", message=".*tasks which were still being processed")  # by whoever stops early, on purpose
    with contextlib.ExitStack() as stack:
        lost: tuple[type[Exception], ...] = (BrokenProcessPool,)
        if scheduler:
            from distributed import KilledWorker

            lost = (KilledWorker,)
            stack.enter_context(_cluster(scheduler))
            stack.enter_context(joblib.parallel_config("dask"))
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="3*n_jobs", max_nbytes=None)
        try:
            _start_trackers()
            with deaf():
                answers = pool(calls())
            for k, answer in answers:
                if k is None:
                    raise InputError(*answer.split(", ", 2))
                yield k, answer
        except lost:
            return


@functools.cache
def _silence_pool() -> None:
    """Print nothing where joblib's own thread stumbles over tasks that are gone: whoever stops a pool early, on purpose, causes that."""
    before = threading.excepthook

    def hook(fault: Any) -> None:
        if fault.exc_type is not KeyError or getattr(fault.thread, "name", "") != "ExecutorManagerThread":
            before(fault)

    threading.excepthook = hook


def _cluster(scheduler: str) -> Any:
    """A client of the Dask cluster, to be closed; InputError where none answers or dask is not installed."""
    try:
        from distributed import Client
    except ImportError:
        raise InputError("dask is not installed", f"--scheduler {scheduler}", "pip install 'dask[distributed]'") from None
    try:
        return Client(scheduler, timeout=CONNECT_S)
    except (OSError, ValueError) as fault:
        raise InputError("no Dask scheduler answers", f"--scheduler {scheduler}", "give the address it printed, tcp://host:port") from fault
