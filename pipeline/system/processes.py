"""Processes of one run: parts of a stage, and children that end with their parent."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator

WATCH_S = 0.5


# in the environment of processes that work on a part of a stage, see `part_environment`
PART_VARIABLE = "VOCO2D_PART"


def part_environment(pipe: int) -> dict[str, str]:
    """Environment of a process that is to work on a part of this one's stage, and to send its last
    line through `pipe`.
    """
    return {**os.environ, PART_VARIABLE: f"{os.getpid()}:{pipe}"}


def parent_stage() -> tuple[int, int] | None:
    """Where a stage started this process to work on a part of it: the stage's process id, and the
    pipe for the part's last line.
    """
    parent, _, pipe = os.environ.get(PART_VARIABLE, "").partition(":")
    return (int(parent), int(pipe)) if pipe else None


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Processes started inside are deaf to Ctrl-C, which a terminal sends to all: this one hands a
    stop on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_alive(process: int) -> bool:
    """Whether a process is there and has not ended: one that was killed keeps its number until its
    own parent asks for its exit code.
    """
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


@functools.cache
def end_with(parent: int) -> None:
    """Kill this process soon after `parent` has ended; never where it is `parent` itself, as when
    joblib works serially or by threads.

    A worker that hands over a large answer, say, would wait for ever, since it holds the other end
    of the pipe itself.
    """
    # it may be the same process, or a helper may stand between the two
    child = os.getppid() == parent

    def watch() -> None:
        while os.getppid() == parent if child else _is_alive(parent):
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
