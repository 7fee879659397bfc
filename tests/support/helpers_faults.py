"""Stage scripts under faults: started in a process group of their own, paused, signalled, killed,
and looked at afterwards.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from helpers_forks import Forked
from helpers_stages import ROOT, STAGES, content, environment, stage_here

from pipeline.run import layout

SHIM = Path(__file__).parents[1] / "tools" / "shim"
PATIENCE_S = 240  # for what takes seconds on an idle machine
# files that hold times
CHANGING = ("manifest.json", "log.jsonl", ".lock", ".ckpt", "tfevents", "index.html")
FOLDERS = {
    "00": layout.PHANTOM,
    "01": layout.SLICES,
    "02": layout.VOLUMES,
    "03": layout.FOLDS,
    "04": layout.VOCO,
    "05": layout.ORGANS,
    "06": layout.CLASSIFIERS,
    "07": layout.SCORES,
    "08": layout.SUBMISSION,
    "09": layout.REPORT,
}


def start(
    name: str,
    out: Path,
    *arguments: str,
    fault: str = "",
    stage: str = "",
    ignore_interrupt: bool = False,
) -> subprocess.Popen | Forked:
    """A stage script by its number, or `run_all`, of the smoke preset in a new process group, with
    a fault of the shim.
    """
    more = (
        {"VOCO_FAULT": fault, "VOCO_STAGE": stage, "PYTHONPATH": f"{SHIM}{os.pathsep}{ROOT}"}
        if fault
        else {}
    )
    variables = environment(PYTHONDONTWRITEBYTECODE="1", **more)
    command = ["--config", "smoke", "--out", str(out), "--jobs", "2", *arguments]
    if name != "run_all":
        script = next(path for path in STAGES if path.name.startswith(name))
        shim = SHIM / "sitecustomize.py"
        return Forked(script, command, variables, [shim], ignore_interrupt)
    # whatever started the tests may ignore Ctrl-C
    handler = signal.SIG_IGN if ignore_interrupt else signal.SIG_DFL
    return subprocess.Popen(
        [str(ROOT / "run_all.sh"), *command],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )


def end(process: subprocess.Popen | Forked) -> tuple[int, str]:
    """Exit code and standard error of a process that is about to end; its group is killed where it
    does not.
    """
    try:
        _, text = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


def run(name: str, out: Path, *arguments: str, **how: str) -> tuple[int, str]:
    """Start a stage script and wait for its end."""
    return end(start(name, out, *arguments, **how))


def torchrun(*arguments: str, variables: Mapping[str, str]) -> tuple[int, str]:
    """What `run` gives, of `torchrun` with two ranks; these are new interpreters."""
    launcher = Path(importlib.util.find_spec("torch.distributed.run").origin)
    return end(Forked(launcher, ["--nproc-per-node=2", *arguments], variables))


def run_here(name: str, out: Path, *arguments: str) -> tuple[int, str]:
    """What `run` gives, of the stage script run in this process."""
    done = stage_here(name, "--config", "smoke", "--out", str(out), *arguments)
    return done.returncode, done.stderr


def wait_for(path: Path, process: subprocess.Popen | Forked) -> str:
    """The text of a file that a process is about to write; AssertionError where it ends without."""
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and path.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            raise AssertionError(
                f"{path.name} did not appear: {process.communicate(timeout=PATIENCE_S)[1][-3000:]}"
            )
        time.sleep(0.02)
    return path.read_text()


def go_on(mark: Path) -> None:
    """Let the process that the shim's `pause` holds at `mark` go on."""
    mark.with_name(f"{mark.name}.over").touch()


def alive(group: int) -> list[int]:
    """Processes of a process group, those that have ended but not been waited for left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def none_alive(group: int) -> bool:
    """True when the whole process group has ended, within a while."""
    deadline = time.monotonic() + 30
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(group)


def stop_two_folds(process: Forked, folder: Path, number: int) -> None:
    """Stop a stage that trains folds 0 and 1 side by side into `folder` once both have a log; they
    end with it, with a checkpoint where there is time for one.
    """
    for fold in "01":
        wait_for(folder / f"fold{fold}" / "log.jsonl", process)
    # a terminal sends Ctrl-C to all
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    if not (gone := none_alive(process.pid)):
        os.killpg(process.pid, signal.SIGKILL)
    code, text = end(process)
    assert gone, "the folds trained on alone"
    assert code == (-number if number == signal.SIGKILL else 128 + number), text
    if number != signal.SIGKILL:
        assert plain_lines(text) == ["stopped: run the same command again to go on"]
        for fold in "01":
            assert (folder / f"fold{fold}" / "last.ckpt").exists()
        assert text.count("checkpoint written") == 2


def temporaries(out: Path) -> list[Path]:
    """Temporary files below a folder."""
    return [path for path in out.rglob("*") if ".tmp-" in path.name or path.name.endswith(".part")]


def products(out: Path) -> dict[str, str]:
    """Checksums of the contents of all files below `out` that a run with the same seed repeats."""
    paths = [
        path
        for path in out.rglob("*")
        if path.is_file() and not any(part in path.name for part in CHANGING)
    ]
    return {str(path.relative_to(out)): hashlib.sha256(content(path)).hexdigest() for path in paths}


def copy(run_folder: Path, target: Path, *without: str) -> Path:
    """A copy of a finished run without some stage folders."""
    shutil.copytree(
        run_folder,
        target,
        ignore=lambda folder, names: [
            n for n in names if Path(folder) == run_folder and n in without
        ],
    )
    return target


def plain_lines(text: str) -> list[str]:
    """Lines of standard error that are no time-stamped log."""
    return [
        line
        for line in text.splitlines()
        if line.strip() and not line[:8].replace(":", "").isdigit()
    ]


def rewrite_folds(out: Path, change: Callable[[str], str]) -> None:
    """Another table in stage 03's folder, of which its manifest knows."""
    folder = out / layout.FOLDS
    path, manifest = folder / layout.FOLD_TABLE, folder / layout.MANIFEST
    path.write_text(change(path.read_text()))
    known = json.loads(manifest.read_text())
    known["outputs"][path.name]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(known))


def without_patient(out: Path, patient: str, instead: str = "") -> None:
    """Stage 03's table with other rows of a patient, or none."""

    def change(text: str) -> str:
        kept = [row for row in text.splitlines(True) if not row.startswith(f"{patient},")]
        return "".join(kept) + instead

    rewrite_folds(out, change)


def refused(code: int, text: str, *parts: str) -> None:
    """Exit code 2 and one line `error: ...` that has all `parts`."""
    lines = plain_lines(text)
    assert code == 2, text
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
