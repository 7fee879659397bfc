"""Write the phantom as a data set in the competition's layout: DICOM with the quirks of real files,
NIfTI, and all tables.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..competition.targets import ANY_INJURY, COLUMNS, SLICE_TARGETS, TARGETS
from ..run.config import PhantomConfig
from ..system.contained import Failure
from ..system.errors import InputError
from ..system.machine import keep_memory
from ..system.pool import spread
from .anatomy import make_scan
from .plan import TEST, TRAIN, PatientPlan, make_plan
from .scanner import height, write_masks, write_nifti, write_series

SEGMENTATIONS = "segmentations"
FOLDERS = ("train_images", "test_images", "unlabelled")
HOSPITAL = "hospital"  # a column that the competition's tables lack


def write_patient(
    config: PhantomConfig, seed: int, root: Path, plan: PatientPlan
) -> list[dict[str, Any]]:
    """Make and write all series of a patient; returns one record a series for the tables."""
    keep_memory()  # of the process that this patient came to
    records = []
    for number, series in enumerate(plan.series):
        key = (seed, plan.split, plan.index)
        scan = make_scan(config, plan.labels, key, number, series.phase, plan.hospital)
        folder = root / FOLDERS[plan.split]
        if series.nifti:
            write_nifti(folder / f"{plan.patient_id}.nii.gz", scan)
            instances = list(range(len(scan.hu)))
        else:
            seeds = [seed, plan.split, plan.index, 3, number]
            stream = np.random.default_rng(seeds)
            instances = write_series(
                folder / plan.patient_id / series.series_id, scan, series, stream
            )
            if series.masks:
                top = height(np.random.default_rng(seeds))
                write_masks(root / SEGMENTATIONS / f"{series.series_id}.nii.gz", scan, top)
        shown = [
            (instance, SLICE_TARGETS[name])
            for name, planes in scan.shown.items()
            for instance in np.array(instances)[planes].tolist()
        ]
        organs = [
            (instance, name)
            for name, planes in scan.organs.items()
            for instance in np.array(instances)[planes].tolist()
        ]
        records.append(
            {
                "ids": [plan.patient_id, series.series_id],
                "aortic_hu": scan.aortic_hu,
                "hospital": plan.hospital.name,
                "slices": len(scan.hu),
                "shown": shown,
                "organs": organs,
            }
        )
    return records


def one_hot(labels: dict[str, int]) -> list[int]:
    """The 13 columns of the tables for class numbers by target."""
    return [int(labels[target.name] == k) for target in TARGETS for k in range(len(target.classes))]


def tables(
    plans: list[PatientPlan], records: list[list[dict[str, Any]]]
) -> dict[str, list[list[Any]]]:
    """Rows (header first) of every table, sorted by the random ids as the competition's are."""
    order = sorted(range(len(plans)), key=lambda k: int(plans[k].patient_id))
    train, test = ([plans[k] for k in order if plans[k].split == split] for split in (TRAIN, TEST))
    series, test_series = (
        [r for k in order if plans[k].split == split for r in records[k]] for split in (TRAIN, TEST)
    )
    prior = [1 / len(target.classes) for target in TARGETS for _ in target.classes]
    keys, columns = ["patient_id", "series_id"], ["patient_id", *COLUMNS]
    return {
        "train.csv": [
            [*columns, ANY_INJURY],
            *([p.patient_id, *one_hot(p.labels), int(any(p.labels.values()))] for p in train),
        ],
        "train_series_meta.csv": [
            [*keys, "aortic_hu", "incomplete_organ", HOSPITAL],
            *([*r["ids"], r["aortic_hu"], 0, r["hospital"]] for r in series),
        ],
        "image_level_labels.csv": [
            [*keys, "instance_number", "injury_name"],
            *([*r["ids"], *one] for r in series for one in r["shown"]),
        ],
        "test_series_meta.csv": [
            [*keys, "aortic_hu", HOSPITAL],
            *([*r["ids"], r["aortic_hu"], r["hospital"]] for r in test_series),
        ],
        "sample_submission.csv": [columns, *([p.patient_id, *prior] for p in test)],
        "phantom_organs.csv": [
            [*keys, "instance_number", "organ"],
            *([*r["ids"], *one] for r in series for one in r["organs"]),
        ],
        "phantom_truth.csv": [columns, *([p.patient_id, *one_hot(p.labels)] for p in test)],
    }


def write_dataset(
    config: PhantomConfig,
    seed: int,
    root: Path,
    jobs: int,
    report: Callable[[Iterable[Any], int], Iterator[Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Write the whole data set below `root` with `jobs` processes; `report(items, total)` shows
    progress.

    Returns counts for the manifest and the names of all files.
    """
    plans = make_plan(config, seed)
    records: list[Any] = [None] * len(plans)
    for k, answer in report(
        spread(partial(write_patient, config, seed, root), plans, jobs), len(plans)
    ):
        if isinstance(answer, Failure):
            raise InputError(
                answer.reason,
                f"patient {plans[k].patient_id}",
                "free some memory or give --jobs 1, then run again",
            )
        records[k] = answer
    written = tables(plans, records)
    for name, rows in written.items():
        with open(root / name, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, lineterminator="\n").writerows(rows)
    share = np.mean([one_hot(plan.labels) for plan in plans if plan.split == TRAIN], axis=0).round(
        4
    )
    flat = [record for found in records for record in found]
    counts = {
        "patients": len(plans),
        "series": len(flat),
        "slices": sum(record["slices"] for record in flat),
    }
    return {**counts, "prevalence": dict(zip(COLUMNS, share.tolist(), strict=True))}, _files(root)


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
