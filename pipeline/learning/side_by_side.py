"""Folds side by side: a module once more for each of them, in processes that end with the stage.

On a CPU a small model gains next to nothing from a second thread, and loses much when anything else
wants the core; two models that train side by side, one thread each, lose nothing. Nor do three that
share two cores, where the third would have one of them alone otherwise.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run import layout
from ..run.config import resolved
from ..run.manifest import ROOT
from ..run.stage import Stage
from ..system.errors import Ended
from ..system.machine import pick_device
from ..system.processes import interrupts_blocked, part_environment
from .interrupt import StopSignal

LOOK_S, MOST_BYTES = 0.05, 1 << 16


@dataclass(frozen=True)
class Part:
    """A process that works on one part, and the pipe through which its last line comes."""

    name: str
    process: subprocess.Popen
    pipe: int

    def last_line(self) -> str:
        """What it had to say at its end; call once, after the end."""
        try:
            # a process of its own may still hold the pipe
            with contextlib.suppress(BlockingIOError):
                return os.read(self.pipe, MOST_BYTES).decode()
            return ""
        finally:
            os.close(self.pipe)


def start_anew(
    stage: Stage, folds: Sequence[int], inputs: dict[str, Any], sections: Sequence[str]
) -> None:
    """Take manifest and checkpoint from all `folds` at once: one that a stopped `--force` did not
    come to must not look finished.
    """
    for part in (stage.part(layout.fold_folder(fold)) for fold in folds):
        with part.lock():
            part.current(inputs, sections, whole=False)
            (part.folder / layout.LAST).unlink(missing_ok=True)


def train_side_by_side(
    stage: Stage, module: str, mine: Sequence[int], inputs: dict[str, Any], sections: Sequence[str]
) -> bool:
    """Train those of the folds `mine` that are stale side by side by `python -m module --fold` and
    return True; False, and nothing done, where that brings nothing.

    That is on a GPU, with one job or one fold, and under torchrun.
    """
    folds = stage.stale(mine, inputs, sections)
    at_once = folds_at_once(stage.config.folds.count, stage.jobs)
    if (
        not folds
        or min(at_once, len(mine)) < 2  # one that is left gets as many threads as it had
        or "WORLD_SIZE" in os.environ
        # torch, which takes seconds to import, is asked only where it matters
        or (stage.device_name != "cpu" and pick_device(stage.device_name).type != "cpu")
    ):
        return False
    options, cores = stage.options, str(max(1, stage.jobs // at_once))
    flags = ["--out", str(stage.out), "--device", options.device]
    flags += ["--data", str(options.data)] if stage.real_data else []
    flags += ["--force"] if options.force else []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as settings:  # JSON is YAML
        json.dump(resolved(stage.config), settings)
        settings.flush()
        flags += ["--config", settings.name]
        parts = {f"fold {k}": [*flags, "--fold", str(k), "--jobs", cores] for k in folds}
        run_side_by_side(module, parts, at_once)
    return True


def folds_at_once(folds: int, jobs: int) -> int:
    """How many of `folds` train at once on `jobs` cores: they are dealt out evenly to as many
    rounds as fill the cores, so that up to twice as many share them and none is left idle.
    """
    return 1 if jobs == 1 else math.ceil(folds / max(1, folds // jobs))


def run_side_by_side(module: str, parts: Mapping[str, Sequence[str]], at_once: int) -> None:
    """Run `module` with the arguments of each part, `at_once` processes at a time.

    A stop of this process is handed on, and waits for the checkpoints; a part that fails stops the
    others.

    Raises:
        Ended: a part failed: its line and exit code. KeyboardInterrupt, SystemExit: this process
        was stopped.
    """
    waiting = list(parts.items())
    running: list[Part] = []
    with StopSignal() as stop:
        try:
            while (waiting or running) and not stop.signum:
                while waiting and len(running) < at_once:
                    running.append(_start(module, *waiting.pop(0)))
                time.sleep(LOOK_S)
                ended = [part for part in running if part.process.poll() is not None]
                running = [part for part in running if part not in ended]
                _refuse(ended)
        finally:
            _end(running)
        if stop.signum:
            stop.leave()


def _refuse(ended: Sequence[Part]) -> None:
    """Raise the first failure among parts that have ended."""
    lines = {part: part.last_line() for part in ended}
    for part, line in lines.items():
        if code := part.process.returncode:
            raise Ended(
                line or f"error: {part.name} {_fate(code)}, run the same command again",
                max(1, code),
            )


def _fate(code: int) -> str:
    """What became of a process, from `Popen.returncode`; the kernel kills with SIGKILL whoever has
    too much memory.
    """
    if code > 0:
        return f"ended with exit code {code}"
    return (
        "was brought down by"
        f" {signal.Signals(-code).name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"
    )


def _end(running: Sequence[Part]) -> None:
    """Stop what still runs and wait for its checkpoints; a second signal does not wait."""
    try:
        for part in running:
            part.process.terminate()
        for part in running:
            part.process.wait()
    finally:
        for part in running:
            part.process.kill()
            part.process.wait()
            os.close(part.pipe)


def _start(module: str, name: str, arguments: Sequence[str]) -> Part:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, "-m", module, *arguments]
    # the package may be importable here for another reason than an installation
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = part_environment(writer) | {"PYTHONPATH": path}
    with interrupts_blocked():
        process = subprocess.Popen(command, env=environment, pass_fds=[writer])
    os.close(writer)
    return Part(name, process, reader)
