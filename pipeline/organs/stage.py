"""Stage 05: organs of every labelled series, by small segmenters trained out of fold."""

from pathlib import Path
from typing import Any

from ..run import layout
from ..run.manifest import digest
from ..run.stage import Stage, stage_function
from ..system.console import log
from ..system.errors import InputError

SECTIONS = ("seed", "model", "organs")
VERSION = 3  # raised when the same masks would become others on a volume's grid, or other boxes


def known_masks(stage: Stage, warn: bool = False) -> dict[str, Path]:
    """Mask files of the run's labelled series by series id; `warn` of others."""
    from .files import mask_files

    files = mask_files(stage.data)
    known = set(stage.series()["series_id"]) if files else set()
    strangers = sorted(files.keys() - known)
    if warn and strangers and not stage.limit:
        log(
            f"warning: {len(strangers)} masks are of no series in train_series_meta.csv and"
            f" ignored, e.g. {files[strangers[0]].name}"
        )
    return {series: path for series, path in files.items() if series in known}


def skips(stage: Stage, files: dict[str, Path]) -> bool:
    """True (and says so) where there is nothing to learn from, or it is not asked for."""
    if not stage.config.organs.enabled:
        log(f"{stage.name}: skipped, organs.enabled is false")
    elif not files:
        log(f"{stage.name}: skipped, {stage.data} has no masks of its series in segmentations/")
    return not stage.config.organs.enabled or not files


def mask_inputs(stage: Stage, files: dict[str, Path]) -> dict[str, Any]:
    """Fingerprint of the masks, by names, sizes and times, and of the volumes that they are laid
    on.
    """
    stats = [(path.name, path.stat()) for _, path in sorted(files.items())]
    prints = [[name, one.st_size, one.st_mtime_ns] for name, one in stats]
    return {**stage.inputs(layout.VOLUMES), "masks": digest(prints), "version": VERSION}


def organ_inputs(stage: Stage, files: dict[str, Path]) -> dict[str, Any]:
    """Fingerprint of everything that the segmenters of a run depend on beside the config."""
    config = stage.config
    upstream = [layout.FOLDS, *([layout.VOCO] if config.organs.init == "voco2d" else [])]
    own = config.model.weights if config.organs.init == "imagenet" else None
    weights = [Path(own)] if own else []
    return mask_inputs(stage, files) | stage.inputs(*upstream, files=weights)


@stage_function(layout.ORGANS, exclusive=False)
def train_segmenter(stage: Stage, fold: int) -> None:
    """Train the segmenter of one fold, in a process of a stage that has laid the masks."""
    from .work import train_one

    if stage.skips_unlabelled():
        return
    files = known_masks(stage) if stage.config.organs.enabled else {}
    if skips(stage, files):
        return
    train_one(stage, fold, files, organ_inputs(stage, files))


@stage_function(layout.ORGANS)
def segment_organs(stage: Stage) -> None:
    """Train a segmenter a fold, and find the organs of every labelled series by the one that has
    not seen its patient.
    """
    if stage.skips_unlabelled():
        return
    config = stage.config
    files = known_masks(stage, warn=True) if config.organs.enabled else {}
    if skips(stage, files):
        return
    if config.convert.flip_hfs:
        raise InputError(
            "masks cannot be turned by PatientPosition",
            "convert.flip_hfs=true",
            "set organs.enabled=false",
        )
    from ..folds import run_folds

    inputs = organ_inputs(stage, files)
    made = stage.current(inputs, SECTIONS, check=lambda: run_folds(stage, stage.labels()))
    if made or not stage.writer:  # one process has the folds trained
        return
    from .work import find_all

    find_all(stage, files, inputs)
