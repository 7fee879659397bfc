"""The command line that all stage scripts share: flags, exit codes, one line for the user instead
of a traceback, clean stops.
"""

import argparse
import contextlib
import gc
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..system.console import say, show_log
from ..system.errors import Ended, InputError, TrainingStopped
from ..system.machine import DEVICES
from ..system.processes import end_with, parent_stage
from .stage import StageFunction

STOPS, AGAIN_S = (signal.SIGINT, signal.SIGTERM), 2.0
# torch and timm make a million objects that stay: with its 700 the collector is a tenth of a start
COLLECT_AFTER = 10_000
OVERRIDE = re.compile(r"[\w.]+=")  # no path has it, if not `./name=`


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The flags of every stage; `doc` says what it reads and writes."""
    flags = argparse.ArgumentParser(
        prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", default="demo", help="YAML file or preset name (default: demo)")
    flags.add_argument(
        "--data", help="data set in the competition's layout (default: the run's own phantom)"
    )
    flags.add_argument("--out", help="output folder (default: outputs/<config name>)")
    flags.add_argument(
        "--jobs", type=_jobs, default=0, help="processes (default, and 0: all cores)"
    )
    flags.add_argument("--device", choices=DEVICES, default="auto")
    flags.add_argument("--force", action="store_true", help="run even where up to date")
    flags.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override any config key, e.g. pretrain.steps=200",
    )
    return flags


def add_scheduler(flags: argparse.ArgumentParser) -> None:
    """The flag of the stages that can work on a cluster."""
    flags.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Dask scheduler to work on (default: processes on this machine)",
    )


def add_models(flags: argparse.ArgumentParser) -> None:
    """The flag of the stages that score, or submit, what several runs predict."""
    flags.add_argument(
        "--models",
        nargs="+",
        metavar="RUN",
        help="folders of the runs that predict, to blend where several; may be read-only"
        " (default: the output folder)",
    )


def add_fold(flags: argparse.ArgumentParser, required: bool = False) -> None:
    """The flag of what can train one of its folds alone."""
    flags.add_argument("--fold", type=int, required=required, help="train this fold only")


def _jobs(text: str) -> int:
    """The value of `--jobs`; 0 and less mean all cores, as for joblib."""
    return max(0, int(text))


def main(
    script: str,
    stage: StageFunction,
    doc: str | None,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> int:
    """Entry point of a stage script: parse its flags (those that `extend` adds go to the stage as
    arguments of its own) and run it. Exit code 0 done, 1 training went wrong, 2 the user's input is
    wrong, 130 or 143 stopped by Ctrl-C or SIGTERM, each with one line and no traceback.
    """
    flags = parser(Path(script).name, doc or "")
    if extend:
        extend(flags)
    options = flags.parse_intermixed_args()
    _part_overrides(options)
    gc.set_threshold(COLLECT_AFTER)
    show_log()
    with _stops() as received:
        try:
            _run_stage(stage, options)
        except BaseException as fault:  # after a signal: whatever a library made of it
            code = 130 if isinstance(fault, KeyboardInterrupt) else getattr(fault, "code", None)
            code = 128 + received[0] if received else code
            if code in (130, 143):
                for number in STOPS:
                    # a second Ctrl-C does not disturb the end
                    signal.signal(number, signal.SIG_IGN)
                again = (
                    "the same command again without --force"
                    if options.force
                    else "the same command again"
                )
                return _say(f"stopped: run {again} to go on", code)
            if isinstance(fault, Ended):
                return _say(str(fault), fault.code)
            if isinstance(fault, (InputError, TrainingStopped)):
                return _say(f"error: {fault}", 2 if isinstance(fault, InputError) else 1)
            raise
    return 0


def _part_overrides(options: argparse.Namespace) -> None:
    """Give `key=value` that follows a flag of several values to the overrides."""
    for name, values in vars(options).items():
        if isinstance(values, list) and values is not options.overrides:
            options.overrides += [one for one in values if OVERRIDE.match(one)]
            setattr(options, name, [one for one in values if not OVERRIDE.match(one)])


def _run_stage(stage: StageFunction, options: argparse.Namespace) -> None:
    # here: a Ctrl-C is answered in one line from the first moment on
    from .presets import load_config

    if part := parent_stage():
        end_with(part[0])
    given = vars(options) | {"command": repeating(options)}
    config = load_config(given.pop("config"), given.pop("overrides"))
    stage(config, **given)


def repeating(options: argparse.Namespace) -> str:
    """The flags of a command line that repeats this run."""
    given = (("--config", options.config), ("--data", options.data), ("--out", options.out))
    flags = [part for flag, value in given if value for part in (flag, value)]
    return shlex.join(flags + options.overrides)


def _say(line: str, code: int) -> int:
    if part := parent_stage():
        os.write(part[1], line.encode())
    else:
        say(line, sys.stderr)
    return code


def _ignore(fault: Any) -> None:
    """A hook that says nothing."""


@contextlib.contextmanager
def _stops() -> Iterator[list[int]]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM SystemExit(143); yields the list of those
    that came. An ignored one stays so.

    Where Python swallows the exception (in a destructor, in the import system), it is raised again,
    by an alarm.
    """
    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        """Note the signal and raise its exception, again and again until this process ends."""
        if signum != signal.SIGALRM:
            received.append(signum)
        sys.unraisablehook = threading.excepthook = _ignore  # what is being torn down has to say
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])

    before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGALRM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items() if not received else ():
            signal.signal(number, handler)
