"""Work for processes of a pool, which import it by name: from here, because another package that is
installed may be called `tests` too.
"""

import os
import signal
from pathlib import Path


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
