"""What every stage needs from the machine: errors for the user, log, progress, seeds, devices and atomic writes."""

import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TEMPORARY = ".tmp-"
WATCH_S = 0.5
PART = "VOCO2D_PART"  # in the environment of processes that work on a part of a stage, see `part_of`


class InputError(Exception):
    """The user's input is wrong: printed as `error: WHAT, WHERE, WHAT TO DO` and answered with exit code 2."""

    def __init__(self, what: str, where: str, remedy: str) -> None:
        super().__init__(" ".join(f"{what}, {where}, {remedy}".split()))


class TrainingStopped(RuntimeError):
    """Training went wrong; the message is for the user (exit code 1), the last good checkpoint is kept."""


def part_environment(pipe: int) -> dict[str, str]:
    """Environment of a process that is to work on a part of this one's stage, and to send its last line through `pipe`."""
    return {**os.environ, PART: f"{os.getpid()}:{pipe}"}


def part_of() -> tuple[int, int] | None:
    """Where a stage started this process to work on a part of it: the stage's process id, and the pipe for the part's last line."""
    parent, _, pipe = os.environ.get(PART, "").partition(":")
    return (int(parent), int(pipe)) if pipe else None


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started inside are deaf to Ctrl-C, which a terminal sends to all: this one hands a stop on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def end_with(parent: int) -> None:
    """Kill this process soon after `parent` has ended.

    A worker that hands over a large answer, say, would wait for ever, since it holds the other end of the pipe itself.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class Ended(Exception):
    """A part of the stage, working in a process of its own, has failed: its line for the user and its exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


def log(message: str) -> None:
    """Print one time-stamped line to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def progress(items: Iterable[T], total: int, name: str, unit: str = "it", every_s: float = 15.0) -> Iterator[T]:
    """Yield `items` with a bar (terminal) or a plain line every `every_s` seconds, both with rate and ETA."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=name, unit=unit)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= every_s:
            shown, rate = now, done / (now - start)
            log(f"{name}: {done}/{total} {unit}, {rate:.1f} {unit}/s, ETA {(total - done) / rate:.0f} s")


def seed_everything(*seeds: int) -> None:
    """Seed Python, numpy and torch from one tuple of integers, e.g. (seed, step)."""
    import random

    import numpy as np
    import torch

    state = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def pick_device(name: str, rank: int = 0) -> Any:
    """`auto|cpu|cuda` to a torch device; InputError when CUDA is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is visible", "--device cuda", "use --device cpu or auto")
    if name != "cpu" and torch.cuda.is_available():
        if rank >= torch.cuda.device_count():
            what = f"process {rank} has no GPU of its own, there are {torch.cuda.device_count()}"
            raise InputError(what, "torchrun --nproc-per-node", "start as many processes as there are GPUs")
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device("cpu")


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """Processes that `torchrun` started together, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_used() -> str:
    """The GPU's name where this process computes on one, else `cpu`; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_initialized() else "cpu"


def peak_mb() -> int:
    """Peak resident memory in MB: this process's own plus that of its largest child (pages that they share count twice)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    living: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            living += path.read_text(encoding="utf-8").split()
    own = _high_water("self") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round((own + max([ended, *map(_high_water, living)])) * 1024 / 1e6)


def _high_water(pid: str) -> int:
    """Peak resident KiB of a process; 0 where it has ended or the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), 0))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the output is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EEXIST: "something else has this name",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENAMETOOLONG: "the path is too long",
}
PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(where: Path | str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear InputError naming `where`, else the file of the error."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in _DISK_ERRORS:
            raise
        where = fault.filename or where
        remedy = "mend its permissions" if fault.errno in (errno.EACCES, errno.EPERM) else "make room"
        raise InputError(_DISK_ERRORS[fault.errno], str(where), f"{remedy} or choose another --out, then run again") from fault


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, else remove it."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
        try:
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except Exception as fault:
            if not isinstance(fault, (InputError, TrainingStopped)) and not getattr(fault, "errno", None):
                _probe(temporary)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _probe(path: Path) -> None:
    """Raise the OSError of a disk that takes no more: writers in C and Rust (torch, polars) report a failed write without its number."""
    with open(path, "ab", buffering=0) as handle:
        handle.write(bytes(PROBE_BYTES))
        handle.write(bytes(PROBE_BYTES))  # the first may end short of the limit without an error


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path` whole, else it is removed."""
    path = Path(path)
    with disk_errors(path):
        temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            remove_folder(path)
            os.rename(temporary, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, under a temporary name: a run killed meanwhile leaves nothing that looks whole."""
    grave = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}-old")
    shutil.rmtree(grave, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, grave)
        shutil.rmtree(grave)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically (keys in the given order)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_temporaries(folder: Path, depth: int = 0, of: str = "") -> None:
    """Remove what killed runs left in `folder` (and `depth` folder levels below it) under temporary names, of the file `of` if given."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.startswith(f".{of}{TEMPORARY}" if of else ".") and TEMPORARY in entry.name:
            path = Path(entry.path)
            shutil.rmtree(path) if entry.is_dir(follow_symlinks=False) else path.unlink()
        elif depth and entry.is_dir(follow_symlinks=False):
            remove_temporaries(Path(entry.path), depth - 1)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Call `work` and return its result with the wall time in seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start
