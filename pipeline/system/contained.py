"""Risky work in a child that may die: nothing but the item that killed it is lost."""

import ctypes
import faulthandler
import gc
import multiprocessing.resource_tracker
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from .machine import keep_memory

GAVE_UP = 3  # exit code of a child that met an exception and so trusts its own memory no more
CAREFUL, LOST = 2, 3  # strikes after which an item is tried with `careful`, and given up
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
# a child answers no more often: waking the parent costs as much as a tenth of a slice
WAIT_S = 0.02


@dataclass(frozen=True)
class Failure:
    """The answer for an item, or a task, that brought down its process every time."""

    reason: str


def _die_with(parent: int) -> None:
    """Let Linux kill this process when `parent` ends: in the midst of C code, which holds the
    interpreter, no thread could.
    """
    getattr(ctypes.CDLL(None), "prctl", lambda *options: 0)(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _serve(
    work: Callable[[Any, bool], Any],
    items: Sequence[Any],
    careful: bool,
    limit_s: float,
    wait_s: float,
    pipe: Connection,
) -> None:
    """Body of the child: answer at least every `wait_s`; SIGALRM kills it when one item takes
    longer than `limit_s`, be it in C code.
    """
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


def _fork(serve: Callable[[Connection], None]) -> tuple[int, Connection]:
    """Start a child that runs `serve(pipe)`: its process id and the pipe that its answers come
    through.
    """
    if cv2 := sys.modules.get("cv2"):
        # its threads do not outlive a fork: a child that changes their number would wait for them
        cv2.setNumThreads(1)
    reader, writer = multiprocessing.Pipe(duplex=False)
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = GAVE_UP
        try:
            _die_with(parent)
            reader.close()
            serve(writer)
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


def contained(
    work: Callable[[Any, bool], Any],
    items: Sequence[Any],
    limit_s: float,
    deaths: list[str] | None = None,
    linked: bool = False,
) -> Iterator[Any]:
    """Yield work(item, careful) for each of `items` in order, from forked children that may crash,
    hang, be killed or raise.

    An item over which a child was lost is tried alone: once more as before when a signal killed the
    child (SIGALRM: the item took more than `limit_s`), then, or at once after an exception, with
    `careful` true; after that its answer is a `Failure`, and with `linked` that of all items behind
    it too, because they need the same. The causes of lost children are appended to `deaths`. An
    OSError that `work` lets pass is raised here.
    """
    at, strikes, wait_s = 0, 0, WAIT_S
    while at < len(items):
        end = at + 1 if strikes else len(items)
        pid, pipe = _fork(partial(_serve, work, items[at:end], strikes >= CAREFUL, limit_s, wait_s))
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
        name = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else "an exception"
            if status
            else "an exit"
        )
        if deaths is not None:
            deaths.append(name)
        if wait_s:  # answers may be lost: the culprit is only known when each is sent at once
            wait_s = 0.0
            continue
        strikes = strikes + 1 if os.WIFSIGNALED(status) else max(strikes + 1, CAREFUL)
        if strikes >= LOST:
            failure = Failure(
                f"took longer than {limit_s:g} s"
                if name == "SIGALRM"
                else f"brought down by {name}: the worker process"
            )
            lost = len(items) - at if linked else 1
            at, strikes = at + lost, 0
            yield from [failure] * lost
