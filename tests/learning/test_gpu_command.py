"""`tests/benchmarks/gpu.py`, as somebody with a GPU calls it, on the CPU and in tiny sizes: so that
it works on the day when there is one.
"""

import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gpu
import gpu_checks
import gpu_ranks
import pytest
import torch
from gpu_plan import CPU, Overtime, Plan, check
from helpers_faults import none_alive

from pipeline.learning import compilation
from pipeline.system.errors import InputError

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
    # counters of batches once broke the backbone at every norm, with torch 2.4
    assert [row["value"] for _, row in rows if row["name"].endswith("graph breaks")] == [0, 0]
    for section in ONLY_CUDA:
        assert any("CUDA" in row["note"] for name, row in rows if name == section)
    for name, row in rows:
        assert f"| {name} | {row['name']} |" in table
    assert "not measured" in table
    # the run leaves its two files and nothing else
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_a_section_that_fails_is_a_row_and_an_exit_code(tmp_path, monkeypatch):
    """Volumes cannot be drawn: the others' rows are there, and the exit code says so."""
    monkeypatch.setattr("gpu_plan.draw_volumes", lambda *_: 1 / 0)
    flags = ("--device", "cpu", "--tiny", "--out", str(tmp_path), "limits", "files")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    assert gpu.main() == 1
    assert "ZeroDivisionError" in (tmp_path / "gpu.md").read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert found["limits"][0]["value"] > 0
    assert found["files"][-1]["passed"] is False


def section(work, module=gpu_checks, long=False):
    work.__module__ = module.__name__
    return gpu.Section("one", work, 1.0, 1.0, long)


def outcome(out: Path) -> list[tuple[str, object, bool | None]]:
    """Name, value and result of the rows in `gpu.json`."""
    found = json.loads((out / "gpu.json").read_text())["sections"]
    return [(row["name"], row["value"], row["passed"]) for rows in found.values() for row in rows]


def test_a_figure_that_is_no_number_is_a_failed_row_and_the_run_goes_on(tmp_path):
    def broken(plan):
        yield check("broken", math.nan, 1)
        yield check("endless", math.inf, 1)

    def whole(plan):
        yield check("whole", 0.5, 1)

    sections = [section(broken), gpu.Section("two", whole, 1.0, 1.0)]
    assert gpu.run(sections, CPU, "quick", tmp_path) == 1
    assert outcome(tmp_path) == [
        ("broken", "nan", False),
        ("endless", "inf", False),
        ("whole", 0.5, True),
    ]
    assert "| one | broken | nan | at most 1 | FAILED |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("fault", [Overtime, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize(("module", "code"), [(gpu_checks, 1), (gpu_ranks, 1), (gpu, 0)])
def test_a_check_that_is_cut_short_has_failed_a_figure_is_missing(tmp_path, fault, module, code):
    def work(plan):
        yield check("first", 0, 1)
        raise fault

    assert gpu.run([section(work, module)], CPU, "quick", tmp_path) == code
    assert outcome(tmp_path) == [("first", 0, True), ("the rest", None, False if code else None)]


@pytest.mark.parametrize(
    ("fault", "module", "code"),
    [
        (KeyboardInterrupt, gpu, 130),
        (KeyboardInterrupt, gpu_checks, 130),
        (Overtime, gpu, 0),
        (Overtime, gpu_checks, 1),
    ],
)
def test_what_comes_between_two_rows_loses_none(tmp_path, monkeypatch, fault, module, code):
    def work(plan):
        yield check("first", 0, 1)
        yield check("second", 0, 1)

    def interrupted(seconds, section, row):
        raise fault

    monkeypatch.setattr(gpu, "say", interrupted)
    assert gpu.run([section(work, module)], CPU, "quick", tmp_path) == code
    last = None if module is gpu else False
    assert outcome(tmp_path) == [("first", 0, True), ("the rest", None, last)]


