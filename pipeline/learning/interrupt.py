"""Stops of a training loop: signals answered at a step boundary."""

import contextlib
import signal
import threading
from typing import Any

from ..system.console import log
from ..system.processes import parent_stage


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
            self._before = {
                number: signal.signal(number, self._remember)
                for number in (signal.SIGTERM, signal.SIGINT)
                if signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, signum: int, frame: Any) -> None:
        self.signum = signum
        if not self.several:
            self.__exit__()
        if not parent_stage():
            with contextlib.suppress(RuntimeError):  # in the midst of another line
                log("stopping after this step; a second signal does not wait for it")

    def leave(self) -> None:
        """Raise KeyboardInterrupt or SystemExit(128 + signal)."""
        raise (
            KeyboardInterrupt
            if self.signum == signal.SIGINT
            else SystemExit(128 + (self.signum or signal.SIGTERM))
        )
