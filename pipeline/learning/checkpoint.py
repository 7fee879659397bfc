"""Training state on disk: atomic, tensors and plain values only, the last k kept, damaged files
noticed.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..run.config import Section, resolved
from ..system.console import log
from ..system.errors import InputError
from ..system.files import atomic_path, disk_errors
from .weights import load_weights, read_metadata, save_weights

__all__ = [
    "describe",
    "described",
    "load_checkpoint",
    "load_weights",
    "newest_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "save_weights",
]


Kept = TypeVar("Kept", bound=Section)


def describe(kind: str, config: Section, kept: type[Section]) -> dict[str, str]:
    """Metadata of a weights file: the sections of a config that `kept` has as fields, from which
    `described` makes them again.
    """
    sections = {name: getattr(config, name) for name in kept.model_fields}
    return {"kind": kind} | {name: json.dumps(resolved(one)) for name, one in sections.items()}


def described(path: Path, kept: type[Kept], what: str, maker: str) -> Kept:
    """The config sections in a file's metadata; InputError where it is not `what` the script
    `maker` writes.
    """
    metadata = read_metadata(path)
    try:
        return kept(**{name: json.loads(metadata[name]) for name in kept.model_fields})
    except (KeyError, ValueError) as fault:
        raise InputError(f"not a {what}", str(path), f"run {maker}") from fault


def save_checkpoint(path: Path | str, state: dict[str, Any], keep: int = 1) -> None:
    """Write tensors and plain values atomically; the `keep - 1` states before it stay as
    `<stem>.1.ckpt` (newest), `.2.ckpt`, ...
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
        for age in range(keep - 1, 0, -1):
            older, newer = earlier(path, age), earlier(path, age - 1)
            if newer.exists():
                newer.replace(older)
    with disk_errors(path):
        for age in range(keep, keep + 100):
            if not earlier(path, age).exists():
                break
            earlier(path, age).unlink()


def earlier(path: Path, age: int) -> Path:
    """Where the checkpoint `age` saves before the newest lies; age 0 is `path` itself."""
    return path if age == 0 else path.with_name(f"{path.stem}.{age}{path.suffix}")


def load_checkpoint(path: Path | str) -> dict[str, Any] | None:
    """The state saved at `path` on the CPU; None where there is none or where the file is damaged
    (which the log says).
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as fault:
        raise InputError("checkpoint not readable", str(path), "mend its permissions") from fault
    except Exception as fault:  # torch raises many kinds for a damaged archive
        log(f"{path} is damaged and not used ({type(fault).__name__})")
        return None
    return state if isinstance(state, dict) else None


def newest_checkpoint(path: Path | str, keep: int) -> dict[str, Any] | None:
    """The newest readable state among `path` and its earlier ones, so that a damaged file costs one
    interval and no run.
    """
    for age in range(keep + 1):
        if (state := load_checkpoint(earlier(Path(path), age))) is not None:
            return state
    return None