def test_a_long_section_is_run_where_it_is_named(tmp_path):
    def work(plan):
        yield check("done", 0, 1)

    long = section(work, long=True)
    assert gpu.run([long], CPU, "quick", tmp_path) == 0
    assert outcome(tmp_path) == [("one", None, None)]
    assert gpu.run([long], CPU, "quick", tmp_path, ["one"]) == 0
    assert outcome(tmp_path) == [("done", 0, True)]
    endless = gpu.Section("one", work, 1000.0, 1000.0)
    assert gpu.run([endless], CPU, "quick", tmp_path) == 0
    assert gpu.run([endless], CPU, "quick", tmp_path, ["one"]) == 1, "named, and not to be had"


@pytest.mark.parametrize("size", ["quick", "whole"])
def test_all_sections_fit_the_time_that_is_promised(size):
    chosen = [one for one in gpu.SECTIONS if size == "whole" or not one.long]
    assert sum(one.seconds(size) for one in chosen) <= gpu.LIMIT_S[size]
    proving = [one.proves for one in gpu.SECTIONS[1:]]
    assert proving == sorted(proving, reverse=True), "figures are what is left out at the end"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "cuda"], "no CUDA device is visible; give --device cpu"),
        (["--device", "cpu", "--out", "FILE"], "File exists"),
        (["--device", "cpu", "--out", "FILE/below"], "Not a directory"),
        (["--device", "cpu", "limit"], "no such section: limit; there are limits"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path, monkeypatch, capsys, arguments, part):
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [one.replace("FILE", str(tmp_path / "file")) for one in arguments]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert part in capsys.readouterr().err.splitlines()[-1]


def test_what_the_guard_says_of_itself_is_no_call_that_waits(tmp_path):
    def step():
        for text in (
            "Synchronization debug mode is a prototype feature and does not yet detect all"
            " synchronizing operations",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(text, stacklevel=1)

    plan = Plan(CPU, "tiny", tmp_path)
    run = gpu_checks.trace(plan, plan.checked(), CPU, 1).run
    assert list(gpu_checks.waits(plan, run, step, False).values()) == [1]


@pytest.mark.parametrize("fault", [Overtime, KeyboardInterrupt])
def test_ranks_end_with_the_wait_for_them(tmp_path, monkeypatch, fault):
    """As torchrun does it: a rank in a session of its own, to which the launcher hands signals."""
    launcher = (
        f"setsid sleep 100 & echo $! > {tmp_path}/pid; trap 'kill $!; exit 1' TERM; wait; exit 1"
    )

    def cut(process, timeout):
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # until the trap is set
        raise fault

    monkeypatch.setattr(subprocess.Popen, "communicate", cut)
    with pytest.raises(fault):
        gpu_ranks.launched(["bash", "-c", launcher])
    assert none_alive(int((tmp_path / "pid").read_text())), "the rank outlives its launcher"


def test_ranks_that_fail_say_why():
    with pytest.raises(RuntimeError, match="ranks ended with 3: no port"):
        gpu_ranks.launched(["bash", "-c", "echo no port >&2; exit 3"])


@pytest.mark.parametrize(
    ("device", "variable", "value", "part"),
    [
        ("cpu", "CXX", "no-such-compiler -O2", "a compiler, no-such-compiler: there is none"),
        ("cpu", "PATH", "", "a compiler, g++ or clang++: there is none"),
        ("cuda", "PATH", "", "a compiler, gcc or clang: there is none"),
        ("cuda", "", "", "needs Triton, which is not installed"),
    ],
)
def test_a_missing_compiler_is_named_before_the_first_step(
    monkeypatch, device, variable, value, part
):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilation, "find_spec", lambda name: variable or None)
    if variable:
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="train.compile is on") as refused:
        compilation.compile_passes(torch.nn.Linear(1, 1), torch.device(device), "train.compile")
    assert part in str(refused.value)
    assert "train.compile=false" in str(refused.value)
