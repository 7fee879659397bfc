"""Processes that load batches: what fails is told, what hangs is not waited for, a stop is answered
at once, a small /dev/shm is enough.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_faults import PATIENCE_S, copy, plain_lines
from helpers_stages import ROOT, environment
from torch.utils.data import Dataset

from pipeline.learning import loaders
from pipeline.learning.interrupt import StopSignal
from pipeline.learning.loaders import batches_of, loading, make_loader
from pipeline.run import layout
from pipeline.system.errors import TrainingStopped


class NoRoom:
    """A batch that cannot be handed over: what torch raises where /dev/shm is full."""

    def __reduce__(self) -> tuple:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


def lost(loader: int, number: int) -> None:
    os.kill(loader, number)
    raise ConnectionResetError(104, "Connection reset by peer")


class Lost:
    """A batch whose process is killed while it hands it over: tensors are asked for in turn."""

    number = signal.SIGKILL

    def __reduce__(self) -> tuple:
        return lost, (os.getpid(), self.number)


class LostRoom(Lost):
    """The same, killed while it writes the next batch where there is no room."""

    number = signal.SIGBUS


class Items(Dataset):
    """Items 0 to 5; `odd` is what item 2 does."""

    def __init__(self, odd=lambda: 2) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 6

    def __getitem__(self, k: int) -> object:
        return self.odd() if k == 2 else k


def stream(odd=lambda: 2, waiting=lambda: None, workers=1):
    loader = make_loader(Items(odd), workers, False, batch_size=None)
    return batches_of(loader, waiting)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_their_order(workers):
    assert [int(batch) for batch in stream(workers=workers)] == list(range(6))


@pytest.mark.slow
def test_a_slow_batch_is_waited_for():
    def slow() -> int:
        time.sleep(2.5)
        return 2

    asked = []
    assert [int(batch) for batch in stream(slow, lambda: asked.append(1))] == list(range(6))
    assert asked, "somebody was asked meanwhile"


@pytest.mark.slow
def test_a_loader_that_fails_without_dying_is_one_line():
    begun = time.monotonic()
    with (
        pytest.raises(TrainingStopped, match=r"/dev/shm.*--shm-size.*pretrain.workers"),
        loading(),
    ):
        list(stream(NoRoom))
    assert time.monotonic() - begun < 30


def test_the_death_of_a_loader_is_told_as_such():
    with pytest.raises(TrainingStopped, match="was killed"), loading():
        list(stream(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    with pytest.raises(TrainingStopped, match="/dev/shm"), loading():
        list(stream(lambda: os.kill(os.getpid(), signal.SIGBUS)))
    with pytest.raises(RuntimeError, match="other"), loading():
        raise RuntimeError("other")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("batch", "told"), [(Lost, "was killed"), (LostRoom, "/dev/shm")])
def test_a_loader_that_dies_while_it_hands_a_batch_over_is_told_as_such(batch, told, workers):
    with pytest.raises(TrainingStopped, match=told), loading():
        list(stream(batch, workers=workers))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [RuntimeError, FileNotFoundError, EOFError])
def test_an_error_of_our_own_in_a_loader_is_no_death(fault):
    def wrong() -> int:
        raise fault("a bug")

    for workers in (0, 1):
        with pytest.raises(fault, match="a bug"), loading():
            list(stream(wrong, workers=workers))


@pytest.mark.slow
def test_what_never_comes_is_not_waited_for_without_limit(monkeypatch):
    monkeypatch.setattr(loaders, "LIMIT_S", 1.5)
    with pytest.raises(TrainingStopped, match=r"no batch has come for 2 s.*train.workers"):
        list(stream(lambda: time.sleep(60)))


@pytest.mark.slow
def test_a_stop_is_answered_while_a_batch_is_waited_for(capfd, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with StopSignal() as stop:

        def leave() -> None:
            if stop.signum:
                stop.leave()

        waited = stream(lambda: time.sleep(60), leave)
        assert [int(next(waited)), int(next(waited))] == [0, 1]
        os.kill(os.getpid(), signal.SIGINT)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(waited)
    assert time.monotonic() - begun < 2
    assert "stopping after this step" in capfd.readouterr().err


def in_small_shm(size: str, *command: str, **more: str) -> subprocess.Popen:
    """A command whose /dev/shm has that size, in a mount namespace of its own."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return subprocess.Popen(
        ["unshare", "-m", "bash", "-c", mount, "_", *command],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # whatever started the tests may ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def may_mount() -> bool:
    try:
        done = in_small_shm("1m", "true")
        done.communicate(timeout=30)
    except OSError:
        return False
    return done.returncode == 0


