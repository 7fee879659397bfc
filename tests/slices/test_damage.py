"""Whatever the files are, the run ends and good slices are what they would be without the bad
ones.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import cv2
import joblib
import numpy as np
import polars as pl
import pytest
from benchmarks.damage import damaged as damaged_copy
from helpers_dicom import dataset, pattern, to_bytes, write_series
from helpers_processes import square_or_die
from helpers_stages import content, run_stage

from pipeline.run import layout
from pipeline.run.config import ConvertConfig
from pipeline.slices import convert, dicom
from pipeline.slices import store as slice_store
from pipeline.slices.convert import decode_series_files
from pipeline.slices.sources import SeriesTask, list_files
from pipeline.system import pool as parallel
from pipeline.system import processes
from pipeline.system.contained import Failure, contained
from pipeline.system.pool import spread

DAMAGED, GOOD, SERIES = 1050, 15, 7


def make(data: Path, damaged: int) -> None:
    """A data set with series of good slices (RLE, JPEG 2000, JPEG-LS, JPEG lossless), `damaged`
    broken ones spread among them.
    """
    rng, rows = np.random.default_rng(11), ["patient_id,series_id,aortic_hu,incomplete_organ"]
    kinds = ("rle", "j2k", "rle", "j2k", "rle", "jpegls", "jpeg")
    for number, kind in enumerate(kinds):
        folder = data / "train_images" / "1" / str(number)
        source = "rle" if kind in ("jpegls", "jpeg") else kind
        write_series(folder, GOOD, source, seed=number)
        files = [path.read_bytes() for path in sorted(folder.glob("*.dcm"))]
        if source != kind:
            files = [
                to_bytes(dataset(pattern(bits), bits, signed, kind))
                for bits in (12, 16)
                for signed in (False, True)
            ]
        for k in range(damaged // len(kinds)):
            (folder / f"{100 + k}.dcm").write_bytes(damaged_copy(files[k % len(files)], rng))
        rows.append(f"1,{number},100.0,0")
    (data / "train_series_meta.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
def test_a_thousand_damaged_files_among_good_ones(tmp_path, capsys):
    results = {}
    for name, damaged in (("clean", 0), ("mixed", DAMAGED)):
        data, out = tmp_path / name, tmp_path / f"out-{name}" / layout.SLICES
        make(data, damaged)
        start = time.perf_counter()
        done = run_stage(
            "01", "--config", "smoke", "--data", str(data), "--out", str(out.parent), "--jobs", "2"
        )
        assert done.returncode == 0, done.stderr
        counts = json.loads((out / "manifest.json").read_text())["counts"]
        results[name] = (
            data,
            out,
            counts,
            pl.read_parquet(out / "index.parquet"),
            time.perf_counter() - start,
        )
    data, out, counts, index, seconds = results["mixed"]
    _, clean, _, expected, _ = results["clean"]
    good = index.filter(pl.col("instance_number") < 100)
    # a damaged file may carry a good position
    facts = [name for name in expected.columns if name not in ("order", "flags", "z_mm")]
    assert good.select(facts).sort("png").equals(expected.select(facts).sort("png"))
    assert len(good) == SERIES * GOOD
    for png in expected["png"]:
        assert content(out / png) == content(clean / png)
    rows = list(csv.reader((out / "quarantine.csv").open()))[1:]
    listed = Counter(path for path, _ in rows)
    assert set(listed.values()) == {1}
    shown = {f"train_images/{png.removesuffix('.png')}.dcm" for png in index["png"]}
    assert shown | set(listed) == {str(path.relative_to(data)) for path in data.rglob("*.dcm")}
    assert not shown & set(listed)
    assert len(rows) > DAMAGED / 3
    assert not list(out.rglob("*.part"))
    with capsys.disabled():
        print(
            f"\n{DAMAGED} damaged files: {len(rows)} quarantined, worker deaths"
            f" {counts['worker_deaths']}, {seconds:.1f} s"
        )


def small_series(tmp_path: Path, count: int = 5, syntax: str = "j2k") -> Path:
    folder = tmp_path / "train_images" / "1" / "2"
    write_series(folder, count, syntax)
    return folder


def crash(number: int) -> None:
    os.kill(os.getpid(), number)


def hang(_: int) -> None:
    time.sleep(60)


def fail(_: int) -> None:
    raise RuntimeError("the decoder says no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "what", "deaths"),
    [
        (crash, signal.SIGSEGV, ["SIGSEGV"] * 3),
        (crash, signal.SIGABRT, ["SIGABRT"] * 3),
        (hang, 0, ["SIGALRM"] * 3),
        (fail, 0, ["an exception"] * 2),
    ],
)
def test_a_file_that_brings_dicomsdl_down_is_decoded_by_pydicom(
    deed, what, deaths, tmp_path, monkeypatch
):
    folder = small_series(tmp_path)
    expected, _ = decode_series_files(list_files(folder, tmp_path), ConvertConfig())
    real, evil = dicom.dicomsdl.open_memory, (folder / "3.dcm").read_bytes()

    def open_memory(data, copy):
        if data == evil:
            deed(what)
        return real(data, copy)

    monkeypatch.setattr(dicom.dicomsdl, "open_memory", open_memory)
    found: list[str] = []
    listing = list_files(folder, tmp_path)
    pictures = [
        picture
        for _, picture in convert.pictures(listing, ConvertConfig(timeout_s=2), deaths=found)
    ]
    assert found == deaths
    assert [picture.decoder for picture in pictures] == [
        "dicomsdl",
        "dicomsdl",
        "pydicom",
        "dicomsdl",
        "dicomsdl",
    ]
    for picture, item in zip(pictures, expected, strict=True):
        assert np.array_equal(picture.image, item.image)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "reason"), [(crash, "brought down by SIGSEGV"), (hang, "took longer than 2 s")]
)
def test_a_file_that_brings_every_decoder_down_is_quarantined_with_the_reason(
    deed, reason, tmp_path, monkeypatch
):
    folder = small_series(tmp_path)
    evil = (folder / "3.dcm").read_bytes()
    real = dicom.picture
    monkeypatch.setattr(
        dicom,
        "picture",
        lambda data, *more: deed(signal.SIGSEGV) if data == evil else real(data, *more),
    )
    slices, quarantined = decode_series_files(
        list_files(folder, tmp_path), ConvertConfig(timeout_s=2)
    )
    assert [item.instance_number for item in slices] == [1, 2, 4, 5]
    assert [path for path, _ in quarantined] == [str(folder / "3.dcm")]
    assert quarantined[0][1].startswith(reason)


def test_what_a_dying_child_has_written_is_not_left_behind(tmp_path, monkeypatch):
    folder, real = small_series(tmp_path), slice_store._write_png

    def write_and_die(out, k, image):
        real(out, k, image)
        if k == 2:
            crash(signal.SIGKILL)

    monkeypatch.setattr(slice_store, "_write_png", write_and_die)
    (tmp_path / "out").mkdir()
    sidecar = slice_store.convert_series(
        SeriesTask("1", "2", "train", str(folder)), tmp_path, tmp_path / "out", ConvertConfig()
    )
    assert sidecar["rows"]["png"] == [f"1/2/{k}.png" for k in (1, 2, 4, 5)]
    assert [path for path, _ in sidecar["quarantine"]] == ["train_images/1/2/3.dcm"]
    assert sorted(path.name for path in (tmp_path / "out" / "1" / "2").iterdir()) == [
        "1.png",
        "2.png",
        "4.png",
        "5.png",
        "series.json",
    ]


def test_a_file_larger_than_any_picture_is_not_even_read(tmp_path, monkeypatch):
    folder = small_series(tmp_path)
    monkeypatch.setattr(dicom, "SPARE_BYTES", 10_000)
    with open(folder / "3.dcm", "ab") as handle:
        handle.write(bytes(1 << 20))
    slices, quarantined = decode_series_files(
        list_files(folder, tmp_path), ConvertConfig(max_pixels=1280)
    )
    assert [item.instance_number for item in slices] == [1, 2, 4, 5]
    assert quarantined == [
        (
            str(folder / "3.dcm"),
            "too large: the file is larger than any picture of convert.max_pixels",
        )
    ]


def test_a_child_that_is_killed_from_outside_changes_nothing(tmp_path, monkeypatch):
    folder = small_series(tmp_path)
    expected, _ = decode_series_files(list_files(folder, tmp_path), ConvertConfig())
    mark, real = tmp_path / "killed", dicom.picture

    def killed_once(*arguments):
        if not mark.exists():
            mark.touch()
            crash(signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(dicom, "picture", killed_once)
    slices, quarantined = decode_series_files(list_files(folder, tmp_path), ConvertConfig())
    assert quarantined == []
    assert [item[:-1] for item in slices] == [item[:-1] for item in expected]


def alone(item: int, careful: bool) -> int:
    cv2.setNumThreads(1)  # waits for the threads of a pool, which a forked child does not have
    return item


def test_open_cv_threads_in_the_parent_do_not_hang_the_child():
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000), np.uint8), (9, 9), 3)
    assert list(contained(alone, [1, 2], 10)) == [1, 2]


def test_errors_of_the_disk_are_no_damage():
    def full(item, careful):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(contained(full, [1, 2], 5))


def leave(item: int, careful: bool) -> int:
    """End the process without an error, as a library's `exit(0)` does; the second item only at the
    first attempts.
    """
    if item == 2 or (item == 1 and not careful):
        os._exit(0)
    return item


def test_a_child_that_ends_before_its_answers_counts_as_lost():
    deaths: list[str] = []
    assert list(contained(leave, range(4), 10, deaths)) == [
        0,
        1,
        Failure("brought down by an exit: the worker process"),
        3,
    ]
    assert set(deaths) == {"an exit"}


def test_items_that_need_the_same_share_their_failure():
    deaths: list[str] = []
    answers = list(contained(leave, range(4), 10, deaths, linked=True))
    assert answers == [0, 1, *[Failure("brought down by an exit: the worker process")] * 2]


def slow(item: int, careful: bool) -> int:
    time.sleep(90 if item else 0.05)
    return os.getpid()


def test_leaving_early_ends_the_child():
    start = time.monotonic()
    answers = contained(slow, [0, 1], 60)
    child = next(answers)
    answers.close()
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.slow
def test_an_orphaned_child_does_not_live_on(tmp_path):
    code = (
        "import os, sys, time\nfrom pipeline.system.contained import contained\n"
        "def work(item, careful):\n    time.sleep(600 if item else 0.1)\n    return os.getpid()\n"
        "for child in contained(work, [0, 1], 600):\n    print(child, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed():
    """A worker handing over more than a pipe holds waits for a reader: it holds the pipe's other
    end itself, so it once waited for ever.
    """
    code = (
        "import os, time\nfrom pipeline.system.pool import spread\ndef work(task):\n   "
        " print(os.getpid(), flush=True)\n    time.sleep(task)\n    return bytes(10 ** 8)\nfor _ in"
        " spread(work, [0, 0.3, 0.3, 0.3], jobs=2):\n    os.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            # the workers hold the pipe too: this ends when they do
            workers, _ = run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == -signal.SIGKILL
    assert len(workers.split()) >= 2


@pytest.mark.slow
def test_workers_that_never_had_a_task_end_with_a_run_that_is_killed():
    """They wait for one for 300 s, and for ever where the dead run held a lock."""
    code = (
        "import os, time\nfrom pipeline.system.pool import spread\ndef work(task):\n"
        "    time.sleep(task)\n    os.kill(os.getppid(), 9)\ndict(spread(work, [4], jobs=3))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as run:
        try:
            run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_that_starts_when_its_run_was_killed_ends_too():
    """The killed run keeps its number until whoever reads its output has waited for it."""
    code = (
        "import sys, time\nfrom pipeline.system.processes import end_with\n"
        "end_with(int(sys.argv[1]))\ntime.sleep(60)\n"
    )
    with subprocess.Popen(["sleep", "600"]) as killed:
        killed.kill()
        worker = subprocess.run([sys.executable, "-c", code, str(killed.pid)], check=False)
    assert worker.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_tasks_of_a_killed_worker_are_done_again_and_a_killer_is_named(tmp_path, capsys):
    tasks = [
        (str(tmp_path / "once") if k == 3 else "always" if k == 5 else "", k) for k in range(8)
    ]
    answers = dict(spread(square_or_die, tasks, jobs=2))
    assert {k: answer for k, answer in answers.items() if k != 5} == {
        k: k * k for k in range(8) if k != 5
    }
    assert isinstance(answers[5], Failure)
    assert "killed" in answers[5].reason
    assert "done again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killer_at_the_start_leaves_the_others_in_parallel(monkeypatch):
    """Only tasks that were begun are done again: three deaths once made the whole rest of a run go
    one by one.
    """
    rounds = []

    def pool(work, tasks, jobs, scheduler, begun):
        """Hands out five tasks at a time, in order; breaks when it comes to task 1."""
        rounds.append(list(tasks))
        for at, k in enumerate(rounds[-1]):
            begun.update(rounds[-1][: at + 5])
            if k == 1:
                return
            yield k, work(tasks[k])

    monkeypatch.setattr(parallel, "_round", pool)
    answers = dict(spread(str, range(40), jobs=2))
    assert answers == {k: str(k) if k != 1 else Failure(parallel.KILLED) for k in range(40)}
    assert rounds == [
        [*range(40)],
        [*range(6, 40), *range(1, 6)],
        [*range(1, 6)],
        [1],
        [2],
        [3],
        [4],
        [5],
    ]


def test_a_pool_that_is_left_early_says_nothing():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        answers = spread(time.sleep, [0, 9, 9, 9, 9], jobs=2)
        next(answers)
        answers.close()
    assert not [str(one.message) for one in seen if "still being processed" in str(one.message)]


def test_only_the_pools_own_thread_is_silent(capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    parallel._silence_pool.__wrapped__()
    for name, work in (
        ("ExecutorManagerThread", lambda: {}[0]),
        ("other thread", lambda: {}[0]),
        ("ExecutorManagerThread", lambda: [][0]),
    ):
        thread = threading.Thread(target=work, name=name)
        thread.start()
        thread.join()
    text = capfd.readouterr().err
    assert (
        text.count("Exception in thread ExecutorManagerThread") == text.count("\nIndexError") == 1
    )
    assert text.count("Exception in thread other thread") == text.count("\nKeyError") == 1


@pytest.mark.slow
def test_where_joblib_works_serially_the_process_is_not_its_own_worker():
    """Without semaphores joblib calls the tasks itself, which once ended the process as orphans."""
    code = (
        "import os, time\nfrom pipeline.system.pool import spread\n"
        "print(dict(spread(abs, [-1, 2, -3], jobs=2)))\ntime.sleep(1.2)\nprint('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JOBLIB_MULTIPROCESSING": "0"},
    )
    assert (done.returncode, done.stdout) == (0, "{0: 1, 1: 2, 2: 3}\nalive\n")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["threading", "sequential"])
def test_tasks_in_threads_or_in_this_process_leave_it_alive(backend):
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert dict(spread(abs, [-1, 2, -3], jobs=2)) == {0: 1, 1: 2, 2: 3}
    time.sleep(3 * processes.WATCH_S)


def test_a_full_dev_shm_is_named_and_the_work_goes_on_serially(monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(joblib.Parallel, "__call__", full)
    assert dict(spread(abs, [-1, 2, -3], jobs=2)) == {0: 1, 1: 2, 2: 3}
    (line,) = caplog.messages
    assert "/dev/shm is full" in line
    assert "one task after another" in line


def test_an_error_of_the_disk_in_a_task_is_no_missing_process():
    def full(task):
        raise OSError(28, "No space left on device")

    with (
        joblib.parallel_config(backend="sequential"),
        pytest.raises(OSError, match="No space left"),
    ):
        dict(spread(full, [1, 2], jobs=2))
