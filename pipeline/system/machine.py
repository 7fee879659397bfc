"""What every stage needs from the machine: seeds, devices, cores, and memory, free and used."""

import contextlib
import ctypes
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INT_MAX = 2**31 - 1


def keep_memory(most: int = 32 << 20) -> None:
    """Let glibc serve blocks of up to 32 MiB from its heap, and give the heap's free end back only
    above `most` bytes: else buffers are paged in anew for every picture (a third of its time) and
    every training step (about a tenth).
    """
    # other C libraries have none, and no such habit
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, most)


def seed_everything(*seeds: int) -> None:
    """Seed Python, numpy and torch from one tuple of integers, e.g. (seed, step)."""
    import random

    import numpy as np
    import torch

    state = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str, rank: int = 0) -> Any:
    """`auto|cpu|cuda` to a torch device; InputError when CUDA is asked for and absent.

    On a GPU cuDNN then tries its algorithms for each shape and keeps the fastest; on a CPU this
    process keeps freed memory from then on.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is visible", "--device cuda", "use --device cpu or auto")
    if name != "cpu" and torch.cuda.is_available():
        if rank >= torch.cuda.device_count():
            what = f"process {rank} has no GPU of its own, there are {torch.cuda.device_count()}"
            raise InputError(
                what, "torchrun --nproc-per-node", "start as many processes as there are GPUs"
            )
        torch.cuda.set_device(rank)
        torch.backends.cudnn.benchmark = True  # few shapes in any stage, each met often
        return torch.device("cuda", rank)
    keep_memory(INT_MAX)
    return torch.device("cpu")


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes of memory that this process may still take, its container's limit included; None where
    the system does not tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for top, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # the other version, or `max`
            most, now = (int((Path(top) / name).read_text()) for name in (limit, used))
            found.append(max(0, most - now))
    return min(found, default=None)


@dataclass(frozen=True)
class Room:
    """What there is of the machine: cores, and free bytes of memory and of /dev/shm (None where
    unknown).
    """

    cores: int
    memory: int | None
    shared: int | None

    @classmethod
    def here(cls) -> "Room":
        """Of this machine, now."""
        try:
            shared: int | None = shutil.disk_usage("/dev/shm").free
        except OSError:
            shared = None
        return cls(cpu_count(), available_memory(), shared)


def world_size() -> int:
    """Processes that `torchrun` started together, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_used() -> str:
    """The GPU's name where this process computes on one, else `cpu`; torch is not imported for
    it.
    """
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_initialized() else "cpu"


def peak_mb() -> int:
    """Peak resident memory in MB: this process's own plus that of its largest child (pages that
    they share count twice).
    """
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
    return int(
        next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    )