small_shm = pytest.mark.skipif(not may_mount(), reason="may not mount a /dev/shm of its own")


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder outside /dev/shm, in which the others may lie: it is hidden here."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def stage_04(out, size: str, *overrides: str, **more: str) -> subprocess.Popen:
    script = str(ROOT / "stages" / "04_pretrain_voco2d.py")
    flags = ("--config", "smoke", "--out", str(out), "--jobs", "2", "--device", "cpu", "--force")
    return in_small_shm(size, sys.executable, script, *flags, *overrides, **more)


@small_shm
def test_a_shm_too_small_for_the_loaders_gets_fewer_of_them(smoke, on_disk):
    out = copy(smoke, on_disk / "run")
    process = stage_04(out, "64k", "pretrain.workers=2")
    text = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0, text
    assert "warning: /dev/shm has 0 MB free, too little for 2 processes" in text
    assert "0 are used; docker run --shm-size=2g" in text
    made = (out / layout.VOCO / layout.BACKBONE).read_bytes()
    assert made == (smoke / layout.VOCO / layout.BACKBONE).read_bytes(), "the result is the same"


@small_shm
@pytest.mark.parametrize("stage", ["04", "06"])
def test_a_shm_that_is_full_later_is_one_line(smoke, on_disk, stage):
    """The product believes that there is room, as when another process fills it meanwhile."""
    out = copy(smoke, on_disk / "run")
    (on_disk / "blind").mkdir()
    (on_disk / "blind" / "sitecustomize.py").write_text(
        "import shutil\n"
        "real = shutil.disk_usage\n"
        "def usage(path):\n"
        "    if str(path) == '/dev/shm':\n"
        "        raise OSError\n"
        "    return real(path)\n"
        "shutil.disk_usage = usage\n"
    )
    script = next((ROOT / "stages").glob(f"{stage}_*.py"))
    flags = ("--config", "smoke", "--out", str(out), "--jobs", "1", "--device", "cpu", "--force")
    process = in_small_shm(
        "64k",
        sys.executable,
        str(script),
        *flags,
        *(("pretrain.workers=2",) if stage == "04" else ("train.workers=2", "--fold", "0")),
        PYTHONPATH=f"{on_disk / 'blind'}{os.pathsep}{ROOT}",
    )
    begun = time.monotonic()
    text = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1, text
    (line,) = plain_lines(text)
    assert line.startswith("error: a process that loads data found no room in /dev/shm")
    assert time.monotonic() - begun < 120


@small_shm
def test_ctrl_c_is_answered_within_two_seconds_where_batches_do_not_come(smoke, on_disk):
    out, mark = copy(smoke, on_disk / "run"), on_disk / "mark"
    (on_disk / "slow").mkdir()
    (on_disk / "slow" / "sitecustomize.py").write_text(
        "import time\n"
        "from torch.utils.data import get_worker_info\n"
        "import pipeline.voco.data as data\n"
        "real = data.VocoSamples.planes\n"
        "def never(self, *given):\n"
        "    if get_worker_info() is None:\n"  # what is looked at before the first step
        "        return real(self, *given)\n"
        f"    open({str(mark)!r}, 'w').write('x')\n"
        "    time.sleep(600)\n"
        "data.VocoSamples.planes = never\n"
    )
    path = f"{on_disk / 'slow'}{os.pathsep}{ROOT}"
    process = stage_04(out, "64m", "pretrain.workers=2", PYTHONPATH=path)
    deadline = time.monotonic() + PATIENCE_S
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    text = ""
    while "stopped at step 0" not in text and process.poll() is None:
        text += process.stderr.readline()
    assert time.monotonic() - begun < 2
    text += process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 130, text
    assert plain_lines(text) == ["stopped: run the same command again without --force to go on"]


def test_torch_is_what_the_loop_relies_on():
    """Names of torch that are not public."""
    assert isinstance(torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL, float)
