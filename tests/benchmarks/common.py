"""What benchmarks share: a device that is waited for, alternating repeats, peak memory, energy,
drawn volumes.
"""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import torch

from pipeline.run import layout

GIB = 2**30
POWERCAP = Path("/sys/class/powercap")


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, what it gave to `device` included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def alternate(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
    until: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call of `works`, all in turn, `rounds` times; the first `warm_up` rounds do
    not count. Ends early, but not before one round, when `time.monotonic()` passes `until`.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for k in range(warm_up + rounds):
        for name, work in works.items():
            found[name].append(seconds_of(work, device))
        if k >= warm_up and time.monotonic() > until:
            break
    return {name: times[warm_up:] for name, times in found.items()}


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(times) for name, times in found.items()}


class Peak:
    """Memory in GiB that was allocated on a GPU since this was made, at its peak. On a CPU the peak
    of the process, whatever filled it: then one process for each thing measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated(device)
            self.again()

    def again(self) -> None:
        """Forget the peak so far, e.g. that of a warm-up."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def gib(self) -> float:
        """The peak."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Energy:
    """Joules that a GPU's board (NVML) or the CPU's packages (RAPL) have used since this was made,
    whoever used them. `missing` says why they cannot be read; empty where they can.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        cuda = device.type == "cuda"
        self._read = partial(_board, device) if cuda else partial(_packages, powercap)
        self.missing, self._before = "", []
        try:
            self._before = self._read()
        except (ImportError, OSError) as fault:
            self.missing = str(fault)

    def joules(self) -> float | None:
        """None where they cannot be read."""
        if self.missing:
            return None
        pairs = zip(self._read(), self._before, strict=True)
        return sum((now - before) % span for (now, span), (before, _) in pairs)


Counters = list[tuple[float, float]]  # joules, and at how many a counter starts again at 0


def _packages(powercap: Path) -> Counters:
    """What every CPU package has used."""
    found = [
        tuple(int((zone / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj"))
        for zone in sorted(powercap.glob("intel-rapl:*"))
        if (zone / "name").read_text().startswith("package")
    ]
    if not found:
        raise OSError(f"no energy counters of CPU packages in {powercap}")
    return found


def _board(device: torch.device) -> Counters:
    """What a GPU's board has used."""
    import pynvml  # the extra bench

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)]
    except pynvml.NVMLError as fault:
        raise OSError(f"NVML: {fault}") from fault


def draw_volumes(folder: Path, count: int, shape: tuple[int, int, int], seed: int = 0) -> Path:
    """`folder` with `count` volumes of `shape` (D, H, W) uint8 and their index, as stage 02 leaves
    them as far as training reads it: brightness rises along x and the texture's contrast along y,
    by a scale of each volume's own, so that places and volumes are easily told apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    depth, height, width = shape
    y, x = (axis / max(height, width) for axis in np.mgrid[:height, :width].astype(np.float32))
    rng, rows = np.random.default_rng(seed), []
    for k in range(count):
        coarse = rng.normal(0, 1, (depth, max(2, height // 8), max(2, width // 8)))
        noise = np.stack(
            [cv2.resize(plane, (width, height)) for plane in coarse.astype(np.float32)]
        )
        bright, rough = rng.uniform(100, 220), rng.uniform(20, 80)
        volume = 20 + bright * x + rough * y * noise
        np.save(folder / f"p{k}_0.npy", volume.clip(0, 255).astype(np.uint8))
        rows.append(
            {
                "patient_id": f"p{k}",
                "series_id": "0",
                "source": "train",
                "path": f"p{k}_0.npy",
            }
        )
    pl.DataFrame(rows).write_parquet(folder / layout.INDEX)
    return folder
