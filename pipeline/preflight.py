"""What a whole run needs and what is there, before its first stage: `run_all.sh` calls it.

`python -m pipeline.preflight [flags of the stages]`: tables, model, disk, memory and ImageNet
weights. Exit code 2 and one line where something is wrong or too little. Nothing is written.
"""

from .run import layout, room
from .run.command import parser
from .run.config import Config
from .run.manifest import read_manifest
from .run.presets import load_config
from .run.stage import Options, Stage
from .system.console import command_line, show_log
from .system.errors import InputError


def check(stage: Stage) -> None:
    """Look ahead from stage 01 to the end of pretraining; what is finished needs nothing.

    Raises:
        InputError: no data, a table that a later stage would refuse, too few patients for the
            folds, no images for the pretraining, no such model or one that does not take the
            images' sizes, weights out of reach, no organ masks where training needs organs, too
            little disk or memory.
    """
    config = stage.config
    if all(read_manifest(stage.out / name) for name in (layout.VOLUMES, layout.VOCO)):
        return
    if stage.real_data or not config.phantom:
        _check_data(stage)
    if config.train.needs_organs and not stage.unlabelled_alone:
        _require_masks(stage)
    disk = _images(stage) if stage.real_data else 0
    memory = max(room.convert_memory(stage.jobs), room.volume_memory(config.volume, stage.jobs))
    organs = config.organs.init if config.organs.enabled else ""
    if "imagenet" in (config.pretrain.init, organs, config.train.init):
        from .learning.backbone import check_weights

        check_weights(config.model.backbone, config.model.weights)
    if stage.real_data:
        from .learning.sizes import check_pretraining, check_training

        check_pretraining(config)
        check_training(config)
        if read_manifest(stage.out / layout.VOCO) is None:
            disk += _checkpoints(config)
    room.require(stage.out, "this run", disk, memory)


def _check_data(stage: Stage) -> None:
    """What stages 03, 04, 06 and 08 read of a data folder, hours after stage 01 has begun."""
    from .competition.tables import (
        has_test,
        read_sample_submission,
        read_series,
        require_slice_labels,
    )
    from .folds import check_folds

    options, data = stage.config, stage.data
    if not options.pretrain.labelled and not (data / "unlabelled").is_dir():
        raise InputError(
            "no images to pretrain on: pretrain.labelled=false leaves unlabelled/ alone",
            str(data / "unlabelled"),
            "add the folder or set pretrain.labelled=true",
        )
    if stage.unlabelled_alone:
        return
    check_folds(stage)
    if options.train.needs_slice_labels:
        require_slice_labels(data)
    if has_test(data):
        read_sample_submission(data)
        read_series(data, "test")


def _require_masks(stage: Stage) -> None:
    """Check that stage 05 will have masks to learn from: else stage 06 would end for want of it."""
    from .organs.files import FOLDER
    from .organs.stage import known_masks

    options = stage.config.phantom
    if known_masks(stage) if stage.real_data else not options or options.masks:
        return
    raise InputError(
        "train.regions=organs, train.visible_loss and train.dice_loss need organ masks: there are"
        " none",
        str(stage.data / FOLDER) if stage.real_data else "phantom.masks=0",
        "give some, or set train.regions=whole train.visible_loss=0 train.dice_loss=0",
    )


def _images(stage: Stage) -> int:
    """Bytes of the slices and volumes that are still to be made."""
    from .slices.presence import refuse_absent
    from .slices.preview import sizes
    from .slices.sources import look_at
    from .slices.stage import tasks_of

    _, tasks = tasks_of(stage)
    found = look_at(tasks, stage.data)
    refuse_absent(tasks, found, stage.data)
    kept, folder = stage.config.convert.keep_png, stage.out / layout.VOLUMES
    pairs = zip(tasks, found, strict=True)
    to_keep = [pair for pair in pairs if kept and not (stage.folder / pair[0].name).is_dir()]
    slices = sizes(to_keep, stage.data, stage.config.convert)
    volumes = [folder / layout.volume_file(one.patient_id, one.series_id) for one in tasks]
    to_build = [path for path in volumes if not path.is_file()]
    return slices.png_bytes + room.volume_bytes(stage.config.volume, len(to_build))


def _checkpoints(config: Config) -> int:
    """Bytes of the checkpoints of the pretraining."""
    from .learning.backbone import feature_shape
    from .learning.sizes import crop_backbone

    options, backbone = config.pretrain, crop_backbone(config)
    C, h, w = feature_shape(backbone, options.crop)
    parameters = sum(one.numel() for one in backbone.parameters())
    parameters += options.width * (C * h * w + 2 * options.width)
    return room.checkpoint_bytes(parameters, options)


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = vars(parser("run_all.sh", __doc__ or "").parse_intermixed_args(arguments))
    show_log()
    try:
        config = load_config(given.pop("config"), given.pop("overrides"))
        check(Stage(layout.SLICES, config, Options(**given)))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
