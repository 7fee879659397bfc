"""Stage folders: manifests, fingerprints and locks."""

import contextlib
import fcntl
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..system.console import log, printable
from ..system.errors import InputError
from ..system.files import disk_errors, remove_temporaries, write_json
from ..system.machine import DEVICES, cpu_count, device_used, peak_mb, world_size
from . import layout
from .locks import holders, try_lock
from .manifest import (
    ROOT,
    SCHEMA,
    broken_outputs,
    digest,
    git_commit,
    read_manifest,
    stage_folder,
    versions,
)

if TYPE_CHECKING:
    import polars as pl

    from .config import Config

T = TypeVar("T")
ADOPT_S = 10.0  # how long another process may be at renaming folders of an older version


@dataclass(frozen=True)
class Options:
    """How a stage is run, apart from its config: the flags that all stage scripts share."""

    out: Path | str | None = None  # the run's folder (default: outputs/<config name>)
    data: Path | str | None = None  # a data set in the competition's layout (default: the phantom)
    jobs: int = 0  # processes, or threads where one process computes; 0: all cores
    device: str = "auto"  # auto, cpu or cuda
    force: bool = False  # run even where up to date
    models: Path | str | Sequence[Path | str] | None = None  # the runs that predict (default: out)
    command: str = ""  # flags of the command line that repeats the run, for the report

    def __post_init__(self) -> None:
        """What a notebook gives is checked as a command line's flags are."""
        if self.device not in DEVICES:
            choice = f"give one of {', '.join(DEVICES)}"
            raise InputError("no such device", f"device={self.device!r}", choice)
        if not isinstance(self.jobs, int):
            raise InputError("no whole number", f"jobs={self.jobs!r}", "give one, 0: all cores")


def as_paths(given: Path | str | Sequence[Path | str] | None) -> list[Path]:
    """The paths of an argument that takes none, one or several."""
    return [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given or ()]


def _in_utf8(folder: Path, flag: str) -> Path:
    """The folder itself; InputError where its name is not UTF-8, which polars, OpenCV and dicomsdl
    cannot open.
    """
    if (shown := printable(str(folder))) != str(folder):
        raise InputError("the path is not UTF-8", f"{flag} {shown}", "rename it or choose another")
    return folder


