"""Stage 06: one classifier a fold."""

from pathlib import Path
from typing import Any

from ..learning.side_by_side import start_anew, train_side_by_side
from ..run import layout
from ..run.manifest import finished, read_manifest, stage_folder
from ..run.stage import Stage, stage_function
from ..system.console import log
from ..system.errors import InputError
from ..system.processes import parent_stage
from .views import MASKS, SECOND_LEVEL, second_level, uses_organs, views

SECTIONS = ("seed", "model", "train")
# another process may be at another fold, and write the manifest of all at the same time
PATIENCE_S = 10.0


def refuse_old_organs(stage: Stage) -> None:
    """Check that the organs that are asked for were found in the volumes and by the folds that are
    there: other folds' segmenters have seen the held-out patients.

    Raises:
        InputError: one of both was made anew since, or masks that are asked for are not there.
    """
    if not uses_organs(stage):
        return
    masks = stage_folder(stage.out, MASKS)
    if stage.config.train.dice_loss and read_manifest(masks) is None:
        raise InputError(
            "train.dice_loss learns from the organ masks that stage 05 lays on the volumes: there"
            " are none",
            str(masks),
            f"give masks in segmentations/ and run {layout.script(layout.ORGANS)}, or set"
            " train.dice_loss=0",
        )
    folder = stage.upstream(layout.ORGANS)
    known = stage.inputs(layout.VOLUMES, layout.FOLDS)
    if not known.items() <= finished(folder)["inputs"].items():
        raise InputError(
            "its organs are of other volumes or folds than those of this run",
            str(folder),
            f"run {layout.script(layout.ORGANS)} again",
        )


def training_inputs(stage: Stage, *upstream: str) -> dict[str, Any]:
    """What the classifiers of a run depend on beside the config's sections: volumes, folds, organs
    where they are asked for, `upstream`, and tables, by content.

    Raises:
        InputError: see `refuse_old_organs`.
    """
    config, data = stage.config, stage.data
    refuse_old_organs(stage)
    if uses_organs(stage):
        upstream = (*upstream, layout.ORGANS, *([MASKS] if config.train.dice_loss else []))
    files = [data / "train.csv", data / "image_level_labels.csv"]
    if config.model.weights and config.train.init == "imagenet":
        files.append(Path(config.model.weights))
    inputs = stage.inputs(layout.VOLUMES, layout.FOLDS, *upstream, files=files)
    if config.train.patience:
        inputs["aggregate"] = config.score.aggregate  # the score that chooses the epoch
    return inputs | views(config) | second_level(config)


@stage_function(layout.CLASSIFIERS, exclusive=False)
def train_folds(stage: Stage, fold: int | None = None) -> None:
    """Train the folds that are not up to date, or the one `fold`; of several processes the one that
    ends last writes the manifest of all.
    """
    if stage.skips_unlabelled():
        return
    config, folds = stage.config, range(stage.config.folds.count)
    if fold not in (None, *folds):
        raise InputError(
            f"there is no fold {fold!r}", f"--fold {fold}", f"choose one of {[*folds]}"
        )
    inputs = training_inputs(stage, *([layout.VOCO] if config.train.init == "voco2d" else []))
    # whatever the rank: any may be the first to change a fold and the last to end
    stage.writer = True
    with stage.lock(PATIENCE_S):
        manifests = [stage.folder / layout.fold_folder(k) / layout.MANIFEST for k in folds]
        known = all(path.is_file() for path in manifests)
        # a stale manifest goes before a fold changes
        stage.current(inputs, SECTIONS, known, lambda: _check_tables(stage))
    mine = stage.share(folds) if fold is None else [fold]
    _say_gates(stage, inputs)
    if stage.options.force and not parent_stage():
        start_anew(stage, mine, inputs, SECTIONS)
    if not train_side_by_side(stage, "pipeline.classifier", mine, inputs, SECTIONS):
        for number in mine:
            _train(stage, number, inputs)
    with stage.lock(PATIENCE_S):
        if read_manifest(stage.folder) is None and not parent_stage():
            from .fold import finish_folds

            finish_folds(stage, inputs, SECTIONS)


def _check_tables(stage: Stage) -> None:
    """Raises InputError where the folds are not of the labelled patients, or training would ask for
    slice labels in vain.
    """
    from ..folds import run_folds

    run_folds(stage, stage.labels())
    if stage.config.train.needs_slice_labels:
        from ..competition.tables import require_slice_labels

        require_slice_labels(stage.data)


def _say_gates(stage: Stage, inputs: dict[str, Any]) -> None:
    """Say once where the second level has no organs, though it is asked for."""
    gated = SECOND_LEVEL not in inputs or layout.ORGANS in inputs
    if not gated and not parent_stage() and stage.rank == 0:
        log(
            f"{stage.name}: the second level has no organs of {layout.ORGANS}: all planes count"
            " alike (gates of 1)"
        )


def _train(stage: Stage, fold: int, inputs: dict[str, Any]) -> None:
    part = stage.part(layout.fold_folder(fold))
    with part.lock():
        if part.current(inputs, SECTIONS):
            return
        with stage.lock(PATIENCE_S):
            # also one that another rank has written since
            stage.current(inputs, SECTIONS, whole=False)
        from .train import run_fold

        outputs = [layout.MODEL, layout.OOF, layout.LOG]
        if SECOND_LEVEL in inputs:
            outputs += [layout.SECOND_MODEL, layout.FIRST_OOF]
        part.finish(run_fold(part, fold), outputs)
