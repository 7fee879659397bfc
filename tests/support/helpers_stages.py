"""Calling the product as a user does: run_all.sh and single stage scripts, in processes of their
own, or in this one where the process is no matter.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted((ROOT / "stages").glob("[01]*.py"))
# of a run whose targets look at their organs
ORGAN_KEYS = ("train.regions=organs", "train.visible_loss=0.5", "train.slices=3")


def content(path: Path) -> bytes:
    """A file as far as runs repeat it: a PNG's pixels, since igzip was seen, twice in all, to pack
    a picture otherwise than before.
    """
    if path.suffix == ".png":
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        return repr((image.shape, image.dtype)).encode() + image.tobytes()
    if path.name == "series.json":
        # sizes of the PNGs
        return json.dumps({**json.loads(path.read_text()), "pictures": None}).encode()
    return path.read_bytes()


def environment(**more: str) -> dict[str, str]:
    """The environment of a user's shell, with this interpreter named and the project importable
    without installation.
    """
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **more}


def run_all(out: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`./run_all.sh` as a user calls it."""
    command = [
        str(ROOT / "run_all.sh"),
        "--config",
        "smoke",
        "--out",
        str(out),
        "--jobs",
        "2",
        *arguments,
    ]
    return subprocess.run(
        command,
        cwd=cwd or out.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )


def run_stage(name: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """One stage script by its number or name."""
    script = next(path for path in STAGES if path.name.startswith(name))
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600
    )


def stage_here(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """What `run_stage` gives, of the script run in this process, which has most imports behind it:
    a process that only imports torch and timm takes seconds.

    For tests to which the process, its signals, memory and threads are no matter. One job, where
    `arguments` do not say otherwise: no pool of processes is left behind.
    """
    script = str(next(path for path in STAGES if path.name.startswith(name)))
    command, code = [script, "--jobs", "1", *arguments], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
