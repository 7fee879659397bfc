"""What a run says while it works: log lines, progress and timings.

Lines go to the logger `voco2d` of the standard library, so whoever imports the package hears as
much of it as they ask `logging` for; stage scripts print them by `show_log`.
"""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from .errors import InputError
from .machine import T

LOGGER = logging.getLogger("voco2d")
LINE_S = 15.0  # between two lines of progress


def printable(text: str) -> str:
    """A text with names of files in it, whose bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print to `stream` (standard output), or nowhere once its reader is gone, as after `| head`:
    that is no reason to lose the work. One write, so that lines of several processes stay lines.
    """
    stream = stream or sys.stdout
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def command_line(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a command line: wrong input is one line on standard error and exit code 2."""

    @functools.wraps(main)
    def answered(*arguments: Any) -> int:
        try:
            return main(*arguments)
        except InputError as fault:
            say(f"error: {fault}", sys.stderr)
            return 2

    return answered


class _StandardError(logging.Handler):
    """Prints to whatever `sys.stderr` is at the time; another error of the print than that of a
    reader who is gone is the caller's.
    """

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), sys.stderr)


def show_log() -> None:
    """Print this process's log to standard error from now on, one time-stamped line a message."""
    if not log_is_shown():
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False


def log_is_shown() -> bool:
    """True after `show_log`."""
    return any(isinstance(handler, _StandardError) for handler in LOGGER.handlers)


def log(message: str) -> None:
    """Log one line: of level WARNING where it begins with `warning:`, else INFO."""
    LOGGER.log(logging.WARNING if message.startswith("warning:") else logging.INFO, message)


def progress(items: Iterable[T], total: int, name: str, unit: str) -> Iterator[T]:
    """Yield `items` with a bar (terminal) or a plain line every `LINE_S` seconds, both with rate
    and ETA.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=name, unit=unit)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= LINE_S:
            shown, rate = now, done / (now - start)
            log(
                f"{name}: {done}/{total} {unit}, {rate:.1f} {unit}/s, ETA"
                f" {(total - done) / rate:.0f} s"
            )


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Call `work` and return its result with the wall time in seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start
