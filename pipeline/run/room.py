"""What a run needs of the machine and what is there, asked before the first write."""

from ..system.console import log
from ..system.machine import Room
from .config import TrainConfig, VocoConfig

AHEAD = 4  # batches that each process that loads works ahead
LOADER_KEYS = "pretrain.workers, train.workers"
MOST_LOADERS = 8
LOADER_MB = 500  # memory of its own of a process that loads
SPARE = 0.9  # share of what is free that is planned with
MB = 1_000_000


def voco_batch_bytes(options: VocoConfig, processes: int = 1) -> int:
    """A batch of one of several processes: crops uint8 and their labels."""
    crops = options.random_crops + options.grid**2
    side = options.image_size // options.grid
    volumes = -(-options.batch // processes)
    return volumes * crops * (options.slices * side**2 + 4)


def train_batch_bytes(options: TrainConfig) -> int:
    """The largest batch of a fold: held-out series come two batches at a time."""
    return 2 * options.batch * options.slices * (options.image_size**2 + 8)


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
            if number < wanted:
                need = sharing * (wanted * each + shared)
                _warn(key, name, f"{wanted}", number, free, need)
            wanted = min(wanted, number)
    return wanted


WARNED: set[tuple[str, str]] = set()


def _warn(key: str, name: str, wanted: str, number: int, free: int, need: int) -> None:
    """Once a process: an epoch asks for loaders again and again."""
    if (key, name) not in WARNED:
        WARNED.add((key, name))
        more = "docker run --shm-size=2g gives more" if name == "/dev/shm" else "set fewer"
        log(
            f"warning: {name} has {free / MB:.0f} MB free, too little for {wanted} processes that"
            f" load data ({need / MB:.0f} MB): {number} are used; {more} ({key})"
        )
