"""`tests/benchmarks/gpu.py`, as somebody with a GPU calls it, on the CPU and in tiny sizes: so that
it works on the day when there is one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tests" / "benchmarks" / "gpu.py"
# by row: what every CPU can check
CHECKED = {
    "pretraining": 6,
    "resuming": 4,
    "fold": 4,
    "files": 2,
    "ranks": 16,
}
ONLY_CUDA = ("synchronisations", "steps", "3D")
SECTIONS = {
    *CHECKED,
    *ONLY_CUDA,
    *("limits", "waiting", "folds", "prediction", "checkpoints", "batches", "memory order"),
    *("compile", "compilation", "graphs"),
}


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    # tiny networks lose by threads what they gain
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = ["--device", "cpu", "--quick", "--tiny", "--out", str(out), *arguments]
    return subprocess.run(
        [sys.executable, str(COMMAND), *flags], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_every_section_runs_and_every_check_passes(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    table = (tmp_path / "gpu.md").read_text()
    assert found["machine"]["torch"] == torch.__version__
    assert found["sections"].keys() == SECTIONS
    rows = [(name, row) for name, part in found["sections"].items() for row in part]
    assert all(row["value"] is not None or "not measured" in row["note"] for _, row in rows)
    assert not [row for _, row in rows if row["passed"] is False]
    for section, count in CHECKED.items():
        passed = [row for name, row in rows if name == section and row["passed"]]
        assert len(passed) >= count, section
    for section in ONLY_CUDA:
        assert any("CUDA" in row["note"] for name, row in rows if name == section)
    for name, row in rows:
        assert f"| {name} | {row['name']} |" in table
    assert "not measured" in table
    # the run leaves its two files and nothing else
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


@pytest.mark.slow
def test_a_section_that_fails_is_a_row_and_an_exit_code(tmp_path):
    """Volumes cannot be drawn: the others' rows are there, and the exit code says so."""
    code = (
        "import sys, runpy, common; common.draw_volumes = lambda *_: 1 / 0;"
        f"sys.argv = ['gpu.py', '--device', 'cpu', '--tiny', '--out', {str(tmp_path)!r}, 'limits',"
        f" 'files']; runpy.run_path({str(COMMAND)!r}, run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), str(COMMAND.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in (tmp_path / "gpu.md").read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert found["limits"][0]["value"] > 0
    assert found["files"][-1]["passed"] is False
