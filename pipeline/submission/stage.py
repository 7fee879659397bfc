"""Stage 08: predictions of the test patients."""

from functools import cache
from typing import Any

from ..classifier.views import VIEWS, views
from ..run import layout
from ..run.manifest import finished, read_manifest
from ..run.runs import MODELS, names_of, runs_of
from ..run.stage import Stage, stage_function
from ..system.console import log

SECTIONS = ("convert", "volume", "score", "predict")


@stage_function(layout.SUBMISSION)
def predict_test(stage: Stage) -> None:
    """Predict unless the submission is up to date."""
    from ..competition.tables import has_test, read_sample_submission, read_series

    if not has_test(stage.data):
        log(
            f"{stage.name}: skipped, {stage.data} has no test_series_meta.csv and"
            " sample_submission.csv"
        )
        return
    from ..slices.presence import refuse_vanished_test
    from ..slices.sources import look_at, test_tasks

    data = stage.image_data
    listed = read_series(data, "test")
    if stage.limit:
        patients = sorted(set(listed["patient_id"]))[: stage.config.data.limit]
        listed = listed.filter(listed["patient_id"].is_in(patients))
        log(f"data.limit: {len(patients)} test patients are predicted, others keep the prior")
    tasks = test_tasks(data, listed)
    runs = runs_of(stage)
    models = {MODELS: list(runs)} if len(runs) > 1 else stage.inputs(layout.CLASSIFIERS)
    files = [data / "sample_submission.csv", data / "test_series_meta.csv"]
    inputs = models | stage.inputs(layout.SCORES, files=files)
    from ..evaluation.calibration import Calibration
    from .writer import SubmissionWriter, check_submission, is_settled

    sample, path = read_sample_submission(data), stage.folder / layout.SUBMISSION_TABLE
    scores, maker = stage.upstream(layout.SCORES), stage.maker(layout.SCORES)
    calibration = Calibration.of_runs(scores, list(runs), maker)
    writer = SubmissionWriter(sample, calibration.prior)
    if not path.exists():
        # everyone has the prior before anything can go wrong, the listing of all test files
        # included
        writer.write(path)
    found = look_at(tasks, data)
    counts = (read_manifest(stage.folder) or {}).get("counts", {})
    if not stage.options.force:
        refuse_vanished_test(tasks, found, counts.get("predicted", 0), data)
    series = [one.fingerprint for one in found]

    @cache
    def blend() -> Any:
        from .inference import load_blend  # late: it imports torch

        return load_blend(list(runs.values()), calibration)

    # what the models refuse leaves the last submission as it was
    if stage.current(inputs | {"series": series}, SECTIONS, is_settled(stage.folder), blend):
        return
    writer.write(path)
    from .inference import fill_submission

    own = views(stage.config).get(VIEWS, [])
    for name, run in zip(names_of(runs.values()), runs.values(), strict=True):
        fitted = finished(run.upstream(layout.CLASSIFIERS))["inputs"].get(VIEWS, [])
        if fitted != own:
            log(
                f"warning: the calibration was fitted to predictions of run {name} with the views"
                f" {fitted}, not {own} (predict.flips, predict.phases): run stages 06 and 07 with"
                " these (nothing is trained anew)"
            )
    counts = fill_submission(
        tasks, data, writer, blend(), stage.config, path, stage.jobs, stage.started
    )
    check_submission(path, sample)
    stage.finish(counts, outputs=[layout.SUBMISSION_TABLE, layout.FALLBACKS])
    log(f"submission: {path}")
