"""Work for processes of a pool, which import it by name: from here, because another package that is
installed may be called `tests` too.
"""

import os
import signal
from pathlib import Path

from pipeline.run.config import ConvertConfig
from pipeline.slices.sources import SeriesTask
from pipeline.slices.store import convert_series


def square_or_die(task: tuple[str, int]) -> int:
    """A task that kills its process: once, where `task` names a file that is not there yet, or
    always.
    """
    mark, number = task
    if mark == "always" or (mark and not Path(mark).exists()):
        if mark != "always":
            Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def convert_or_die(
    task: SeriesTask, data: Path, target: Path, config: ConvertConfig
) -> dict[str, object]:
    """Convert a series; the first worker to meet series 2 is killed."""
    mark = target.with_suffix(".mark")
    if task.series_id == "2" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return convert_series(task, data, target, config)


def blocks_interrupts(_: int) -> bool:
    """Whether this process lets Ctrl-C wait."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
