"""A small finished run written by hand for the tests of the report: every stage folder, with ids
and paths that try to be HTML.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from helpers_scores import label_frame, one_hot, predicted, series_frame

from pipeline.ablation.statistics import cell_draws, compare, correct, sentence
from pipeline.competition.targets import COLUMNS, TARGET_NAMES
from pipeline.evaluation.scoring import score_predictions
from pipeline.folds import stratified_folds
from pipeline.run import layout
from pipeline.run.config import Config, resolved
from pipeline.run.presets import load_config
from pipeline.system.files import write_json
from pipeline.volumes.store import INDEX_SCHEMA

EVIL = """<img src=x onerror=alert(1)>&"'""" + 32 * "W"
EVIL_PATH = "train_images/<script>alert(1)</script>/7/1.dcm"
DEPTH = 8


def smoke_config() -> Config:
    """The smoke preset."""
    return load_config("smoke")


def write_manifest(
    out: Path, name: str, counts: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any
) -> None:
    """A manifest as `Stage.finish` writes it."""
    manifest = {
        "schema": 1,
        "stage": name,
        "config": {},
        "inputs": inputs or {},
        "fingerprint": name,
        "outputs": {},
        "counts": counts,
        "seconds": 61.0,
        "versions": {"python": "3.x"},
        "git": "0123456789abcdef",
        "jobs": 2,
        "peak_mb": 321,
        "device": "cpu",
        **more,
    }
    write_json(out / name / "manifest.json", manifest)


def write_run(out: Path) -> pl.DataFrame:
    """Fill `out` with all stages of 24 patients; returns the labels. The first patient's id is
    `EVIL`, the bowel injury is labelled in slices 103, 108 and 111, and the prediction is the
    worst by far.
    """
    config, truth = smoke_config(), one_hot(24)
    truth[0] = np.eye(13)[[1, 3, 6, 9, 12]].sum(0)
    labels = label_frame(truth)
    labels = labels.with_columns(pl.Series("patient_id", [EVIL, *labels["patient_id"][1:]]))
    series = series_frame(labels, predicted(truth, 1.5))
    worst = np.eye(13)[[0, 2, 4, 7, 10]].sum(0) * 0.9 + 0.04
    series = series.with_columns(
        pl.when(pl.col("patient_id") == EVIL).then(worst[k]).otherwise(pl.col(c)).alias(c)
        for k, c in enumerate(COLUMNS)
    )
    write_conversion(out)
    write_volumes(out, labels, series)
    write_training(out, config)
    folds = stratified_folds(labels, series, 2, 0)
    plain = {
        name: series_frame(labels, predicted(truth, signal, seed=8))
        for name, signal in (("histogram", 0.2), ("thumbnail", 0.4))
    }
    outcome = score_predictions({"folds": series}, labels, folds, config, plain)
    write_manifest(
        out,
        layout.SCORES,
        outcome.scores["counts"],
        config={"seed": config.seed, "score": resolved(config.score)},
    )
    write_json(out / layout.SCORES / "scores.json", outcome.scores)
    write_json(out / layout.SCORES / layout.CALIBRATION, outcome.parameters)
    outcome.patients.write_parquet(out / layout.SCORES / "patients.parquet")
    counts = {
        "patients": 9,
        "series": 10,
        "predicted": 7,
        "prior": 2,
        "fallbacks": 3,
        "patients_per_hour": 1234.5,
        "fold_spread": {"bowel": 0.341, "liver": 0.68},
    }
    write_manifest(out, layout.SUBMISSION, counts)
    (out / layout.SUBMISSION / "fallbacks.csv").write_text(
        "patient_id,series_id,reason\n1,2,<b>bad</b>\n1,,prior\n3,,prior\n"
    )
    write_ablation(out, truth)
    return labels


def write_ablation(out: Path, truth: np.ndarray) -> None:
    """Stage 10: three variants of two seeds, the first two alike, the third better by far; probes
    of a start and one backbone.
    """
    signal = {"scratch": 0.5, "voco2d": 0.5, "liver_only": 4.0}
    draws = {
        name: [cell_draws(truth, predicted(truth, strength, seed=k), 100, 0) for k in range(2)]
        for name, strength in signal.items()
    }
    targets = {name: ("liver",) if name == "liver_only" else TARGET_NAMES for name in signal}
    compared = compare(draws, targets, [("voco2d", "scratch"), ("liver_only", "scratch")], 0)
    correct(compared, ("voco2d", "scratch"))
    costs = [
        {"variant": name, "training_s": 75.0, "pretraining_s": 130.0 if name == "voco2d" else 0.0}
        for name in signal
    ]
    write_json(
        out / layout.ABLATION / "table.json",
        {
            "patients": len(truth),
            "seeds": [1, 2],
            "reference": "scratch",
            "compared": compared,
            "costs": costs,
            "variants": compare(draws, targets, [(name, name) for name in signal], 0),
            "sentences": [sentence(row) for row in compared],
        },
    )
    rows = [
        {
            "backbone": name,
            "seed": seed,
            "statistics": kind,
            "question": question,
            "probe": "dense" if figure == "Dice" else "inside",
            "figure": figure,
            "hospital": hospital,
            "value": 0.5 + 0.1 * seed if hospital == "all" else 0.0,
        }
        for name in ("start", "voco2d")
        for seed in (1, 2)
        for kind in ("stored", "settled")
        for question, figure in (("liver", "Dice"), ("bowel", "AUC"))
        for hospital in ("all", "A")
    ]
    rows.append({**rows[0], "backbone": "place", "seed": 0, "statistics": "", "value": 0.25})
    pl.DataFrame(rows).write_csv(out / layout.ABLATION / "probes.csv")
    write_manifest(out, layout.ABLATION, {"cells": 6, "variants": 3})


