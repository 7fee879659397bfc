"""The runs of `--models`, whose predictions are scored, or submitted."""

from collections import Counter
from collections.abc import Iterable

from ..system.errors import InputError
from . import layout
from .manifest import stage_folder
from .stage import Stage

MODELS = "models"  # name of the input, where there are several runs


def runs_of(stage: Stage) -> dict[str, Stage]:
    """The stage as it reads each run of `--models`, by the digest of the run's trained models and
    in the order of these, so that nothing depends on the order in which runs are named; itself
    where none is.

    Raises:
        InputError: a folder that is no run, one whose stage 06 is not finished, or two with the
        same models.
    """
    found: dict[str, Stage] = {}
    for path in stage.models or [stage.out]:
        if stage.models and not stage_folder(path, layout.CLASSIFIERS).is_dir():
            what = f"no {layout.CLASSIFIERS} in it" if path.is_dir() else "no such folder"
            remedy = f"give a run's folder, the one that holds {layout.CLASSIFIERS}"
            raise InputError(what, f"--models {path}", remedy)
        run = stage.reading_run(path)
        key = run.inputs(layout.CLASSIFIERS)[layout.CLASSIFIERS]
        if key in found:
            where = f"--models {found[key].models[0]} and {path}"
            raise InputError("two runs have the same models", where, "name every run once")
        found[key] = run
    return dict(sorted(found.items()))


def names_of(runs: Iterable[Stage]) -> list[str]:
    """A name for each run: its folder's, and where two have the same their whole paths."""
    paths = [run.models[0].resolve() for run in runs]
    times = Counter(path.name for path in paths)
    return [path.name if times[path.name] == 1 else str(path) for path in paths]
