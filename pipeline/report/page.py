"""The report page: what the stage folders of a run hold, gathered section by section and rendered
as one self-contained HTML file.

A section whose stage has not run is None, and the template says so. Nothing is marked as safe HTML:
every value is escaped.
"""

from pathlib import Path

from ..run import layout
from .inputs import Run
from .sections import (
    ablation,
    conversion,
    cost,
    duration,
    facts,
    montage,
    pretraining,
    probes,
    scores,
    test,
    training,
    worst,
)

TEMPLATE = Path(__file__).parent / "report.html.j2"


def render(run: Run) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined

    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["duration"] = duration
    needs = {
        conversion: layout.SLICES,
        montage: layout.VOLUMES,
        pretraining: layout.VOCO,
        training: f"{layout.CLASSIFIERS}/fold",
        scores: layout.SCORES,
        worst: layout.SCORES,
        test: layout.SUBMISSION,
        ablation: layout.ABLATION,
        probes: layout.ABLATION,
        facts: "",
        cost: "",
    }
    names = ("", *run.manifests)
    values = {
        make.__name__: make(run) if any(one.startswith(stage) for one in names) else None
        for make, stage in needs.items()
    }
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.config.name, **values
    )
