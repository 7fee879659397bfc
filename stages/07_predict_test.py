"""Stage 07: predict the test patients straight from DICOM and write the submission; skipped where
there are no test tables.

Reads   test_series_meta.csv, sample_submission.csv and test_images/ of the data folder,
        05_folds/fold<K>/model.safetensors and 06_oof/calibration.json below `--models` (default:
        <out>)
Writes  <out>/07_submission/submission.csv, fallbacks.csv (who got the prior, and why),
        manifest.json
"""

import argparse

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.stage import Stage
from pipeline.system.console import log

SECTIONS = ("convert", "volume", "score", "predict")


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flag that only this stage has."""
    flags.add_argument(
        "--models",
        help="folder that holds 05_folds and 06_oof, may be read-only (default: the output folder)",
    )


def run(stage: Stage) -> None:
    """Predict unless the submission is up to date."""
    from pipeline.competition.tables import has_test, read_sample_submission, read_series

    if not has_test(stage.data):
        log(
            f"{stage.name}: skipped, {stage.data} has no test_series_meta.csv and"
            " sample_submission.csv"
        )
        return
    from pipeline.slices.sources import fingerprints, test_tasks

    data = stage.image_data
    tasks = test_tasks(data, read_series(data, "test"))
    inputs = stage.inputs(
        layout.CLASSIFIERS,
        layout.SCORES,
        files=[data / "sample_submission.csv", data / "test_series_meta.csv"],
    )
    from pipeline.evaluation.calibration import Calibration
    from pipeline.submission.writer import SubmissionWriter, check_submission, is_settled

    sample, path = read_sample_submission(data), stage.folder / layout.SUBMISSION_TABLE
    calibration = Calibration.of_run(stage.upstream(layout.SCORES), inputs[layout.CLASSIFIERS])
    writer = SubmissionWriter(sample, calibration.prior)
    if not path.exists():
        # everyone has the prior before anything can go wrong, the listing of all test files
        # included
        writer.write(path)
    if stage.current(
        inputs | {"series": fingerprints(tasks, data)}, SECTIONS, is_settled(stage.folder)
    ):
        return
    writer.write(path)
    from pipeline.submission.inference import load_ensemble, predict_test

    ensemble = load_ensemble(stage, calibration)
    counts = predict_test(
        tasks, data, writer, ensemble, stage.config, path, stage.jobs, stage.started
    )
    check_submission(path, sample)
    stage.finish(counts, outputs=[layout.SUBMISSION_TABLE, layout.FALLBACKS])
    log(f"submission: {path}")


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.SUBMISSION, __doc__, run, add_flags))
