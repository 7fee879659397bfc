"""The log: silent or formatted as whoever imports the package wants it, time-stamped lines from
every process of a stage.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.system.console import say

ROOT = Path(__file__).resolve().parents[2]
SAY = "from pipeline.system.console import log\nlog('a line, 100 %')\nlog('warning: a fault')\n"
WORKERS = """
import multiprocessing, os
from torch.utils.data import DataLoader
from pipeline.system.console import log, show_log
from pipeline.system.pool import spread

def say(where):
    log(f"{where} says so")

class Items:
    def __len__(self):
        return 2

    def __getitem__(self, k):
        say(f"loader {k}")
        return k

if __name__ == "__main__":
    show_log()
    show_log()  # no line comes twice
    say("main")
    list(spread(say, ["pool 0", "pool 1"], jobs=2))
    list(DataLoader(Items(), num_workers=1))
    child = multiprocessing.get_context("fork").Process(target=say, args=("child",))
    child.start()
    child.join()
    if os.fork() == 0:
        say("fork")
        os._exit(0)
    os.wait()
"""


def heard(code: str, cwd: Path = ROOT) -> list[str]:
    """What a script says on standard error, in lines."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    assert not done.stdout
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("before", "lines"),
    [
        ("", ["warning: a fault"]),  # as any library that nobody has asked for more
        (
            "logging.basicConfig(level=logging.INFO)",
            ["INFO:voco2d:a line, 100 %", "WARNING:voco2d:warning: a fault"],
        ),
        ("logging.getLogger('voco2d').setLevel(logging.ERROR)", []),
    ],
)
def test_whoever_imports_the_package_decides_what_is_heard(before, lines):
    assert heard(f"import logging\n{before}\n{SAY}") == lines


def test_a_line_is_one_write():
    """An unbuffered stream hands every write on: two processes' lines ran into each other."""
    written = []

    class Stream(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    say("one line", Stream())
    assert written == ["one line\n"]


@pytest.mark.slow
def test_every_process_of_a_stage_prints_time_stamped_lines(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    lines = heard(f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')")
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines), lines
    assert sorted(line[9:] for line in lines) == sorted(
        f"{where} says so"
        for where in ("main", "pool 0", "pool 1", "loader 0", "loader 1", "child", "fork")
    )
