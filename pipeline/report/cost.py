"""What ran on what, how long it took, and how to run it again."""

from typing import Any

import numpy as np
import polars as pl
import yaml

from ..run import layout
from ..run.config import resolved
from ..run.layout import MAKERS
from ..run.manifest import digest
from .inputs import Run


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 8.1 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 59.5:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def facts(run: Run) -> dict[str, str]:
    """What ran on what, by term."""
    manifests = list(run.manifests.values())
    versions = {
        name: version
        for manifest in manifests
        for name, version in manifest["versions"].items()
        if version
    }
    devices = {manifest["device"] for manifest in manifests if manifest.get("device")}
    commits = {(manifest["git"] or "no git checkout")[:12] for manifest in manifests}
    found = {
        "Data": f"{run.data}" if run.data else "phantom, made by this run: no patient's data",
        "Patients": _patients(run),
        "Images": _images(run),
        "Model": _model(run),
        "Device": ", ".join(sorted(devices)),
        "Commit": ", ".join(sorted(commits)),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {term: text for term, text in found.items() if text}


def _patients(run: Run) -> str:
    patients = run.index.group_by("source").agg(pl.col("patient_id").n_unique())
    found = dict(patients.iter_rows())
    labelled, unlabelled = found.get("train", 0), found.get("unlabelled", 0)
    return f"{labelled} labelled, {unlabelled} unlabelled" if found else ""


def _images(run: Run) -> str:
    found = run.conversion()
    return "{series} series, {slices} slices".format(**found[1]) if found else ""


def _model(run: Run) -> str:
    for name, manifest in run.manifests.items():
        if name.startswith(f"{layout.CLASSIFIERS}/"):
            text = "{model[backbone]} from {train[init]}, {train[sequence]} over {train[slices]}"
            text = f"{text} slices".format(**manifest["config"])
            train = manifest["config"]["train"]
            if train.get("regions") != "organs":
                return text
            own = train.get("abdomen_slices")
            return f"{text} of each region" + (f", {own} of the abdomen" if own else "")
    return ""


def cost(run: Run) -> dict[str, Any]:
    """Time, throughput and memory of every stage's last sitting, what to type to repeat it, and the
    config that was used.
    """
    made = sorted(run.manifests, key=lambda name: MAKERS.get(name, name))
    used = resolved(run.config)
    for name in made:
        used |= run.manifests[name]["config"]
    # the stage of the classifiers is listed fold by fold
    rows = [_row(run, name) for name in made if name != layout.CLASSIFIERS]
    scripts = {MAKERS[name] for name in MAKERS if any(one.startswith(name) for one in made)}
    return {
        "rows": rows,
        "total": sum(row["seconds"] for row in rows) - _side_by_side(run),
        "flags": run.flags,
        "scripts": sorted(scripts | {layout.REPORT}),
        "config": yaml.safe_dump(used, sort_keys=False, allow_unicode=True),
    }


def _row(run: Run, name: str) -> dict[str, Any]:
    """A stage's manifest with what its row of the table shows; `stale`: the inputs that were made
    again after it.
    """
    manifest = run.manifests[name]
    stale = [
        one
        for one, value in manifest["inputs"].items()
        if one in run.manifests and digest(run.manifests[one]["outputs"]) != value
    ]
    return {
        **manifest,
        **_rate(run, name),
        "name": name,
        "memory": manifest.get("peak_mb"),
        "stale": stale,
        "device": manifest.get("device", ""),
    }


def _side_by_side(run: Run) -> float:
    """Seconds by which folds that trained side by side, in one sitting, took less than their
    sum.
    """
    whole = run.manifests.get(layout.CLASSIFIERS, {"seconds": 0.0})["seconds"]
    folds = [
        manifest["seconds"]
        for name, manifest in run.manifests.items()
        if name.startswith(f"{layout.CLASSIFIERS}/")
    ]
    return max(0.0, sum(folds) - whole) if folds and whole >= max(folds) else 0.0


def _rate(run: Run, name: str) -> dict[str, Any]:
    """Throughput of a stage in its own unit and the share of time it waits for data; of training
    the median step or epoch.
    """
    records, counts = run.log(name), run.manifests[name]["counts"]
    units = {
        "samples_per_s": "volumes/s",
        "slices_per_s": "slices/s",
        "patients_per_hour": "patients/h",
    }
    seen = [key for key in (*units, "waiting") if records and key in records[-1]]
    middle = {key: float(np.median([row[key] for row in records])) for key in seen} or counts
    rate = next((f"{middle[key]:.0f} {unit}" for key, unit in units.items() if key in middle), "")
    return {"rate": rate, "waiting": middle.get("waiting")}