class Stage:
    """One run of one stage: resolved options, its folder under `--out`, and its manifest.

    A stage asks `current(...)` first, imports what is heavy only after that, works, and calls
    `finish(...)`.
    """

    def __init__(self, name: str, config: "Config", options: Options = Options()) -> None:  # noqa: B008
        self.name, self.config, self.options = name, config, options
        # folders of the runs whose predictions are scored, or submitted
        self.models = as_paths(options.models)
        self.out = Path(options.out).resolve() if options.out else ROOT / "outputs" / config.name
        self.folder = self.out / name
        _in_utf8(self.out, "--out")
        self.jobs = options.jobs or cpu_count()
        self.device_name = options.device
        self.rank = int(os.environ.get("RANK", 0))
        self.writer = self.rank == 0
        self.started = time.monotonic()
        self._state: dict[str, Any] = {}
        # names, and whether all of their files were looked at
        self._checked: set[tuple[str, bool]] = set()
        # the locks that keep other runs from changing what this one reads
        self.reading = contextlib.ExitStack()

    @property
    def fingerprint(self) -> str:
        """Of the inputs and config sections given to `current`, empty before."""
        return self._state.get("fingerprint", "")

    @property
    def real_data(self) -> bool:
        """True where `--data` names a data set, False where the run makes its own phantom."""
        return self.options.data is not None

    @property
    def data(self) -> Path:
        """The data folder in the competition's layout."""
        if not self.real_data:
            if not self.config.phantom:
                raise InputError(
                    "no data",
                    f"config '{self.config.name}' has no phantom",
                    "give --data /path/to/rsna",
                )
            return self.upstream(layout.PHANTOM, lambda file: "/" not in file)
        folder = Path(self.options.data or "").resolve()
        if not folder.is_dir():
            raise InputError(
                "no such data folder", str(folder), "give --data the folder that holds train.csv"
            )
        return _in_utf8(folder, "--data")

    @property
    def image_data(self) -> Path:
        """`data` for a stage that reads its images too: of the phantom none may be missing, real
        ones are listed series by series.
        """
        return (
            self.data
            if self.real_data or not self.config.phantom
            else self.upstream(layout.PHANTOM, lambda file: True)
        )

    @property
    def unlabelled_alone(self) -> bool:
        """True for a data set of `unlabelled/` and no labelled series: for pretraining."""
        labelled = ("train.csv", "train_series_meta.csv", "train_images")
        return (
            self.real_data
            and (self.data / "unlabelled").is_dir()
            and not any((self.data / name).exists() for name in labelled)
        )

    def skips_unlabelled(self) -> bool:
        """True (and says so) where a stage that needs labels has nothing to do."""
        if self.unlabelled_alone:
            log(
                f"{self.name}: skipped, {self.data} has unlabelled/ alone, no train.csv,"
                " train_series_meta.csv and train_images/"
            )
        return self.unlabelled_alone

    @property
    def limit(self) -> dict[str, int]:
        """`data.limit` where there is one: of a stage that reads the tables, part of its inputs."""
        return {"limit": self.config.data.limit} if self.config.data.limit else {}

    def labels(self) -> "pl.DataFrame":
        """`train.csv`, of the patients that `data.limit` leaves."""
        from ..competition import tables

        return self._limited(tables.read_labels(self.data))

    def series(self) -> "pl.DataFrame":
        """`train_series_meta.csv`, of the same patients."""
        from ..competition import tables

        return self._limited(tables.read_series(self.data, "train"))

    def _limited(self, frame: "pl.DataFrame") -> "pl.DataFrame":
        if not self.limit:
            return frame
        from ..competition import subset, tables

        labels, series = tables.read_labels(self.data), tables.read_series(self.data, "train")
        kept = subset.first_patients(labels, series, self.config.data.limit)
        return frame.filter(frame["patient_id"].is_in(list(kept)))

    def part(self, name: str) -> "Stage":
        """A sub-folder with a manifest of its own, written by whichever rank works on it, e.g. one
        fold.
        """
        part = Stage(f"{self.name}/{name}", self.config, self.options)
        part.writer, part._checked, part.reading = True, self._checked, self.reading
        return part

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of `items` that this rank of `torchrun` works on; all of them in a single
        process.
        """
        return items[self.rank :: world_size()]

    def reading_run(self, folder: Path) -> "Stage":
        """This stage as it reads the run in `folder`, until this one ends."""
        run = Stage(self.name, self.config, replace(self.options, models=folder))
        run.reading = self.reading
        return run

    def maker(self, name: str) -> str:
        """The script that makes the folder of an earlier stage, with the runs that it has to blend
        where this one reads several.
        """
        several = ["--models", *map(str, self.models), "--out", str(self.out)]
        return shlex.join([layout.script(name), *(several if len(self.models) > 1 else [])])

    def upstream(self, name: str, needed: Callable[[str], bool] = lambda file: True) -> Path:
        """Folder of an earlier stage, held until this one ends.

        Raises:
            InputError: naming the script that makes it, when it is not finished or one of its
            `needed` files is not whole.
        """
        elsewhere = self.models[0] if len(self.models) == 1 and name[:5] != "data/" else self.out
        folder = stage_folder(elsewhere, name)
        if (name, needed("/")) in self._checked:
            return folder
        if folder.is_relative_to(self.out):
            self.reading.enter_context(self._held(self._lock_file(name), fcntl.LOCK_SH))
        manifest, maker = read_manifest(folder), self.maker(name)
        if manifest is None:
            raise InputError(f"{name} is missing or unfinished", str(folder), f"run {maker} first")
        if broken := list(filter(needed, broken_outputs(folder, manifest))):
            raise InputError(
                f"a file of {name} is missing or has another size",
                str(folder / broken[0]),
                f"run {maker} again",
            )
        self._checked.add((name, needed("/")))
        return folder

    def inputs(self, *stages: str, files: Iterable[Path] = ()) -> dict[str, Any]:
        """Fingerprint of what this stage reads: outputs of earlier stages, and files by content
        (absent ones as None).
        """
        made = {
            name: digest((read_manifest(self.upstream(name)) or {})["outputs"]) for name in stages
        }
        return made | {path.name: digest(path) if path.is_file() else None for path in files}

    def fingerprint_of(self, inputs: dict[str, Any], sections: Iterable[str]) -> str:
        """Digest of all that this stage's result depends on."""
        # late: stage scripts answer a Ctrl-C in one line from the first moment on
        from .config import decisive

        config = {name: decisive(getattr(self.config, name)) for name in sections}
        stage, inputs = layout.former(self.name), {layout.former(k): v for k, v in inputs.items()}
        return digest({"schema": SCHEMA, "stage": stage, "config": config, "inputs": inputs})

    def fingerprint_without(self, *names: str) -> str:
        """`fingerprint` as if there were no inputs of these names."""
        if not self._state:
            return ""
        inputs = {key: value for key, value in self._state["inputs"].items() if key not in names}
        return self.fingerprint_of(inputs, self._state["config"])

    def made_from(self, inputs: dict[str, Any], sections: Iterable[str]) -> bool:
        """True when the folder is whole and was made from exactly these inputs and config
        sections.
        """
        return self._found(self.fingerprint_of(inputs, sections))[0]

    def stale(
        self, folds: Sequence[int], inputs: dict[str, Any], sections: Iterable[str]
    ) -> list[int]:
        """Those of `folds` whose folder is to be made, again or for the first time."""
        return [
            fold
            for fold in folds
            if self.options.force
            or not self.part(layout.fold_folder(fold)).made_from(inputs, sections)
        ]

    @property
    def whole(self) -> bool:
        """True when the folder is what `current` asked for, and all of it is there."""
        return self._found(self.fingerprint)[0]

    def _found(self, fingerprint: str) -> tuple[bool, list[str]]:
        """Whether the folder is whole and has this fingerprint; its outputs that are missing or
        have another size.
        """
        manifest = read_manifest(self.folder)
        broken = broken_outputs(self.folder, manifest) if manifest else []
        return (
            manifest is not None and not broken and manifest["fingerprint"] == fingerprint,
            broken,
        )

    def current(
        self,
        inputs: dict[str, Any],
        sections: Iterable[str],
        whole: bool = True,
        check: Callable[[], object] | None = None,
    ) -> bool:
        """True (and says so) when the folder was made from exactly these inputs and config sections
        and is whole.

        `whole` is what the caller knows of files that the manifest does not list. Otherwise the
        stage is about to run: the old manifest, outputs of a wrong size and what a killed run left
        go, so that nothing looks finished until `finish`. Before they do, `check` is called: what
        it refuses by an InputError leaves the folder as it was.
        """
        tree = self.config.model_dump(mode="json")
        self._state = {
            "config": {name: tree[name] for name in sections},
            "inputs": inputs,
            "fingerprint": (fingerprint := self.fingerprint_of(inputs, sections)),
        }
        made, broken = self._found(fingerprint)
        if broken:
            log(f"{self.name}: {broken[0]} is missing or has another size, made again")
        if made and whole and not self.options.force:
            log(f"{self.name}: up to date")
            return True
        if self.writer:
            if check:
                check()
            for name in (layout.MANIFEST, *broken):
                (self.folder / name).unlink(missing_ok=True)
            remove_temporaries(self.folder)
            remove_temporaries(self.folder.parent, of=self.folder.name)
        return False

    def finish(self, counts: dict[str, Any], outputs: Iterable[str] | Mapping[str, str]) -> None:
        """Write the manifest, the last act of a stage: `outputs` are the files (relative) that
        later stages depend on.

        A mapping gives the digests of those that need not be read again.
        """
        if not self.writer:
            return
        known = outputs if isinstance(outputs, Mapping) else {}
        files = {
            name: {
                "bytes": (path := self.folder / name).stat().st_size,
                "digest": known.get(name) or digest(path),
            }
            for name in outputs
        }
        seconds = round(time.monotonic() - self.started, 2)
        manifest = {
            "schema": SCHEMA,
            "stage": self.name,
            **self._state,
            "outputs": files,
            "counts": counts,
            "seconds": seconds,
            "peak_mb": peak_mb(),
            "device": device_used(),
            "jobs": self.jobs,
            "versions": versions(),
            "git": git_commit(),
        }
        write_json(self.folder / layout.MANIFEST, manifest)
        log(f"{self.name}: done in {seconds:.1f} s")

    def lock(self, patience_s: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Hold the stage's folder for this process; InputError naming the holder when another run
        makes or reads it for `patience_s`.
        """
        return (
            self._held(self._lock_file(self.name), fcntl.LOCK_EX, patience_s)
            if self.writer
            else contextlib.nullcontext()
        )

    def adopt_former(self) -> None:
        """Give folders of this run that bear former names their present ones, and say so; where
        nothing can be written they are read by the former ones.
        """
        moved = []
        for name, before in layout.FORMER.items():
            old, new = self.out / before, self.out / name
            if not old.is_dir() or new.exists() or not os.access(self.out, os.W_OK):
                continue
            with self._held(self._lock_file(before), fcntl.LOCK_EX, ADOPT_S):
                if old.is_dir() and not new.exists():  # another process may have been faster
                    old.rename(new)
                    moved.append(f"{before} is now {name}")
        if moved:
            log(f"{self.out} is of an older version: {', '.join(moved)}")

    def _lock_file(self, name: str) -> Path:
        return self.out / f".lock-{name.replace('/', '-')}"

    @contextlib.contextmanager
    def _held(self, path: Path, kind: int, patience_s: float = 0.0) -> Iterator[None]:
        with disk_errors(path):
            self.out.mkdir(parents=True, exist_ok=True)
            handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held open: closing gives the lock up)
        with handle:
            deadline = time.monotonic() + patience_s
            while not try_lock(handle, kind):
                if time.monotonic() > deadline:
                    what, where = (
                        f"another run holds {path.name.removeprefix('.lock-')}",
                        f"{path}: {holders(handle)}",
                    )
                    raise InputError(what, where, "wait for it or choose another --out")
                time.sleep(0.1)
            if kind == fcntl.LOCK_EX:
                handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
            yield


class StageFunction:
    """A stage as a function with plain arguments, for scripts and notebooks alike."""

    def __init__(self, folder: str, run: Callable[..., None], exclusive: bool) -> None:
        self.folder, self.run, self.exclusive = folder, run, exclusive
        self.__doc__, self.__name__ = run.__doc__, run.__name__

    def __call__(
        self,
        config: "Config | Path | str" = "demo",
        *,
        out: Path | str | None = None,
        data: Path | str | None = None,
        jobs: int = 0,
        device: str = "auto",
        force: bool = False,
        models: Path | str | Sequence[Path | str] | None = None,
        command: str = "",
        **own: Any,
    ) -> Path:
        """Run the stage unless it is up to date and return its folder.

        `config` is a preset's name, a YAML file or a config; `own` are the arguments that only this
        stage has. The other arguments are those of `Options`.

        Raises:
            InputError: the user's input is wrong.
            TrainingStopped: training went wrong; the last good checkpoint is kept.
        """
        # late: stage scripts answer a Ctrl-C in one line from the first moment on
        from .config import Config
        from .presets import load_config

        if not isinstance(config, Config | Path | str):
            what = f"a {type(config).__name__} is no config"
            remedy = "give a preset's name, a YAML file or what load_config returns"
            raise InputError(what, f"config={config!r}", remedy)
        checked = config if isinstance(config, Config) else load_config(config)
        options = Options(out, data, jobs, device, force, models, command)
        stage = Stage(self.folder, checked, options)
        stage.adopt_former()
        lock = stage.lock() if self.exclusive else contextlib.nullcontext()
        with disk_errors(stage.folder), stage.reading, lock:
            self.run(stage, **own)
        return stage.folder


def stage_function(
    folder: str, exclusive: bool = True
) -> Callable[[Callable[..., None]], StageFunction]:
    """Decorator of a function that takes a `Stage` and arguments of its own: the stage of `folder`,
    callable with plain arguments. One that is not `exclusive` locks what it writes by itself.
    """
    return lambda run: StageFunction(folder, run, exclusive)
