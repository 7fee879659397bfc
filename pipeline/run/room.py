"""What a run needs of the machine and what is there, asked before the first write."""

import shutil
from pathlib import Path

from ..system.console import log
from ..system.errors import InputError
from ..system.machine import Room
from .config import OrganConfig, TrainConfig, VocoConfig, VolumeConfig

AHEAD = 4  # batches that each process that loads works ahead
LOADER_KEYS = "pretrain.workers, organs.workers, train.workers"
MOST_LOADERS = 8
LOADER_MB = 500  # memory of its own of a process that loads
SPARE = 0.9  # share of what is free that is planned with
MB = 1_000_000
WARNED: set[tuple[str, str]] = set()  # keys and kinds of room that a line was said of, once each


def voco_batch_bytes(options: VocoConfig, processes: int = 1) -> int:
    """A batch of one of several processes: crops uint8 and their labels."""
    crops = options.random_crops + options.grid**2
    side = options.crop
    volumes = -(-options.batch // processes)
    return volumes * crops * (options.slices * side**2 + 4)


def train_batch_bytes(options: TrainConfig, phases: int = 1) -> int:
    """The largest batch of a fold: held-out series come two batches at a time, or one in all its
    phases.
    """
    return (
        max(2 * options.batch, phases)
        * options.sample_slices
        * (options.channels * options.image_size**2 + 8)
    )


def organ_batch_bytes(options: OrganConfig) -> int:
    """A batch of stage 05: three planes as channels, and labels."""
    return options.batch * 4 * options.image_size**2


def loaders(asked: int | None, batch_bytes: int, key: str, gpu: bool, sharing: int = 1) -> int:
    """How many processes load batches for each of `sharing` processes that train.

    As many as `asked`; where None, one beside a model on the CPU, which wants the cores itself, and
    on a GPU one a core. Never more than memory and /dev/shm hold, where each batch lies until it is
    used; then a line says so.
    """
    room = Room.here()
    spare_cores = max(1, room.cores // sharing) - 1
    wanted = min(MOST_LOADERS if gpu else 1, spare_cores) if asked is None else asked
    # the batches that wait, and the two on their way to the model
    for name, free, each, shared in (
        ("memory", room.memory, LOADER_MB * MB, 0),
        ("/dev/shm", room.shared, AHEAD * batch_bytes, 2 * batch_bytes),
    ):
        if wanted and free is not None:
            number = max(0, int((SPARE * free / sharing - shared) // each))
            if number < wanted and (key, name) not in WARNED:  # each epoch asks again
                WARNED.add((key, name))
                need = sharing * (wanted * each + shared)
                more = "docker run --shm-size=2g gives more" if name == "/dev/shm" else "set fewer"
                log(
                    f"warning: {name} has {free / MB:.0f} MB free, too little for {wanted}"
                    f" processes that load data ({need / MB:.0f} MB): {number} are used; {more}"
                    f" ({key})"
                )
            wanted = min(wanted, number)
    return wanted


def require(
    folder: Path, name: str, disk: int = 0, memory: int = 0, way_out: str = "choose another --out"
) -> None:
    """Say what a stage needs and what there is: bytes of disk below `folder`, and of memory.

    Raises:
        InputError: there is less.
    """
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    there = {"disk": shutil.disk_usage(parent).free, "memory": Room.here().memory}
    needed = {"disk": disk, "memory": memory}
    parts = []
    for what, free in there.items():
        if free is None or not needed[what]:
            continue
        parts.append(f"{size(needed[what])} of {what} ({size(free)} free)")
        if needed[what] > free:
            remedy = f"make room or {way_out}" if what == "disk" else "set fewer --jobs"
            raise InputError(
                f"{name} needs about {size(needed[what])} of {what}, {size(free)} are free",
                str(parent),
                f"{remedy}, or try data.limit=10 first",
            )
    if parts:
        log(f"{name}: needs about {' and '.join(parts)}")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / MB:.1f} MB"


def convert_memory(jobs: int) -> int:
    """Of stage 01: its index, and a process with its child each (measured on 512 x 512 slices)."""
    return (300 + 190 * max(1, jobs)) * MB


def volume_memory(options: VolumeConfig, jobs: int) -> int:
    """Of stage 02: float32 planes of 512 x 512 in each process, once as they are and once cut."""
    return (250 + jobs * 150) * MB + 2 * jobs * options.depth * 512 * 512 * 4


def checkpoint_bytes(parameters: int, options: VocoConfig) -> int:
    """Of stage 04's checkpoints, one being written: student, teacher and AdamW's moments."""
    return (options.keep + 2) * (4 + options.amsgrad) * 4 * parameters


def volume_bytes(options: VolumeConfig, volumes: int) -> int:
    """Of so many volumes on disk, with what describes them."""
    return volumes * (options.depth * options.height * options.width + 4096)