def write_conversion(out: Path) -> None:
    """Stage 01: counts and one file a quarantine reason."""
    counts = {
        "series": 26,
        "slices": 300,
        "by_source": {"train": 280, "unlabelled": 20},
        "by_decoder": {"dicomsdl": 300},
        "by_transfer_syntax": {"1.2.840.10008.1.2.5": 290, "<u>": 10},
        "by_flags": {"none": 298, "partial": 2},
        "quarantined": 8,
        "by_reason": {"damaged RLE": 8},
        "worker_deaths": {"SIGSEGV": 2},
        "converted_now": 300,
        "slices_per_s": 99.5,
        "mb_per_s": 4.5,
    }
    write_manifest(out, layout.SLICES, counts)
    lines = [
        "path,reason",
        f"{EVIL_PATH},damaged RLE: <i>why</i>",
        *(f"x/{k}.dcm,damaged RLE: why" for k in range(7)),
    ]
    (out / layout.SLICES / "quarantine.csv").write_text("\n".join(lines) + "\n")


def write_volumes(out: Path, labels: pl.DataFrame, series: pl.DataFrame) -> None:
    """Stage 02: one volume a series and one unlabelled, plane k the constant 20 k; slice labels of
    the first patient.
    """
    folder, rows = out / layout.VOLUMES, []
    folder.mkdir(parents=True)
    volume = np.broadcast_to(20 * np.arange(DEPTH, dtype=np.uint8)[:, None, None], (DEPTH, 20, 24))
    for number, (patient, one) in enumerate(
        [*series.select("patient_id", "series_id").iter_rows(), ("unlabelled-1", "1")]
    ):
        np.save(folder / f"{number}.npy", volume)
        rows.append(
            {
                "patient_id": patient,
                "series_id": one,
                "source": "unlabelled" if patient == "unlabelled-1" else "train",
                "path": f"{number}.npy",
                "depth": DEPTH,
                "height": 20,
                "width": 24,
                "slices_used": 16,
                "slices_left_out": 1,
                "plane_instances": [100 + 2 * k for k in range(DEPTH)],
                "digest": "",
            }
        )
    pl.DataFrame(rows, schema=INDEX_SCHEMA).write_parquet(folder / "index.parquet")
    write_manifest(out, layout.VOLUMES, {"volumes": len(rows)})
    marked = series.filter(pl.col("patient_id") == labels["patient_id"][0])["series_id"][0]
    (out / "data" / "phantom").mkdir(parents=True)
    table = {
        "patient_id": [EVIL] * 3,
        "series_id": [marked] * 3,
        "instance_number": [103, 108, 111],
        "injury_name": ["Bowel"] * 3,
    }
    pl.DataFrame(table).write_csv(out / "data" / "phantom" / "image_level_labels.csv")


def write_training(out: Path, config: Config) -> None:
    """Stages 04 and 06: logs and pictures."""
    import cv2

    write_manifest(
        out,
        layout.VOCO,
        {
            "volumes": 20,
            "held_out": 4,
            "steps": 6,
            "merit": "position_accuracy",
            "position_accuracy": 0.5,
            "baselines": {
                "silhouette_position_accuracy": 0.31,
                "thumbnail_position_accuracy": 0.42,
            },
        },
        config={"pretrain": resolved(config.pretrain)},
    )
    steps = [
        {
            "step": k,
            "loss": 2 / k,
            "intra": 1 / k,
            "inter": 0.5 / k,
            "reg": 0.5 / k,
            "std": 0.7,
            "correlation": 0.1 * k,
            "waiting": 0.01,
            "samples_per_s": 5.0,
            **({"position_accuracy": 0.1 * k} if k % 3 == 0 else {}),
        }
        for k in range(1, 7)
    ]
    for name in ("crops", "similarity"):
        cv2.imwrite(str(out / layout.VOCO / f"{name}.png"), np.full((300, 1500, 3), 200, np.uint8))
    (out / layout.VOCO / "log.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in steps)
    )
    for fold in range(2):
        rows = [
            {
                "epoch": k,
                "loss": 5.0 - k,
                "terms": {**dict.fromkeys(TARGET_NAMES, 1.0 / k), "slices": 0.5},
                "slices_per_s": 80.0,
                "waiting": 0.02,
                **dict.fromkeys(TARGET_NAMES, 1.0 / k),
                "any_injury": 0.3,
                "score": 0.9 - 0.1 * k,
            }
            for k in range(1, 4)
        ]
        write_manifest(
            out,
            f"06_folds/fold{fold}",
            {"fold": fold},
            config={"model": resolved(config.model), "train": resolved(config.train)},
        )
        (out / layout.CLASSIFIERS / f"fold{fold}" / "log.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
