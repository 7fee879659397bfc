"""Stops of a training loop: signals answered at a step boundary, and processes that load data and
die.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ..system.errors import TrainingStopped


class StopSignal:
    """Inside `with`, the first SIGTERM or Ctrl-C is remembered as `signum` instead of raised: the
    loop ends at a step boundary.

    A second one takes its ordinary course; with `several` processes, which torchrun and a batch
    system may both signal, it does not. `leave()` raises what the signal would have raised.
    """

    def __init__(self, several: bool = False) -> None:
        self.signum, self.several = 0, several
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = [
                number
                for number in (signal.SIGTERM, signal.SIGINT)
                if signal.getsignal(number) != signal.SIG_IGN
            ]
            self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, signum: int, frame: Any) -> None:
        self.signum = signum
        if not self.several:
            self.__exit__()

    def leave(self) -> None:
        """Raise KeyboardInterrupt or SystemExit(128 + signal)."""
        raise (
            KeyboardInterrupt
            if self.signum == signal.SIGINT
            else SystemExit(128 + (self.signum or signal.SIGTERM))
        )


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Turn the death of a process that loads data into TrainingStopped."""
    try:
        yield
    except RuntimeError as fault:
        if "DataLoader worker" not in str(fault):
            raise
        what = "a process that loads data was killed (out of memory?); the last checkpoint is kept"
        raise TrainingStopped(
            f"{what}: run the same command again, with fewer `workers` if memory is short"
        ) from fault
