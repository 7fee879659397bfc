"""Is an output tree what its manifests say? Sizes and checksums of every file that a stage lists,
and the pixels of every slice.

`./run_all.sh --verify [--config FILE] [--out DIR]` or `python -m pipeline.run.verify`: prints one
line for each thing that differs. Exit code 0 whole, 1 something differs, 2 wrong input. Nothing is
changed; run the stages again to mend what is named.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..system.console import command_line, progress, say, show_log
from ..system.errors import InputError
from ..system.machine import cpu_count
from . import layout
from .command import parser
from .layout import MAKERS
from .manifest import ROOT, SCHEMA, digest, read_manifest
from .presets import load_config

SLICES_AT_ONCE = 4096  # slices whose answers are waited for at a time
PATTERNS = (
    "data/*/manifest.json",
    "[01]*/manifest.json",
    "[01]*/*/manifest.json",
    "[01]*/*/*/manifest.json",
)


def difference(path: Path, entry: dict[str, object]) -> str | None:
    """How a file differs from its manifest's entry; None where it is the same."""
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{path}: {size} bytes, not {entry['bytes']}"
        return None if digest(path) == entry["digest"] else f"{path}: same size, other contents"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as fault:
        return f"{path}: not readable ({fault.strerror})"


def slice_difference(path: Path, crc32: int) -> str | None:
    """How a PNG differs from the pixels that were converted; None where it is the same."""
    import cv2
    from isal import isal_zlib

    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.is_file() else None
    if image is None:
        return f"{path}: {'not readable' if path.exists() else 'missing'}"
    return None if isal_zlib.crc32(image) == crc32 else f"{path}: other pixels"


def _slices(folder: Path, threads: ThreadPoolExecutor) -> Iterator[str]:
    """One line for each PNG of the slice index that differs; a part at a time, since there may be
    millions.
    """
    from ..system.frames import read_frame

    index = read_frame(folder / layout.INDEX, ["png", "crc32"])

    def answers() -> Iterator[str | None]:
        for part in index.iter_slices(SLICES_AT_ONCE):
            yield from threads.map(
                slice_difference, [folder / png for png in part["png"]], part["crc32"]
            )

    yield from filter(None, progress(answers(), len(index), "slices", "slices"))


def _chain(out: Path, manifests: dict[str, dict[str, Any] | None]) -> Iterator[str]:
    """Stages that are not finished, and those made from something else than what now lies there."""
    yield from (
        f"{out / name}: unfinished"
        for name in MAKERS
        if (out / name).is_dir() and name not in manifests
    )
    for name, manifest in manifests.items():
        inputs = (manifest or {}).get("inputs", {})
        for source in MAKERS.keys() & inputs.keys():
            made = manifests.get(source)
            if made and digest(made["outputs"]) != inputs[source]:
                yield f"{out / name}: made from another {source} than this one"
            # it may have its --models elsewhere
            elif (
                source not in manifests
                and not (out / source).is_dir()
                and name != layout.SUBMISSION
            ):
                yield f"{out / source}: missing, {name} was made from it"


def differences(out: Path) -> Iterator[str]:
    """One line for each file below the output folder `out` that is missing or differs, and each
    manifest that is not usable.

    Raises:
        InputError: there is no manifest at all.
    """
    found = sorted({path for pattern in PATTERNS for path in out.glob(pattern)})
    if not found:
        raise InputError(
            "no stage has finished here", str(out), "give --out the output folder of a run"
        )
    manifests = {path.parent: read_manifest(path.parent) for path in found}
    yield from (
        f"{path}/manifest.json: damaged, or not of version {SCHEMA}"
        for path, manifest in manifests.items()
        if not manifest
    )
    yield from _chain(
        out,
        {
            layout.current(str(path.relative_to(out))): manifest
            for path, manifest in manifests.items()
        },
    )
    files = [
        (folder / name, entry)
        for folder, m in manifests.items()
        if m
        for name, entry in m["outputs"].items()
    ]
    with ThreadPoolExecutor(cpu_count()) as threads:
        answers = threads.map(difference, *zip(*files, strict=True)) if files else []
        wrong = {
            path: line
            for (path, _), line in zip(
                files, progress(answers, len(files), "files", "files"), strict=True
            )
            if line
        }
        yield from wrong.values()
        index = out / layout.SLICES / layout.INDEX
        if manifests.get(index.parent) and index not in wrong:
            yield from _slices(index.parent, threads)


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    flags = parser("run_all.sh", __doc__ or "")
    flags.add_argument("--verify", action="store_true", help="what this command does")
    options = flags.parse_intermixed_args(arguments)
    show_log()
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    config = load_config(options.config, options.overrides)
    out = Path(options.out).resolve() if options.out else ROOT / "outputs" / config.name
    wrong = 0
    for line in differences(out):
        wrong += 1
        say(line)
    say(
        f"{wrong} differences: remove those files and run the same run_all.sh command again"
        if wrong
        else f"{out}: whole"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
