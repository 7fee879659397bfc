"""Stage folders: manifests, fingerprints, locks and the command line that all stage scripts share."""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .config import Config, load_config, resolved
from .runtime import InputError, cpu_count, disk_errors, log, write_json

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
MAKERS = {
    "data/phantom": "00_make_phantom",
    "01_slices": "01_convert_dicom",
    "02_volumes": "02_build_volumes",
    "03_folds": "03_make_folds",
    "04_voco2d": "04_pretrain_voco2d",
    "05_folds": "05_train_folds",
    "06_oof": "06_score_oof",
    "07_submission": "07_predict_test",
    "08_report": "08_report",
}
PACKAGES = ("torch", "timm", "numpy", "polars", "dicomsdl", "pydicom", "opencv-python-headless", "albumentations", "scikit-learn")


def digest(value: Any) -> str:
    """Hex digest of a JSON value, or of a file's bytes when given a Path."""
    state = hashlib.blake2b(digest_size=16)
    if isinstance(value, Path):
        with open(value, "rb") as handle:
            while block := handle.read(1 << 20):
                state.update(block)
    else:
        state.update(json.dumps(value, sort_keys=True).encode())
    return state.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage folder, or None where the stage did not finish or wrote another schema."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        log(f"{path} is damaged: the stage runs again")
        return None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        log(f"{path} was written by another version: the stage runs again")
        return None
    return manifest


class Stage:
    """One run of one stage: resolved options, its folder under `--out`, and its manifest.

    A stage script asks `current(...)` first, imports what is heavy only after that, works, and calls `finish(...)`.
    """

    def __init__(self, name: str, config: Config, options: argparse.Namespace) -> None:
        self.name, self.config, self.options = name, config, options
        self.out = Path(options.out).resolve() if options.out else ROOT / "outputs" / config.name
        self.folder = self.out / name
        self.jobs: int = options.jobs or cpu_count()
        self.device_name: str = options.device
        self.rank = int(os.environ.get("RANK", 0))
        self.writer = self.rank == 0
        self.started = time.monotonic()
        self._state: dict[str, Any] = {}

    @property
    def real_data(self) -> bool:
        """True where `--data` names a data set, False where the run makes its own phantom."""
        return self.options.data is not None

    @property
    def data(self) -> Path:
        """The data folder in the competition's layout."""
        if self.real_data:
            folder, remedy = Path(self.options.data).resolve(), "give --data the folder that holds train.csv"
        elif self.config.phantom:
            folder, remedy = self.out / "data" / "phantom", "run stages/00_make_phantom.py first"
        else:
            raise InputError("no data", f"config '{self.config.name}' has no phantom", "give --data /path/to/rsna")
        if not folder.is_dir():
            raise InputError("no such data folder", str(folder), remedy)
        return folder

    def part(self, name: str) -> "Stage":
        """A sub-folder with a manifest of its own, written by whichever rank works on it, e.g. one fold."""
        part = Stage(f"{self.name}/{name}", self.config, self.options)
        part.writer = True
        return part

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of `items` that this rank of `torchrun` works on; all of them in a single process."""
        return items[self.rank :: int(os.environ.get("WORLD_SIZE", 1))]

    def upstream(self, name: str) -> Path:
        """Folder of an earlier stage; InputError naming the script that makes it when it is not finished."""
        folder = Path(getattr(self.options, "models", None) or self.out) / name
        if read_manifest(folder) is None:
            maker = MAKERS[name.split("/")[0] if not name.startswith("data/") else name]
            raise InputError(f"{name} is missing or unfinished", str(folder), f"run stages/{maker}.py first")
        return folder

    def inputs(self, *stages: str, files: Iterable[Path] = ()) -> dict[str, Any]:
        """Fingerprint of what this stage reads: outputs of earlier stages, and files by content (absent ones as None)."""
        found: dict[str, Any] = {name: digest((read_manifest(self.upstream(name)) or {})["outputs"]) for name in stages}
        for path in files:
            found[path.name] = digest(path) if path.is_file() else None
        return found

    def current(self, inputs: dict[str, Any], sections: Iterable[str]) -> bool:
        """True (and says so) when the folder was made from exactly these inputs and config sections and is whole."""
        tree = resolved(self.config)
        config = {name: tree[name] for name in sections}
        fingerprint = digest({"schema": SCHEMA, "stage": self.name, "config": config, "inputs": inputs})
        self._state = {"config": config, "inputs": inputs, "fingerprint": fingerprint}
        manifest = read_manifest(self.folder)
        if self.options.force or manifest is None or manifest["fingerprint"] != fingerprint:
            return False
        broken = [name for name, entry in manifest["outputs"].items() if not _same_size(self.folder / name, entry)]
        if broken:
            log(f"{self.name}: {broken[0]} is missing or has another size, made again")
            return False
        log(f"{self.name}: up to date")
        return True

    def finish(self, counts: dict[str, Any], outputs: Iterable[str]) -> None:
        """Write the manifest, the last act of a stage: `outputs` are the files (relative) that later stages depend on."""
        if not self.writer:
            return
        files = {name: {"bytes": (self.folder / name).stat().st_size, "digest": digest(self.folder / name)} for name in outputs}
        seconds = round(time.monotonic() - self.started, 2)
        manifest = {"schema": SCHEMA, "stage": self.name, **self._state, "outputs": files, "counts": counts,
                    "seconds": seconds, "versions": versions(), "git": git_commit(), "jobs": self.jobs}  # fmt: skip
        write_json(self.folder / "manifest.json", manifest)
        log(f"{self.name}: done in {seconds:.1f} s")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the stage's folder for this process; InputError naming the holder when another run has it."""
        if not self.writer:
            yield
            return
        path = self.out / f".lock-{self.name.replace('/', '-')}"
        with disk_errors(path):
            self.out.mkdir(parents=True, exist_ok=True)
            handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held open: closing gives the lock up)
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip()
                raise InputError(f"another run holds {self.name}", f"{path}: {holder}", "wait for it or choose another --out") from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            yield


def _same_size(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of the code, `None` outside a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The flags of every stage; `doc` says what it reads and writes."""
    flags = argparse.ArgumentParser(prog=f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", default="demo", help="YAML file or preset name (default: demo)")
    flags.add_argument("--data", help="data set in the competition's layout (default: the run's own phantom)")
    flags.add_argument("--out", help="output folder (default: outputs/<config name>)")
    flags.add_argument("--jobs", type=int, default=0, help="processes (default: all cores)")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument("--force", action="store_true", help="run even where up to date")
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="override any config key, e.g. pretrain.steps=200")
    return flags


def _terminate(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def main(script: str, folder: str, doc: str | None, run: Callable[[Stage], None],
         extend: Callable[[argparse.ArgumentParser], None] | None = None, exclusive: bool = True) -> int:  # fmt: skip
    """Entry point of a stage script: parse, lock (unless not `exclusive`), run; exit code 0 done, 2 the user's input is wrong,
    130 or 143 stopped by a signal."""
    flags = parser(Path(script).stem, doc or "")
    if extend:
        extend(flags)
    options = flags.parse_intermixed_args()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        stage = Stage(folder, load_config(options.config, options.overrides), options)
        with stage.lock() if exclusive else contextlib.nullcontext():
            run(stage)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0
