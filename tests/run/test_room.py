"""What a run needs, and what there is."""

import pytest

from pipeline.run import room as rooms
from pipeline.run.presets import load_config
from pipeline.system.machine import Room, available_memory

MB = 1_000_000


@pytest.fixture
def room(monkeypatch):
    """Set what there is of the machine."""
    monkeypatch.setattr(rooms, "WARNED", set())

    def there(cores: int, memory: int | None, shared: int | None) -> None:
        monkeypatch.setattr(Room, "here", classmethod(lambda cls: cls(cores, memory, shared)))

    return there


def test_the_batch_of_the_paper():
    """4 volumes, 2 + 9 crops of 32 slices of 64 x 64."""
    config = load_config("paper")
    assert rooms.voco_batch_bytes(config.pretrain) == 4 * 11 * (32 * 64 * 64 + 4)
    assert rooms.voco_batch_bytes(config.pretrain, 2) == 2 * 11 * (32 * 64 * 64 + 4)


@pytest.mark.parametrize(
    ("cores", "memory", "shared", "asked", "gpu", "sharing", "workers", "said"),
    [
        (16, 64_000, 32_000, None, True, 1, 8, ""),
        (4, 64_000, 32_000, None, True, 1, 3, ""),  # not 8 on four cores
        (4, 64_000, 32_000, None, True, 4, 0, ""),
        (2, 64_000, 32_000, None, False, 1, 1, ""),
        (1, 64_000, 32_000, None, False, 1, 0, ""),
        (4, 64_000, 32_000, 8, True, 1, 8, ""),  # asked for
        (16, 64_000, 64, 8, True, 1, 1, "/dev/shm has 64 MB free, too little for 8 processes"),
        (16, 64_000, 64, 1, True, 2, 0, "/dev/shm has 64 MB free, too little for 1 processes"),
        (16, 2_000, 32_000, 8, True, 1, 3, "memory has 2000 MB free, too little for 8 processes"),
        (16, None, None, 8, True, 1, 8, ""),
    ],
)
def test_loaders_are_what_cores_memory_and_shm_hold(
    room, capfd, cores, memory, shared, asked, gpu, sharing, workers, said
):
    room(cores, memory and memory * MB, shared and shared * MB)
    assert rooms.loaders(asked, 6 * MB, "pretrain.workers", gpu, sharing) == workers
    heard = capfd.readouterr().err
    assert (said in heard) if said else not heard
    assert rooms.loaders(asked, 6 * MB, "pretrain.workers", gpu, sharing) == workers
    assert not capfd.readouterr().err, "one line, however often it is asked"


def test_this_machine_has_room():
    room = Room.here()
    assert room.cores >= 1
    assert room.memory == pytest.approx(available_memory(), rel=0.5)
    assert room.memory > 100 * MB
