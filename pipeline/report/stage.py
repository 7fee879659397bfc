"""Stage 09: the report."""

from functools import cache

from ..run import layout
from ..run.manifest import digest
from ..run.stage import Stage, stage_function
from ..system.console import log
from ..system.errors import InputError
from ..system.files import write_text

MANIFESTS = (
    f"{layout.PHANTOM}/{layout.MANIFEST}",
    f"[01]*/{layout.MANIFEST}",
    f"{layout.CLASSIFIERS}/fold*/{layout.MANIFEST}",
)


@stage_function(layout.REPORT)
def write_report(stage: Stage) -> None:
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
    data, flags = stage.data if stage.real_data else None, stage.options.command
    labels = (data or stage.out / "data" / "phantom") / "image_level_labels.csv"

    @cache
    def page() -> str:
        from .inputs import find_run
        from .page import render

        return render(find_run(stage.out, stage.config, data, flags))

    inputs = {**stage.inputs(files=[labels]), **found, "flags": flags}
    if stage.current(inputs, ["name"], check=page):
        return
    write_text(stage.folder / layout.PAGE, page())
    stage.finish({"stages": len(found), "bytes": len(page().encode())}, [layout.PAGE])
    log(f"report: {stage.folder / 'index.html'}")
