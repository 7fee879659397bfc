"""Stage scripts in processes of their own that need not import torch and timm, which takes a new
interpreter seconds: they are forked from a server that has done nothing but that.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

SERVER = ForkServerContext()
SERVER.set_forkserver_preload(
    ["torch._dynamo", "timm", "albumentations", "cv2", "polars", "pydantic", "pydicom", "joblib"]
    + ["scipy.optimize", "sklearn.linear_model", "matplotlib.figure"]
)


class Forked(ForkServerProcess):
    """A script and its arguments in a process group of its own, with what the tests use of
    `subprocess.Popen`.

    `first` are scripts that run before it, as `sitecustomize` does in a new interpreter.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        first: Sequence[Path] = (),
        ignore_interrupt: bool = False,
    ) -> None:
        super().__init__()
        self._script, self._first, self._ignores = script, first, ignore_interrupt
        self._arguments, self._environment = list(arguments), dict(environment)
        self._folder = Path.cwd()
        ends = [SERVER.Pipe(duplex=False) for _ in range(2)]
        self._ends: list[Connection] = [end for _, end in ends]
        self.start()
        for end in self._ends:
            end.close()
        self._texts = ["", ""]
        # read as it comes: a full pipe would hold the script
        self._readers = [
            threading.Thread(target=self._read, args=(k, end), daemon=True)
            for k, (end, _) in enumerate(ends)
        ]
        for reader in self._readers:
            reader.start()
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while self.poll() is None and os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)
        atexit.register(self._end)

    def run(self) -> None:
        os.setsid()
        multiprocessing.set_start_method(None, force=True)  # the platform's, not the server's
        for number, end in enumerate(self._ends, 1):
            os.dup2(end.fileno(), number)
            end.close()
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        handler = signal.SIG_IGN if self._ignores else signal.default_int_handler
        signal.signal(signal.SIGINT, handler)
        for script in self._first:
            runpy.run_path(str(script))
        sys.argv = [str(self._script), *self._arguments]
        try:
            runpy.run_path(str(self._script), run_name="__main__")
        finally:
            threading._shutdown()  # ends pools, before multiprocessing waits for their processes

    def _read(self, k: int, end: Connection) -> None:
        with os.fdopen(os.dup(end.fileno())) as stream:
            end.close()
            self._texts[k] = stream.read()

    def _end(self) -> None:
        """Leave nothing alive that a failed test has left: the tests' process would wait for it."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        return self.exitcode

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in (*self._readers, self):
            thread.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(str(self._script), timeout or 0)
        return self._texts[0], self._texts[1]
