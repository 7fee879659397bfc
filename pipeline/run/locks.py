"""Locks on stage folders, and who holds them."""

import fcntl
import os
import socket
from typing import TextIO

from ..system.console import log


def holders(handle: TextIO) -> str:
    """Who wrote into a lock file and may still hold it: of this machine's processes those that
    live.
    """
    handle.seek(0)
    here = f" on {socket.gethostname()}"
    lines = dict.fromkeys(handle.read().splitlines())
    return (
        " and ".join(line for line in lines if not line.endswith(here) or _lives(line))
        or "a process that has just ended"
    )


def _lives(line: str) -> bool:
    try:
        os.kill(int(line.split()[1]), 0)
    except (ValueError, IndexError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def try_lock(handle: TextIO, kind: int) -> bool:
    """True where this process now has the lock; also, with a warning, where the file system knows
    no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as fault:
        log(
            f"warning: {handle.name} cannot be locked ({fault.strerror}): see to it that no second"
            " run uses this folder"
        )
    return True
