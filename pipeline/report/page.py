"""The report page: what the stage folders of a run hold, gathered section by section and rendered
as one self-contained HTML file.

A section whose stage has not run is None, and the template says so. Nothing is marked as safe HTML:
every value is escaped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..run import layout
from . import ablation, cost, data, scores, training
from .inputs import Run

TEMPLATE = Path(__file__).parent / "report.html.j2"
# name in the template: what gathers its values, and the stage that has to have run
SECTIONS: dict[str, tuple[Callable[[Run], Any], str]] = {
    "facts": (cost.facts, ""),
    "conversion": (data.conversion, ""),
    "montage": (data.montage, layout.VOLUMES),
    "pretraining": (training.pretraining, layout.VOCO),
    "organs": (training.organs, layout.ORGANS),
    "training": (training.training, f"{layout.CLASSIFIERS}/fold"),
    "scores": (scores.scores, layout.SCORES),
    "worst": (scores.worst, layout.SCORES),
    "test": (data.test_predictions, layout.SUBMISSION),
    "ablation": (ablation.comparison, layout.ABLATION),
    "probes": (ablation.probe_table, layout.ABLATION),
    "cost": (cost.cost, ""),
}


def render(run: Run) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined

    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["duration"] = cost.duration
    names = ("", *run.manifests)
    values = {
        name: gather(run) if any(one.startswith(stage) for one in names) else None
        for name, (gather, stage) in SECTIONS.items()
    }
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.config.name, **values
    )
