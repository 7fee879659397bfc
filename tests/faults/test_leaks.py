"""Thirty calls of stages in one process: open files, children and memory stay flat."""

import json
import subprocess
import sys

from helpers_faults import copy
from helpers_stages import ROOT, environment

CALLS, WARM = 30, 12
GROWTH_MB = 60  # allocators keep a little; one leaked volume or model a call would be far more
SCRIPT = """
import json, os, runpy, sys
out, calls = sys.argv[1], int(sys.argv[2])
plan = 7 * [("03_make_folds", ["--force"])] + [
    ("09_report", ["--force"]),
    ("02_build_volumes", ["--force", "--jobs", "1"]),
    ("07_score_oof", ["--force", "score.bootstrap=5", "score.calibrate=false"]),
]
train = ("04_pretrain_voco2d", ["--force", "pretrain.steps=1"])
seen = []
for k in range(calls):
    name, more = train if k % 15 == 6 else plan[k % len(plan)]
    sys.argv = [name, "--config", "smoke", "--out", out, *more]
    try:
        runpy.run_path(f"stages/{name}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
    pages = int(open("/proc/self/statm").read().split()[1])
    threads = len(os.listdir("/proc/self/task"))
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    seen.append((len(os.listdir("/proc/self/fd")), megabytes, threads))
print(json.dumps(seen))
"""


def test_repeated_stage_calls_leak_nothing(smoke, tmp_path):
    out = copy(smoke, tmp_path / "run", "data")
    (out / "data").symlink_to(smoke / "data")
    command = [sys.executable, "-c", SCRIPT, str(out), str(CALLS)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files, memory, threads = zip(*json.loads(done.stdout.splitlines()[-1])[WARM:], strict=True)
    assert max(files) == min(files[: CALLS // 5]), f"open files grow: {files}"
    assert max(threads) <= threads[0] + 4, f"threads grow: {threads}"
    assert memory[-1] - memory[0] < GROWTH_MB, f"memory grows: {memory}"
