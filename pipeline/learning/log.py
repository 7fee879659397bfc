"""The log of a training run, the same for every loop: JSON lines, TensorBoard, and what is added.

A logger is a class of about ten lines, see `Logger`; `LOGGERS.append(Mine)` adds it to every run.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..run import layout
from ..system.files import atomic_path, disk_errors

Record = Mapping[str, Any]
"""Figures of one step or epoch by name; a value may be a mapping of figures."""


class Logger(Protocol):
    """Where records go. It is made with the folder of the run, the records that a resumed run keeps
    (all later ones were never), and the name of the figure that counts: `step` or `epoch`.
    """

    def __init__(self, folder: Path, kept: Sequence[Record], axis: str) -> None: ...

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Nothing more comes."""


class JsonLines:
    """`log.jsonl`: one record a line. A resumed run keeps what came before its checkpoint, so that
    its log is that of a run that never stopped.
    """

    def __init__(self, folder: Path, kept: Sequence[Record], axis: str) -> None:
        path = folder / layout.LOG
        with atomic_path(path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        self.handle = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (see close)

    def write(self, record: Record) -> None:
        """Append one line."""
        self.handle.write(_line(record))

    def close(self) -> None:
        """Close the file."""
        self.handle.close()


class TensorBoard:
    """`tensorboard/`: every figure as a scalar, figures of figures as `terms/bowel`."""

    def __init__(self, folder: Path, kept: Sequence[Record], axis: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.axis = axis
        following = kept[-1][axis] + 1 if kept else 1
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=following)

    def write(self, record: Record) -> None:
        """Add each figure at the record's step or epoch."""
        for name, value in record.items():
            for part, figure in value.items() if isinstance(value, Mapping) else [("", value)]:
                tag = f"{name}/{part}" if part else name
                self.board.add_scalar(tag, figure, record[self.axis])

    def close(self) -> None:
        """Write what is buffered."""
        self.board.close()


LOGGERS: list[type[Logger]] = [JsonLines, TensorBoard]


@contextlib.contextmanager
def open_log(folder: Path, kept: Sequence[Record], axis: str) -> Iterator[Callable[[Record], None]]:
    """Yield a function that gives a record to every logger."""
    with disk_errors(folder / layout.LOG), contextlib.ExitStack() as closing:
        loggers = []
        for kind in LOGGERS:
            loggers.append(kind(folder, kept, axis))
            closing.callback(loggers[-1].close)

        def write(record: Record) -> None:
            for logger in loggers:
                logger.write(record)

        yield write


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines log; a half-written last line (a killed run) is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
