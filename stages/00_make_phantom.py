"""Make the phantom data set of the demo: a seeded procedural abdomen with injuries, as DICOM.

Reads   the config's `phantom` section and `seed`
Writes  <out>/data/phantom/ in the competition's layout: train_images/, test_images/, unlabelled/,
        train.csv, train_series_meta.csv, image_level_labels.csv, test_series_meta.csv,
        sample_submission.csv, phantom_truth.csv (labels of the test patients) and
        phantom_organs.csv (organs in view by slice), for evaluation only, manifest.json
Skipped when --data names a data set or the config has `phantom: null`.
"""

from pipeline.phantom.version import DRAWING
from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.stage import Stage
from pipeline.system.console import log, progress
from pipeline.system.files import atomic_folder


def run(stage: Stage) -> None:
    """Write the data set whole, under a temporary name first."""
    config = stage.config.phantom
    if stage.real_data or config is None:
        log(
            f"{stage.name}: skipped, "
            + (
                f"--data names {stage.options.data}"
                if stage.real_data
                else "the config has `phantom: null`"
            )
        )
        return
    if stage.current({"seed": stage.config.seed, **DRAWING}, ["phantom"]):
        return
    from pipeline.phantom.dataset import write_dataset

    with atomic_folder(stage.folder) as folder:
        counts, files = write_dataset(
            config,
            stage.config.seed,
            folder,
            stage.jobs,
            lambda items, n: progress(items, n, stage.name, "patients"),
        )
    log(
        f"{stage.name}: {counts['patients']} patients, {counts['series']} series,"
        f" {counts['slices']} slices"
    )
    stage.finish(counts, files)


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.PHANTOM, __doc__, run))
