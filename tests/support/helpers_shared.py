"""Folders that several test processes share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(
    factory: pytest.TempPathFactory, worker: str, name: str, make: Callable[[Path], None]
) -> Path:
    """A folder called `name` that all test processes share: whichever needs it first calls `make`
    with its path, the others wait.
    """
    base = factory.getbasetemp() if worker == "master" else factory.getbasetemp().parent
    folder, done = base / name / name, base / name / "done"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder
