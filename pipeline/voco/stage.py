"""Stage 04: pretraining of the backbone."""

from pathlib import Path
from typing import Any

from ..run import layout
from ..run.stage import Stage, stage_function
from ..system.errors import InputError


def inputs(stage: Stage) -> dict[str, Any]:
    """Fingerprint of the volumes, of the folds where one is left out, and of the weights' file.

    Raises:
        InputError: volumes or folds are missing.
    """
    fold = stage.config.pretrain.exclude_fold
    left_out = fold is not None
    if left_out and stage.unlabelled_alone:
        raise InputError(
            "unlabelled images alone have no folds",
            f"pretrain.exclude_fold={fold}",
            "set it to null",
        )
    weights = [Path(stage.config.model.weights)] if stage.config.model.weights else []
    return stage.inputs(layout.VOLUMES, *([layout.FOLDS] if left_out else []), files=weights)


def excluded_patients(stage: Stage) -> frozenset[str]:
    """Patients of the fold `pretrain.exclude_fold`, none where no fold is left out.

    Raises:
        InputError: no folds, or none of that number.
    """
    fold = stage.config.pretrain.exclude_fold
    if fold is None:
        return frozenset()
    from ..folds import read_folds

    path = stage.upstream(layout.FOLDS) / layout.FOLD_TABLE
    table = read_folds(path)
    found = frozenset(table.filter(table["fold"] == fold)["patient_id"])
    if not found:
        raise InputError(
            f"no patient is in fold {fold}", str(path), "choose another pretrain.exclude_fold"
        )
    return found


def _check(stage: Stage) -> None:
    from ..learning.sizes import check_pretraining  # late: it imports torch

    check_pretraining(stage.config)
    excluded_patients(stage)


@stage_function(layout.VOCO)
def pretrain_voco2d(stage: Stage) -> None:
    """Train, then draw what was learnt."""
    known = {"seed": stage.config.seed, **inputs(stage)}
    if stage.current(known, ["model", "pretrain"], check=lambda: _check(stage)):
        return
    from ..learning.distributed import setup
    from .figures import draw_all
    from .pretrain import pretrain

    volumes, excluded = stage.upstream(layout.VOLUMES), excluded_patients(stage)
    world = setup(stage.device_name, stage.options.jobs)
    try:
        counts = pretrain(stage.config, volumes, stage.folder, world, stage.options.force, excluded)
        pictures: list[str] = []
        if world.main:
            pictures = draw_all(stage.config, volumes, stage.folder, world.device, excluded)
        stage.finish(counts, [layout.BACKBONE, *pictures])
    finally:
        world.close()
