"""Files that are whole or not there: atomic writes, clear errors of the disk, what killed runs
left.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, TrainingStopped

TEMPORARY = ".tmp-"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the output is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EEXIST: "something else has this name",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENAMETOOLONG: "the path is too long",
}


PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(where: Path | str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear InputError naming `where`, else the
    file of the error.
    """
    try:
        yield
    except OSError as fault:
        if fault.errno not in _DISK_ERRORS:
            raise
        where = fault.filename or where
        remedy = (
            "mend its permissions" if fault.errno in (errno.EACCES, errno.EPERM) else "make room"
        )
        raise InputError(
            _DISK_ERRORS[fault.errno],
            str(where),
            f"{remedy} or choose another --out, then run again",
        ) from fault


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, else
    remove it.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
        try:
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except Exception as fault:
            if not isinstance(fault, (InputError, TrainingStopped)) and not getattr(
                fault, "errno", None
            ):
                _probe(temporary)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _probe(path: Path) -> None:
    """Raise the OSError of a disk that takes no more: writers in C and Rust (torch, polars) report
    a failed write without its number.
    """
    with open(path, "ab", buffering=0) as handle:
        handle.write(bytes(PROBE_BYTES))
        handle.write(bytes(PROBE_BYTES))  # the first may end short of the limit without an error


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path` whole, else it is
    removed.
    """
    path = Path(path)
    with disk_errors(path):
        temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            remove_folder(path)
            os.rename(temporary, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, under a temporary name: a run killed meanwhile leaves
    nothing that looks whole.
    """
    grave = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}-old")
    shutil.rmtree(grave, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, grave)
        shutil.rmtree(grave)


def keep_only(folder: Path, identity: str) -> None:
    """Remove what a folder holds of another `identity`, and say in it whose it is now."""
    mark = folder / "identity.txt"
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == identity):
        remove_folder(folder)
        write_text(mark, identity)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically (keys in the given order)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_temporaries(folder: Path, depth: int = 0, of: str = "") -> None:
    """Remove what killed runs left in `folder` (and `depth` folder levels below it) under temporary
    names, of the file `of` if given.
    """
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.startswith(f".{of}{TEMPORARY}" if of else ".") and TEMPORARY in entry.name:
            path = Path(entry.path)
            shutil.rmtree(path) if entry.is_dir(follow_symlinks=False) else path.unlink()
        elif depth and entry.is_dir(follow_symlinks=False):
            remove_temporaries(Path(entry.path), depth - 1)
