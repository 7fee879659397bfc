"""SIGTERM and Ctrl-C, whenever they come: 143 or 130, one line, nobody left alive, nothing that
looks finished, and a rerun goes on.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_faults import (
    FOLDERS,
    alive,
    copy,
    end,
    go_on,
    none_alive,
    plain_lines,
    products,
    run_here,
    start,
    temporaries,
    wait_for,
)
from helpers_processes import blocks_interrupts

from pipeline.learning.interrupt import StopSignal
from pipeline.run import layout
from pipeline.system.pool import spread

SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM
LINE = "stopped: run the same command again to go on"
FORCED = LINE.replace("again", "again without --force")  # which would begin anew


# where each stage is held when the signal comes: in a worker process, in the middle of a write, in
# training
@pytest.mark.parametrize(
    ("stage", "part", "number", "arguments"),
    [
        ("00", ".dcm", SIGINT, ()),
        ("01", "series.json", SIGINT, ("--force",)),
        ("02", ".npy.tmp-", SIGTERM, ("--force",)),
        ("03", "folds.csv.tmp-", SIGINT, ("--force",)),
        ("04", "log.jsonl.tmp-", SIGINT, ("--force", "pretrain.checkpoint_every=1000")),
        ("06", "log.jsonl.tmp-", SIGTERM, ("--force", "--jobs", "1")),
        ("07", "scores.json.tmp-", SIGTERM, ("--force",)),
        ("08", ".dcm", SIGINT, ("--force",)),
        ("09", "index.html.tmp-", SIGTERM, ("--force",)),
    ],
)
def test_a_stop_is_one_line(smoke, tmp_path, stage, part, number, arguments):
    out = tmp_path / "run"
    copy(smoke, out) if stage != "00" else out.mkdir()
    process = start(stage, out, *arguments, fault=f"pause:{tmp_path / 'mark'}:{part}")
    wait_for(tmp_path / "mark", process)
    # a terminal sends Ctrl-C to all
    os.killpg(process.pid, SIGINT) if number == SIGINT else os.kill(process.pid, SIGTERM)
    go_on(tmp_path / "mark")
    code, text = end(process)
    assert code == 128 + number, text
    assert plain_lines(text) == [FORCED if "--force" in arguments else LINE], text
    assert none_alive(process.pid), alive(process.pid)
    assert not (out / FOLDERS[stage] / "manifest.json").exists(), "it must not look finished"
    if stage in ("03", "01"):
        assert run_here(stage, out)[0] == 0
        assert not temporaries(out)
        assert products(out) == products(smoke)
    if stage == "04":
        assert (out / layout.VOCO / "last.ckpt").exists(), "a stop writes a checkpoint"


@pytest.mark.slow
def test_workers_do_not_see_ctrl_c():
    """A terminal sends it to them too: each would answer with a traceback of its own."""
    assert [found for _, found in spread(blocks_interrupts, range(4), jobs=2)] == 4 * [True]
    assert not blocks_interrupts(0)


def test_an_ignored_ctrl_c_stays_ignored(smoke, tmp_path):
    """As in `nohup run_all.sh &`: the background job goes on when someone presses Ctrl-C in the
    terminal.
    """
    out, mark = copy(smoke, tmp_path / "run"), tmp_path / "mark"
    process = start(
        "03", out, "--force", fault=f"pause:{mark}:folds.csv.tmp-", ignore_interrupt=True
    )
    wait_for(mark, process)
    os.killpg(process.pid, SIGINT)
    go_on(mark)
    code, text = end(process)
    assert (code, plain_lines(text)) == (0, []), text


def test_training_leaves_an_ignored_ctrl_c_ignored():
    before = signal.signal(SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), SIGINT)
        assert not stop.signum
    finally:
        signal.signal(SIGINT, before)


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_run_all_hands_a_stop_on_to_its_stage(smoke, tmp_path, number):
    out = copy(smoke, tmp_path / "run", layout.FOLDS)
    process = start("run_all", out, fault=f"pause:{tmp_path / 'mark'}:folds.csv.tmp-")
    wait_for(tmp_path / "mark", process)
    os.kill(process.pid, number)
    code, text = end(process)
    assert code == 128 + number, text
    assert plain_lines(text) == [LINE], text
    assert none_alive(process.pid), "the stage must not go on alone"
    assert not (out / layout.FOLDS / "manifest.json").exists()


def test_killed_at_random_moments_the_run_ends_with_the_same_submission(smoke, tmp_path):
    """A few of the kills that `kill_loop.py --kills 40` makes over the whole run."""
    loop = Path(__file__).parents[1] / "tools" / "kill_loop.py"
    command = [
        sys.executable,
        str(loop),
        "--kills",
        "1",
        "--reference",
        str(smoke),
        "--begin",
        layout.SCORES,
        "--work",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills" in done.stdout
