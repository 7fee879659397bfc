"""Stage 08: one self-contained page about the run, for people: what ran, what it made of the data,
scores, errors, cost.

Reads   the manifests, logs, tables and pictures of all finished stages below <out>,
        image_level_labels.csv of the data folder
Writes  <out>/08_report/index.html, manifest.json
"""

import shlex

from pipeline.run import layout
from pipeline.run.command import main
from pipeline.run.manifest import digest
from pipeline.run.stage import Stage
from pipeline.system.console import log
from pipeline.system.errors import InputError
from pipeline.system.files import write_text

MANIFESTS = (
    f"{layout.PHANTOM}/{layout.MANIFEST}",
    f"0*/{layout.MANIFEST}",
    f"{layout.CLASSIFIERS}/fold*/{layout.MANIFEST}",
)


def flags_of(stage: Stage) -> str:
    """The command-line flags that repeat this run."""
    given = (
        ("--config", stage.options.config),
        ("--data", stage.options.data),
        ("--out", stage.options.out),
    )
    return shlex.join(
        [part for flag, value in given if value for part in (flag, value)] + stage.options.overrides
    )


def run(stage: Stage) -> None:
    """Write the page unless it shows these very results."""
    found = {
        str(path.relative_to(stage.out)): digest(path)
        for pattern in MANIFESTS
        for path in sorted(stage.out.glob(pattern))
    }
    found.pop(f"{layout.REPORT}/{layout.MANIFEST}", None)
    if not found:
        raise InputError(
            "nothing to report", str(stage.out), "run ./run_all.sh or earlier stages first"
        )
    data, flags = stage.data if stage.real_data else None, flags_of(stage)
    labels = (data or stage.out / "data" / "phantom") / "image_level_labels.csv"
    if stage.current({**stage.inputs(files=[labels]), **found, "flags": flags}, ["name"]):
        return
    from pipeline.report.inputs import find_run
    from pipeline.report.page import render

    page = render(find_run(stage.out, stage.config, data, flags))
    write_text(stage.folder / layout.PAGE, page)
    stage.finish({"stages": len(found), "bytes": len(page.encode())}, [layout.PAGE])
    log(f"report: {stage.folder / 'index.html'}")


if __name__ == "__main__":
    raise SystemExit(main(__file__, layout.REPORT, __doc__, run))
