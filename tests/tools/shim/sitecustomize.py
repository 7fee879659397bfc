"""Faults for the processes of a test: loaded by Python at start where this folder is on PYTHONPATH
and VOCO_FAULT is set.

- kill:N: the write that would take a file past N bytes kills the whole process group, half-written
  file and all.
- full:N: that write fails instead (RLIMIT_FSIZE: it holds for Python, C and Rust alike, and for
  root).
- refuse:ERRNO:WHERE: whatever would change something below the path WHERE fails with this error.
- pause:MARK:PART: the first process to open a path that contains PART writes its id to the file
  MARK and waits for MARK.over.
- clock:SECONDS: the wall clock jumps back by so much at every second look.

With VOCO_STAGE only the stage script of that number, and its children, are hit.
"""

import os
import resource
import signal
import sys
import time

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def refuse(number: int, where: str) -> None:
    def hook(event: str, arguments: tuple) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and (arguments[2] or 0) & WRITING
        )
        if (
            changes
            and isinstance(arguments[0], (str, bytes, os.PathLike))
            and os.fsdecode(arguments[0]).startswith(where)
        ):
            raise OSError(number, os.strerror(number), os.fsdecode(arguments[0]))

    sys.addaudithook(hook)


def pause(mark: str, part: str) -> None:
    def hook(event: str, arguments: tuple) -> None:
        if (
            event != "open"
            or not isinstance(arguments[0], str)
            or part not in arguments[0]
            or os.path.exists(f"{mark}.over")
        ):  # noqa: PTH110
            return
        try:
            handle = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
        deadline = time.monotonic() + 600  # nobody waits for a test that has failed
        while not os.path.exists(f"{mark}.over") and time.monotonic() < deadline:  # noqa: PTH110 (pathlib is not imported this early)
            time.sleep(0.02)

    sys.addaudithook(hook)


def turn_back(seconds: float) -> None:
    real, looks = time.time, iter(range(1 << 62))
    time.time = lambda: real() - seconds * (next(looks) % 2)


def arm(kind: str, *rest: str) -> None:
    if kind in ("kill", "full"):
        limit(int(rest[0]))
    if kind == "kill":
        signal.signal(signal.SIGXFSZ, lambda *_: os.killpg(0, signal.SIGKILL))
    elif kind == "refuse":
        refuse(int(rest[0]), rest[1])
    elif kind == "pause":
        pause(*rest)
    elif kind == "clock":
        turn_back(float(rest[0]))


if "VOCO_FAULT" in os.environ:
    stage = os.environ.get("VOCO_STAGE", "")
    if stage and any(f"stages/{stage}_" in part for part in sys.orig_argv):
        stage = os.environ["VOCO_STAGE"] = ""  # its children too
    if not stage:
        arm(*os.environ["VOCO_FAULT"].split(":"))
