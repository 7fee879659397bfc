"""The sections of the report: each reads what a stage left and returns what the page shows."""

import json
from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import yaml

from ..competition.metric import WEIGHTS, loss_terms, normalise
from ..competition.tables import read_slice_labels
from ..competition.targets import COLUMNS, SCORE_KEYS, TARGET_NAMES, TARGETS, group_slices
from ..evaluation.metrics import METRICS, Interval, interval, resamples
from ..run import layout
from ..run.config import resolved
from ..run.layout import MAKERS
from ..run.manifest import digest
from ..voco.crops import base_boxes, overlap_labels, random_boxes
from ..volumes.sampling import evenly
from . import ablation as report_ablation
from . import charts as figures
from .charts import Line, chart, curve
from .inputs import Run

SHOWN = 6  # series of the montage, worst errors, paths a quarantine reason


PLANES, ERROR_PLANES = 6, 4  # of a series in the montage, of a worst error


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 8.1 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 59.5:
        return f"{seconds:.1f} s"
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def facts(run: Run) -> dict[str, str]:
    """What ran on what, by term."""
    manifests, index = list(run.manifests.values()), run.index()
    trained = next(
        (
            manifest["config"]
            for name, manifest in run.manifests.items()
            if name.startswith(f"{layout.CLASSIFIERS}/")
        ),
        None,
    )
    converted = run.manifests.get(layout.SLICES, {}).get("counts")
    patients = (
        {}
        if index is None
        else dict(index.group_by("source").agg(pl.col("patient_id").n_unique()).iter_rows())
    )
    versions = {
        name: version
        for manifest in manifests
        for name, version in manifest["versions"].items()
        if version
    }
    found = {
        "Data": f"{run.data}" if run.data else "phantom, made by this run: no patient's data",
        "Patients": (
            f"{patients.get('train', 0)} labelled, {patients.get('unlabelled', 0)} unlabelled"
            if patients
            else ""
        ),
        "Images": (
            f"{converted['series']} series, {converted['slices']} slices" if converted else ""
        ),
        "Model": (
            trained
            and "{model[backbone]} from {train[init]}, "
            "{train[sequence]} over {train[slices]} slices".format(**trained)
        ),
        "Device": ", ".join(
            sorted({manifest["device"] for manifest in manifests if manifest.get("device")})
        ),
        "Commit": ", ".join(
            sorted({(manifest["git"] or "no git checkout")[:12] for manifest in manifests})
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {term: text for term, text in found.items() if text}


def conversion(run: Run) -> dict[str, Any]:
    """Counts of stage 01, and the quarantined files by reason."""
    from pydicom.uid import UID

    counts = run.manifests[layout.SLICES]["counts"]
    lost = pl.read_csv(run.out / layout.SLICES / layout.QUARANTINE, infer_schema=False)
    groups = lost.group_by(
        pl.col("reason").str.split(":").list.first().alias("kind"), maintain_order=True
    )
    reasons = groups.agg(pl.len(), pl.struct("path", "reason").head(SHOWN).alias("files")).sort(
        "len", descending=True
    )
    syntaxes = {
        UID(name).name if name[:1].isdigit() else name: number
        for name, number in counts["by_transfer_syntax"].items()
    }
    tables = {
        "Transfer syntax": syntaxes,
        "Decoder": counts["by_decoder"],
        "Flags": counts["by_flags"],
    }
    return {"counts": counts, "tables": tables, "quarantine": reasons.to_dicts()}


def _pictures(run: Run, row: dict[str, Any], planes: list[int]) -> list[dict[str, Any]]:
    """Planes of the volume of an index row, each with the instance number of its nearest slice;
    none where the file is gone.
    """
    path = run.out / layout.VOLUMES / row["path"]
    if not path.is_file():
        return []
    volume = np.load(path, mmap_mode="r")
    return [
        {
            "uri": figures.jpeg_uri(volume[plane]),
            "plane": plane,
            "instance": row["plane_instances"][plane],
        }
        for plane in planes
    ]


def montage(run: Run) -> list[dict[str, Any]]:
    """Evenly chosen series, two thirds of them labelled, with evenly chosen planes from top to
    bottom.
    """
    index, rows = run.index(), []
    for source, count in (("train", 2 * SHOWN // 3), ("unlabelled", SHOWN // 3)):
        part = index.filter(pl.col("source") == source)
        rows += (
            [part.row(k, named=True) for k in sorted(set(evenly(len(part), count).tolist()))]
            if len(part)
            else []
        )
    return [
        {**row, "pictures": _pictures(run, row, evenly(row["depth"], PLANES).tolist())}
        for row in rows
    ]


def pretraining(run: Run) -> dict[str, Any]:
    """Curves and pictures of stage 04."""
    manifest, records = run.manifests[layout.VOCO], run.log(layout.VOCO)
    options = manifest["config"]["pretrain"]
    boxes = random_boxes(options["image_size"], options["grid"], 4096, np.random.default_rng(0))
    overlap = overlap_labels(boxes, base_boxes(options["image_size"], options["grid"]))
    # of a base crop chosen blindly
    chance = float((overlap >= overlap.max(axis=1, keepdims=True) - 0.1).mean())
    terms = [
        Line(name, f"c{k}", curve(records, "step", name))
        for k, name in enumerate(("loss", "intra", "inter", "reg"), 1)
    ]
    level = Line("", "rule", [(0, chance), (options["steps"], chance)])
    found = Line("", "c1", curve(records, "step", "position_accuracy"), True)
    charts = [
        chart("Loss and its terms", "step", terms),
        chart("Position accuracy, held out", "step", [level, found]),
    ]
    for key, title in (
        ("correlation", "Correlation of label and similarity"),
        ("std", "Standard deviation of embeddings"),
    ):
        charts.append(chart(title, "step", [Line("", "c1", curve(records, "step", key))]))
    pictures = {
        path.stem: figures.data_uri(path.read_bytes(), "png")
        for path in (run.out / layout.VOCO).glob("*.png")
    }
    return {
        "counts": manifest["counts"],
        "options": options,
        "chance": chance,
        "charts": charts,
        "pictures": pictures,
    }


def training(run: Run) -> dict[str, Any]:
    """Curves of stage 05: of every fold, and of every target as the mean over folds."""
    logs = {
        name.rpartition("/fold")[2]: run.log(name)
        for name in run.manifests
        if name.startswith(f"{layout.CLASSIFIERS}/fold")
    }
    loss, held = (
        [
            Line(f"fold {fold}", f"c{k % 6 + 1}", curve(rows, "epoch", key))
            for k, (fold, rows) in enumerate(logs.items())
        ]
        for key in ("loss", "score")
    )
    rows = [row for rows in logs.values() for row in rows]
    if layout.SCORES in run.manifests:
        floor, last = (
            _read_scores(run)["floors"]["weighted_means"]["score"],
            max((row["epoch"] for row in rows), default=1),
        )
        held.append(Line("weighted class means", "rule", [(1, floor), (last, floor)]))
    terms = [{"epoch": row["epoch"], **row["terms"]} for row in rows]
    parts, scored = (
        [
            Line(name, f"c{k}", curve(table, "epoch", name))
            for k, name in enumerate((*TARGET_NAMES, "slices"), 1)
        ]
        for table in (terms, rows)
    )
    titles = ("Training loss", "Official score, held out")
    return {
        "folds": [
            chart(title, "epoch", lines) for title, lines in zip(titles, (loss, held), strict=True)
        ],
        "targets": [
            chart(title, "epoch", lines)
            for title, lines in zip(titles, (parts, scored), strict=True)
        ],
    }


def _read_scores(run: Run) -> dict[str, Any]:
    return json.loads((run.out / layout.SCORES / layout.SCORE_TABLE).read_text(encoding="utf-8"))


def _predictions(run: Run) -> tuple[pl.DataFrame, list[np.ndarray]]:
    """patients.parquet, and of it labels, raw and nested probabilities (N, 13)."""
    table = pl.read_parquet(run.out / layout.SCORES / "patients.parquet")
    return table, [
        table.select(pl.col(f"{kind}_{c}").cast(pl.Float64) for c in COLUMNS).to_numpy()
        for kind in ("label", "raw", "nested")
    ]


def reduction(labels: np.ndarray, probabilities: np.ndarray, count: int, seed: int) -> Interval:
    """1 - score / score of the weighted class means, with an interval: both are scored on the same
    resampled patients.
    """
    means, found = labels.mean(axis=0, keepdims=True) * WEIGHTS, []
    for values in (probabilities, np.repeat(means, len(labels), axis=0)):
        loss, weight = loss_terms(labels, normalise(values))
        drawn = [
            (counts @ (loss * weight)) / (counts @ weight)
            for counts in resamples(len(labels), count, seed)
        ]
        found.append(np.concatenate(drawn).mean(axis=1))
    return interval(1 - found[0] / found[1])


def scores(run: Run) -> dict[str, Any]:
    """Rows of the score table (`best`: position of the lowest honest value), metrics, charts and
    confusion tables.
    """
    found, options = _read_scores(run), run.manifests[layout.SCORES]["config"]
    labels, raw, nested = _predictions(run)[1]
    columns = {**found["floors"], **{name: found[name] for name in ("raw", "nested", "in_sample")}}
    table = {key: [column[key] for column in columns.values()] for key in SCORE_KEYS}
    rows = [
        {
            "key": key,
            "values": values,
            "best": int(np.argmin(values[:-1])),
            "interval": found["intervals"]["nested"][key],
            "reduction": found["reduction"]["nested"][key],
        }
        for key, values in table.items()
    ]
    curves, calibrated = figures.score_charts(labels, raw, nested)
    return {
        **found,
        "columns": list(columns),
        "rows": rows,
        "names": METRICS,
        "curves": curves,
        "calibrated": calibrated,
        "confusion": figures.confusion(labels, nested),
        "saved": reduction(labels, nested, options["score"]["bootstrap"], options["seed"]),
    }


def worst(run: Run) -> list[dict[str, Any]]:
    """The patients with the largest part in the nested score: labels, probabilities and planes of
    one series.
    """
    patients, (labels, _, nested) = _predictions(run)
    loss, weight = loss_terms(labels, nested)
    part = loss * weight / weight.sum(axis=0)
    part /= part.sum()  # (N, 6): each patient's and question's share of the score
    data, errors = run.data or run.out / "data" / "phantom", []
    marks = read_slice_labels(data) if data.is_dir() else None
    for k in np.argsort(-part.sum(axis=1), kind="stable")[:SHOWN].tolist():
        targets = [
            {
                "name": target.name,
                "true": int(labels[k, where].argmax()),
                "share": part[k, t],
                "classes": list(zip(target.classes, nested[k, where].tolist(), strict=True)),
            }
            for t, (target, where) in enumerate(zip(TARGETS, group_slices().values(), strict=True))
        ]
        series = _marked_series(run, patients["patient_id"][k], marks)
        errors.append(
            {
                **patients.row(k, named=True),
                "share": part[k].sum(),
                "targets": targets,
                "any": part[k, -1],
                "series": series,
            }
        )
    return errors


def _marked_series(run: Run, patient: str, marks: pl.DataFrame | None) -> dict[str, Any] | None:
    """A series of the patient, one with slice labels if any: the middle slice of each injury,
    filled up with evenly chosen planes.
    """
    index, found, chosen = run.index(), {}, {}
    own = (
        []
        if index is None
        else index.filter(pl.col("source") == "train", pl.col("patient_id") == patient).to_dicts()
    )
    if not own:
        return None
    if marks is not None:
        middle = pl.col("instance_number").quantile(0.5, "nearest").cast(pl.Int64)
        labelled = (
            marks.filter(pl.col("patient_id") == patient)
            .group_by("series_id", "injury_name")
            .agg(middle)
        )
        for series, injury, number in labelled.sort("series_id", "injury_name").iter_rows():
            found.setdefault(series, {})[injury.replace("_", " ").lower()] = number
    row = max(own, key=lambda one: len(found.get(one["series_id"], ())))
    for injury, number in found.get(row["series_id"], {}).items():
        plane = min(range(row["depth"]), key=lambda k: abs(row["plane_instances"][k] - number))
        chosen[plane] = [*chosen.get(plane, []), injury]
    planes = evenly(row["depth"], ERROR_PLANES).tolist()
    # each takes the place of the nearest that shows no labelled injury
    for plane in set(chosen) - set(planes):
        planes.remove(min(set(planes) - set(chosen), key=lambda k: abs(k - plane)))
        planes.append(plane)
    return {
        **row,
        "pictures": [
            {**one, "injuries": chosen.get(one["plane"], [])}
            for one in _pictures(run, row, sorted(set(planes)))
        ],
    }


def test(run: Run) -> dict[str, Any]:
    """Counts of stage 07, and its fallbacks by reason."""
    reasons = pl.read_csv(run.out / layout.SUBMISSION / layout.FALLBACKS, infer_schema=False)[
        "reason"
    ].to_list()
    return {
        "counts": run.manifests[layout.SUBMISSION]["counts"],
        "reasons": Counter(reasons).most_common(SHOWN),
    }


def ablation(run: Run) -> dict[str, Any]:
    """Comparison of variants by stage 09."""
    return report_ablation.comparison(run.out / layout.ABLATION)


def probes(run: Run) -> dict[str, Any]:
    """Probes of frozen backbones by stage 09."""
    return report_ablation.probe_table(run.out / layout.ABLATION)


def cost(run: Run) -> dict[str, Any]:
    """Time, throughput and memory of every stage's last sitting, what to type to repeat it, and the
    config that was used.
    """
    rows, used = [], resolved(run.config)
    for name, manifest in sorted(
        run.manifests.items(), key=lambda item: MAKERS.get(item[0], item[0])
    ):
        used |= manifest["config"]
        made = {
            one: digest(run.manifests[one]["outputs"])
            for one in manifest["inputs"]
            if one in run.manifests
        }
        stale = [one for one, value in made.items() if value != manifest["inputs"][one]]
        if name != layout.CLASSIFIERS:  # its folds are listed
            rows.append(
                {
                    **manifest,
                    **_rate(run, name),
                    "name": name,
                    "memory": manifest.get("peak_mb"),
                    "stale": stale,
                    "device": manifest.get("device", ""),
                }
            )
    scripts = sorted(
        {
            script
            for name, script in MAKERS.items()
            if any(one.startswith(name) for one in run.manifests)
        }
        | {layout.REPORT}
    )
    total = sum(row["seconds"] for row in rows) - _side_by_side(run)
    return {
        "rows": rows,
        "total": total,
        "flags": run.flags,
        "scripts": scripts,
        "config": yaml.safe_dump(used, sort_keys=False, allow_unicode=True),
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
