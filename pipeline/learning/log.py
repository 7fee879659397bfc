"""The log of a training run: one JSON record a line."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..system.files import atomic_path, disk_errors


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines log; a half-written last line (a killed run) is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


@contextlib.contextmanager
def json_log(
    path: Path, keep: Callable[[dict[str, Any]], bool]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that appends one record a line; records of an earlier run stay where `keep`
    says so.

    A resumed run keeps what came before its checkpoint, so that its log is that of a run that never
    stopped.
    """
    records = [record for record in read_log(path) if keep(record)]
    with atomic_path(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    with disk_errors(path), open(path, "a", encoding="utf-8", buffering=1) as handle:
        yield lambda record: print(json.dumps(record), file=handle)
