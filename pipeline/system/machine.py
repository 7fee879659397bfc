"""What every stage needs from the machine: errors for the user, log, progress, seeds, devices and
atomic writes.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError

T = TypeVar("T")


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
            raise InputError(
                what, "torchrun --nproc-per-node", "start as many processes as there are GPUs"
            )
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
